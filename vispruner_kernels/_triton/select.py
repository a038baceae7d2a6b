"""`select`, `prune` and `select_varlen`: one launch each."""

from __future__ import annotations

import functools
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispruner_kernels._checks import check_offsets
from vispruner_kernels._triton import launch, topk
from vispruner_kernels._triton.bipartite import DROPPED, IMPORTANT, SWEEP, bipartite
from vispruner_kernels._triton.neighbours import ROWS, list_neighbours
from vispruner_kernels._triton.pairwise import ALIVE, CHOSEN, DEAD, pairwise
from vispruner_kernels._triton.rules import (
    INT32_MIN,
    INT64_MAX,
    INT64_MIN,
    arrive,
    close_counter,
    index_key,
    ordered,
    read_counter,
    score_key,
)
from vispruner_kernels._triton.similarity import similarity
from vispruner_kernels._triton.topk import gather_rows

# Tokens of a tile's side, bytes of features per step, and the nearest neighbours that are listed.
BLOCK_N, BLOCK_BYTES, NEIGHBOURS = 32, 128, 32
NUM_WARPS = 8
# The most tokens whose similarities fit the registers of a program. Older compilers need more.
SMALL = 128 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 64
# Rounds of the pairwise rule before it takes care of its bad case.
EAGER = 64
# Arrays of one int32 per token in scratch. States are bytes: few lines of the cache to look up.
ARRAYS = tl.constexpr(6)


