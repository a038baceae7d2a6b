"""Packed batches: the range of each image, and the outputs that no image owns."""

from __future__ import annotations

import triton
import triton.language as tl

# Offsets read and outputs zeroed per step.
OFFSETS, ZEROS = tl.constexpr(128), tl.constexpr(1024)


@triton.jit
def image_range(offsets_ptr, stride, image, end):
    """(offsets[image], offsets[image + 1]), clamped to ascend within [0, end].

    A GPU cannot raise: an offset below an earlier one counts as the largest earlier one. So images
    are disjoint and within the tensors for any offsets.
    """
    largest_offset = tl.zeros([OFFSETS], tl.int32)
    for first in range(0, image + 1, OFFSETS):
        offs = first + tl.arange(0, OFFSETS)
        offset = tl.load(offsets_ptr + offs.to(tl.int64) * stride, mask=offs <= image, other=0)
        largest_offset = tl.maximum(largest_offset, offset)
    begin = tl.max(largest_offset, axis=0)
    following = tl.load(offsets_ptr + (image + 1).to(tl.int64) * stride)
    return tl.minimum(begin, end), tl.minimum(tl.maximum(begin, following), end)


@triton.jit
def zero_gaps(out_ptr, image, images, begin, filled, end, size):
    """Zero the outputs of [0, size) that no image fills, by one program per image.

    The image owns out[begin:end] and fills out[begin:filled]. The first image also zeroes the
    outputs before it, the last one those after it.
    """
    _zero(out_ptr, 0, tl.where(image == 0, begin, 0))
    _zero(out_ptr, filled, end)
    _zero(out_ptr, tl.where(image == images - 1, end, size), size)


@triton.jit
def _zero(out_ptr, begin, end):
    for first in range(begin, end, ZEROS):
        offs = first + tl.arange(0, ZEROS)
        tl.store(out_ptr + offs, tl.zeros([ZEROS], out_ptr.dtype.element_ty), mask=offs < end)
