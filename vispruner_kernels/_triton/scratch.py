"""Scratch of `select`: its size on the host, its arrays by name in the kernel."""

from __future__ import annotations

import functools

import triton
import triton.language as tl

# Arrays of one int32 per token.
ARRAYS = tl.constexpr(6)


@functools.lru_cache(maxsize=1024)
def layout(
    images: int, total: int, max_tokens: int, block: int, neighbours: int
) -> tuple[int, int, int, int]:
    """The number of programs, and for `scratch_arrays` sim_size and array_size; then the int32
    words of all scratch."""

    def whole(words: int) -> int:
        return -(-words // 16) * 16

    blocks = -(-max_tokens // block)
    sim_size, array_size = total * whole(max_tokens), whole(total)
    words = sim_size + (2 * neighbours + 2 + ARRAYS.value) * array_size
    words += 2 * images * (1 + blocks)
    return images * blocks * (blocks + 1) // 2, sim_size, array_size, words


@triton.jit
def scratch_arrays(scratch_ptr, sim_size, array_size, start, ld, NEIGHBOURS: tl.constexpr):
    """The arrays of the image whose tokens begin at `start`, and the counters of all images.

    The similarities take `sim_size` int32. `array_size` is the number of tokens of all images,
    rounded up to a multiple of 16. The lists take array_size * NEIGHBOURS int64; `pair` and the
    int32 arrays after it have array_size elements each. Counters are int64, one per image, then one
    per block of every image.

    The names are those of the pairwise rule. The bipartite rule uses three of these arrays under
    other names: pair as keys, partner as next, rank as sorted. rank[t] is the rank of token t;
    sorted[r] is the token of rank r.
    """
    array_size = array_size.to(tl.int64)
    sim_ptr = scratch_ptr + start * ld  # [N, ld]
    all_lists_ptr = (scratch_ptr + sim_size).to(tl.pointer_type(tl.int64))
    all_pairs_ptr = all_lists_ptr + array_size * NEIGHBOURS
    words_ptr = (all_pairs_ptr + array_size).to(tl.pointer_type(tl.int32))  # [ARRAYS, array_size]
    counters_ptr = (words_ptr + ARRAYS * array_size).to(tl.pointer_type(tl.int64))
    lists_ptr = all_lists_ptr + start * NEIGHBOURS  # [N, NEIGHBOURS]
    pair_ptr = all_pairs_ptr + start  # [N], as all below
    state_ptr = words_ptr + start
    rank_ptr = state_ptr + array_size
    partner_ptr = rank_ptr + array_size
    missed_ptr = partner_ptr + array_size
    search_ptr = partner_ptr + 2 * array_size
    living_ptr = partner_ptr + 3 * array_size
    return (
        sim_ptr,
        lists_ptr,
        pair_ptr,
        state_ptr,
        rank_ptr,
        partner_ptr,
        missed_ptr,
        search_ptr,
        living_ptr,
        counters_ptr,
    )
