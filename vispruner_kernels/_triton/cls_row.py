"""The CLS row of attention for `cls_scores` and `cls_attention`.

Both run the same code, so their scores have the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vispruner_kernels._triton.attention import (
    check_arrivals,
    dot,
    head_dim_parts,
    largest,
    load_part,
    split_scale,
)

# Heads and keys of a tile of the mean.
BLOCK_H, BLOCK_S = 16, 512
# The most keys of a chunk, whose exponentials form one sum, and the most bytes of its keys.
CHUNK, TILE = 128, 32768
# Rows of the smallest product of tensor cores.
ROWS = tl.constexpr(16)
# int64 words in a line of 128 bytes of scratch.
LINE = tl.constexpr(16)
# Integers that may change without another compilation.
INTEGERS = ("S", "H", "num_prefix", "lines", "tag")


@triton.jit
def _scratch(scratch_ptr, S, H):
    """(logits [H, ld], maxima and sums of chunks [H, chunks, 2], ld), after a counter in LINE
    words. All are float32."""
    ld = tl.cdiv(S, 16) * 16
    logits_ptr = (scratch_ptr + LINE).to(tl.pointer_type(tl.float32))
    return logits_ptr, logits_ptr + H * ld.to(tl.int64), ld


@triton.jit
def _add_products(
    x, q_ptr, k_rows, mask_n, D: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr
):
    """x + the products of elements [FIRST, FIRST + SIZE) of q and the keys.

    x is [CHUNK] for float32. For half types it is [ROWS, CHUNK], and all rows are alike, because
    tensor cores have no smaller product.
    """
    if SIZE > 0:
        k = load_part(k_rows, mask_n, D, FIRST, SIZE)  # [CHUNK, SIZE]
        if k.dtype == tl.float32:
            q_row = q_ptr + tl.zeros([1, 1], tl.int32)
            q = load_part(q_row, tl.full([1], True, tl.int1), D, FIRST, SIZE)
            x += tl.sum(q * k, axis=1)
        else:
            q_rows = q_ptr + tl.zeros([ROWS, 1], tl.int32)
            q = load_part(q_rows, tl.full([ROWS], True, tl.int1), D, FIRST, SIZE)
            x = dot(q, tl.trans(k), x)
    return x


@triton.jit
def _exact_sum(x):
    """The sum of up to 2**11 numbers in [0, 1], in any order: rounded to multiples of 2**-40, they
    add up without rounding in float64. So it does not matter which thread has which of them."""
    x = (x.to(tl.float64) + 6144.0) - 6144.0
    return tl.sum(x, axis=0).to(tl.float32)


@triton.jit
def cls_chunk(
    q_ptr,
    k_ptr,
    scratch_ptr,
    stride_ks,
    S,
    H,
    scale,
    head,
    chunk,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    D3: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Store the logits of query row 0 with a chunk of keys of one head, their maximum and the sum
    of their exponentials.

    Pointers are those of the image and, for q and k, of the head. The order of sums does not depend
    on alignment.
    """
    sign, c = split_scale(scale)
    offs_n = chunk * CHUNK + tl.arange(0, CHUNK)
    mask_n = offs_n < S
    if k_ptr.dtype.element_ty == tl.float32:
        # 0, but the compiler does not know: with vectors it would add in another order.
        k_ptr += (S < 0).to(tl.int32)
        x = tl.zeros([CHUNK], tl.float32)
    else:
        x = tl.zeros([ROWS, CHUNK], tl.float32)
    k_rows = k_ptr + offs_n.to(tl.int64)[:, None] * stride_ks * UNIT
    x = _add_products(x, q_ptr, k_rows, mask_n, D, 0, D1)
    x = _add_products(x, q_ptr, k_rows, mask_n, D, D1, D2)
    x = _add_products(x, q_ptr, k_rows, mask_n, D, D1 + D2, D3)
    if k_ptr.dtype.element_ty != tl.float32:
        x = tl.sum(tl.where((tl.arange(0, ROWS) == 0)[:, None], x, 0.0), axis=0)
    x *= sign

    logits_ptr, sums_ptr, ld = _scratch(scratch_ptr, S, H)
    tl.store(logits_ptr + head * ld + offs_n, x, mask=mask_n)
    x = tl.where(mask_n, x, -float("inf"))
    m_i = largest(x, 0)
    weight = tl.exp2((x - tl.where(m_i == -float("inf"), 0.0, m_i)) * c)
    part_ptr = sums_ptr + (head * tl.cdiv(S, CHUNK) + chunk) * 2
    tl.store(part_ptr, m_i)
    tl.store(part_ptr + 1, _exact_sum(weight))


