"""The CUDA kernels of the C++ core: one launch on the current stream of the tensors' device.

The arguments have been checked. Each call allocates its outputs and one scratch buffer.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vispruner_kernels import _native, _tuned
from vispruner_kernels._native import _C, arguments


def _reason() -> str:
    """Why the kernels cannot run; empty if they can."""
    if torch.version.hip:
        return "not for HIP devices"
    if not _native.INSTALLED:
        return "not built, because the C++ core is not built"
    if not hasattr(_C, "cuda_select"):
        return f"not built; install nvcc and {_native.reinstall('VISPRUNER_KERNELS_CUDA')}"
    return ""


REASON = _reason()
INSTALLED = not REASON


# csrc/cuda/variants.h. All give the same bits.
VARIANTS: tuple[_C.Variant, ...] = getattr(_C, "cuda_variants", ())
# The number of a variant, counted from 1, for all calls. 0 leaves the choice to the core, and None
# to tuned.json. Tests and `benchmarks.tune` set it.
VARIANT: int | None = None
_NO_OFFSETS: _C.Offsets = {"data": 0, "stride": 0}


def _offsets(x: Tensor) -> _C.Offsets:
    return {"data": x.data_ptr(), "stride": x.stride(0)}


@functools.lru_cache(maxsize=1024)
def _scratch_bytes(images: int, tokens: int, total: int, removes: bool) -> int:
    return _C.cuda_select_scratch(images=images, tokens=tokens, total=total, removes=removes)


@functools.lru_cache(maxsize=1024)
def _tuned_variant(device: int, images: int, tokens: int, matching: str) -> int:
    return _tuned.number("native", VARIANTS, device, images, tokens, matching)


def _device_and_stream(x: Tensor) -> tuple[int, int]:
    """The device's index and its current stream; faster than a `torch.cuda.Stream`."""
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
    images, tokens, channels = features.shape
    device = features.device
    # Faster than torch.empty.
    out = torch.empty_strided((images, keep), (keep, 1), dtype=torch.int64, device=device)
    if images == 0:
        return out
    important = int(keep * important_ratio)
    size = _scratch_bytes(images, tokens, images * tokens, important < keep < tokens)
    scratch = torch.empty_strided((size,), (1,), dtype=torch.int8, device=device)
    device_index, stream = _device_and_stream(out)
    variant = VARIANT
    if variant is None:
        variant = _tuned_variant(device_index, images, tokens, matching)
    _C.cuda_select(
        call={
            "features": arguments.tokens(features),
            "scores": arguments.tokens(scores),
            "cu_seqlens": _NO_OFFSETS,
            "cu_keep": _NO_OFFSETS,
            "images": images,
            "tokens": tokens,
            "channels": channels,
            "total": images * tokens,
            "keep": keep,
            "important": important,
            "total_keep": 0,
            "important_ratio": important_ratio,
            "step": min(step, tokens),
            "matching": arguments.MATCHINGS[matching],
            "eager_rounds": arguments.EAGER_ROUNDS,
            "variant": variant,
            "indices": out.data_ptr(),
            "kept": kept,
            "scratch": scratch.data_ptr(),
        },
        device=device_index,
        stream=stream,
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
    device_index, stream = _device_and_stream(out)
    variant = VARIANT
    if variant is None:
        variant = _tuned_variant(device_index, images, longest, matching)
    _C.cuda_select(
        call={
            "features": arguments.packed_tokens(features),
            "scores": arguments.packed_tokens(scores),
            "cu_seqlens": _offsets(cu_seqlens),
            "cu_keep": _offsets(cu_keep),
            "images": images,
            "tokens": longest,
            "channels": channels,
            "total": total,
            "keep": 0,
            "important": 0,
            "total_keep": total_keep,
            "important_ratio": important_ratio,
            "step": min(step, longest),
            "matching": arguments.MATCHINGS[matching],
            "eager_rounds": arguments.EAGER_ROUNDS,
            "variant": variant,
            "indices": out.data_ptr(),
            "kept": 0,
            "scratch": scratch.data_ptr(),
        },
        device=device_index,
        stream=stream,
    )
    return out
