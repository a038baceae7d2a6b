"""The C++ core on the CPU: tensors to pointers, and one call into `vispruner_kernels._C`.

The arguments have been checked; what only a CPU can check, the values of offsets, is checked here.
Every allocation names its device: whoever calls from C++ may have another default.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from vispruner_kernels import _native, reference
from vispruner_kernels._checks import check_offsets
from vispruner_kernels._native import _C, arguments

INSTALLED = _native.INSTALLED
_CPU = torch.device("cpu")


def _empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    # Faster than torch.empty, and with a device that need not be parsed.
    return torch.empty_strided((rows, columns), (columns, 1), dtype=dtype, device=_CPU)


_Rule: TypeAlias = tuple[float, int, int, int, int, int]


def _rule(important_ratio: float, step: int, matching: str) -> _Rule:
    numbers = (
        arguments.MATCHINGS[matching],
        arguments.BLOCK_THREADS,
        arguments.EAGER_ROUNDS,
        arguments.COMPACT_TO,
    )
    return important_ratio, step, *numbers


def select(
    features: Tensor, scores: Tensor, keep: int, important_ratio: float, step: int, matching: str
) -> Tensor:
    batch, n, channels = features.shape
    indices = _empty(batch, keep, torch.int64)
    _C.select(
        arguments.tokens(features),
        arguments.tokens(scores),
        batch,
        n,
        channels,
        keep,
        _rule(important_ratio, step, matching),
        torch.get_num_threads(),
        indices.data_ptr(),
        0,
    )
    return indices


def prune(
    features: Tensor, scores: Tensor, keep: int, important_ratio: float, step: int, matching: str
) -> tuple[Tensor, Tensor]:
    batch, n, channels = features.shape
    indices = _empty(batch, keep, torch.int64)
    kept = torch.empty((batch, keep, channels), dtype=features.dtype, device="cpu")
    _C.select(
        arguments.tokens(features),
        arguments.tokens(scores),
        batch,
        n,
        channels,
        keep,
        _rule(important_ratio, step, matching),
        torch.get_num_threads(),
        indices.data_ptr(),
        kept.data_ptr(),
    )
    return kept, indices


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
    # Copies, so that what is checked is what is used, whoever writes to the originals meanwhile.
    cu_seqlens, cu_keep = (
        x.clone(memory_format=torch.contiguous_format) for x in (cu_seqlens, cu_keep)
    )
    check_offsets("select_varlen", total, cu_seqlens, max_seqlen, cu_keep, total_keep)
    indices = torch.zeros(total_keep, dtype=torch.int64, device="cpu")
    _C.select_varlen(
        arguments.packed(features),
        arguments.packed(scores),
        cu_seqlens.data_ptr(),
        cu_keep.data_ptr(),
        len(cu_seqlens) - 1,
        channels,
        _rule(important_ratio, step, matching),
        torch.get_num_threads(),
        indices.data_ptr(),
    )
    return indices


def select_topk(scores: Tensor, keep: int) -> Tensor:
    batch, n = scores.shape
    indices = _empty(batch, keep, torch.int64)
    _C.select_topk(
        arguments.tokens(scores), batch, n, keep, torch.get_num_threads(), indices.data_ptr()
    )
    return indices


def select_rows(scores: Tensor, width: int, rows: int) -> Tensor:
    batch, n = scores.shape
    indices = _empty(batch, rows * width, torch.int64)
    _C.select_rows(
        arguments.tokens(scores), batch, n, width, rows, torch.get_num_threads(), indices.data_ptr()
    )
    return indices


def _heads(x: Tensor) -> tuple[int, int, int, int]:
    """[B, S, H, D] or [total, H, D] as address, stride of an image, of a token, of a head."""
    *image, token, head, _ = x.stride()
    return x.data_ptr(), image[0] if image else 0, token, head


def _lse(lse: Tensor | None) -> tuple[int, int, int, int]:
    """[B, H, S] or [H, total] likewise; address 0 if there is none."""
    if lse is None:
        return 0, 0, 0, 0
    *image, head, token = lse.stride()
    return lse.data_ptr(), image[0] if image else 0, token, head


def _shape(
    q: Tensor, images: int, scale: float | None, num_prefix: int
) -> tuple[int, int, int, int, int, float, int]:
    *_, sequence, heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    return arguments.DTYPES[q.dtype], images, sequence, heads, head_dim, scale, num_prefix


def cls_scores(q: Tensor, k: Tensor, scale: float | None = None, num_prefix: int = 1) -> Tensor:
    scores = _empty(q.shape[0], q.shape[1] - num_prefix, torch.float32)
    _C.cls_scores(
        _heads(q),
        _heads(k),
        _shape(q, q.shape[0], scale, num_prefix),
        torch.get_num_threads(),
        scores.data_ptr(),
    )
    return scores


def cls_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, num_prefix: int = 1
) -> tuple[Tensor, Tensor]:
    scores = cls_scores(q, k, scale, num_prefix)
    return reference.attention(q, k, v, scale), scores


def received_scores(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    num_prefix: int = 0,
    lse: Tensor | None = None,
) -> Tensor:
    scores = _empty(q.shape[0], q.shape[1] - num_prefix, torch.float32)
    _C.received_scores(
        _heads(q),
        _heads(k),
        _lse(lse),
        _shape(q, q.shape[0], scale, num_prefix),
        torch.get_num_threads(),
        scores.data_ptr(),
    )
    return scores


def received_scores_varlen(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    total = q.shape[0]
    # A copy, so that what is checked is what is used.
    cu_seqlens = cu_seqlens.clone(memory_format=torch.contiguous_format)
    check_offsets("received_scores_varlen", total, cu_seqlens, max_seqlen)
    scores = torch.empty(total, dtype=torch.float32, device="cpu")
    _C.received_scores_varlen(
        _heads(q),
        _heads(k),
        _lse(lse),
        cu_seqlens.data_ptr(),
        total,
        _shape(q, len(cu_seqlens) - 1, scale, 0),
        torch.get_num_threads(),
        scores.data_ptr(),
    )
    return scores
