"""`select_topk` and `select_rows`; `select` and `prune` where the score alone decides."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispruner_kernels._triton import launch
from vispruner_kernels._triton.rules import INT32_MIN, score_key


@triton.jit
def _top(key, valid, keep):
    """Which of the int32 keys [BLOCK] are the `keep` largest; equal keys: the earlier first."""
    # The keep-th largest key, bit by bit from the top: at least `keep` keys reach it.
    threshold = tl.full([], INT32_MIN, tl.int64)
    for step in range(32):
        candidate = threshold + (tl.full([], 1, tl.int64) << (31 - step))
        reach = tl.sum(((key >= candidate) & valid).to(tl.int32), axis=0)
        threshold = tl.where(reach >= keep, candidate, threshold)
    above = (key > threshold) & valid
    equal = (key == threshold) & valid
    room = keep - tl.sum(above.to(tl.int32), axis=0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= room))


@triton.jit
def _topk_kernel(
    scores_ptr,
    features_ptr,
    out_ptr,
    kept_ptr,
    N,
    C,
    keep,
    stride_sb,
    stride_sn,
    stride_fb,
    stride_fn,
    GATHER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[image] = the `keep` tokens of the highest scores, ascending; kept = their features.

    Grid: (images).
    Scratch: none; the keys of an image are in registers.
    Moves: scores once, indices once; the kept features twice.
    Deterministic: integer keys, one program per image.
    """
    image = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    score = tl.load(
        scores_ptr + image * stride_sb + offs_n.to(tl.int64) * stride_sn, mask=mask_n, other=0.0
    )
    kept = _top(score_key(score), mask_n, keep)
    place = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(out_ptr + image * keep + place, offs_n.to(tl.int64), mask=kept)
    if GATHER:
        tl.debug_barrier()
        gather_rows(
            features_ptr + image * stride_fb,
            stride_fn,
            out_ptr + image * keep,
            kept_ptr + image * keep * C,
            keep,
            C,
            BLOCK_T,
            BLOCK_C,
        )


@triton.jit
def gather_rows(
    features_ptr,
    stride_fn,
    index_ptr,
    kept_ptr,
    keep,
    C,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """kept[t] = features[index[t]], by one program."""
    for first in range(0, keep, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        mask_t = offs_t < keep
        token = tl.load(index_ptr + offs_t, mask=mask_t, other=0)
        for channel in range(0, C, BLOCK_C):
            offs_c = channel + tl.arange(0, BLOCK_C)
            mask = mask_t[:, None] & (offs_c < C)[None, :]
            row = tl.load(
                features_ptr + token[:, None] * stride_fn + offs_c[None, :], mask=mask
            )  # [BLOCK_T, BLOCK_C]
            tl.store(kept_ptr + offs_t.to(tl.int64)[:, None] * C + offs_c[None, :], row, mask=mask)


@triton.jit
def _rows_kernel(
    scores_ptr,
    out_ptr,
    H,
    width,
    rows,
    stride_sb,
    stride_sn,
    BLOCK_H: tl.constexpr,
):
    """out[image] = the tokens of the `rows` grid rows of the highest sums, ascending.

    Grid: (images).
    Scratch: none; the sums of an image are in registers.
    Moves: scores once, indices once.
    Deterministic: sums from left to right, integer keys, one program per image.
    """
    image = tl.program_id(0).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    row_ptr = scores_ptr + image * stride_sb + offs_h.to(tl.int64) * width * stride_sn
    total = tl.load(row_ptr, mask=mask_h, other=0.0).to(tl.float32)
    for _ in range(1, width):
        row_ptr += stride_sn
        total += tl.load(row_ptr, mask=mask_h, other=0.0).to(tl.float32)
    kept = _top(score_key(total), mask_h, rows)
    place = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    place_ptr = out_ptr + image * rows * width + place * width
    for column in range(width):
        tl.store(place_ptr + column, (offs_h * width + column).to(tl.int64), mask=kept)


def _num_warps(block: int) -> int:
    return min(16, max(1, block // 128))


def select_topk(scores: Tensor, keep: int) -> Tensor:
    batch = scores.shape[0]
    out = torch.empty((batch, keep), dtype=torch.int64, device=scores.device)
    if batch:
        launch_topk(scores, scores, out, None)
    return out


def launch_topk(scores: Tensor, features: Tensor, out: Tensor, kept: Tensor | None) -> None:
    """`features` [B, N, C] are read only to be gathered into `kept`."""
    batch, n = scores.shape
    block = triton.next_power_of_2(n)
    launch.run(
        _topk_kernel,
        batch,
        scores,
        scores,
        features,
        out,
        out if kept is None else kept,
        n,
        features.shape[-1],
        out.shape[1],
        scores.stride(0),
        scores.stride(1),
        features.stride(0),
        features.stride(1),
        GATHER=kept is not None,
        BLOCK_N=block,
        BLOCK_T=8,
        BLOCK_C=256,
        num_warps=_num_warps(block),
        enable_fp_fusion=False,
    )


def select_rows(scores: Tensor, width: int, rows: int) -> Tensor:
    batch, n = scores.shape
    out = torch.empty((batch, rows * width), dtype=torch.int64, device=scores.device)
    if batch:
        block = triton.next_power_of_2(n // width)
        launch.run(
            _rows_kernel,
            batch,
            scores,
            scores,
            out,
            n // width,
            width,
            rows,
            scores.stride(0),
            scores.stride(1),
            BLOCK_H=block,
            num_warps=_num_warps(block),
            enable_fp_fusion=False,
        )
    return out
