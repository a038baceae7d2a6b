"""Caches that hold a pruned prompt, and callers who go on as if it were not.

What a cache holds is written on it, so that a copy of it has it too, and another handle sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vispruner_kernels.integrations._prompt import given
from vispruner_kernels.integrations._visual import send

_NAME = "_vispruner_held"


@dataclass
class HeldPrompt:
    """What a cache holds, and what the caller takes it for."""

    # Columns that the caller counts and the cache does not have.
    dropped: int
    # [B] tokens that each prompt lost.
    removed: Tensor
    # [B] what to add to a column of the cache for the position of the token there.
    shift: Tensor
    # Whether positions are in space, where nothing moves when tokens go (Qwen2.5-VL).
    space: bool
    # [B, columns] of the cache, the rest being ones; none where all are.
    mask: Tensor | None

    @classmethod
    def of(
        cls,
        model: Any,
        pruned: Any,
        length: int,
        before: HeldPrompt | None = None,
        copies: int = 1,
    ) -> HeldPrompt:
        """After a prompt [B, length] became `pruned`, which follows `before` in the cache; each row
        `copies` times."""
        embeds, mask = given(pruned, "inputs_embeds", "attention_mask")
        dropped = length - embeds.shape[1] + (before.dropped if before else 0)
        removed = send(pruned.removed, embeds.device)
        removed = removed + before.removed if before else removed
        space = hasattr(model.model, "get_rope_index")
        if space:
            tokens = embeds.shape[1] if mask is None else mask.sum(-1)
            # The next position is that of the next token, padding left out, and the delta.
            shift = model.model.rope_deltas[:, 0] + tokens - embeds.shape[1]
        else:
            shift = dropped - removed
        rows = [x.repeat_interleave(copies, 0) for x in (removed, shift)]
        mask = None if mask is None else mask.repeat_interleave(copies, 0)
        return cls(dropped, rows[0], rows[1], space, mask)

    def translate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The caller's mask and positions, which count what was removed, as those of the cache."""
        ids, embeds, mask, positions = given(
            arguments, "input_ids", "inputs_embeds", "attention_mask", "position_ids"
        )
        x = embeds if ids is None else ids
        (batch, new), cached = x.shape[:2], arguments["past_key_values"].get_seq_length()
        if batch != len(self.removed):
            raise ValueError(
                f"past_key_values holds {len(self.removed)} pruned prompts, expected {batch}"
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
                columns[:, cached:] = mask[:, -new:]
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
        return arguments


def held(cache: Any) -> HeldPrompt | None:
    """What a cache holds of a pruned prompt, unless it was emptied since."""
    prompt = getattr(cache, _NAME, None)
    if prompt is not None and not cache.get_seq_length():
        delattr(cache, _NAME)
        return None
    return prompt


def hold(cache: Any, prompt: HeldPrompt) -> None:
    """Writes on the cache what it holds."""
    setattr(cache, _NAME, prompt)
