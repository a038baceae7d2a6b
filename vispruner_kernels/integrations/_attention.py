"""Capture scores and features from one layer of a vision tower while it runs.

transformers finds a layer's attention function by a name in the layer's config. While a capture
is active, the attention module of that one layer has a config that names our function. All other
layers keep their implementation. Our function computes the scores without an attention map. Hooks
of users on eager attention still receive the layer's own map.

A capture belongs to one thread. Other threads, and hooks in the tower, can prune or run the same
model at the same time.
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
class Capture:
    """Scores and features captured in one run of a vision tower."""

    needs: Needs | None
    num_prefix: int
    # Multiply received scores, which are means over queries, by the number of queries. Then scores
    # from attention windows of different sizes are comparable.
    sums: bool = False
    # The attention module that the scores come from.
    attention: Any = None
    # One tensor for each call of the attention function.
    scores: list[Tensor] = field(default_factory=list)
    # The features.
    hidden: Any = None
    # Functions that modules call instead of their own forward.
    forwards: dict[Any, Callable[..., Any]] = field(default_factory=dict)


# The active capture of this thread.
_CAPTURE: ContextVar[Capture | None] = ContextVar("vispruner_capture", default=None)
# Held while a model is changed, never while it runs.
_LOCK = threading.Lock()
# For each change of a module: how many captures need it, and the function that undoes it.
_CHANGED: dict[tuple[Any, Any], tuple[int, Callable[[], None]]] = {}
# Name of an attribute. A config that selects our function keeps the original config in it.
_ORIGINAL_CONFIG = "_vispruner_original_config"


@contextmanager
def _changed(module: Any, change: Callable[[Any], Callable[[], None]]) -> Iterator[None]:
    """Keep `change(module)` in effect while any capture needs it. `change` returns its undo."""
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
def capture_scores(attention: Any, result: Capture) -> Iterator[Capture]:
    """Inside the context, this thread's calls of `attention` add scores to `result`."""
    result.attention = attention
    with ExitStack() as stack:
        if result.needs is not None:
            stack.enter_context(_changed(attention, _use_our_attention))
        token = _CAPTURE.set(result)
        try:
            yield result
        finally:
            _CAPTURE.reset(token)


@contextmanager
def capture_output(module: Any, result: Capture) -> Iterator[None]:
    """Inside the context, `result.hidden` becomes the output of `module` in this thread."""

    def note(module: Any, args: Any, output: Any) -> None:
        if _CAPTURE.get() is result:
            result.hidden = output[0] if isinstance(output, tuple) else output

    hook = module.register_forward_hook(note)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def replace_forward(module: Any, result: Capture, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the context, a call of `module` in this thread runs the given `forward`."""
    result.forwards[module] = forward
    with _changed(module, _redirect_forward):
        yield


def _redirect_forward(module: Any) -> Callable[[], None]:
    own, original = vars(module).get("forward"), module.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        result = _CAPTURE.get()
        replacement = None if result is None else result.forwards.get(module)
        return (replacement or original)(*args, **kwargs)

    def undo() -> None:
        del module.forward
        if own is not None:
            module.forward = own

    module.forward = call
    return undo


# Hooks of these libraries do not read or change the output of a module.
_LIBRARIES = ("torch.distributed", "torch.utils", "torch._", "transformers.", "accelerate.")


def has_hooks(module: Any) -> bool:
    """Whether a user registered hooks on the module, or on all modules."""
    every = torch.nn.modules.module
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        every._global_forward_hooks,
        every._global_forward_pre_hooks,
    )
    names = (getattr(hook, "__module__", None) or "" for group in hooks for hook in group.values())
    return any(not name.startswith(_LIBRARIES) for name in names)


def has_user_code(module: Any) -> bool:
    """Whether user code may read or change the module's output: a hook or a replaced forward."""
    ours = (module, _redirect_forward) in _CHANGED
    theirs = "forward" in vars(module) and not ours and not hasattr(module, "_hf_hook")
    return theirs or has_hooks(module)


def _use_our_attention(attention: Any) -> Callable[[], None]:
    config = attention.config
    name = config._attn_implementation or "eager"
    # Our name contains the original name, because models pack images if a name contains "flash".
    ours = f"vispruner_{name}"
    ALL_ATTENTION_FUNCTIONS.register(ours, _attention)
    switched = copy.copy(config)
    switched._attn_implementation = ours
    setattr(switched, _ORIGINAL_CONFIG, config)
    attention.config = switched

    def undo() -> None:
        attention.config = config

    return undo


def _own_function(module: Any, config: Any) -> Callable[..., Any]:
    """The attention function that the module calls without a capture."""
    name = config._attn_implementation or "eager"
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    # Each model has an eager function of its own.
    return sys.modules[type(module).__module__].eager_attention_forward


class _WithConfig:
    """A module with another config: FlashAttention's function reads its own name in the config."""

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
    """Attention function for transformers: [B, H, S, D] -> [B, S, H, D].

    It adds scores to the active capture if that captures this module.
    """
    result = _CAPTURE.get()
    wanted = result is not None and result.attention is module and result.needs
    # Another thread may already have restored the original config.
    config = getattr(module.config, _ORIGINAL_CONFIG, module.config)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    # Hooks of users may read the maps of eager attention.
    maps = (config._attn_implementation or "eager") == "eager" and has_hooks(module)
    fused = wanted == "cls" and not (dropout or differentiable or maps)
    out, weights = None, None
    if not fused:
        out, weights = _own_function(module, config)(
            _WithConfig(module, config),
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
