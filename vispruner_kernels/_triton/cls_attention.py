"""`cls_attention`: the forward pass of FlashAttention and the CLS row, in one launch; or an
attention of PyTorch and `cls_scores`."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispruner_kernels._pytorch_attention import attention, chosen
from vispruner_kernels._triton import launch
from vispruner_kernels._triton.attention import (
    dot,
    dot_parts,
    is_signed,
    largest,
    load_part,
    split_scale,
    store_part,
    stride_unit,
)
from vispruner_kernels._triton.cls_row import INTEGERS, LINE, cls_chunk, cls_mean, cls_plan
from vispruner_kernels._triton.cls_scores import cls_scores
from vispruner_kernels._triton.rules import arrive, close_counter, read_counter

# (bytes of an element, head dimension up to): BLOCK_M, BLOCK_N and num_stages, as registers and
# shared memory allow. The first triple is for rows that begin at multiples of 16 bytes, the second
# for other rows, in which every element takes the registers of a pointer. The number of warps comes
# from cls_plan, as for cls_scores: it fixes the order of the sums of the CLS row, which must be the
# same in both kernels.
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
    D1: tl.constexpr,
    D2: tl.constexpr,
    D3: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[first : first + BLOCK_M] = softmax(scale * q k^T) v, for one head.

    Rows are multiplied in parts of D1, D2 and D3 elements, see head_dim_parts."""
    sign, c = split_scale(scale)
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < S
    # The logits are scaled, not q: a scaled q would be a computed tile, which every product would
    # read through registers and wait for.
    q_rows = q_ptr + offs_m.to(tl.int64)[:, None] * stride_qs * UNIT
    q1 = load_part(q_rows, mask_m, D, 0, D1)  # [BLOCK_M, D1]
    q2 = load_part(q_rows, mask_m, D, D1, D2)
    q3 = load_part(q_rows, mask_m, D, D1 + D2, D3)
    k_rows = k_ptr + offs_n.to(tl.int64)[:, None] * stride_ks * UNIT
    v_rows = v_ptr + offs_n.to(tl.int64)[:, None] * stride_vs * UNIT
    step = tl.full([], BLOCK_N * UNIT, tl.int64)

    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else 1], tl.float32)
    acc3 = tl.zeros([BLOCK_M, D3 if D3 > 0 else 1], tl.float32)
    for start in range(0, S, BLOCK_N):
        mask_n = offs_n < S - start
        k1 = load_part(k_rows, mask_n, D, 0, D1)  # [BLOCK_N, D1]
        k2 = load_part(k_rows, mask_n, D, D1, D2)
        k3 = load_part(k_rows, mask_n, D, D1 + D2, D3)
        x = dot_parts(q1, q2, q3, k1, k2, k3, D2, D3)  # [BLOCK_M, BLOCK_N]
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
        weight = weight.to(q1.dtype)
        v1 = load_part(v_rows, mask_n, D, 0, D1)
        acc1 = dot(weight, v1, acc1 * alpha[:, None])
        if D2 > 0:
            v2 = load_part(v_rows, mask_n, D, D1, D2)
            acc2 = dot(weight, v2, acc2 * alpha[:, None])
        if D3 > 0:
            v3 = load_part(v_rows, mask_n, D, D1 + D2, D3)
            acc3 = dot(weight, v3, acc3 * alpha[:, None])
        m_i = m_new
        k_rows += step * stride_ks
        v_rows += step * stride_vs

    out_rows = out_ptr + offs_m.to(tl.int64)[:, None] * stride_os
    store_part(out_rows, mask_m, _divided(acc1, l_i, q1.dtype), D, 0, D1)
    store_part(out_rows, mask_m, _divided(acc2, l_i, q1.dtype), D, D1, D2)
    store_part(out_rows, mask_m, _divided(acc3, l_i, q1.dtype), D, D1 + D2, D3)


@triton.jit
def _divided(acc, l_i, dtype: tl.constexpr):
    if dtype == tl.float32:
        out = tl.div_rn(acc, l_i[:, None])
    else:
        # Two roundings in float32 do not show in half types.
        out = acc * tl.div_rn(1.0, l_i)[:, None]
    return out.to(dtype)


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
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    D3: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out = attention; scores[image] = attention of query row 0 to each key, mean over heads.

    Grid: (images * heads * (1 + blocks of BLOCK_M queries)). The first programs of an image, one
      per head, compute the CLS row. They come first so that the mean over heads ends before the
      blocks do, and they bring the keys into L2.
    Scratch: 4 bytes per head and token, see cls_row.
    Moves: q, k, v and out once; k and v again per block, and k once more for the CLS row, from L2.
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
        scratch_ptr += image * lines * LINE
        word = read_counter(scratch_ptr)
        # Stages take registers where elements are loaded one by one.
        for chunk in tl.range(0, tl.cdiv(S, CHUNK), num_stages=1 if UNIT < 8 else 2):
            cls_chunk(
                q_ptr + head * stride_qh * UNIT,
                k_ptr + head * stride_kh * UNIT,
                scratch_ptr,
                stride_ks,
                S,
                H,
                scale,
                head,
                chunk,
                D,
                D1,
                D2,
                D3,
                UNIT,
                CHUNK,
            )
        if arrive(scratch_ptr, word, tag, H):
            scores_ptr += image * (S - num_prefix)
            cls_mean(
                scratch_ptr, scores_ptr, S, H, num_prefix, scale, CHUNK, BLOCK_C, BLOCK_H, BLOCK_S
            )
            close_counter(scratch_ptr)
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
            D1,
            D2,
            D3,
            UNIT,
            BLOCK_M,
            BLOCK_N,
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
    batch, tokens, heads, head_dim = shape
    unit = stride_unit(itemsize, aligned, shape, *strides)
    _, sizes, meta = cls_plan(shape, num_prefix, itemsize, unit)
    width = max(16, triton.next_power_of_2(head_dim))
    block_m, block_n, stages = BLOCKS[itemsize, width][unit == 1]
    meta = {**meta, "BLOCK_M": block_m, "BLOCK_N": block_n, "num_stages": stages}
    if itemsize == 4:
        # Without it some versions of the assembler give a thread too few registers, and spill.
        meta["maxnreg"] = 255
    grid = batch * heads * (1 + triton.cdiv(tokens, block_m))
    sizes = [*sizes, *(x // unit for stride in strides for x in stride[:3])]
    return grid, batch * sizes[3] * LINE.value, sizes, meta


def cls_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, num_prefix: int, kernel: str
) -> tuple[Tensor, Tensor]:
    batch, tokens, _, head_dim = q.shape
    aligned = (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16 == 0
    strides = (q.stride(), k.stride(), v.stride())
    if kernel != "fused":
        fits = stride_unit(q.itemsize, aligned, q.shape, *strides) > 1
        kernel = chosen(kernel, q, k, v, scale, fits)
        if kernel != "fused":
            out = attention(kernel, q, k, v, scale)
            return out, cls_scores(q, k, scale, num_prefix)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    scores = torch.empty((batch, tokens - num_prefix), dtype=torch.float32, device=q.device)
    if batch:
        scale = head_dim**-0.5 if scale is None else scale
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
