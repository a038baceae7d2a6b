"""`received_scores` and `received_scores_varlen`: one launch with lse, two without."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispruner_kernels._checks import check_offsets
from vispruner_kernels._triton import launch
from vispruner_kernels._triton.attention import (
    LOG2E,
    check_arrivals,
    dot,
    is_signed,
    largest,
    split_scale,
    stride_unit,
)
from vispruner_kernels._triton.rules import arrive, close_counter, read_counter

# (bytes of an element, padded head dimension): BLOCK, STEP and num_stages, by registers and shared
# memory. A program keeps BLOCK rows, queries in the first launch and keys in the second, and goes
# over the others by STEP. The order of sums hangs on them, so alignment has no say.
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
# Heads added, offsets read and tokens zeroed at once.
BLOCK_H, OFFSETS, ZEROS = tl.constexpr(16), tl.constexpr(128), tl.constexpr(1024)
# Steps of STEP queries that one program adds, in float32: rounding adds up where rows are alike.
ADDED = 32
# ln(2) in two parts; products of the first with whole numbers below 2**15 are exact.
LN2_HI, LN2_LO = tl.constexpr(0.693359375), tl.constexpr(-2.12194440e-4)
# Arguments of both kernels, and of the second; no kernel is compiled anew for them.
BOTH = ("S", "H", "tokens", *(f"stride_{x}{y}" for x in "qk" for y in "bsh"), "stride_cu")
SECOND = (*BOTH, "num_prefix", "stride_lb", "stride_lh", "stride_ls", "tag")


@triton.jit
def _image(cu_ptr, stride_cu, image, tokens, S):
    """(start, end, S): where an image is among the tokens, and how many it has.

    Contradictory offsets: what falls counts as the largest before it, and an image ends after S.
    """
    largest_offset = tl.zeros([OFFSETS], tl.int32)
    for first in range(0, image + 1, OFFSETS):
        offs = first + tl.arange(0, OFFSETS)
        offset = tl.load(cu_ptr + offs.to(tl.int64) * stride_cu, mask=offs <= image, other=0)
        largest_offset = tl.maximum(largest_offset, offset)
    before = tl.max(largest_offset, axis=0)
    after = tl.maximum(before, tl.load(cu_ptr + (image + 1) * stride_cu))
    start = tl.minimum(before, tokens).to(tl.int64)
    end = tl.minimum(after, tokens).to(tl.int64)
    return start, end, tl.minimum(end - start, S).to(tl.int32)


@triton.jit
def _zero(out_ptr, begin, end):
    for start in range(begin, end, ZEROS):
        offs = start + tl.arange(0, ZEROS)
        tl.store(out_ptr + offs, 0.0, mask=offs < end)


@triton.jit
def _kept(
    x_ptr,
    stride,
    first,
    S,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x[first : first + ROWS], 0 from row S on."""
    offs = first + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    return tl.load(
        x_ptr + offs.to(tl.int64)[:, None] * stride * UNIT + offs_d[None, :],
        mask=(offs < S)[:, None] & (offs_d < D)[None, :],
        other=0.0,
    )


