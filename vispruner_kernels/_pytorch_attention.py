"""The kernels of `cls_attention` that are PyTorch's, and when they run.

"fused" is our kernel on GPUs, which finds the scores of the [CLS] row in the same launch. "sdpa" is
`scaled_dot_product_attention`, which chooses among PyTorch's kernels, and "cudnn" is its kernel of
cuDNN; `cls_scores` runs beside these two. The scores have the same bits with every kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vispruner_kernels import _tuned, reference

# Scales outside of this range run in our kernel, which is made for any.
USUAL_SCALES = 2.0**-126, 1e38


def attention(kernel: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Attention output [B, S, H, D], contiguous."""
    if kernel == "sdpa":
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
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )[0]
    return out.transpose(1, 2).contiguous()


def cudnn_serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's kernel of cuDNN takes these tensors, and is not switched off."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    return torch.backends.cuda.can_use_cudnn_attention(params)


def chosen(kernel: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, fits: bool) -> str:
    """The kernel that runs on a GPU for the argument `kernel` of `cls_attention`: never "auto".

    "auto" is what tuned.json has for the GPU, the head dimension and the number of images. Our
    kernel runs where `fits` is false (rows do not begin at multiples of 16 bytes), and for other
    scales. Values in tensors do not matter.
    """
    if kernel == "auto":
        if not fits or q.dtype is torch.float32:
            return "fused"
        if scale is not None and not USUAL_SCALES[0] <= scale <= USUAL_SCALES[1]:
            return "fused"
        kernel = _tuned.attention(q.get_device(), q.shape[-1], q.shape[0])
        return "fused" if kernel == "cudnn" and not cudnn_serves(q, k, v) else kernel
    if kernel == "cudnn" and q.numel() and not cudnn_serves(q, k, v):
        raise ValueError(
            f"cls_attention: kernel is 'cudnn', which {q.device.type} tensors of {q.dtype} and "
            f"head dimension {q.shape[-1]} do not have here; pass 'auto', 'sdpa' or 'fused'"
        )
    return kernel