@triton.jit
def cls_mean(
    scratch_ptr,
    scores_ptr,
    S,
    H,
    num_prefix,
    scale,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """scores = the softmax of the logits of an image, averaged over heads, without the prefix."""
    _, c = split_scale(scale)
    chunks = tl.cdiv(S, CHUNK)
    logits_ptr, sums_ptr, ld = _scratch(scratch_ptr, S, H)
    offs_c = tl.arange(0, BLOCK_C)
    for start in range(0, S, BLOCK_S):
        offs_n = start + tl.arange(0, BLOCK_S)
        total = tl.zeros([BLOCK_S], tl.float64)
        for first in range(0, H, BLOCK_H):
            head = (first + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]  # [BLOCK_H, 1]
            mask_h = head < H
            mask_c = mask_h & (offs_c < chunks)[None, :]
            part_ptr = sums_ptr + (head * chunks + offs_c[None, :]) * 2
            m_chunk = tl.load(part_ptr, mask=mask_c, other=-float("inf"))
            l_chunk = tl.load(part_ptr + 1, mask=mask_c, other=0.0)
            x = tl.load(
                logits_ptr + head * ld + offs_n[None, :],
                mask=mask_h & (offs_n < ld)[None, :],
                other=0.0,
            )  # [BLOCK_H, BLOCK_S]
            m_i = largest(m_chunk, 1)[:, None]
            l_i = tl.sum(l_chunk * tl.exp2((m_chunk - m_i) * c), axis=1)[:, None]
            weight = tl.exp2((x - m_i) * c) * tl.div_rn(1.0, l_i * H)
            total += tl.sum(tl.where(mask_h, weight, 0.0), axis=0)
        tl.store(
            scores_ptr + offs_n - num_prefix,
            total.to(tl.float32),
            mask=(offs_n >= num_prefix) & (offs_n < S),
        )


def cls_plan(
    shape: torch.Size, num_prefix: int, itemsize: int, unit: int
) -> tuple[int, list[int], dict[str, Any]]:
    """Chunks of a head, [S, H, num_prefix, lines of scratch per image] and constants."""
    _, tokens, heads, head_dim = shape
    sizes = head_dim_parts(head_dim)
    # A power of two.
    chunk = min(CHUNK, 1 << (TILE // (itemsize * sum(sizes))).bit_length() - 1)
    chunks = triton.cdiv(tokens, chunk)
    check_arrivals(heads * chunks)
    lines = 1 + triton.cdiv(heads * (triton.cdiv(tokens, 16) * 16 + 2 * chunks), 32)
    meta = {
        "D": head_dim,
        **dict(zip(("D1", "D2", "D3"), sizes, strict=True)),
        "UNIT": unit,
        "CHUNK": chunk,
        "BLOCK_C": max(4, triton.next_power_of_2(chunks)),
        "BLOCK_H": BLOCK_H,
        "BLOCK_S": BLOCK_S,
        "num_warps": 4 if itemsize == 2 and sum(sizes) <= 64 else 8,
        # Otherwise the compiler would choose which products to fuse.
        "enable_fp_fusion": False,
    }
    return chunks, [tokens, heads, num_prefix, lines], meta
