"""Shared by the attention kernels: scale, products, maxima, strides and the limit of programs."""

from __future__ import annotations

import triton
import triton.language as tl

from vispruner_kernels._triton import launch
from vispruner_kernels._triton.rules import COUNT_MASK

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(launch.INTERPRETED)
# The interpreter computes products in this type; tl.dot takes float64 from Triton 3.5 on.
WIDE = tl.constexpr(tl.float32 if triton.__version__.startswith("3.4.") else tl.float64)


@triton.jit
def split_scale(scale):
    """(sign, c) with c > 0 and exp(scale * x) = 2 ** (c * sign * x).

    So the largest logit is the largest sign * x. sign is 1 or -1; 2 or -2 for |scale| above 1e38,
    so that c does not overflow; 0 if scale is 0 in float32, where a non-finite x gives NaN. It is 1
    unless `is_signed`.
    """
    # The interpreter would treat a subnormal number as a float64.
    scale = tl.cast(scale, tl.float32)
    size = tl.abs(scale)
    unit = tl.where(size > 1e38, 2.0, 1.0)
    sign = tl.where(scale < 0, -unit, tl.where(scale > 0, unit, 0.0))
    return sign, tl.where(size > 0, tl.where(size > 1e38, 0.5 * size, size), 1.0) * LOG2E


def is_signed(scale: float) -> bool:
    """Whether the sign of `split_scale` may differ from 1: also for a scale below float32's normal
    range, because it may be 0 there."""
    return not 2.0**-126 <= scale <= 1e38


@triton.jit
def largest(x, axis: tl.constexpr):
    """tl.max that ignores NaN. A NaN still reaches the result, because its exponential is NaN."""
    if INTERPRETED:
        # numpy warns about rows of only NaN.
        x = tl.where(x == x, x, -float("inf"))
    return tl.max(x, axis=axis)


@triton.jit
def dot(a, b, acc=None):
    """a @ b (+ acc) in float32. Half types use tensor cores, float32 does not use tf32."""
    if INTERPRETED:
        # numpy has no bfloat16, and the order of its sums depends on the shape of the tile.
        x = tl.dot(a.to(WIDE), b.to(WIDE), out_dtype=WIDE).to(tl.float32)
        return x if acc is None else acc + x
    return tl.dot(a, b, acc, input_precision="ieee")


def check_arrivals(arrivals: int) -> None:
    if arrivals > COUNT_MASK.value:
        raise ValueError(
            f"vispruner_kernels: q needs {arrivals} programs that share a counter, "
            f"expected at most {COUNT_MASK.value}; call it with fewer heads at a time"
        )


def stride_unit(
    itemsize: int, aligned: bool, shape: tuple[int, ...], *strides: tuple[int, ...]
) -> int:
    """The number of elements in 16 bytes if every row begins at a multiple of 16 bytes, else 1.

    Kernels get strides in this unit. Triton itself detects only strides that are multiples of 16
    elements.
    """
    unit = 16 // itemsize
    # The stride of a dimension of size 1 does not matter.
    sizes = shape[:-1]
    odd = any(x % unit for row in strides for x, n in zip(row, sizes, strict=False) if n > 1)
    return 1 if odd or not aligned else unit
