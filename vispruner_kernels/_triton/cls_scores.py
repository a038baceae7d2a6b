"""`cls_scores`: one launch."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispruner_kernels._triton import launch
from vispruner_kernels._triton.attention import stride_unit
from vispruner_kernels._triton.cls_row import INTEGERS, LINE, cls_plan, cls_row


@triton.jit(
    do_not_specialize=[*INTEGERS, "stride_qb", "stride_qh", "stride_kb", "stride_ks", "stride_kh"]
)
def _cls_scores_kernel(
    q_ptr,
    k_ptr,
    scores_ptr,
    scratch_ptr,
    S,
    H,
    num_prefix,
    lines,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    scale,
    tag,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """scores[image] = the attention of query row 0 to each key, mean over heads.

    Grid: (images * heads * chunks of keys); the last program of an image averages its heads.
    Scratch: 4 bytes per head and token, see cls_row.
    Moves: k once, row 0 of q, logits written and read, scores once.
    Deterministic: the split and the order of every sum depend on the shape and the dtype only;
      no float atomics.
    """
    chunks = tl.cdiv(S, CHUNK)
    image = (tl.program_id(0) // (H * chunks)).to(tl.int64)
    part = tl.program_id(0) % (H * chunks)
    head = (part // chunks).to(tl.int64)
    chunk = part % chunks
    cls_row(
        q_ptr + (image * stride_qb + head * stride_qh) * UNIT,
        k_ptr + (image * stride_kb + head * stride_kh) * UNIT,
        scores_ptr + image * (S - num_prefix),
        scratch_ptr + image * lines * LINE,
        stride_ks,
        S,
        H,
        num_prefix,
        scale,
        tag,
        head,
        chunk,
        chunk + 1,
        H * chunks,
        D,
        UNIT,
        BLOCK_N,
        BLOCK_D,
        CHUNK,
        BLOCK_C,
        BLOCK_H,
        BLOCK_S,
    )


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: torch.Size,
    q: tuple[int, ...],
    k: tuple[int, ...],
    aligned: bool,
    num_prefix: int,
    itemsize: int,
) -> tuple[int, int, list[int], dict[str, Any]]:
    """Programs, int64 words of scratch, the kernel's integers and constants.

    `q` and `k` are the strides of the tensors.
    """
    unit = stride_unit(itemsize, aligned, shape, q, k)
    chunks, sizes, meta = cls_plan(shape, num_prefix, itemsize, unit)
    strides = [x // unit for x in (q[0], q[2], *k[:3])]
    return shape[0] * shape[2] * chunks, shape[0] * sizes[-1] * LINE.value, [*sizes, *strides], meta


def cls_scores(q: Tensor, k: Tensor, scale: float | None, num_prefix: int) -> Tensor:
    batch, tokens, _, head_dim = q.shape
    scores = torch.empty((batch, tokens - num_prefix), dtype=torch.float32, device=q.device)
    if batch:
        aligned = (q.data_ptr() | k.data_ptr()) % 16 == 0
        grid, words, sizes, meta = _plan(
            q.shape, q.stride(), k.stride(), aligned, num_prefix, q.itemsize
        )
        launch.run(
            _cls_scores_kernel,
            grid,
            q,
            q,
            k,
            scores,
            torch.empty(words, dtype=torch.int64, device=q.device),
            *sizes,
            head_dim**-0.5 if scale is None else scale,
            launch.new_tag(),
            **meta,
        )
    return scores
