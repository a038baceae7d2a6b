"""`cls_attention`: the forward pass of FlashAttention and the CLS row, in one launch."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispruner_kernels._triton import launch
from vispruner_kernels._triton.attention import (
    dot,
    is_signed,
    largest,
    split_scale,
    stride_unit,
)
from vispruner_kernels._triton.cls_row import INTEGERS, LINE, cls_plan, cls_row

# (bytes of an element, padded head dimension): BLOCK_M, KEYS (BLOCK_N of `_attention`) and
# num_stages, as registers and shared memory allow. The first triple is for rows that begin at
# multiples of 16 bytes, the second for other rows, in which every element takes the registers of a
# pointer. The number of warps comes from cls_plan, as for cls_scores: it fixes the order of the
# sums of the CLS row, which must be the same in both kernels.
BLOCKS = {
    (2, 16): ((64, 64, 3), (64, 16, 2)),
    (2, 32): ((128, 64, 3), (64, 16, 2)),
    (2, 64): ((128, 64, 3), (64, 16, 2)),
    (2, 128): ((128, 64, 2), (32, 32, 2)),
    (2, 256): ((64, 32, 2), (32, 32, 2)),
    (4, 16): ((32, 32, 2), (16, 32, 3)),
    (4, 32): ((32, 32, 2), (16, 32, 3)),
    (4, 64): ((64, 32, 3), (16, 32, 3)),
    (4, 128): ((32, 16, 2), (16, 32, 3)),
    (4, 256): ((32, 16, 2), (16, 16, 2)),
}


@triton.jit
def _attention(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    stride_qs,
    stride_ks,
    stride_vs,
    stride_os,
    S,
    scale,
    first,
    SIGNED: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[first : first + BLOCK_M] = softmax(scale * q k^T) v, for one head."""
    sign, c = split_scale(scale)
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_q = (offs_m < S)[:, None] & (offs_d < D)[None, :]
    # The logits are scaled, not q: a scaled q would be a computed tile, which every product would
    # read through registers and wait for.
    q = tl.load(
        q_ptr + offs_m.to(tl.int64)[:, None] * stride_qs * UNIT + offs_d[None, :],
        mask=mask_q,
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]
    k_ptrs = k_ptr + offs_n.to(tl.int64)[None, :] * stride_ks * UNIT + offs_d[:, None]
    v_ptrs = v_ptr + offs_n.to(tl.int64)[:, None] * stride_vs * UNIT + offs_d[None, :]
    step = tl.full([], BLOCK_N * UNIT, tl.int64)

    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, S, BLOCK_N):
        mask_n = offs_n < S - start
        k = tl.load(k_ptrs, mask=mask_n[None, :] & (offs_d < D)[:, None], other=0.0)
        x = dot(q, k)  # [BLOCK_M, BLOCK_N]
        if SIGNED:
            x *= sign
        x = tl.where(mask_n[None, :], x, -float("inf"))
        m_new = tl.maximum(m_i, largest(x, 1))
        # While all logits are -inf, any finite shift will do.
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        # The largest weight is exactly 1; a fused x * c - shift * c would not give that.
        weight = tl.exp2((x - shift[:, None]) * c)
        alpha = tl.exp2((m_i - shift) * c)
        l_i = l_i * alpha + tl.sum(weight, axis=1)
        v = tl.load(v_ptrs, mask=mask_n[:, None] & (offs_d < D)[None, :], other=0.0)
        acc = dot(weight.to(v.dtype), v, acc * alpha[:, None])
        m_i = m_new
        k_ptrs += step * stride_ks
        v_ptrs += step * stride_vs

    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * stride_os + offs_d[None, :]
    if q.dtype == tl.float32:
        out = tl.div_rn(acc, l_i[:, None])
    else:
        # Two roundings in float32 do not show in half types.
        out = acc * tl.div_rn(1.0, l_i)[:, None]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_q)


