"""The CLS row of attention for `cls_scores` and `cls_attention`.

Both run the same code, so their scores have the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vispruner_kernels._triton.attention import check_arrivals, largest, split_scale
from vispruner_kernels._triton.rules import arrive, close_counter, read_counter

# Keys of a chunk, whose exponentials form one sum; heads and keys of a tile of the mean.
CHUNK, BLOCK_H, BLOCK_S = 256, 16, 256
# Bytes of k that a program reads at once.
TILE = 16384
# int64 words in a line of 128 bytes of scratch.
LINE = tl.constexpr(16)
# Integers that may change without another compilation.
INTEGERS = ("S", "H", "num_prefix", "lines", "tag")


@triton.jit
def _sum_pairwise(x):
    """Sums of the rows of x [N, D], adjacent elements first: layouts do not change the order."""
    for _ in tl.static_range(8):
        if x.shape[1] > 1:
            even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
            x = even + odd
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def _logits(
    q_ptr,
    k_ptr,
    logits_ptr,
    stride_ks,
    sign,
    begin,
    end,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """logits[begin:end] = sign * q . k, in float32."""
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    q = tl.load(q_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    # Without vectors, a second stage of loads takes more registers than it is worth.
    for start in tl.range(begin, end, BLOCK_N, num_stages=3 if UNIT > 1 else 1):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end
        k = tl.load(
            k_ptr + offs_n.to(tl.int64)[:, None] * stride_ks * UNIT + offs_d[None, :],
            mask=mask_n[:, None] & mask_d[None, :],
            other=0.0,
        ).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        tl.store(logits_ptr + offs_n, _sum_pairwise(k * q[None, :]) * sign, mask=mask_n)


@triton.jit
def _mean_of_heads(
    logits_ptr,
    sums_ptr,
    scores_ptr,
    c,
    S,
    H,
    num_prefix,
    ld,
    chunks,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """scores = the softmax of the logits, averaged over heads in float64, without the prefix."""
    # The largest logit of every head, and 1 / the sum of its exponentials.
    heads_ptr = sums_ptr + H * chunks * 2
    offs_c = tl.arange(0, BLOCK_C)
    for first in range(0, H, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        mask_c = (head < H)[:, None] & (offs_c < chunks)[None, :]
        part_ptr = sums_ptr + (head.to(tl.int64)[:, None] * chunks + offs_c[None, :]) * 2
        m_chunk = tl.load(part_ptr, mask=mask_c, other=-float("inf"))
        l_chunk = tl.load(part_ptr + 1, mask=mask_c, other=0.0)
        m_i = largest(m_chunk, 1)
        l_i = tl.sum(l_chunk * tl.exp2((m_chunk - m_i[:, None]) * c), axis=1)
        tl.store(heads_ptr + 2 * head, m_i, mask=head < H)
        tl.store(heads_ptr + 2 * head + 1, tl.div_rn(1.0, l_i), mask=head < H)
    tl.debug_barrier()
    for start in range(0, S, BLOCK_S):
        offs_n = start + tl.arange(0, BLOCK_S)
        mask_n = offs_n < S
        total = tl.zeros([BLOCK_S], tl.float64)
        for first in range(0, H, BLOCK_H):
            head = (first + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]  # [BLOCK_H, 1]
            mask_h = head < H
            m_i = tl.load(heads_ptr + 2 * head, mask=mask_h, other=0.0)
            factor = tl.load(heads_ptr + 2 * head + 1, mask=mask_h, other=0.0)
            row_ptr = logits_ptr + head * ld + offs_n[None, :]
            x = tl.load(row_ptr, mask=mask_h & (offs_n < ld)[None, :], other=0.0)
            weight = tl.exp2((x - m_i) * c) * factor  # [BLOCK_H, BLOCK_S]
            total += tl.sum(tl.where(mask_h, weight, 0.0).to(tl.float64), axis=0)
        tl.store(
            scores_ptr + offs_n - num_prefix,
            (total / H).to(tl.float32),
            mask=mask_n & (offs_n >= num_prefix),
        )


@triton.jit
def cls_row(
    q_ptr,
    k_ptr,
    scores_ptr,
    scratch_ptr,
    stride_ks,
    S,
    H,
    num_prefix,
    scale,
    tag,
    head,
    chunk,
    end_chunk,
    arrivals,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Compute the logits of query row 0 with the keys of chunks [chunk, end_chunk) of a head.

    The last of an image's `arrivals` programs writes the scores. Pointers are those of the image
    and, for q and k, of the head.

    Scratch: a counter in LINE words; logits [H, ld]; for every chunk the maximum and the sum of
      exponentials [H, chunks, 2]; for every head the maximum and 1 / the sum [H, 2].
    """
    ld = tl.cdiv(S, 16) * 16
    chunks = tl.cdiv(S, CHUNK)
    logits_ptr = (scratch_ptr + LINE).to(tl.pointer_type(tl.float32))
    sums_ptr = logits_ptr + H * ld.to(tl.int64)
    word = read_counter(scratch_ptr)
    sign, c = split_scale(scale)

    row_ptr = logits_ptr + head * ld
    end = tl.minimum(end_chunk * CHUNK, S)
    _logits(q_ptr, k_ptr, row_ptr, stride_ks, sign, chunk * CHUNK, end, D, UNIT, BLOCK_N, BLOCK_D)
    # Load the logits again, so that the layout of these sums does not depend on that of the keys.
    tl.debug_barrier()
    for i in range(chunk, end_chunk):
        offs_n = i * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(row_ptr + offs_n, mask=offs_n < ld, other=0.0)
        x = tl.where(offs_n < S, x, -float("inf"))
        m_i = largest(x, 0)
        weight = tl.exp2((x - tl.where(m_i == -float("inf"), 0.0, m_i)) * c)
        part_ptr = sums_ptr + (head * chunks + i) * 2
        tl.store(part_ptr, m_i)
        tl.store(part_ptr + 1, tl.sum(weight, axis=0))

    if arrive(scratch_ptr, word, tag, arrivals):
        _mean_of_heads(
            logits_ptr,
            sums_ptr,
            scores_ptr,
            c,
            S,
            H,
            num_prefix,
            ld,
            chunks,
            BLOCK_H,
            BLOCK_S,
            BLOCK_C,
        )
        close_counter(scratch_ptr)


def cls_plan(
    shape: torch.Size, num_prefix: int, itemsize: int, unit: int
) -> tuple[int, list[int], dict[str, Any]]:
    """Chunks of a head, [S, H, num_prefix, lines of scratch per image], cls_row's constants."""
    _, tokens, heads, head_dim = shape
    chunks = triton.cdiv(tokens, CHUNK)
    check_arrivals(heads * chunks)
    lines = 1 + triton.cdiv(heads * (triton.cdiv(tokens, 16) * 16 + 2 * chunks + 2), 32)
    block_d = max(16, triton.next_power_of_2(head_dim))
    meta = {
        "D": head_dim,
        "UNIT": unit,
        # Without vectors, every element takes the registers of a pointer.
        "BLOCK_N": min(CHUNK, TILE // (4 if unit == 1 else itemsize) // block_d),
        "BLOCK_D": block_d,
        "CHUNK": CHUNK,
        "BLOCK_C": max(4, triton.next_power_of_2(chunks)),
        "BLOCK_H": BLOCK_H,
        "BLOCK_S": BLOCK_S,
        "num_warps": 4 if itemsize == 2 and block_d <= 64 else 8,
        # Otherwise the compiler would choose which products to fuse.
        "enable_fp_fusion": False,
    }
    return chunks, [tokens, heads, num_prefix, lines], meta