@triton.jit(do_not_specialize=BOTH)
def _softmax_kernel(
    q_ptr,
    k_ptr,
    cu_ptr,
    scratch_ptr,
    S,
    H,
    tokens,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_cu,
    scale,
    SIGNED: tl.constexpr,
    VARLEN: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The largest logit of every query row and 1 / the sum of its exponentials.

    Grid: (images * heads * blocks of BLOCK queries).
    Scratch: as in _received_kernel, 8 bytes per head and token.
    Moves: q once, k once per block.
    Deterministic: one program per row, keys in order.
    """
    blocks = tl.cdiv(S, BLOCK)
    image = (tl.program_id(0) // (H * blocks)).to(tl.int64)
    images = tl.num_programs(0) // (H * blocks)
    head = (tl.program_id(0) // blocks % H).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK
    # Behind counters and sums.
    row = (H * tl.cdiv(S, ROWS) + head) * tokens
    scratch_ptr += images * blocks
    start = image * S
    q_ptr += (image * stride_qb + head * stride_qh) * UNIT
    k_ptr += (image * stride_kb + head * stride_kh) * UNIT
    if VARLEN:
        start, _, S = _image(cu_ptr, stride_cu, image, tokens, S)
        q_ptr += start * stride_qs * UNIT
        k_ptr += start * stride_ks * UNIT
    if first >= S:
        return

    sign, c = split_scale(scale)
    q = _kept(q_ptr, stride_qs, first, S, D, UNIT, BLOCK, BLOCK_D)
    offs_n = tl.arange(0, STEP)
    offs_d = tl.arange(0, BLOCK_D)
    k_ptrs = k_ptr + offs_n.to(tl.int64)[None, :] * stride_ks * UNIT + offs_d[:, None]
    step = tl.full([], STEP * UNIT, tl.int64) * stride_ks
    peak = tl.full([BLOCK], -float("inf"), tl.float32)
    norm = tl.zeros([BLOCK], tl.float32)
    # What rounding has added to norm.
    excess = tl.zeros([BLOCK], tl.float32)
    for n in range(0, S, STEP):
        mask_n = offs_n < S - n
        k = tl.load(k_ptrs, mask=mask_n[None, :] & (offs_d < D)[:, None], other=0.0)
        x = dot(q, k)  # [BLOCK, STEP]
        if SIGNED:
            x *= sign
        x = tl.where(mask_n[None, :], x, -float("inf"))
        new_peak = tl.maximum(peak, largest(x, 1))
        # Nothing but -inf so far: any finite shift will do.
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        decay = tl.exp2((peak - shift) * c)
        before = norm * decay
        part = tl.sum(tl.exp2((x - shift[:, None]) * c), axis=1) - excess * decay
        norm = before + part
        excess = (norm - before) - part
        peak = new_peak
        k_ptrs += step

    offs_m = first + tl.arange(0, BLOCK)
    rows_ptr = (scratch_ptr + row + start + offs_m).to(tl.pointer_type(tl.float32))
    tl.store(rows_ptr, peak, mask=offs_m < S)
    tl.store(rows_ptr + 1, tl.div_rn(1.0, norm), mask=offs_m < S)


@triton.jit
def _split_lse(lse):
    """(n, w): exp(-lse) = 2**-n * w, n whole and w near 1, so that neither rounds to speak of."""
    x = lse * LOG2E
    n = tl.floor(x + 0.5)
    rest = (lse - n * LN2_HI) - n * LN2_LO
    # Beyond, and of what is not finite, x is all that is known.
    small = tl.abs(lse) < 16384.0
    return tl.where(small, n, x), tl.exp2(tl.where(small, rest, 0.0) * -LOG2E)


@triton.jit(do_not_specialize=SECOND)
def _received_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    cu_ptr,
    scores_ptr,
    scratch_ptr,
    S,
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
      block of keys to arrive adds its sums.
    Scratch: int64 counters [images, blocks], float64 sums [H, parts, tokens] and, without lse, what
      _softmax_kernel left [H, tokens].
    Moves: k once per part, q and lse once per block, sums out and in, scores once.
    Deterministic: every sum has an order that depends on the shape only; no float atomics.

    VARLEN: S is the largest that an image can have, num_prefix is 0.
    """
    blocks = tl.cdiv(S, BLOCK)
    parts = tl.cdiv(S, ROWS)
    image = (tl.program_id(0) // (H * parts * blocks)).to(tl.int64)
    images = tl.num_programs(0) // (H * parts * blocks)
    head = (tl.program_id(0) // (parts * blocks) % H).to(tl.int64)
    part = tl.program_id(0) // blocks % parts
    block = tl.program_id(0) % blocks
    first = block * BLOCK
    row = (H * parts + head) * tokens
    counter_ptr = scratch_ptr + image * blocks + block
    scratch_ptr += images * blocks
    start = image * S
    q_ptr += (image * stride_qb + head * stride_qh) * UNIT
    k_ptr += (image * stride_kb + head * stride_kh) * UNIT
    lse_ptr += image * stride_lb + head * stride_lh
    if VARLEN:
        start, end, S = _image(cu_ptr, stride_cu, image, tokens, S)
        if (head == 0) & (part == 0) & (block == 0):
            # What is no image's.
            _zero(scores_ptr, 0, tl.where(image == 0, start, 0))
            _zero(scores_ptr, start + S, end)
            _zero(scores_ptr, tl.where(image == images - 1, end, tokens), tokens)
        q_ptr += start * stride_qs * UNIT
        k_ptr += start * stride_ks * UNIT
        lse_ptr += start * stride_ls
        scores_ptr += start
    else:
        scores_ptr += image * (S - num_prefix)
    begin, end = part * ROWS, tl.minimum(part * ROWS + ROWS, S)
    if (first >= S) | (begin >= S):
        return
    counter = read_counter(counter_ptr)

    sign, c = split_scale(scale)
    k = tl.trans(_kept(k_ptr, stride_ks, first, S, D, UNIT, BLOCK, BLOCK_D))
    offs_m = tl.arange(0, STEP)
    offs_d = tl.arange(0, BLOCK_D)
    q_ptrs = q_ptr + (begin + offs_m).to(tl.int64)[:, None] * stride_qs * UNIT + offs_d[None, :]
    step = tl.full([], STEP * UNIT, tl.int64) * stride_qs
    rows_ptr = scratch_ptr + row + start
    acc = tl.zeros([STEP, BLOCK], tl.float32)
    for m in range(begin, end, STEP):
        mask_m = offs_m < S - m
        # Asked for before the product, which takes as long.
        if LSE:
            offs = (m + offs_m).to(tl.int64) * stride_ls
            shift, factor = _split_lse(tl.load(lse_ptr + offs, mask=mask_m, other=0.0))
        else:
            word = tl.load(rows_ptr + m + offs_m, mask=mask_m, other=0)
            peak = word.to(tl.int32).to(tl.float32, bitcast=True)
            factor = (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        q = tl.load(q_ptrs, mask=mask_m[:, None] & (offs_d < D)[None, :], other=0.0)
        x = dot(q, k)  # [STEP, BLOCK]
        if SIGNED:
            x *= sign
        if LSE:
            weight = tl.exp2(tl.fma(x, c, -shift[:, None]))
        else:
            weight = tl.exp2((x - peak[:, None]) * c)
        acc = tl.fma(tl.where(mask_m[:, None], weight, 0.0), factor[:, None], acc)
        q_ptrs += step

    offs_n = first + tl.arange(0, BLOCK)
    mask_n = offs_n < S
    sums_ptr = scratch_ptr.to(tl.pointer_type(tl.float64)) + start + offs_n
    # Of the image: S is its own by now.
    parts = tl.cdiv(S, ROWS)
    sums = tl.sum(acc.to(tl.float64), axis=0)
    tl.store(sums_ptr + (head * parts + part) * tokens, sums, mask=mask_n)
    if arrive(counter_ptr, counter, tag, H * parts):
        total = tl.zeros([BLOCK], tl.float64)
        for h in range(0, H * parts, BLOCK_H):
            offs_h = (h + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]  # [BLOCK_H, 1]
            mask = (offs_h < H * parts) & mask_n[None, :]
            others = tl.load(sums_ptr[None, :] + offs_h * tokens, mask=mask, other=0.0)
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
    """Programs for a part of the queries, parts, int64 words of scratch, integers of both kernels
    and their constants.

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
        # Left alone, the assembler of some versions is sparing, and spills.
        "maxnreg": 255 if itemsize == 4 else None,
        # What is to be fused says so.
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
    scale: float | None = None,
    num_prefix: int = 0,
    lse: Tensor | None = None,
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
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    tokens, images = q.shape[0], cu_seqlens.shape[0] - 1
    if q.device.type == "cpu":
        check_offsets("received_scores_varlen", tokens, cu_seqlens, max_seqlen)
    if tokens == 0 or images == 0 or max_seqlen == 0:
        return torch.zeros(tokens, dtype=torch.float32, device=q.device)
    scores = torch.empty(tokens, dtype=torch.float32, device=q.device)
    _launch(q, k, lse, cu_seqlens, images, min(max_seqlen, tokens), tokens, 0, scale, scores)
    return scores
