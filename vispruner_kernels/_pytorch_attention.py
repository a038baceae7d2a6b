"""The kernels of `cls_attention` that are PyTorch's, and when they run on a GPU.

"fused" is our kernel, which finds the scores of the [CLS] row in the same launch. "sdpa" is
`scaled_dot_product_attention`, which chooses among PyTorch's kernels, and "cudnn" is its kernel of
cuDNN; `cls_scores` runs beside these two. The scores have the same bits with every kernel.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from vispruner_kernels import _tuned, reference


def attention(kernel: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Attention output [B, S, H, D], contiguous."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale < 0:
        # PyTorch's kernels may overflow with a negative scale.
        q, scale = -q, -scale
    if kernel == "sdpa":
        # Some of PyTorch's kernels read vectors from memory at any address.
        q, k, v = (x if x.data_ptr() % 16 == 0 else x.clone() for x in (q, k, v))
        return reference.attention(q, k, v, scale)
    if q.numel() == 0:
        return q.new_empty(q.shape)
    # The operator itself: to allow only this kernel in scaled_dot_product_attention, PyTorch would
    # change a setting of all threads.
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_bias=None,
        compute_log_sumexp=False,
        scale=scale,
    )[0]
    # Through a flat tensor, so that dimensions of size 1 get the strides of a contiguous tensor.
    return out.transpose(1, 2).flatten().view(q.shape)


def cudnn_serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's kernel of cuDNN takes these tensors, and is not switched off."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    # PyTorch asks the current device.
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        return torch.backends.cuda.can_use_cudnn_attention(params)


def chosen(kernel: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, fits: bool) -> str:
    """The kernel that runs on a GPU for the argument `kernel` of `cls_attention`: never "auto".

    "auto" is what tuned.json has for the GPU, the head dimension and the number of images. Our
    kernel runs instead for float32, for scales that are not usual, and where cuDNN does not serve:
    `fits` is false if rows do not begin at multiples of 16 bytes. Values in tensors do not matter.
    A layout that ran our kernel may do so again without this function (_triton/recording.py).
    """
    expanded = any(
        stride == 0 and size > 1
        for x in (q, k, v)
        for stride, size in zip(x.stride(), x.shape, strict=True)
    )
    fits = fits and not expanded
    if kernel == "auto":
        usual = scale is None or not is_unusual(scale)
        if not fits or not usual or q.dtype is torch.float32:
            return "fused"
        kernel = _tuned.attention(q.get_device(), q.shape[-1], q.shape[0])
        return "fused" if kernel == "cudnn" and not cudnn_serves(q, k, v) else kernel
    if kernel == "cudnn" and q.numel() and not (fits and cudnn_serves(q, k, v)):
        raise ValueError(
            f"cls_attention: kernel is 'cudnn', which {q.device.type} tensors of {q.dtype}, shape "
            f"{[*q.shape]} and these strides do not have here, or it is switched off in PyTorch; "
            "pass 'auto', 'sdpa' or 'fused'"
        )
    return kernel


def is_unusual(scale: float) -> bool:
    """As `is_signed` of _triton/attention.py, which needs Triton."""
    return not 2.0**-126 <= scale <= 1e38
