"""`select_topk` and `select_rows`; also `select` and `prune` if the scores alone decide."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispruner_kernels._triton import launch
from vispruner_kernels._triton.rules import INT32_MIN, score_key


@triton.jit
def _keys(score, valid):
    return tl.where(valid, score_key(score), INT32_MIN)


@triton.jit
def _threshold(key, keep):
    """The `keep`-th largest of the int32 keys [BLOCK], and how many keys equal to it are kept."""
    # Bit by bit from the top, so that at least `keep` keys reach the threshold. Invalid elements
    # have the key INT32_MIN, which reaches no candidate.
    threshold = tl.full([], INT32_MIN, tl.int32)
    for step in range(32):
        # In two's complement, INT32_MIN + 2**31 is 0.
        candidate = threshold ^ (tl.full([], 1, tl.int32) << (31 - step))
        reach = tl.sum((key >= candidate).to(tl.int32), axis=0)
        threshold = tl.where(reach >= keep, candidate, threshold)
    return threshold, keep - tl.sum((key > threshold).to(tl.int32), axis=0)


@triton.jit
def _kept(key, valid, threshold, room, before):
    """(kept, count, before). kept: whether a key is kept; of equal keys the lower index comes
    first. count: how many keys are kept up to this one, earlier blocks included. before: the sums
    of both counts over all blocks so far, for the next block."""
    above = key > threshold
    equal = (key == threshold) & valid
    # Both counts in one scan; each is at most 2**14.
    both = (above.to(tl.int32) << 16) + equal.to(tl.int32)
    count = before + tl.cumsum(both, axis=0)
    equals = count & 0xFFFF
    kept = above | (equal & (equals <= room))
    return kept, (count >> 16) + tl.minimum(equals, room), before + tl.sum(both, axis=0)


@triton.jit(do_not_specialize=["keep"])
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
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[image] = the `keep` tokens of the highest scores, ascending; kept = their features.

    Grid: (images).
    Scratch: none; the keys of an image are in registers.
    Moves: scores twice, indices once; the kept features twice.
    Deterministic: integer keys, one program per image.
    """
    image = tl.program_id(0).to(tl.int64)
    scores_ptr += image * stride_sb
    out_ptr += image * keep
    offs_n = tl.arange(0, BLOCK_N)
    score = tl.load(scores_ptr + offs_n.to(tl.int64) * stride_sn, mask=offs_n < N, other=0.0)
    threshold, room = _threshold(_keys(score, offs_n < N), keep)
    # Load the scores again, from the cache: a scan of all keys would not fit the registers.
    before = 0
    for first in range(0, N, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        mask_s = offs_s < N
        part = tl.load(scores_ptr + offs_s.to(tl.int64) * stride_sn, mask=mask_s, other=0.0)
        key = _keys(part, mask_s)
        kept, count, before = _kept(key, mask_s, threshold, room, before)
        tl.store(out_ptr + count - 1, offs_s.to(tl.int64), mask=kept)
    if GATHER:
        tl.debug_barrier()
        gather_rows(
            features_ptr + image * stride_fb,
            stride_fn,
            out_ptr,
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


@triton.jit(do_not_specialize=["width", "rows"])
def _rows_kernel(
    scores_ptr,
    out_ptr,
    grid_rows,
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
    mask_h = offs_h < grid_rows
    row_ptr = scores_ptr + image * stride_sb + offs_h.to(tl.int64) * width * stride_sn
    total = tl.load(row_ptr, mask=mask_h, other=0.0).to(tl.float32)
    for _ in range(1, width):
        row_ptr += stride_sn
        total += tl.load(row_ptr, mask=mask_h, other=0.0).to(tl.float32)
    key = _keys(total, mask_h)
    threshold, room = _threshold(key, rows)
    kept, count, _ = _kept(key, mask_h, threshold, room, 0)
    place_ptr = out_ptr + image * rows * width + (count - 1) * width
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
    """Launch the kernel; `features` [B, N, C] are read only if `kept` is given."""
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
        BLOCK_S=min(block, 1024),
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
