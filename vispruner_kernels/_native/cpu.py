"""The C++ core on CPU tensors: the operators call `vispruner_kernels._C`.

The arguments have been checked, except the values of offsets. This module checks those, because on
a CPU they need no copy from a device. Every allocation names its device: the default device of
Python also applies if TorchScript calls an operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vispruner_kernels import _native, reference
from vispruner_kernels._checks import check_offsets
from vispruner_kernels._native import _C, arguments

INSTALLED = _native.INSTALLED
_CPU = torch.device("cpu")


def _empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    # Faster than torch.empty, and the device is not a string to parse.
    return torch.empty_strided((rows, columns), (columns, 1), dtype=dtype, device=_CPU)


def _rule(important_ratio: float, step: int, matching: str) -> _C.SelectRule:
    return {
        "important_ratio": important_ratio,
        "step": step,
        "matching": arguments.MATCHINGS[matching],
        "block_threads": arguments.BLOCK_THREADS,
        "eager_rounds": arguments.EAGER_ROUNDS,
        "compact_to": arguments.COMPACT_TO,
    }


def select(
    features: Tensor, scores: Tensor, keep: int, important_ratio: float, step: int, matching: str
) -> Tensor:
    images, tokens, channels = features.shape
    indices = _empty(images, keep, torch.int64)
    _C.select(
        features=arguments.tokens(features),
        scores=arguments.tokens(scores),
        images=images,
        tokens=tokens,
        channels=channels,
        keep=keep,
        rule=_rule(important_ratio, step, matching),
        threads=torch.get_num_threads(),
        indices=indices.data_ptr(),
        kept=0,
    )
    return indices


def prune(
    features: Tensor, scores: Tensor, keep: int, important_ratio: float, step: int, matching: str
) -> tuple[Tensor, Tensor]:
    images, tokens, channels = features.shape
    indices = _empty(images, keep, torch.int64)
    kept = torch.empty((images, keep, channels), dtype=features.dtype, device="cpu")
    _C.select(
        features=arguments.tokens(features),
        scores=arguments.tokens(scores),
        images=images,
        tokens=tokens,
        channels=channels,
        keep=keep,
        rule=_rule(important_ratio, step, matching),
        threads=torch.get_num_threads(),
        indices=indices.data_ptr(),
        kept=kept.data_ptr(),
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
    # Copies: another thread may write to the originals between the check and the use.
    cu_seqlens, cu_keep = (
        x.clone(memory_format=torch.contiguous_format) for x in (cu_seqlens, cu_keep)
    )
    check_offsets("select_varlen", total, cu_seqlens, max_seqlen, cu_keep, total_keep)
    indices = torch.zeros(total_keep, dtype=torch.int64, device="cpu")
    _C.select_varlen(
        features=arguments.packed_tokens(features),
        scores=arguments.packed_tokens(scores),
        cu_seqlens=cu_seqlens.data_ptr(),
        cu_keep=cu_keep.data_ptr(),
        images=len(cu_seqlens) - 1,
        channels=channels,
        rule=_rule(important_ratio, step, matching),
        threads=torch.get_num_threads(),
        indices=indices.data_ptr(),
    )
    return indices


def select_topk(scores: Tensor, keep: int) -> Tensor:
    images, tokens = scores.shape
    indices = _empty(images, keep, torch.int64)
    _C.select_topk(
        scores=arguments.tokens(scores),
        images=images,
        tokens=tokens,
        keep=keep,
        threads=torch.get_num_threads(),
        indices=indices.data_ptr(),
    )
    return indices


def select_rows(scores: Tensor, width: int, rows: int) -> Tensor:
    images, tokens = scores.shape
    indices = _empty(images, rows * width, torch.int64)
    _C.select_rows(
        scores=arguments.tokens(scores),
        images=images,
        tokens=tokens,
        width=width,
        rows=rows,
        threads=torch.get_num_threads(),
        indices=indices.data_ptr(),
    )
    return indices


def _heads(x: Tensor) -> _C.Heads:
    """Describe q or k: [B, S, H, D], or packed [total, H, D]."""
    *image, token, head, _ = x.stride()
    return {
        "data": x.data_ptr(),
        "image_stride": image[0] if image else 0,
        "token_stride": token,
        "head_stride": head,
    }


def _lse(lse: Tensor | None) -> _C.LogSumExp:
    """Describe lse: [B, H, S], packed [H, total], or None."""
    if lse is None:
        return {"data": 0, "image_stride": 0, "head_stride": 0, "token_stride": 0}
    *image, head, token = lse.stride()
    return {
        "data": lse.data_ptr(),
        "image_stride": image[0] if image else 0,
        "head_stride": head,
        "token_stride": token,
    }


def _shape(q: Tensor, images: int, scale: float | None, num_prefix: int) -> _C.AttentionShape:
    *_, sequence, heads, head_dim = q.shape
    return {
        "dtype": arguments.DTYPES[q.dtype],
        "images": images,
        "sequence": sequence,
        "heads": heads,
        "head_dim": head_dim,
        "scale": head_dim**-0.5 if scale is None else scale,
        "num_prefix": num_prefix,
    }


def cls_scores(q: Tensor, k: Tensor, scale: float | None, num_prefix: int) -> Tensor:
    scores = _empty(q.shape[0], q.shape[1] - num_prefix, torch.float32)
    _C.cls_scores(
        q=_heads(q),
        k=_heads(k),
        shape=_shape(q, q.shape[0], scale, num_prefix),
        threads=torch.get_num_threads(),
        scores=scores.data_ptr(),
    )
    return scores


def cls_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, num_prefix: int
) -> tuple[Tensor, Tensor]:
    scores = cls_scores(q, k, scale, num_prefix)
    return reference.attention(q, k, v, scale), scores


def received_scores(
    q: Tensor,
    k: Tensor,
    scale: float | None,
    num_prefix: int,
    lse: Tensor | None,
) -> Tensor:
    scores = _empty(q.shape[0], q.shape[1] - num_prefix, torch.float32)
    _C.received_scores(
        q=_heads(q),
        k=_heads(k),
        lse=_lse(lse),
        shape=_shape(q, q.shape[0], scale, num_prefix),
        threads=torch.get_num_threads(),
        scores=scores.data_ptr(),
    )
    return scores


def received_scores_varlen(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None,
    lse: Tensor | None,
) -> Tensor:
    total = q.shape[0]
    # A copy: another thread may write to the original between the check and the use.
    cu_seqlens = cu_seqlens.clone(memory_format=torch.contiguous_format)
    check_offsets("received_scores_varlen", total, cu_seqlens, max_seqlen)
    scores = torch.empty(total, dtype=torch.float32, device="cpu")
    _C.received_scores_varlen(
        q=_heads(q),
        k=_heads(k),
        lse=_lse(lse),
        cu_seqlens=cu_seqlens.data_ptr(),
        total=total,
        shape=_shape(q, len(cu_seqlens) - 1, scale, 0),
        threads=torch.get_num_threads(),
        scores=scores.data_ptr(),
    )
    return scores
