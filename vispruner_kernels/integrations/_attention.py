"""Scores out of one layer of a model of transformers, by its own interface for attention.

The layer's attention module gets a config of its own that names our function, for as long as the
tower runs. Every other layer keeps the implementation it has, and no map of attention is made.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vispruner_kernels import ops
from vispruner_kernels.methods import Needs


@dataclass
class _Capture:
    needs: Needs
    num_prefix: int
    # Multiply a score, a mean over queries, by their number: windows of different sizes compare.
    sums: bool
    scores: list[Tensor] = field(default_factory=list)


_CAPTURE: ContextVar[_Capture | None] = ContextVar("vispruner_capture", default=None)
# One tower is read at a time; others may run meanwhile, also in the layer that is switched.
_SWITCH = threading.Lock()


def _attention(
    base: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """A transformers attention function: [B, H, S, D] -> [B, S, H, D], scores to the capture."""
    capture = _CAPTURE.get()
    if capture is not None and attention_mask is not None:
        raise ValueError("attention_mask in the vision tower: scores of masked attention")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if capture is None or capture.needs != "cls" or dropout or differentiable:
        out, weights = base(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if capture is None:
        return out, weights
    q, k = q.detach(), k.detach()
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if capture.needs == "received" and cu_seqlens is not None:
        cu_seqlens = cu_seqlens.int()
        longest = int(kwargs["max_length_q"])
        scores = ops.received_scores_varlen(q[0], k[0], cu_seqlens, longest, scaling)
        if capture.sums:
            counts = cu_seqlens.diff()
            scores = scores * counts.repeat_interleave(counts, output_size=len(scores))
    elif capture.needs == "received":
        scores = ops.received_scores(q, k, scaling, capture.num_prefix)
        if capture.sums:
            scores = scores * q.shape[1]
    elif dropout or differentiable:
        scores = ops.cls_scores(q, k, scaling, capture.num_prefix)
    else:
        out, scores = ops.cls_attention(q, k, v, scaling, capture.num_prefix)
    capture.scores.append(scores)
    return out, None


@contextmanager
def capturing(
    attention: Any, needs: Needs | None, num_prefix: int, sums: bool = False
) -> Iterator[list[Tensor]]:
    """Scores of what `attention` computes meanwhile, in the order of its calls."""
    if needs is None:
        yield []
        return
    capture = _Capture(needs, num_prefix, sums)
    with _SWITCH:
        config = attention.config
        base = config._attn_implementation
        # The eager function is private to each model. SDPA computes the same.
        base = base if base in ALL_ATTENTION_FUNCTIONS else "sdpa"
        # Models ask whether a name contains "flash" and then pack images for it.
        name = f"vispruner_{base}"
        ALL_ATTENTION_FUNCTIONS.register(name, partial(_attention, ALL_ATTENTION_FUNCTIONS[base]))
        attention.config = copy.copy(config)
        attention.config._attn_implementation = name
        token = _CAPTURE.set(capture)
        try:
            yield capture.scores
        finally:
            _CAPTURE.reset(token)
            attention.config = config
