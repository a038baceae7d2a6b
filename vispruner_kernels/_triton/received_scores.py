"""`received_scores` and `received_scores_varlen`: one launch with lse, two without it."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispruner_kernels._checks import check_offsets
from vispruner_kernels._triton import launch, softmax_rows
from vispruner_kernels._triton.attention import (
    LOG2E,
    check_arrivals,
    dot,
    is_signed,
    split_scale,
    stride_unit,
)
from vispruner_kernels._triton.offsets import image_range, zero_gaps
from vispruner_kernels._triton.rules import arrive, close_counter, read_counter
from vispruner_kernels._triton.softmax_rows import _softmax_kernel, load_rows, received_scratch

# (bytes of an element, padded head dimension): BLOCK, STEP and num_stages, as registers and shared
# memory allow. A program keeps BLOCK rows in registers, of queries in the first launch and of keys
# in the second, and iterates over the other rows by STEP. Tile sizes fix the summation order, so
# they ignore alignment.
BLOCKS = {
    (2, 16): (128, 64, 3),
    (2, 32): (128, 64, 3),
    (2, 64): (128, 64, 3),
    (2, 128): (128, 64, 2),
    (2, 256): (64, 32, 2),
    (4, 16): (32, 32, 2),
    (4, 32): (32, 32, 2),
    (4, 64): (32, 32, 2),
    (4, 128): (64, 16, 2),
    (4, 256): (16, 32, 2),
}
NUM_WARPS = 8
# Partial sums that are added at once.
BLOCK_H = tl.constexpr(16)
# Steps of STEP queries that one program adds in float32. If rows are alike, the rounding errors of
# longer sums add up.
ADDED = 32
# ln(2) in two parts; products of the first one with integers below 2**15 are exact.
LN2_HI, LN2_LO = tl.constexpr(0.693359375), tl.constexpr(-2.12194440e-4)
# Integers that may change without another compilation.
INTEGERS = (*softmax_rows.INTEGERS, "num_prefix", "stride_lb", "stride_lh", "stride_ls", "tag")


@triton.jit
def _split_lse(lse):
    """(n, w): exp(-lse) = 2**-n * w, with an integer n and w near 1: rounding is negligible."""
    x = lse * LOG2E
    n = tl.floor(x + 0.5)
    rest = (lse - n * LN2_HI) - n * LN2_LO
    # For larger or non-finite lse the exponent is x itself and w is 1.
    small = tl.abs(lse) < 16384.0
    return tl.where(small, n, x), tl.exp2(tl.where(small, rest, 0.0) * -LOG2E)


@triton.jit(do_not_specialize=INTEGERS)
def _received_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    cu_ptr,
    scores_ptr,
    scratch_ptr,
    max_seqlen,
    H,
    tokens,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_cu,
    num_prefix,
    stride_lb,
    stride_lh,
    stride_ls,
    scale,
    tag,
    SIGNED: tl.constexpr,
    LSE: tl.constexpr,
    VARLEN: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """scores[key] = attention that the key receives, mean over heads and query rows.

    Grid: (images * heads * parts of ROWS queries * blocks of BLOCK keys); the last program of a
      block of keys to arrive adds the sums of the block.
    Scratch: int64 counters [images, blocks], float64 sums [H, parts, tokens] and, without lse, the
      8-byte rows of _softmax_kernel [H, tokens].
    Moves: k once per part, q and lse once per block, sums written and read once, scores once.
    Deterministic: the order of every sum depends on the shape and the dtype only; no float atomics.

    VARLEN: max_seqlen is the largest number of tokens of an image and num_prefix is 0; else
    max_seqlen is the number of tokens of every image.
    """
    blocks = tl.cdiv(max_seqlen, BLOCK)
    max_parts = tl.cdiv(max_seqlen, ROWS)
    image = (tl.program_id(0) // (H * max_parts * blocks)).to(tl.int64)
    images = tl.num_programs(0) // (H * max_parts * blocks)
    head = (tl.program_id(0) // (max_parts * blocks) % H).to(tl.int64)
    part = tl.program_id(0) // blocks % max_parts
    block = tl.program_id(0) % blocks
    first = block * BLOCK
    counters_ptr, sums_ptr, rows_ptr = received_scratch(
        scratch_ptr, images, blocks, H, max_parts, tokens
    )
    counter_ptr = counters_ptr + image * blocks + block
    q_ptr += (image * stride_qb + head * stride_qh) * UNIT
    k_ptr += (image * stride_kb + head * stride_kh) * UNIT
    lse_ptr += image * stride_lb + head * stride_lh
    if VARLEN:
        start, stop = image_range(cu_ptr, stride_cu, image, tokens)
        S = tl.minimum(stop - start, max_seqlen).to(tl.int32)
        if (head == 0) & (part == 0) & (block == 0):
            zero_gaps(scores_ptr, image, images, start, start + S, stop, tokens)
        start = start.to(tl.int64)
        q_ptr += start * stride_qs * UNIT
        k_ptr += start * stride_ks * UNIT
        lse_ptr += start * stride_ls
        scores_ptr += start
    else:
        start, S = image * max_seqlen, max_seqlen
        scores_ptr += image * (S - num_prefix)
    begin, end = part * ROWS, tl.minimum(part * ROWS + ROWS, S)
    if (first >= S) | (begin >= S):
        return
    counter = read_counter(counter_ptr)

    sign, c = split_scale(scale)
    k = tl.trans(load_rows(k_ptr, stride_ks, first, S, D, UNIT, BLOCK, BLOCK_D))
    offs_m = tl.arange(0, STEP)
    offs_d = tl.arange(0, BLOCK_D)
    q_ptrs = q_ptr + (begin + offs_m).to(tl.int64)[:, None] * stride_qs * UNIT + offs_d[None, :]
    step = tl.full([], STEP * UNIT, tl.int64) * stride_qs
    row_ptr = rows_ptr + head * tokens + start
    acc = tl.zeros([STEP, BLOCK], tl.float32)
    for m in range(begin, end, STEP):
        mask_m = offs_m < S - m
        # Loaded before the product, which hides the latency.
        if LSE:
            offs = (m + offs_m).to(tl.int64) * stride_ls
            shift, factor = _split_lse(tl.load(lse_ptr + offs, mask=mask_m, other=0.0))
        else:
            # Both floats in one load.
            word = tl.load(row_ptr + m + offs_m, mask=mask_m, other=0)
            m_i = word.to(tl.int32).to(tl.float32, bitcast=True)
            factor = (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        q = tl.load(q_ptrs, mask=mask_m[:, None] & (offs_d < D)[None, :], other=0.0)
        x = dot(q, k)  # [STEP, BLOCK]
        if SIGNED:
            x *= sign
        if LSE:
            weight = tl.exp2(tl.fma(x, c, -shift[:, None]))
        else:
            weight = tl.exp2((x - m_i[:, None]) * c)
        acc = tl.fma(tl.where(mask_m[:, None], weight, 0.0), factor[:, None], acc)
        q_ptrs += step

    offs_n = first + tl.arange(0, BLOCK)
    mask_n = offs_n < S
    sum_ptr = sums_ptr + start + offs_n
    parts = tl.cdiv(S, ROWS)
    sums = tl.sum(acc.to(tl.float64), axis=0)
    tl.store(sum_ptr + (head * parts + part) * tokens, sums, mask=mask_n)
    if arrive(counter_ptr, counter, tag, H * parts):
        total = tl.zeros([BLOCK], tl.float64)
        for h in range(0, H * parts, BLOCK_H):
            offs_h = (h + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]  # [BLOCK_H, 1]
            mask = (offs_h < H * parts) & mask_n[None, :]
            others = tl.load(sum_ptr[None, :] + offs_h * tokens, mask=mask, other=0.0)
            total += tl.sum(others, axis=0)
        score = (total / H / S).to(tl.float32)
        tl.store(scores_ptr + offs_n - num_prefix, score, mask=mask_n & (offs_n >= num_prefix))
        close_counter(counter_ptr)


@functools.lru_cache(maxsize=1024)
def _plan(
    images: int,
    sequence: int,
    tokens: int,
    heads: int,
    head_dim: int,
    strides: tuple[tuple[int, ...], ...],
    aligned: bool,
    itemsize: int,
    lse: bool,
) -> tuple[int, int, int, list[int], dict[str, Any]]:
    """Programs per part of the queries, parts, int64 words of scratch, integers of both kernels and
    their constants.

    `strides` are those of q and k, [B, S, H, D] or [total, H, D].
    """
    packed = len(strides[0]) == 3
    shape = (tokens, heads, head_dim) if packed else (images, sequence, heads, head_dim)
    unit = stride_unit(itemsize, aligned, shape, *strides)
    block_d = max(16, triton.next_power_of_2(head_dim))
    block, step, num_stages = BLOCKS[itemsize, block_d]
    blocks, parts = triton.cdiv(sequence, block), triton.cdiv(sequence, ADDED * step)
    check_arrivals(heads * parts)
    integers = [sequence, heads, tokens]
    for stride in strides:
        integers += [x // unit for x in ((0, *stride[:2]) if packed else stride[:3])]
    meta = {
        "VARLEN": packed,
        "D": head_dim,
        "UNIT": unit,
        "BLOCK": block,
        "STEP": step,
        "ROWS": ADDED * step,
        "BLOCK_D": block_d,
        "num_warps": NUM_WARPS,
        "num_stages": num_stages,
        # Without it some versions of the assembler give a thread too few registers, and spill.
        "maxnreg": 255 if itemsize == 4 else None,
        # Kernels fuse by tl.fma where they need it.
        "enable_fp_fusion": False,
    }
    words = images * blocks + heads * tokens * (parts if lse else parts + 1)
    return images * heads * blocks, parts, words, integers, meta


def _launch(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    cu_seqlens: Tensor | None,
    images: int,
    sequence: int,
    tokens: int,
    num_prefix: int,
    scale: float | None,
    scores: Tensor,
) -> None:
    heads, head_dim = q.shape[-2:]
    scale = head_dim**-0.5 if scale is None else scale
    aligned = (q.data_ptr() | k.data_ptr()) % 16 == 0
    strides = (q.stride(), k.stride())
    grid, parts, words, integers, meta = _plan(
        images, sequence, tokens, heads, head_dim, strides, aligned, q.itemsize, lse is not None
    )
    scratch = torch.empty(words, dtype=torch.int64, device=q.device)
    offsets = cu_seqlens if cu_seqlens is not None else scratch
    integers = [*integers, offsets.stride(0)]
    meta = {**meta, "SIGNED": is_signed(scale)}
    lse_strides: tuple[int, ...] = (0, 0, 0)
    if lse is None:
        launch.run(_softmax_kernel, grid, q, q, k, offsets, scratch, *integers, scale, **meta)
    else:
        lse_strides = lse.stride() if lse.dim() == 3 else (0, *lse.stride())
    launch.run(
        _received_kernel,
        grid * parts,
        q,
        q,
        k,
        lse if lse is not None else scratch,
        offsets,
        scores,
        scratch,
        *integers,
        num_prefix,
        *lse_strides,
        scale,
        launch.new_tag(),
        LSE=lse is not None,
        **meta,
    )


def received_scores(
    q: Tensor,
    k: Tensor,
    scale: float | None,
    num_prefix: int,
    lse: Tensor | None,
) -> Tensor:
    batch, sequence = q.shape[:2]
    scores = torch.empty((batch, sequence - num_prefix), dtype=torch.float32, device=q.device)
    if batch:
        _launch(q, k, lse, None, batch, sequence, batch * sequence, num_prefix, scale, scores)
    return scores


def received_scores_varlen(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None,
    lse: Tensor | None,
) -> Tensor:
    tokens, images = q.shape[0], cu_seqlens.shape[0] - 1
    if q.device.type == "cpu":
        check_offsets("received_scores_varlen", tokens, cu_seqlens, max_seqlen)
    if tokens == 0 or images == 0 or max_seqlen == 0:
        return torch.zeros(tokens, dtype=torch.float32, device=q.device)
    scores = torch.empty(tokens, dtype=torch.float32, device=q.device)
    _launch(q, k, lse, cu_seqlens, images, min(max_seqlen, tokens), tokens, 0, scale, scores)
    return scores
