"""`select`, `prune` and `select_varlen`: one launch each, on AMD GPUs three."""

from __future__ import annotations

import functools
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispruner_kernels import _tuned
from vispruner_kernels._checks import check_offsets
from vispruner_kernels._triton import launch, topk
from vispruner_kernels._triton.bipartite import DROPPED, IMPORTANT, SWEEP, bipartite
from vispruner_kernels._triton.neighbours import ROWS, list_neighbours
from vispruner_kernels._triton.offsets import image_range, zero_gaps
from vispruner_kernels._triton.pairwise import ALIVE, CHOSEN, DEAD, pairwise
from vispruner_kernels._triton.rules import (
    INT64_MAX,
    INT64_MIN,
    arrive,
    close_counter,
    rank_by_score,
    read_counter,
)
from vispruner_kernels._triton.scratch import layout, scratch_arrays
from vispruner_kernels._triton.similarity import similarity, store_tile
from vispruner_kernels._triton.topk import gather_rows

# Tokens along one side of a tile, bytes of features per step, and the length of a neighbour list.
BLOCK_N, BLOCK_BYTES, NEIGHBOURS = 32, 128, 32
# From so many tokens in all images on, larger tiles, which read features half as often
# (docs/measured.md). Below, they would be too few to keep a GPU busy.
MANY_TOKENS, MANY_BLOCK_N = 8192, 64
# All give the same bits.
VARIANTS = [{"block_n": n} for n in (BLOCK_N, MANY_BLOCK_N)]
# The number of a variant, counted from 1, for all calls. 0 leaves the choice to
# `_suit_large_tiles`, and None to tuned.json. Tests and `benchmarks.tune` set it.
VARIANT: int | None = None
NUM_WARPS = 8
# The most tokens whose similarities fit the registers of a program; older compilers need more
# registers.
SMALL = 128 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 64
# Rounds of the pairwise rule in which every orphaned token searches again (pairwise.py).
EAGER = 64
# Phases of the kernel: ALL in one launch, or one launch for each of the others.
ALL, TILES, LISTS, PASSES = (tl.constexpr(phase) for phase in range(4))
# On AMD GPUs tl.debug_barrier() does not wait for stores, so arriving at a counter does not publish
# them (rules.py). There the end of a launch does.
FUSED = not launch.HIP
# Integers that may change without another compilation.
INTEGERS = (
    "max_tokens",
    "dense_keep",
    "dense_important",
    "step",
    "total",
    "total_keep",
    "ratio_bits",
    "stride_sb",
    "tag",
)
# The bits of -0.0, which stands for ratio 0. Triton passes an integer as int64 only if it does not
# fit 32 bits. The bits of usual ratios do not fit. Those of 0.0 would, and Triton would compile
# another variant for them.
NO_RATIO = -(2**63)


