"""KV caches that hold a pruned prompt, and callers that continue with unpruned masks and positions.

A caller decodes by hand with the mask and the positions of the prompt that it knows, the unpruned
one. `HeldPrompt` records what pruning removed, and translates the caller's mask and positions to
the columns of the cache. The record is an attribute of the cache, so copies of the cache have it,
and every handle can read it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor

from vispruner_kernels.integrations._prompt import given
from vispruner_kernels.integrations._visual import send

VERSION = tuple(int(x) for x in transformers.__version__.split(".")[:2])
# The name of the cache argument in transformers: since 5.24, and before.
NEW_NAME, OLD_NAME = "cache", "past_key_values"
NAMES = (NEW_NAME, OLD_NAME)
# From these versions on, the methods of models accept the new name only.
_OLD_NAME_ENDS = {"forward": (5, 40), "generate": (6, 0)}
# Attribute of a cache that holds a pruned prompt, and attribute of the class of such a cache.
_HELD, _ROWS_IN_STEP = "_vispruner_held", "_vispruner_rows_in_step"


@functools.cache
def cache_name(cls: type) -> str:
    """The name of the cache argument in the forward of a class of models."""
    parameters = inspect.signature(cls.forward).parameters  # type: ignore[attr-defined]
    return next((name for name in NAMES if name in parameters), NEW_NAME)


def cache_in(arguments: dict[str, Any], cls: type, method: str = "forward") -> tuple[Any, str]:
    """The cache in the arguments of a method of `cls`, or None, and the name of the argument.

    Raises ValueError if the method would ignore that name, or if both names are given.
    """
    names = [name for name in NAMES if arguments.get(name) is not None]
    if not names:
        return None, ""
    own = cache_name(cls)
    if len(names) == 2:
        raise ValueError(f"{NEW_NAME} and {OLD_NAME} are both given, expected {own} alone")
    (name,) = names
    renamed = name == OLD_NAME and own == NEW_NAME and VERSION < _OLD_NAME_ENDS[method]
    if name != own and not renamed:
        raise ValueError(
            f"{name} is given, expected {own}, as transformers {transformers.__version__} calls it"
        )
    # transformers prefers the new name even if its value is None.
    for other in NAMES:
        if other != name:
            arguments.pop(other, None)
    return arguments[name], name


def length_of(cache: Any) -> int:
    """Number of tokens in a cache, as an int: a static cache returns a tensor that it updates."""
    return 0 if cache is None else int(cache.get_seq_length())


def cache_of(output: Any) -> Any:
    """The cache in the output of a model, or None. It is found by its type."""
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(values, Tensor):
        return None
    return next((x for x in values if isinstance(x, transformers.Cache)), None)


@dataclass
class HeldPrompt:
    """A pruned prompt in a cache, and its difference from the prompt of the caller."""

    # Columns of the cache up to the end of the last pruned prompt.
    columns: int
    # The number of first columns that are the same in the prompt of the caller.
    unchanged: int
    # Columns that the caller counts but the cache does not have.
    dropped: int
    # [B] the number of tokens removed from each prompt.
    removed: Tensor
    # [B] the position of a token minus its column in the cache.
    shift: Tensor
    # Whether positions are in space (Qwen2.5-VL). Removing tokens does not change those.
    space: bool
    # [B, columns or more] mask of the cache; further columns are ones. None if all are ones.
    mask: Tensor | None

    @classmethod
    def of(
        cls,
        core: Any,
        pruned: Any,
        length: int,
        cached: int,
        before: HeldPrompt | None = None,
        copies: int = 1,
    ) -> HeldPrompt:
        """The record after a prompt [B, length] became `pruned`.

        The cache had `cached` columns and the record `before`. Each row is repeated `copies` times.
        """
        embeds, mask = given(pruned, "inputs_embeds", "attention_mask")
        dropped = length - embeds.shape[1] + (before.dropped if before else 0)
        removed = send(pruned.removed, embeds.device)
        removed = removed + before.removed if before else removed
        space = hasattr(core, "get_rope_index")
        if space:
            tokens = embeds.shape[1] if mask is None else mask.sum(-1)
            # The next position is the number of tokens without padding plus the delta.
            shift = core.rope_deltas[:, 0] + tokens - embeds.shape[1]
        else:
            shift = dropped - removed
        columns = cached + embeds.shape[1]
        unchanged = before.unchanged if before else cached + pruned.unchanged
        prompt = cls(columns, unchanged, dropped, removed, shift, space, mask)
        return prompt.rows(lambda x: x.repeat_interleave(copies, 0)) if copies > 1 else prompt

    def rows(self, change: Callable[[Tensor], Tensor]) -> HeldPrompt:
        """The record after `change` of the rows of the cache."""
        mask = None if self.mask is None else change(self.mask)
        return replace(self, removed=change(self.removed), shift=change(self.shift), mask=mask)

    def translate(self, arguments: dict[str, Any], cache: Any, name: str) -> None:
        """Replace the caller's mask and positions, which count removed tokens, by the cache's own.

        `name` is the name of the cache argument.
        """
        ids, embeds, mask, positions = given(
            arguments, "input_ids", "inputs_embeds", "attention_mask", "position_ids"
        )
        x = embeds if ids is None else ids
        (batch, new), cached = x.shape[:2], length_of(cache)
        if batch != len(self.removed):
            raise ValueError(f"{name} holds {len(self.removed)} pruned prompts, expected {batch}")
        if cached < self.columns:
            raise ValueError(
                f"{name} was cut to {cached} tokens, within a pruned prompt that ends at "
                f"{self.columns}, expected at most {self.unchanged}, before the first image: run "
                "the whole prompt again"
            )
        arguments.pop("cache_position", None)
        if mask is not None:
            expected = cached + self.dropped + new
            if not isinstance(mask, Tensor) or tuple(mask.shape) != (batch, expected):
                got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(
                    f"attention_mask: got {got}, expected [{batch}, {expected}], the unpruned "
                    "prompt and the tokens after it"
                )
        if mask is not None or self.mask is not None:
            columns = torch.ones(batch, cached + new, dtype=torch.int64, device=x.device)
            if self.mask is not None:
                known = self.mask[:, :cached]
                columns[:, : known.shape[1]] = known
            if mask is not None:
                # Columns after the prompt are the last columns of the caller's mask.
                columns[:, self.columns :] = mask[:, self.columns + self.dropped :]
            self.mask = arguments["attention_mask"] = columns
        if positions is None:
            columns = torch.arange(cached, cached + new, device=x.device)
            positions = columns + self.shift[:, None]
            arguments["position_ids"] = positions.expand(3, -1, -1) if self.space else positions
        elif not self.space:
            arguments["position_ids"] = positions - self.removed[:, None]
        elif positions.dim() == 3 and len(positions) == 4:
            # The first row has text positions.
            text = positions[:1] - self.removed[:, None]
            arguments["position_ids"] = torch.cat([text, positions[1:]])


def held(cache: Any) -> HeldPrompt | None:
    """The record of the pruned prompt in a cache, or None. Dropped once the prompt is cut off."""
    prompt = getattr(cache, _HELD, None)
    if prompt is not None and length_of(cache) <= prompt.unchanged:
        delattr(cache, _HELD)
        return None
    return prompt


def hold(cache: Any, prompt: HeldPrompt) -> None:
    """Store the record on the cache."""
    setattr(cache, _HELD, prompt)
    if not hasattr(cache, _ROWS_IN_STEP):
        cls: Any = type(cache)
        cache.__class__ = _in_step(cls)


@functools.cache
def _in_step(base: Any) -> Any:
    """A subclass of a cache class, with the same name, that also applies changes to the record.

    A method that reorders, repeats or selects rows of the cache does the same to the record.
    """

    def reorder(cache: Any, rows: Tensor, *rest: Any, **options: Any) -> Any:
        _change_rows(cache, lambda x: x.index_select(0, rows.to(x.device)))
        return base.reorder_cache(cache, rows, *rest, **options)

    def repeat(cache: Any, repeats: int, *rest: Any, **options: Any) -> Any:
        _change_rows(cache, lambda x: x.repeat_interleave(repeats, 0))
        return base.batch_repeat_interleave(cache, repeats, *rest, **options)

    def select(cache: Any, rows: Tensor, *rest: Any, **options: Any) -> Any:
        _change_rows(cache, lambda x: x[rows.to(x.device)])
        return base.batch_select_indices(cache, rows, *rest, **options)

    def reduce(cache: Any, protocol: Any) -> Any:
        # Pickle finds a class by its name, and this class has the name of `base`.
        return _new_in_step, (base,), vars(cache)

    names = ("__module__", "__qualname__", "__doc__")
    methods = {
        "reorder_cache": reorder,
        "batch_repeat_interleave": repeat,
        "batch_select_indices": select,
    }
    own: dict[str, Any] = {name: x for name, x in methods.items() if hasattr(base, name)}
    own |= {name: getattr(base, name) for name in names}
    own |= {"__reduce_ex__": reduce, _ROWS_IN_STEP: True}
    return type(base.__name__, (base,), own)


def _new_in_step(base: Any) -> Any:
    cls: Any = _in_step(base)
    return cls.__new__(cls)


def _change_rows(cache: Any, change: Callable[[Tensor], Tensor]) -> None:
    prompt = held(cache)
    if prompt is not None:
        hold(cache, prompt.rows(change))


@contextmanager
def released(cache: Any, prompt: HeldPrompt | None) -> Iterator[None]:
    """Remove the record while a call with translated arguments runs, so that nothing in the call
    translates them again. Afterwards restore it, unless the call stored a new record."""
    if prompt is not None:
        delattr(cache, _HELD)
    try:
        yield
    finally:
        if prompt is not None and not hasattr(cache, _HELD):
            hold(cache, prompt)