@triton.jit(do_not_specialize=[*INTEGERS, *(f"stride_{x}{y}" for x in "qkv" for y in "bsh")])
def _cls_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    scores_ptr,
    scratch_ptr,
    S,
    H,
    num_prefix,
    lines,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    scale,
    tag,
    SIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out = attention; scores[image] = attention of query row 0 to each key, mean over heads.

    Grid: (images * heads * (1 + blocks of BLOCK_M queries)). The first programs of an image, one
      per head, run cls_row. They come first so that the mean over heads ends before the blocks do,
      and they bring the keys into L2.
    Scratch: 4 bytes per head and token, see cls_row.
    Moves: q, k, v and out once; k and v again per block, and k once more by cls_row, from L2.
    Deterministic: the order of every sum depends on the shape and the dtype only and, for out, on
      whether rows begin at multiples of 16 bytes; no float atomics.
    """
    blocks = tl.cdiv(S, BLOCK_M)
    parts = H * (1 + blocks)
    image = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    q_ptr += image * stride_qb * UNIT
    k_ptr += image * stride_kb * UNIT
    if part < H:
        head = part.to(tl.int64)
        cls_row(
            q_ptr + head * stride_qh * UNIT,
            k_ptr + head * stride_kh * UNIT,
            scores_ptr + image * (S - num_prefix),
            scratch_ptr + image * lines * LINE,
            stride_ks,
            S,
            H,
            num_prefix,
            scale,
            tag,
            head,
            0,
            tl.cdiv(S, CHUNK),
            H,
            D,
            UNIT,
            BLOCK_N,
            BLOCK_D,
            CHUNK,
            BLOCK_C,
            BLOCK_H,
            BLOCK_S,
        )
    else:
        head = ((part - H) // blocks).to(tl.int64)
        _attention(
            q_ptr + head * stride_qh * UNIT,
            k_ptr + head * stride_kh * UNIT,
            v_ptr + (image * stride_vb + head * stride_vh) * UNIT,
            out_ptr + (image * S * H + head) * D,
            stride_qs,
            stride_ks,
            stride_vs,
            H * D,
            S,
            scale,
            (part - H) % blocks * BLOCK_M,
            SIGNED,
            D,
            UNIT,
            BLOCK_M,
            KEYS,
            BLOCK_D,
        )


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: torch.Size,
    strides: tuple[tuple[int, ...], ...],
    aligned: bool,
    num_prefix: int,
    itemsize: int,
) -> tuple[int, int, list[int], dict[str, Any]]:
    """Programs, int64 words of scratch, the kernel's integers and constants."""
    batch, tokens, heads, _ = shape
    unit = stride_unit(itemsize, aligned, shape, *strides)
    _, sizes, meta = cls_plan(shape, num_prefix, itemsize, unit)
    block_m, keys, stages = BLOCKS[itemsize, meta["BLOCK_D"]][unit == 1]
    meta = {**meta, "BLOCK_M": block_m, "KEYS": keys, "num_stages": stages}
    grid = batch * heads * (1 + triton.cdiv(tokens, block_m))
    sizes = [*sizes, *(x // unit for stride in strides for x in stride[:3])]
    return grid, batch * sizes[3] * LINE.value, sizes, meta


def cls_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, num_prefix: int
) -> tuple[Tensor, Tensor]:
    batch, tokens, _, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    scores = torch.empty((batch, tokens - num_prefix), dtype=torch.float32, device=q.device)
    if batch:
        scale = head_dim**-0.5 if scale is None else scale
        strides = (q.stride(), k.stride(), v.stride())
        aligned = (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 == 0
        grid, words, sizes, meta = _plan(q.shape, strides, aligned, num_prefix, q.itemsize)
        launch.run(
            _cls_attention_kernel,
            grid,
            q,
            q,
            k,
            v,
            out,
            scores,
            torch.empty(words, dtype=torch.int64, device=q.device),
            *sizes,
            scale,
            launch.new_tag(),
            SIGNED=is_signed(scale),
            **meta,
        )
    return out, scores
