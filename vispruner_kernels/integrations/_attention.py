"""Scores out of one layer of a model of transformers, by its own interface for attention.

The layer's attention module gets a config of its own that names our function, for as long as the
tower runs. Every other layer keeps the implementation it has, and no map of attention is made.
"""

from __future__ import annotations

import copy
import sys
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
class Reading:
    """What a run of a vision tower leaves for us."""

    needs: Needs | None
    num_prefix: int
    # Multiply a score, a mean over queries, by their number: windows of different sizes compare.
    sums: bool = False
    # In the order of calls.
    scores: list[Tensor] = field(default_factory=list)
    # The features.
    hidden: Any = None


# Of this thread. Others may run the model meanwhile and must not notice.
_READING: ContextVar[Reading | None] = ContextVar("vispruner_reading", default=None)
# The model is switched for one reading at a time.
_LOCK = threading.Lock()


@contextmanager
def reading(attention: Any, result: Reading) -> Iterator[Reading]:
    """Scores of what `attention` computes meanwhile, in this thread."""
    with _LOCK:
        token = _READING.set(result)
        config = attention.config
        try:
            if result.needs is not None:
                attention.config = copy.copy(config)
                attention.config._attn_implementation = _register(attention, config)
            yield result
        finally:
            attention.config = config
            _READING.reset(token)


@contextmanager
def watching(module: Any, result: Reading) -> Iterator[None]:
    """`result.hidden` is what `module` returns meanwhile, in this thread."""

    def note(module: Any, args: Any, output: Any) -> None:
        if _READING.get() is result:
            result.hidden = output[0] if isinstance(output, tuple) else output

    hook = module.register_forward_hook(note)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def standing_in(module: Any, result: Reading, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` calls `forward` meanwhile, in this thread."""
    own, original = module.__dict__.get("forward"), module.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        return (forward if _READING.get() is result else original)(*args, **kwargs)

    module.forward = call
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _register(attention: Any, config: Any) -> str:
    """The name of our attention function around the implementation that the module has."""
    name = config._attn_implementation or "eager"
    if name in ALL_ATTENTION_FUNCTIONS:
        base = ALL_ATTENTION_FUNCTIONS[name]
    else:
        # Each model has an eager function of its own.
        base = sys.modules[type(attention).__module__].eager_attention_forward
        name = f"eager_{type(attention).__name__}"
    # Models ask whether a name contains "flash" and then pack images for it.
    ALL_ATTENTION_FUNCTIONS.register(f"vispruner_{name}", partial(_attention, base, config))
    return f"vispruner_{name}"


class _AsBefore:
    """A module with the config it had: FlashAttention's function looks up its own name there."""

    def __init__(self, module: Any, config: Any) -> None:
        self._module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _attention(
    base: Callable[..., Any],
    config: Any,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """A transformers attention function: [B, H, S, D] -> [B, S, H, D]; scores to the reading."""
    result = _READING.get()
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if result is None or result.needs != "cls" or dropout or differentiable:
        before = _AsBefore(module, config)
        out, weights = base(
            before, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if result is None:
        return out, weights
    if attention_mask is not None:
        raise ValueError("the vision tower masks its attention: its scores are not supported")
    q, k = q.detach(), k.detach()
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if result.needs == "received" and cu_seqlens is not None:
        cu_seqlens = cu_seqlens.int()
        longest = int(kwargs["max_length_q"])
        scores = ops.received_scores_varlen(q[0], k[0], cu_seqlens, longest, scaling)
        if result.sums:
            counts = cu_seqlens.diff()
            scores = scores * counts.repeat_interleave(counts, output_size=len(scores))
    elif result.needs == "received":
        scores = ops.received_scores(q, k, scaling, result.num_prefix)
        if result.sums:
            scores = scores * q.shape[1]
    elif dropout or differentiable:
        scores = ops.cls_scores(q, k, scaling, result.num_prefix)
    else:
        out, scores = ops.cls_attention(q, k, v, scaling, result.num_prefix)
    result.scores.append(scores)
    return out, None
