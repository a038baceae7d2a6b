"""Fixed-point cosine similarity of two blocks of tokens (docs/contract.md, section 2, step 3)."""

from __future__ import annotations

import triton
import triton.language as tl

from vispruner_kernels._triton.rules import INT32_MAX, INT32_MIN, float_bits, ordered

# The bits of 1e-30 and of infinity. As integers, magnitudes keep their order and NaN is above
# infinity.
MIN_MAGNITUDE_BITS = tl.constexpr(0x0DA24260)
INFINITY_BITS = tl.constexpr(0x7F800000)
FIXED_POINT_MAX = tl.constexpr(16256.0)


@triton.jit
def _fixed_point_scale(row_ptr, mask_n, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """The factor of each token's features; 0 if the token has no usable magnitude."""
    magnitude = tl.zeros([BLOCK_N, BLOCK_C], tl.int32)
    # In a loop without tl.dot, Triton prefetches only if num_stages is given here.
    for channel in tl.range(0, C, BLOCK_C, num_stages=4):
        offs_c = channel + tl.arange(0, BLOCK_C)
        mask = mask_n[:, None] & (offs_c < C)[None, :]
        x = tl.load(row_ptr[:, None] + offs_c[None, :], mask=mask, other=0.0)
        magnitude = tl.maximum(magnitude, float_bits(x) & INT32_MAX)
    bits = tl.max(magnitude, axis=1)  # [BLOCK_N]
    usable = (bits >= MIN_MAGNITUDE_BITS) & (bits < INFINITY_BITS)
    magnitude = tl.where(usable, bits, INFINITY_BITS).to(tl.float32, bitcast=True)
    # 16256 / infinity is 0.
    return tl.div_rn(tl.full([BLOCK_N], FIXED_POINT_MAX, tl.float32), magnitude)


@triton.jit
def _fixed_point(row_ptr, mask_n, scale, channel, C, BLOCK_C: tl.constexpr):
    """Integers in [-16256, 16256], int32 [BLOCK_N, BLOCK_C]."""
    offs_c = channel + tl.arange(0, BLOCK_C)
    mask = mask_n[:, None] & (offs_c < C)[None, :]
    x = tl.load(row_ptr[:, None] + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    usable = scale > 0.0
    # Multiplying by scale 0 does not suffice: infinity times 0 is NaN.
    return (tl.where(usable[:, None], x, 0.0) * scale[:, None]).to(tl.int32)


@triton.jit
def _reciprocal_norm(square):
    """1 / sqrt of int64 sums of squares, both steps correctly rounded in float32; 0 for 0."""
    root = tl.sqrt_rn(tl.maximum(square, 1).to(tl.float32))
    return tl.where(square > 0, tl.div_rn(tl.full(root.shape, 1.0, tl.float32), root), 0.0)


@triton.jit
def similarity(
    row_a_ptr,
    mask_a,
    row_b_ptr,
    mask_b,
    C,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Similarities, float32 [BLOCK_N, BLOCK_N], from pointers to the tokens' features [BLOCK_N].

    With q = 128 * hi + lo both halves are int8, so int32 sums on tensor cores are exact.
    """
    scale_a = _fixed_point_scale(row_a_ptr, mask_a, C, BLOCK_N, BLOCK_C)
    scale_b = _fixed_point_scale(row_b_ptr, mask_b, C, BLOCK_N, BLOCK_C)
    high = tl.zeros([BLOCK_N, BLOCK_N], tl.int32)
    # One sum of both mixed products would be slower: Triton gives two tl.dot in a row different
    # layouts, and converts the sum between them.
    high_low = tl.zeros([BLOCK_N, BLOCK_N], tl.int32)
    low_high = tl.zeros([BLOCK_N, BLOCK_N], tl.int32)
    low = tl.zeros([BLOCK_N, BLOCK_N], tl.int32)
    square_a = tl.zeros([BLOCK_N], tl.int64)
    square_b = tl.zeros([BLOCK_N], tl.int64)
    for channel in range(0, C, BLOCK_C):
        a = _fixed_point(row_a_ptr, mask_a, scale_a, channel, C, BLOCK_C)
        b = _fixed_point(row_b_ptr, mask_b, scale_b, channel, C, BLOCK_C)
        a_hi, a_lo = a >> 7, a & 127
        b_hi, b_lo = b >> 7, b & 127
        # BLOCK_C products of 7 by 14 bits fit int32.
        square_a += (tl.sum(a_hi * a, axis=1).to(tl.int64) << 7) + tl.sum(a_lo * a, axis=1)
        square_b += (tl.sum(b_hi * b, axis=1).to(tl.int64) << 7) + tl.sum(b_lo * b, axis=1)
        a_hi, a_lo = a_hi.to(tl.int8), a_lo.to(tl.int8)
        b_hi, b_lo = tl.trans(b_hi.to(tl.int8)), tl.trans(b_lo.to(tl.int8))
        high = tl.dot(a_hi, b_hi, high, out_dtype=tl.int32)
        high_low = tl.dot(a_hi, b_lo, high_low, out_dtype=tl.int32)
        low_high = tl.dot(a_lo, b_hi, low_high, out_dtype=tl.int32)
        low = tl.dot(a_lo, b_lo, low, out_dtype=tl.int32)
    # |mixed| <= C * 2 * 127**2, which fits int32 up to the 65536 channels that the check allows.
    mixed = high_low + low_high
    gram = (high.to(tl.int64) << 14) + (mixed.to(tl.int64) << 7) + low.to(tl.int64)
    r_a, r_b = _reciprocal_norm(square_a), _reciprocal_norm(square_b)
    return gram.to(tl.float32) * (r_a[:, None] * r_b[None, :])


@triton.jit
def store_tile(sim_ptr, ld, sim, block_a, block_b, N, BLOCK_N: tl.constexpr):
    """Store ordered keys of `sim` [BLOCK_N, BLOCK_N] in both halves of the symmetric sim [N, ld].

    INT32_MIN is on the diagonal and in the padding of a row.
    """
    offs_a = block_a * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_b = block_b * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_a, mask_b = offs_a < N, offs_b < N
    mask = mask_a[:, None] & mask_b[None, :] & (offs_a[:, None] != offs_b[None, :])
    key = tl.where(mask, ordered(sim), INT32_MIN)
    # Offsets within a tile fit int32.
    rows, columns = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_N)[None, :]
    corner_a, corner_b = block_a.to(tl.int64) * BLOCK_N, block_b.to(tl.int64) * BLOCK_N
    tile_ptr = sim_ptr + corner_a * ld + corner_b + rows * ld + columns
    tl.store(tile_ptr, key, mask=mask_a[:, None] & (offs_b < ld)[None, :])
    tile_ptr = sim_ptr + corner_b * ld + corner_a + columns * ld + rows
    tl.store(tile_ptr, key, mask=mask_b[None, :] & (offs_a < ld)[:, None])
