"""The CUDA kernels of the C++ core: one launch on the current stream of the tensors' device.

The arguments have been checked. Nothing is allocated but the output and one piece of scratch.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vispruner_kernels import _native
from vispruner_kernels._native import _C, arguments


def _reason() -> str:
    """Why the kernels cannot run, or nothing."""
    if torch.version.hip:
        return "not for HIP devices"
    if not _native.INSTALLED:
        return "not built, as the native core"
    if not hasattr(_C, "cuda_select"):
        return f"not built; install nvcc and {_native.reinstall('VISPRUNER_KERNELS_CUDA')}"
    return ""


REASON = _reason()
INSTALLED = not REASON


@functools.lru_cache(maxsize=1024)
def _scratch_bytes(images: int, tokens: int, total: int, removes: bool) -> int:
    return _C.cuda_select_scratch(images, tokens, total, removes)


def _device_and_stream(x: Tensor) -> tuple[int, int]:
    """The current stream as a number, without the objects that torch.cuda makes around it."""
    device = x.get_device()
    return device, torch._C._cuda_getCurrentRawStream(device)


def _select(
    features: Tensor,
    scores: Tensor,
    keep: int,
    important_ratio: float,
    step: int,
    matching: str,
    kept: int,
) -> Tensor:
    batch, n, channels = features.shape
    device = features.device
    # Faster than torch.empty.
    out = torch.empty_strided((batch, keep), (keep, 1), dtype=torch.int64, device=device)
    if batch == 0:
        return out
    important = int(keep * important_ratio)
    size = _scratch_bytes(batch, n, batch * n, important < keep < n)
    scratch = torch.empty_strided((size,), (1,), dtype=torch.int8, device=device)
    _C.cuda_select(
        arguments.tokens(features),
        arguments.tokens(scores),
        (0, 0),
        (0, 0),
        batch,
        n,
        channels,
        batch * n,
        keep,
        important,
        (important_ratio, min(step, n), arguments.MATCHINGS[matching], arguments.EAGER_ROUNDS),
        out.data_ptr(),
        kept,
        scratch.data_ptr(),
        *_device_and_stream(out),
    )
    return out


def select(
    features: Tensor, scores: Tensor, keep: int, important_ratio: float, step: int, matching: str
) -> Tensor:
    return _select(features, scores, keep, important_ratio, step, matching, 0)


def prune(
    features: Tensor, scores: Tensor, keep: int, important_ratio: float, step: int, matching: str
) -> tuple[Tensor, Tensor]:
    size = features.shape[0], keep, features.shape[2]
    kept = torch.empty(size, dtype=features.dtype, device=features.device)
    rule = important_ratio, step, matching
    return kept, _select(features, scores, keep, *rule, kept.data_ptr())


def select_varlen(
    features: Tensor,
    scores: Tensor,
    cu_seqlens: Tensor,
    cu_keep: Tensor,
    max_seqlen: int,
    total_keep: int,
    important_ratio: float,
    step: int,
    matching: str,
) -> Tensor:
    total, channels = features.shape
    images, longest = len(cu_seqlens) - 1, min(max_seqlen, total)
    out = torch.empty(total_keep, dtype=torch.int64, device=features.device)
    if total_keep == 0:
        return out
    if images == 0 or longest == 0:
        return out.zero_()
    size = _scratch_bytes(images, longest, total, True)
    scratch = torch.empty_strided((size,), (1,), dtype=torch.int8, device=features.device)
    _C.cuda_select(
        arguments.packed(features),
        arguments.packed(scores),
        (cu_seqlens.data_ptr(), cu_seqlens.stride(0)),
        (cu_keep.data_ptr(), cu_keep.stride(0)),
        images,
        longest,
        channels,
        total,
        total_keep,
        0,
        (
            important_ratio,
            min(step, longest),
            arguments.MATCHINGS[matching],
            arguments.EAGER_ROUNDS,
        ),
        out.data_ptr(),
        0,
        scratch.data_ptr(),
        *_device_and_stream(out),
    )
    return out