@triton.jit(do_not_specialize=INTEGERS)
def _select_kernel(
    features_ptr,
    scores_ptr,
    cu_seqlens_ptr,
    cu_keep_ptr,
    out_ptr,
    kept_ptr,
    scratch_ptr,
    max_tokens,
    C,
    dense_keep,
    dense_important,
    step,
    total,
    total_keep,
    ratio_bits,
    stride_fb,
    stride_fn,
    stride_sb,
    stride_sn,
    stride_cu,
    stride_ck,
    sim_size,
    array_size,
    tag,
    PHASE: tl.constexpr,
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

    Grid: (images * tiles); a tile is a pair of blocks of BLOCK_N tokens. The program that finishes
      a block's last tile builds its neighbour lists, the one that finishes an image's last block
      runs the passes of the image. In launches of one PHASE: (images * tiles), (images * blocks)
      and (images).
    Scratch: similarities [total, ld] int32, lists, a few words per token, counters (scratch.py).
    Moves: features 2 * (N / BLOCK_N + 1) times, all but the first from L2; similarities written
      once, read several times for the lists, and in part by the passes.
    Deterministic: all sums and comparisons are on integers; the order of arrival decides only which
      program continues.

    VARLEN: an image has at most max_tokens tokens and keeps at most as many as it has. There are
    `total` tokens and `total_keep` outputs. ratio_bits are the bits of the float64 ratio of
    important tokens. Otherwise every image has max_tokens tokens and keeps dense_keep of them,
    dense_important by their scores.
    """
    # Searches read a row of similarities up to the next multiple of 16 columns. BLOCK_N is a
    # multiple of 16, so the tiles write all of these columns.
    tl.static_assert(BLOCK_N % 16 == 0)
    max_blocks = tl.cdiv(max_tokens, BLOCK_N)
    if PHASE == LISTS:
        programs = max_blocks
    elif PHASE == PASSES:
        programs = 1
    else:
        programs = max_blocks * (max_blocks + 1) // 2
    image = tl.program_id(0) // programs
    images = tl.num_programs(0) // programs
    # In the launch for the lists, the number of a block.
    tile = tl.program_id(0) % programs

    if VARLEN:
        start, stop = image_range(cu_seqlens_ptr, stride_cu, image, total)
        N = tl.minimum(stop - start, max_tokens)
        blocks = tl.cdiv(N, BLOCK_N)
        # Programs beyond an image's length exit immediately; one stays to zero outputs.
        if tile >= tl.maximum(blocks * (blocks + 1) // 2, 1):
            return
        slot, end = image_range(cu_keep_ptr, stride_ck, image, total_keep)
        keep = tl.minimum(end - slot, N)
        if PHASE == ALL or PHASE == TILES:
            if tile == 0:
                zero_gaps(out_ptr, image, images, slot, slot + keep, end, total_keep)
        # In float64 like Python's int(keep * ratio): Triton passes a float argument as float32.
        ratio = ratio_bits.to(tl.int64).to(tl.float64, bitcast=True)
        important = (keep.to(tl.float64) * ratio).to(tl.int32)
        blocks = tl.where(keep > 0, blocks, 0)
        start = start.to(tl.int64)
        features_ptr += start * stride_fn
        scores_ptr += start * stride_sn
        out_ptr += slot
    else:
        N, keep, important, blocks = max_tokens, dense_keep, dense_important, max_blocks
        start = image.to(tl.int64) * N
        features_ptr += image.to(tl.int64) * stride_fb
        scores_ptr += image.to(tl.int64) * stride_sb
        out_ptr += image.to(tl.int64) * keep
        kept_ptr += image.to(tl.int64) * keep * C
    # If the scores alone decide, or all tokens are kept, the tiles on the diagonal suffice.
    removes = (keep > important) & (keep < N)
    if tile >= tl.where(removes, blocks * (blocks + 1) // 2, blocks):
        return

    # The stride of a row of similarities, which is padded with INT32_MIN.
    ld = tl.cdiv(max_tokens, 16) * 16
    (
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
    ) = scratch_arrays(scratch_ptr, sim_size, array_size, start, ld, NEIGHBOURS)
    # States are bytes, so that a search reads few cache lines.
    state_ptr = state_ptr.to(tl.pointer_type(tl.int8))
    # The bipartite rule uses the same memory under other names (scratch.py).
    keys_ptr, sorted_ptr, next_ptr = pair_ptr, rank_ptr, partner_ptr
    block_counters_ptr = counters_ptr + images + image.to(tl.int64) * max_blocks
    image_counter_ptr = counters_ptr + image
    # Tile t pairs block a = t % blocks with block (a + t // blocks) % blocks: each pair once, and
    # the diagonal first. A block is in `blocks` tiles.
    block_a = tile % blocks
    block_b = (block_a + tile // blocks) % blocks

    # Phase 1: similarities of the tile, and on the diagonal the order by score.
    if PHASE == ALL or PHASE == TILES:
        offs_a = block_a * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_b = block_b * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_a, mask_b = offs_a < N, offs_b < N
        if block_a == block_b:
            rank = rank_by_score(scores_ptr, stride_sn, N, offs_a, mask_a, BLOCK_N)
            if PAIRWISE:
                state = tl.where(rank < important, CHOSEN, tl.where(keep > important, ALIVE, DEAD))
                tl.store(rank_ptr + offs_a, rank, mask=mask_a)
                tl.store(partner_ptr + offs_a, -1, mask=mask_a)
                pair = tl.where(
                    rank < important, INT64_MIN, tl.full([BLOCK_N], INT64_MAX, tl.int64)
                )
                tl.store(pair_ptr + offs_a, pair, mask=mask_a)
            else:
                state = tl.where(keep > important, (rank - important) & 1, DROPPED)
                state = tl.where(rank < important, IMPORTANT, state)
                tl.store(sorted_ptr + rank, offs_a, mask=mask_a)
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
            store_tile(sim_ptr, ld, sim, block_a, block_b, N, BLOCK_N)

    # Phase 2: the program that finishes a block's last tile builds the block's neighbour lists.
    last = PHASE == PASSES
    if PHASE == ALL:
        last = False
        image_word = read_counter(image_counter_ptr)
        word_a = read_counter(block_counters_ptr + block_a)
        word_b = read_counter(block_counters_ptr + block_b)
        for side in range(0, 2):
            block = tl.where(side == 0, block_a, block_b)
            word = tl.where(side == 0, word_a, word_b)
            if (side == 0) | (block_a != block_b):
                if arrive(block_counters_ptr + block, word, tag, tl.where(removes, blocks, 1)):
                    close_counter(block_counters_ptr + block)
                    if removes:
                        _list_block(sim_ptr, ld, lists_ptr, N, block, BLOCK_N, NEIGHBOURS)
                    last = last | arrive(image_counter_ptr, image_word, tag, blocks)
    elif PHASE == LISTS:
        if removes & (tile < blocks):
            _list_block(sim_ptr, ld, lists_ptr, N, tile, BLOCK_N, NEIGHBOURS)

    # Phase 3: the program that finishes an image's last block removes duplicates and writes the
    # result.
    if last:
        if PHASE == ALL:
            close_counter(image_counter_ptr)
        if removes:
            if PAIRWISE:
                pairwise(
                    sim_ptr,
                    ld,
                    lists_ptr,
                    state_ptr,
                    rank_ptr,
                    partner_ptr,
                    search_ptr,
                    missed_ptr,
                    living_ptr,
                    pair_ptr,
                    N,
                    N - keep,
                    NEIGHBOURS,
                    EAGER,
                )
            else:
                bipartite(
                    sim_ptr,
                    ld,
                    lists_ptr,
                    state_ptr,
                    sorted_ptr + important,
                    next_ptr,
                    missed_ptr,
                    keys_ptr,
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
            gather_rows(features_ptr, stride_fn, out_ptr, kept_ptr, keep, C, 8, 256)


@triton.jit
def _list_block(sim_ptr, ld, lists_ptr, N, block, BLOCK_N: tl.constexpr, NEIGHBOURS: tl.constexpr):
    for row in range(0, BLOCK_N, ROWS):
        token = block * BLOCK_N + row + tl.arange(0, ROWS)
        list_neighbours(sim_ptr, ld, lists_ptr, N, token, NEIGHBOURS)


def _launch(
    features: Tensor,
    scores: Tensor,
    images: int,
    max_tokens: int,
    step: int,
    matching: str,
    out: Tensor,
    *,
    keep: int = 0,
    important: int = 0,
    kept: Tensor | None = None,
    offsets: tuple[Tensor, Tensor] | None = None,
    ratio_bits: int = NO_RATIO,
) -> None:
    """`keep`, `important` and `kept` of images of one length, or `offsets` and `ratio_bits`."""
    total = features.numel() // features.shape[-1]
    channels, strides = features.shape[-1], features.stride()
    # Loads that are not vectors need a register per address.
    aligned = (channels | strides[0] | strides[-2]) % 16 == 0 and features.data_ptr() % 16 == 0
    block = _block(features, images, max_tokens, matching) if aligned else BLOCK_N
    grid, sim_size, array_size, words = layout(images, total, max_tokens, block, NEIGHBOURS)
    cu_seqlens, cu_keep = offsets or (out, out)
    args = (
        features,
        scores,
        cu_seqlens,
        cu_keep,
        out,
        out if kept is None else kept,
        torch.empty(words, dtype=torch.int32, device=features.device),
        max_tokens,
        channels,
        keep,
        important,
        min(step, max_tokens),
        total,
        out.numel(),
        ratio_bits,
        strides[0],
        strides[-2],
        scores.stride(0),
        scores.stride(-1),
        # Without offsets `out` stands in for them. Its strides depend on keep, and Triton would
        # compile again for some of them, so 0 is passed.
        cu_seqlens.stride(0) if offsets else 0,
        cu_keep.stride(0) if offsets else 0,
        sim_size,
        array_size,
        launch.new_tag(),
    )
    meta = {
        "PAIRWISE": matching == "pairwise",
        "VARLEN": offsets is not None,
        "GATHER": kept is not None,
        "BLOCK_N": block,
        "BLOCK_C": BLOCK_BYTES // features.element_size() if aligned else 32,
        "NEIGHBOURS": NEIGHBOURS,
        "SMALL": SMALL,
        "EAGER": EAGER,
        "num_warps": NUM_WARPS,
        "num_stages": 3,
        "maxnreg": 255,
        "enable_fp_fusion": False,
    }
    if FUSED:
        launch.run(_select_kernel, grid, features, *args, PHASE=ALL.value, **meta)
        return
    blocks = triton.cdiv(max_tokens, block)
    for phase, programs in ((TILES, grid), (LISTS, images * blocks), (PASSES, images)):
        launch.run(_select_kernel, programs, features, *args, PHASE=phase.value, **meta)


@functools.lru_cache(maxsize=1024)
def _tuned_variant(device: int, images: int, tokens: int, matching: str) -> int:
    return _tuned.number("triton", VARIANTS, device, images, tokens, matching)


def _block(features: Tensor, images: int, max_tokens: int, matching: str) -> int:
    """Tokens along one side of a tile, for aligned features, as tuned.json has measured them."""
    variant = VARIANT
    if variant is None:
        variant = _tuned_variant(features.get_device(), images, max_tokens, matching)
    if variant:
        return VARIANTS[variant - 1]["block_n"]
    total = features.numel() // features.shape[-1]
    return MANY_BLOCK_N if _suit_large_tiles(features, total) else BLOCK_N


def _suit_large_tiles(features: Tensor, total: int) -> bool:
    """Whether larger tiles are faster. They spill on GPUs of other compute capabilities, and if
    features are not aligned."""
    return total >= MANY_TOKENS and (
        launch.INTERPRETED or torch.cuda.get_device_capability(features.device)[0] in (9, 10)
    )


def select(
    features: Tensor, scores: Tensor, keep: int, important_ratio: float, step: int, matching: str
) -> Tensor:
    return _select(features, scores, keep, important_ratio, step, matching, None)


def prune(
    features: Tensor, scores: Tensor, keep: int, important_ratio: float, step: int, matching: str
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
        # The scores alone decide, or all tokens are kept.
        topk.launch_topk(scores, features, out, kept)
    else:
        _launch(
            features,
            scores,
            batch,
            n,
            step,
            matching,
            out,
            keep=keep,
            important=important,
            kept=kept,
        )
    return out


def select_varlen(
    features: Tensor,
    scores: Tensor,
    cu_seqlens: Tensor,
    cu_keep: Tensor,
    max_seqlen: int,
    total_keep: int,
    important_ratio: float,
    step: int,
    matching: str,
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
    _launch(
        features,
        scores,
        images,
        min(max_seqlen, total),
        step,
        matching,
        out,
        offsets=(cu_seqlens, cu_keep),
        ratio_bits=struct.unpack("<q", struct.pack("<d", important_ratio or -0.0))[0],
    )
    return out