@triton.jit(do_not_specialize=["N", "keep", "important", "step", "total", "stride_sb", "tag"])
def _select_kernel(
    features_ptr,
    scores_ptr,
    cu_seqlens_ptr,
    cu_keep_ptr,
    out_ptr,
    kept_ptr,
    scratch_ptr,
    N,
    C,
    keep,
    important,
    step,
    total,
    stride_fb,
    stride_fn,
    stride_sb,
    stride_sn,
    stride_cu,
    stride_ck,
    sim_size,
    tokens,
    tag,
    PAIRWISE: tl.constexpr,
    VARLEN: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    SMALL: tl.constexpr,
    EAGER: tl.constexpr,
):
    """out[image] = the tokens that are kept, ascending; kept = their features.

    Grid: (images * tiles); a tile is a pair of blocks of BLOCK_N tokens. The last tile to arrive at
      a block lists its neighbours, the last block to arrive at an image walks its passes.
    Scratch: similarities [tokens, ld] int32, lists, a few words per token, counters.
    Moves: features 2 * (N / BLOCK_N + 1) times, from L2 but for the first; similarities once out,
      and in for the lists.
    Deterministic: all sums and comparisons are of integers; arrival decides only who goes on.

    VARLEN: N is max_seqlen, keep is total_keep and `important` are the bits of the float64 ratio;
    else `important` tokens are kept by score.
    """
    # A row is read to the end of a vector, which some tile must have written.
    tl.static_assert(BLOCK_N % 16 == 0)
    blocks = tl.cdiv(N, BLOCK_N)
    tiles = blocks * (blocks + 1) // 2
    image = tl.program_id(0) // tiles
    images = tl.num_programs(0) // tiles
    tile = tl.program_id(0) % tiles

    # Scratch; `ld` is the stride of a row of similarities, which ends with INT32_MIN.
    ld = tl.cdiv(N, 16) * 16
    tokens = tokens.to(tl.int64)
    lists_ptr = (scratch_ptr + sim_size).to(tl.pointer_type(tl.int64))
    pair_ptr = lists_ptr + tokens * NEIGHBOURS
    state_ptr = (pair_ptr + tokens).to(tl.pointer_type(tl.int32))
    counters_ptr = (state_ptr + ARRAYS * tokens).to(tl.pointer_type(tl.int64))
    block_counters_ptr = counters_ptr + images + image.to(tl.int64) * blocks
    counters_ptr += image

    if VARLEN:
        # Whatever the offsets say, images are disjoint and within the tensors.
        start, stop = _range(cu_seqlens_ptr, stride_cu, image, total)
        N = tl.minimum(stop - start, N)
        blocks = tl.cdiv(N, BLOCK_N)
        # Most programs, where most images are smaller than the largest.
        if tile >= tl.maximum(blocks * (blocks + 1) // 2, 1):
            return
        slot, end = _range(cu_keep_ptr, stride_ck, image, keep)
        if tile == 0:
            # What no image's tokens fill.
            _fill(out_ptr, 0, tl.where(image == 0, slot, 0))
            _fill(out_ptr, slot + tl.minimum(end - slot, N), end)
            _fill(out_ptr, tl.where(image == images - 1, end, keep), keep)
        keep = tl.minimum(end - slot, N)
        # As Python's int(keep * ratio): a float argument would be float32.
        ratio = important.to(tl.int64).to(tl.float64, bitcast=True)
        important = (keep.to(tl.float64) * ratio).to(tl.int32)
        blocks = tl.where(keep > 0, blocks, 0)
        start = start.to(tl.int64)
        features_ptr += start * stride_fn
        scores_ptr += start * stride_sn
        out_ptr += slot
    else:
        start = image.to(tl.int64) * N
        features_ptr += image.to(tl.int64) * stride_fb
        scores_ptr += image.to(tl.int64) * stride_sb
        out_ptr += image.to(tl.int64) * keep
        kept_ptr += image.to(tl.int64) * keep * C
    # Where the score alone decides, or nothing does, the tiles on the diagonal are enough.
    removes = (keep > important) & (keep < N)
    if tile >= tl.where(removes, blocks * (blocks + 1) // 2, blocks):
        return

    scratch_ptr += start * ld
    lists_ptr += start * NEIGHBOURS
    pair_ptr += start
    state_ptr += start
    place_ptr = state_ptr + tokens
    state_ptr = state_ptr.to(tl.pointer_type(tl.int8))
    partner_ptr = place_ptr + tokens
    # Pairs of blocks by their distance around a circle: each pair once.
    block_a = tile % blocks
    block_b = (block_a + tile // blocks) % blocks

    # Phase 1: similarities of the tile, and on the diagonal the order by score.
    offs_a = block_a * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_b = block_b * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_a, mask_b = offs_a < N, offs_b < N
    if block_a == block_b:
        rank = _rank(scores_ptr, stride_sn, N, offs_a, mask_a, BLOCK_N)
        if PAIRWISE:
            state = tl.where(rank < important, CHOSEN, tl.where(keep > important, ALIVE, DEAD))
            tl.store(place_ptr + offs_a, rank, mask=mask_a)
            tl.store(partner_ptr + offs_a, -1, mask=mask_a)
            pair = tl.where(rank < important, INT64_MIN, tl.full([BLOCK_N], INT64_MAX, tl.int64))
            tl.store(pair_ptr + offs_a, pair, mask=mask_a)
        else:
            state = tl.where(keep > important, (rank - important) & 1, DROPPED)
            state = tl.where(rank < important, IMPORTANT, state)
            tl.store(place_ptr + rank, offs_a, mask=mask_a)
        tl.store(state_ptr + offs_a, state, mask=mask_a)
    if removes:
        sim = similarity(
            features_ptr + offs_a.to(tl.int64) * stride_fn,
            mask_a,
            features_ptr + offs_b.to(tl.int64) * stride_fn,
            mask_b,
            C,
            BLOCK_N,
            BLOCK_C,
        )
        mask = mask_a[:, None] & mask_b[None, :] & (offs_a[:, None] != offs_b[None, :])
        key = tl.where(mask, ordered(sim), INT32_MIN)
        # Offsets within a tile fit int32.
        rows, columns = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_N)[None, :]
        corner_a, corner_b = block_a.to(tl.int64) * BLOCK_N, block_b.to(tl.int64) * BLOCK_N
        tile_ptr = scratch_ptr + corner_a * ld + corner_b + rows * ld + columns
        tl.store(tile_ptr, key, mask=mask_a[:, None] & (offs_b < ld)[None, :])
        tile_ptr = scratch_ptr + corner_b * ld + corner_a + columns * ld + rows
        tl.store(tile_ptr, key, mask=mask_b[None, :] & (offs_a < ld)[:, None])

    # Phase 2: whose tile was the last of a block lists the neighbours of its tokens.
    image_word = read_counter(counters_ptr)
    word_a = read_counter(block_counters_ptr + block_a)
    word_b = read_counter(block_counters_ptr + block_b)
    last = False
    for side in range(0, 2):
        block = tl.where(side == 0, block_a, block_b)
        word = tl.where(side == 0, word_a, word_b)
        if (side == 0) | (block_a != block_b):
            if arrive(block_counters_ptr + block, word, tag, tl.where(removes, blocks, 1)):
                close_counter(block_counters_ptr + block)
                if removes:
                    for row in range(0, BLOCK_N, ROWS):
                        token = block * BLOCK_N + row + tl.arange(0, ROWS)
                        list_neighbours(scratch_ptr, ld, lists_ptr, N, token, NEIGHBOURS)
                last = last | arrive(counters_ptr, image_word, tag, blocks)

    # Phase 3: whose block was the last of an image removes duplicates and writes the result.
    if last:
        close_counter(counters_ptr)
        if removes:
            if PAIRWISE:
                pairwise(
                    scratch_ptr,
                    ld,
                    lists_ptr,
                    state_ptr,
                    place_ptr,
                    partner_ptr,
                    partner_ptr + tokens,
                    partner_ptr + 2 * tokens,
                    partner_ptr + 3 * tokens,
                    pair_ptr,
                    N,
                    N - keep,
                    NEIGHBOURS,
                    EAGER,
                )
            else:
                bipartite(
                    scratch_ptr,
                    ld,
                    lists_ptr,
                    state_ptr,
                    place_ptr + important,
                    partner_ptr,
                    partner_ptr + tokens,
                    pair_ptr,
                    N,
                    N - important,
                    keep - important,
                    step,
                    NEIGHBOURS,
                    SMALL,
                )
        tl.debug_barrier()
        count = 0
        for first in range(0, N, SWEEP):
            offs_n = first + tl.arange(0, SWEEP)
            if PAIRWISE:
                kept = tl.load(state_ptr + offs_n, mask=offs_n < N, other=DEAD) != DEAD
            else:
                kept = tl.load(state_ptr + offs_n, mask=offs_n < N, other=DROPPED) != DROPPED
            place = count + tl.cumsum(kept.to(tl.int32), axis=0) - 1
            index = offs_n.to(tl.int64)
            if VARLEN:
                index += start
            tl.store(out_ptr + place, index, mask=kept)
            count += tl.sum(kept.to(tl.int32), axis=0)
        if GATHER:
            tl.debug_barrier()
            gather_rows(features_ptr, stride_fn, out_ptr, kept_ptr, keep, C, ROWS, 256)


@triton.jit
def _range(offsets_ptr, stride, image, end):
    """offsets[image] and offsets[image + 1] within [0, end]; one that falls counts as the largest
    before it."""
    begin = 0
    for first in range(0, image + 1, SWEEP):
        offs = first + tl.arange(0, SWEEP)
        offset = tl.load(offsets_ptr + offs.to(tl.int64) * stride, mask=offs <= image, other=0)
        begin = tl.maximum(begin, tl.max(offset, axis=0))
    following = tl.load(offsets_ptr + (image + 1).to(tl.int64) * stride)
    begin = tl.minimum(begin, end)
    return begin, tl.maximum(begin, tl.minimum(following, end))


@triton.jit
def _fill(out_ptr, begin, end):
    for first in range(begin, end, SWEEP):
        offs = first + tl.arange(0, SWEEP)
        tl.store(out_ptr + offs, tl.zeros([SWEEP], tl.int64), mask=offs < end)


@triton.jit
def _rank(scores_ptr, stride_sn, N, offs_n, mask_n, BLOCK_N: tl.constexpr):
    """Positions of tokens in the order by score."""
    score = tl.load(scores_ptr + offs_n.to(tl.int64) * stride_sn, mask=mask_n, other=0.0)
    key = index_key(score_key(score), offs_n)
    larger = tl.zeros([BLOCK_N, BLOCK_N], tl.int32)
    for first in range(0, N, BLOCK_N):
        offs = first + tl.arange(0, BLOCK_N)
        mask = offs < N
        score = tl.load(scores_ptr + offs.to(tl.int64) * stride_sn, mask=mask, other=0.0)
        other = tl.where(mask, index_key(score_key(score), offs), INT64_MIN)
        larger += (other[:, None] > key[None, :]).to(tl.int32)
    return tl.sum(larger, axis=0)


@functools.lru_cache(maxsize=1024)
def _layout(images: int, tokens: int, longest: int, block: int) -> tuple[int, int, int, int]:
    """Programs, the sizes of the parts of scratch and of all of it in int32."""

    def whole(words: int) -> int:
        return -(-words // 16) * 16

    blocks = -(-longest // block)
    similarities, rounded = tokens * whole(longest), whole(tokens)
    words = similarities + (2 * NEIGHBOURS + 2 + ARRAYS.value) * rounded + 2 * images * (1 + blocks)
    return images * blocks * (blocks + 1) // 2, similarities, rounded, words


def _launch(
    features: Tensor,
    scores: Tensor,
    offsets: tuple[Tensor, Tensor] | None,
    images: int,
    longest: int,
    keep: int,
    important: int,
    step: int,
    matching: str,
    out: Tensor,
    kept: Tensor | None,
) -> None:
    tokens = features.numel() // features.shape[-1]
    channels, strides = features.shape[-1], features.stride()
    # Where no load is a vector, addresses fill the registers.
    aligned = (channels | strides[0] | strides[-2]) % 16 == 0 and features.data_ptr() % 16 == 0
    grid, similarities, rounded, words = _layout(images, tokens, longest, BLOCK_N)
    cu_seqlens, cu_keep = offsets or (out, out)
    launch.run(
        _select_kernel,
        grid,
        features,
        features,
        scores,
        cu_seqlens,
        cu_keep,
        out,
        out if kept is None else kept,
        torch.empty(words, dtype=torch.int32, device=features.device),
        longest,
        channels,
        keep,
        important,
        min(step, longest),
        tokens,
        strides[0],
        strides[-2],
        scores.stride(0),
        scores.stride(-1),
        # Not the strides of `out`: Triton would compile anew for some values of keep.
        cu_seqlens.stride(0) if offsets else 0,
        cu_keep.stride(0) if offsets else 0,
        similarities,
        rounded,
        launch.new_tag(),
        PAIRWISE=matching == "pairwise",
        VARLEN=offsets is not None,
        GATHER=kept is not None,
        BLOCK_N=BLOCK_N,
        BLOCK_C=BLOCK_BYTES // features.element_size() if aligned else 32,
        NEIGHBOURS=NEIGHBOURS,
        SMALL=SMALL,
        EAGER=EAGER,
        num_warps=NUM_WARPS,
        num_stages=3,
        maxnreg=255,
        enable_fp_fusion=False,
    )


def select(
    features: Tensor,
    scores: Tensor,
    keep: int,
    important_ratio: float = 0.5,
    step: int = 8,
    matching: str = "bipartite",
) -> Tensor:
    return _select(features, scores, keep, important_ratio, step, matching, None)


def prune(
    features: Tensor,
    scores: Tensor,
    keep: int,
    important_ratio: float = 0.5,
    step: int = 8,
    matching: str = "bipartite",
) -> tuple[Tensor, Tensor]:
    batch, _, channels = features.shape
    kept = torch.empty((batch, keep, channels), dtype=features.dtype, device=features.device)
    return kept, _select(features, scores, keep, important_ratio, step, matching, kept)


def _select(
    features: Tensor,
    scores: Tensor,
    keep: int,
    important_ratio: float,
    step: int,
    matching: str,
    kept: Tensor | None,
) -> Tensor:
    batch, n, _ = features.shape
    out = torch.empty((batch, keep), dtype=torch.int64, device=features.device)
    important = int(keep * important_ratio)
    if batch == 0:
        return out
    if important == keep or keep == n:
        # The score alone decides, or nothing does.
        topk.launch_topk(scores, features, out, kept)
    else:
        _launch(features, scores, None, batch, n, keep, important, step, matching, out, kept)
    return out


def select_varlen(
    features: Tensor,
    scores: Tensor,
    cu_seqlens: Tensor,
    cu_keep: Tensor,
    max_seqlen: int,
    total_keep: int,
    important_ratio: float = 0.5,
    step: int = 8,
    matching: str = "bipartite",
) -> Tensor:
    total = features.shape[0]
    if features.device.type == "cpu":
        check_offsets("select_varlen", total, cu_seqlens, max_seqlen, cu_keep, total_keep)
    images = len(cu_seqlens) - 1
    out = torch.empty(total_keep, dtype=torch.int64, device=features.device)
    if total_keep == 0:
        return out
    if images == 0 or max_seqlen == 0:
        return out.zero_()
    # The bits of 0.0 would be an int32 to Triton, and a variant of their own.
    ratio_bits = struct.unpack("<q", struct.pack("<d", important_ratio or -0.0))[0]
    _launch(
        features,
        scores,
        (cu_seqlens, cu_keep),
        images,
        min(max_seqlen, total),
        total_keep,
        ratio_bits,
        step,
        matching,
        out,
        None,
    )
    return out
