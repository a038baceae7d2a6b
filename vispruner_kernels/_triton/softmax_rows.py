"""The softmax of every query row, for `received_scores` without lse."""

from __future__ import annotations

import triton
import triton.language as tl

from vispruner_kernels._triton.attention import dot, largest, split_scale
from vispruner_kernels._triton.offsets import image_range

# Integers that may change without another compilation.
INTEGERS = (
    "max_seqlen",
    "H",
    "tokens",
    *(f"stride_{x}{y}" for x in "qk" for y in "bsh"),
    "stride_cu",
)


@triton.jit
def received_scratch(scratch_ptr, images, blocks, H, parts, tokens):
    """(counters, sums, rows) of `received_scores`, all of 8 bytes.

    Counters are int64 [images, blocks], partial sums are float64 [H, parts, tokens]. Rows are pairs
    of float32 [H, tokens], the largest logit and 1 / the sum of the exponentials. With lse there
    are no rows.
    """
    sums_ptr = scratch_ptr + images * blocks
    rows_ptr = sums_ptr + (H * parts).to(tl.int64) * tokens
    return scratch_ptr, sums_ptr.to(tl.pointer_type(tl.float64)), rows_ptr


@triton.jit
def load_rows(
    x_ptr,
    stride,
    first,
    S,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x[first : first + ROWS]; rows from S on are 0."""
    offs = first + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    return tl.load(
        x_ptr + offs.to(tl.int64)[:, None] * stride * UNIT + offs_d[None, :],
        mask=(offs < S)[:, None] & (offs_d < D)[None, :],
        other=0.0,
    )


@triton.jit(do_not_specialize=INTEGERS)
def _softmax_kernel(
    q_ptr,
    k_ptr,
    cu_ptr,
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
    """rows[query] = the largest logit of a query row, 1 / the sum of its exponentials.

    Grid: (images * heads * blocks of BLOCK queries).
    Scratch: 8 bytes per head and token, `rows` of `received_scratch`.
    Moves: q once, k once per block.
    Deterministic: one program per row, keys in order.

    VARLEN: max_seqlen is the largest number of tokens of an image; else max_seqlen is the number
    of tokens of every image.
    """
    blocks = tl.cdiv(max_seqlen, BLOCK)
    image = (tl.program_id(0) // (H * blocks)).to(tl.int64)
    images = tl.num_programs(0) // (H * blocks)
    head = (tl.program_id(0) // blocks % H).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK
    parts = tl.cdiv(max_seqlen, ROWS)
    _, _, rows_ptr = received_scratch(scratch_ptr, images, blocks, H, parts, tokens)
    q_ptr += (image * stride_qb + head * stride_qh) * UNIT
    k_ptr += (image * stride_kb + head * stride_kh) * UNIT
    if VARLEN:
        start, end = image_range(cu_ptr, stride_cu, image, tokens)
        start, end = start.to(tl.int64), end.to(tl.int64)
        S = tl.minimum(end - start, max_seqlen).to(tl.int32)
        q_ptr += start * stride_qs * UNIT
        k_ptr += start * stride_ks * UNIT
    else:
        start, S = image * max_seqlen, max_seqlen
    if first >= S:
        return

    sign, c = split_scale(scale)
    q = load_rows(q_ptr, stride_qs, first, S, D, UNIT, BLOCK, BLOCK_D)
    offs_n = tl.arange(0, STEP)
    offs_d = tl.arange(0, BLOCK_D)
    k_ptrs = k_ptr + offs_n.to(tl.int64)[None, :] * stride_ks * UNIT + offs_d[:, None]
    step = tl.full([], STEP * UNIT, tl.int64) * stride_ks
    # Online softmax, its sum with Kahan's compensation.
    m_i = tl.full([BLOCK], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK], tl.float32)
    # The rounding error that l_i contains.
    excess = tl.zeros([BLOCK], tl.float32)
    for n in range(0, S, STEP):
        mask_n = offs_n < S - n
        k = tl.load(k_ptrs, mask=mask_n[None, :] & (offs_d < D)[:, None], other=0.0)
        x = dot(q, k)  # [BLOCK, STEP]
        if SIGNED:
            x *= sign
        x = tl.where(mask_n[None, :], x, -float("inf"))
        m_new = tl.maximum(m_i, largest(x, 1))
        # While all logits are -inf, any finite shift will do.
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        alpha = tl.exp2((m_i - shift) * c)
        before = l_i * alpha
        part = tl.sum(tl.exp2((x - shift[:, None]) * c), axis=1) - excess * alpha
        l_i = before + part
        excess = (l_i - before) - part
        m_i = m_new
        k_ptrs += step

    offs_m = first + tl.arange(0, BLOCK)
    row_ptr = (rows_ptr + head * tokens + start + offs_m).to(tl.pointer_type(tl.float32))
    tl.store(row_ptr, m_i, mask=offs_m < S)
    tl.store(row_ptr + 1, tl.div_rn(1.0, l_i), mask=offs_m < S)
