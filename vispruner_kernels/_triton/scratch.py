"""Scratch of `select`: its size on the host, its arrays by name in the kernel."""

from __future__ import annotations

import functools

import triton
import triton.language as tl

# Arrays of one int32 per token.
ARRAYS = tl.constexpr(6)


@functools.lru_cache(maxsize=1024)
def layout(
    images: int, tokens: int, max_tokens: int, block: int, neighbours: int
) -> tuple[int, int, int, int]:
    """Programs; int32 words of the similarities; tokens of an array; int32 words of all scratch."""

    def whole(words: int) -> int:
        return -(-words // 16) * 16

    blocks = -(-max_tokens // block)
    similarities, rounded = tokens * whole(max_tokens), whole(tokens)
    words = similarities + (2 * neighbours + 2 + ARRAYS.value) * rounded + 2 * images * (1 + blocks)
    return images * blocks * (blocks + 1) // 2, similarities, rounded, words


@triton.jit
def scratch_arrays(scratch_ptr, sim_size, tokens, start, ld, NEIGHBOURS: tl.constexpr):
    """The arrays of the image whose tokens begin at `start`, and the counters of all images.

    An array of `tokens` elements serves all images. Both rules use the same memory: pair and keys,
    rank (of a token, for the pairwise rule) and sorted (tokens by rank, for the bipartite rule),
    partner and next. Counters are int64, one per image, then one per block of every image.
    """
    tokens = tokens.to(tl.int64)
    sim_ptr = scratch_ptr + start * ld  # [N, ld]
    all_lists_ptr = (scratch_ptr + sim_size).to(tl.pointer_type(tl.int64))
    all_pairs_ptr = all_lists_ptr + tokens * NEIGHBOURS
    words_ptr = (all_pairs_ptr + tokens).to(tl.pointer_type(tl.int32))  # [ARRAYS, tokens]
    counters_ptr = (words_ptr + ARRAYS * tokens).to(tl.pointer_type(tl.int64))
    lists_ptr = all_lists_ptr + start * NEIGHBOURS  # [N, NEIGHBOURS]
    pair_ptr = all_pairs_ptr + start  # [N], as all below
    state_ptr = words_ptr + start
    rank_ptr = state_ptr + tokens
    partner_ptr = rank_ptr + tokens
    missed_ptr = partner_ptr + tokens
    search_ptr = partner_ptr + 2 * tokens
    living_ptr = partner_ptr + 3 * tokens
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
