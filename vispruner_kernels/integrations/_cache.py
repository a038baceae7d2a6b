"""Caches: what their argument is called, and callers who go on as if nothing had been pruned.

What a cache holds is written on it, so that a copy of it has it too, and another handle sees it.
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
# What transformers calls the argument for a cache: the name since 5.24, and the one before it.
NEW_NAME, OLD_NAME = "cache", "past_key_values"
NAMES = (NEW_NAME, OLD_NAME)
# The versions from which on methods of models take the new name only.
_OLD_NAME_ENDS = {"forward": (5, 40), "generate": (6, 0)}
# On a cache, and on the class of one that holds a prompt.
_HELD, _ROWS_FOLLOW = "_vispruner_held", "_vispruner_rows_follow"


@functools.cache
def cache_name(cls: type) -> str:
    """What the forward of a class of models calls its cache."""
    parameters = inspect.signature(cls.forward).parameters  # type: ignore[attr-defined]
    return next((name for name in NAMES if name in parameters), NEW_NAME)


def cache_in(arguments: dict[str, Any], cls: type, method: str = "forward") -> tuple[Any, str]:
    """The cache that a call of a method of `cls` is given, or None, and the name of the argument.

    Raises ValueError where it is given under a name that the method would ignore, or under both.
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
    # transformers would prefer the new name even with None.
    for other in NAMES:
        if other != name:
            arguments.pop(other, None)
    return arguments[name], name


def length_of(cache: Any) -> int:
    """Tokens in a cache; a static cache has their number in a tensor that it changes later."""
    return 0 if cache is None else int(cache.get_seq_length())


def cache_of(output: Any) -> Any:
    """The cache among the outputs of a model, or None; by its type, whatever its name is."""
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(values, Tensor):
        return None
    return next((x for x in values if isinstance(x, transformers.Cache)), None)


@dataclass
class HeldPrompt:
    """What a cache holds, and what the caller takes it for."""

    # Columns of the cache up to the end of the last pruned prompt, and of these the first ones that
    # are those of the caller.
    columns: int
    unchanged: int
    # Columns that the caller counts and the cache does not have.
    dropped: int
    # [B] tokens that each prompt lost.
    removed: Tensor
    # [B] what to add to a column of the cache for the position of the token there.
    shift: Tensor
    # Whether positions are in space, where nothing moves when tokens go (Qwen2.5-VL).
    space: bool
    # [B, columns or more] of the cache, the rest being ones; none where all are.
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
        """After a prompt [B, length] became `pruned`, behind `cached` columns of a cache that held
        `before`; each row `copies` times."""
        embeds, mask = given(pruned, "inputs_embeds", "attention_mask")
        dropped = length - embeds.shape[1] + (before.dropped if before else 0)
        removed = send(pruned.removed, embeds.device)
        removed = removed + before.removed if before else removed
        space = hasattr(core, "get_rope_index")
        if space:
            tokens = embeds.shape[1] if mask is None else mask.sum(-1)
            # The next position is that of the next token, padding left out, and the delta.
            shift = core.rope_deltas[:, 0] + tokens - embeds.shape[1]
        else:
            shift = dropped - removed
        columns = cached + embeds.shape[1]
        unchanged = before.unchanged if before else cached + pruned.unchanged
        prompt = cls(columns, unchanged, dropped, removed, shift, space, mask)
        return prompt.rows(lambda x: x.repeat_interleave(copies, 0)) if copies > 1 else prompt

    def rows(self, change: Callable[[Tensor], Tensor]) -> HeldPrompt:
        """Of the rows that `change` makes of those of the cache."""
        mask = None if self.mask is None else change(self.mask)
        return replace(self, removed=change(self.removed), shift=change(self.shift), mask=mask)

    def translate(self, arguments: dict[str, Any], cache: Any, name: str) -> None:
        """Makes the caller's mask and positions, which count what was removed, those of the cache,
        which is the argument of that name."""
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
                f"{self.columns}, expected at most {self.unchanged}, before the first image, or "
                "the whole prompt anew"
            )
        arguments.pop("cache_position", None)
        if mask is not None:
            expected = cached + self.dropped + new
            if not isinstance(mask, Tensor) or tuple(mask.shape) != (batch, expected):
                got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(
                    f"attention_mask: got {got}, expected [{batch}, {expected}], the unpruned "
                    "prompt and what came after it"
                )
        if mask is not None or self.mask is not None:
            columns = torch.ones(batch, cached + new, dtype=torch.int64, device=x.device)
            if self.mask is not None:
                known = self.mask[:, :cached]
                columns[:, : known.shape[1]] = known
            if mask is not None:
                # What came after the prompt is where the caller has it.
                columns[:, self.columns :] = mask[:, self.columns + self.dropped :]
            self.mask = arguments["attention_mask"] = columns
        if positions is None:
            columns = torch.arange(cached, cached + new, device=x.device)
            positions = columns + self.shift[:, None]
            arguments["position_ids"] = positions.expand(3, -1, -1) if self.space else positions
        elif not self.space:
            arguments["position_ids"] = positions - self.removed[:, None]
        elif positions.dim() == 3 and len(positions) == 4:
            # The first row counts the text.
            text = positions[:1] - self.removed[:, None]
            arguments["position_ids"] = torch.cat([text, positions[1:]])


def held(cache: Any) -> HeldPrompt | None:
    """What a cache holds of a pruned prompt, unless that was cut off since."""
    prompt = getattr(cache, _HELD, None)
    if prompt is not None and length_of(cache) <= prompt.unchanged:
        delattr(cache, _HELD)
        return None
    return prompt


def hold(cache: Any, prompt: HeldPrompt) -> None:
    """Writes on the cache what it holds."""
    setattr(cache, _HELD, prompt)
    if not hasattr(cache, _ROWS_FOLLOW):
        cls: Any = type(cache)
        cache.__class__ = _following(cls)


@functools.cache
def _following(base: Any) -> Any:
    """A class of caches of the same name: what is done to the rows of a cache is done to those of
    the prompt that it holds."""

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
        # Pickles know the class by its name, which is that of `base`.
        return _new_following, (base,), vars(cache)

    names = ("__module__", "__qualname__", "__doc__")
    methods = {
        "reorder_cache": reorder,
        "batch_repeat_interleave": repeat,
        "batch_select_indices": select,
    }
    own: dict[str, Any] = {name: x for name, x in methods.items() if hasattr(base, name)}
    own |= {name: getattr(base, name) for name in names}
    own |= {"__reduce_ex__": reduce, _ROWS_FOLLOW: True}
    return type(base.__name__, (base,), own)


def _new_following(base: Any) -> Any:
    cls: Any = _following(base)
    return cls.__new__(cls)


def _change_rows(cache: Any, change: Callable[[Tensor], Tensor]) -> None:
    prompt = held(cache)
    if prompt is not None:
        hold(cache, prompt.rows(change))


@contextmanager
def released(cache: Any, prompt: HeldPrompt | None) -> Iterator[None]:
    """For a call whose arguments are translated: what is called translates nothing again. Unless it
    writes something new, the cache holds afterwards what it held."""
    if prompt is not None:
        delattr(cache, _HELD)
    try:
        yield
    finally:
        if prompt is not None and not hasattr(cache, _HELD):
            hold(cache, prompt)
