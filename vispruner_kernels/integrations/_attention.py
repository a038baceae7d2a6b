"""Scores out of one layer of a model of transformers, by its own interface for attention.

The layer's attention module gets a config of its own that names our function, for as long as a
tower runs that we read. Every other layer keeps the implementation it has, and no map of attention
is made, except for hooks of users on eager attention. A reading belongs to a thread: others may
read or run the same model meanwhile, also from hooks of the tower.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
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
    # The module that computes them.
    attention: Any = None
    # In the order of calls.
    scores: list[Tensor] = field(default_factory=list)
    # The features.
    hidden: Any = None
    # What modules call in place of their own forward.
    instead: dict[Any, Callable[..., Any]] = field(default_factory=dict)


# Of this thread.
_READING: ContextVar[Reading | None] = ContextVar("vispruner_reading", default=None)
# Held while a model is changed, never while it runs.
_LOCK = threading.Lock()
# How many readings need the change of a module, and what to undo after the last.
_CHANGED: dict[tuple[Any, Any], tuple[int, Callable[[], None]]] = {}
# On the config of an attention module that names our function: the config before.
_BEFORE = "_vispruner_before"


@contextmanager
def _changed(module: Any, change: Callable[[Any], Callable[[], None]]) -> Iterator[None]:
    """`change(module)` for as long as any reading needs it; it returns how to undo it."""
    key = module, change
    with _LOCK:
        count, undo = _CHANGED.get(key) or (0, change(module))
        _CHANGED[key] = count + 1, undo
    try:
        yield
    finally:
        with _LOCK:
            count, undo = _CHANGED.pop(key)
            if count > 1:
                _CHANGED[key] = count - 1, undo
            else:
                undo()


@contextmanager
def reading(attention: Any, result: Reading) -> Iterator[Reading]:
    """Scores of what `attention` computes meanwhile, in this thread."""
    result.attention = attention
    with ExitStack() as stack:
        if result.needs is not None:
            stack.enter_context(_changed(attention, _use_our_function))
        token = _READING.set(result)
        try:
            yield result
        finally:
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
    result.instead[module] = forward
    with _changed(module, _stand_in):
        yield


def _stand_in(module: Any) -> Callable[[], None]:
    own, original = vars(module).get("forward"), module.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        result = _READING.get()
        instead = None if result is None else result.instead.get(module)
        return (instead or original)(*args, **kwargs)

    def undo() -> None:
        del module.forward
        if own is not None:
            module.forward = own

    module.forward = call
    return undo


# Their hooks do not look at what a module computes.
_LIBRARIES = ("torch.distributed", "torch.utils", "torch._", "transformers.", "accelerate.")


def has_hooks(module: Any) -> bool:
    """Whether users put hooks on it, or on all modules."""
    every = torch.nn.modules.module
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        every._global_forward_hooks,
        every._global_forward_pre_hooks,
    )
    names = (getattr(hook, "__module__", None) or "" for group in hooks for hook in group.values())
    return any(not name.startswith(_LIBRARIES) for name in names)


def is_watched(module: Any) -> bool:
    """Whether users see or change what the module computes: by hooks, or by a forward of theirs."""
    ours = (module, _stand_in) in _CHANGED
    theirs = "forward" in vars(module) and not ours and not hasattr(module, "_hf_hook")
    return theirs or has_hooks(module)


def _use_our_function(attention: Any) -> Callable[[], None]:
    config = attention.config
    name = config._attn_implementation or "eager"
    # Models ask whether a name contains "flash" and then pack images for it.
    ours = f"vispruner_{name}"
    ALL_ATTENTION_FUNCTIONS.register(ours, _attention)
    switched = copy.copy(config)
    switched._attn_implementation = ours
    setattr(switched, _BEFORE, config)
    attention.config = switched

    def undo() -> None:
        attention.config = config

    return undo


def _own_function(module: Any, config: Any) -> Callable[..., Any]:
    """What the module would call without us."""
    name = config._attn_implementation or "eager"
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    # Each model has an eager function of its own.
    return sys.modules[type(module).__module__].eager_attention_forward


class _AsBefore:
    """A module with the config it had: FlashAttention's function looks up its own name there."""

    def __init__(self, module: Any, config: Any) -> None:
        self._module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """A transformers attention function: [B, H, S, D] -> [B, S, H, D]; scores to the reading."""
    result = _READING.get()
    wanted = result is not None and result.attention is module and result.needs
    # Another thread may have undone the change already.
    config = getattr(module.config, _BEFORE, module.config)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    # Users may look at the maps of eager attention.
    maps = (config._attn_implementation or "eager") == "eager" and has_hooks(module)
    fused = wanted == "cls" and not (dropout or differentiable or maps)
    out, weights = None, None
    if not fused:
        out, weights = _own_function(module, config)(
            _AsBefore(module, config),
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            **kwargs,
        )
    if not result or not wanted:
        return out, weights
    if attention_mask is not None:
        raise ValueError("the vision tower masks its attention: its scores are not supported")
    q, k = q.detach(), k.detach()
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if wanted == "received" and cu_seqlens is not None:
        cu_seqlens = cu_seqlens.int()
        longest = int(kwargs["max_length_q"])
        scores = ops.received_scores_varlen(q[0], k[0], cu_seqlens, longest, scaling)
        if result.sums:
            counts = cu_seqlens.diff()
            scores = scores * counts.repeat_interleave(counts, output_size=len(scores))
    elif wanted == "received":
        scores = ops.received_scores(q, k, scaling, result.num_prefix)
        if result.sums:
            scores = scores * q.shape[1]
    elif fused:
        out, scores = ops.cls_attention(q, k, v, scaling, result.num_prefix)
    else:
        scores = ops.cls_scores(q, k, scaling, result.num_prefix)
    result.scores.append(scores)
    return out, weights
