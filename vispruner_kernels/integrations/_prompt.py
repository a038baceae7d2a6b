"""Build the shorter prompt: the new place of each remaining token.

The host waits for the device only to read the placeholders and the padding of the caller and, for
Qwen2.5-VL, the grids and positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vispruner_kernels.integrations._readers.arguments import given_pixels, needed
from vispruner_kernels.integrations._visual import Kept, send


def given(inputs: Mapping[str, Any], *names: str) -> list[Any]:
    """Arguments of these names, or None for each that is missing."""
    return [inputs.get(name) for name in names]


def placeholders(model: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Masks of the image and video placeholders in the prompts, bool [B, L] on the host."""
    ids, embeds = given(inputs, "input_ids", "inputs_embeds")
    tokens = {kind: getattr(model.config, f"{kind}_token_id", None) for kind in ("image", "video")}
    if ids is not None:
        ids = ids.cpu()
        return {kind: ids == token for kind, token in tokens.items() if token is not None}
    embedding = model.get_input_embeddings()
    found = {}
    with torch.no_grad():
        for kind, token in tokens.items():
            if token is not None:
                row = embedding(torch.tensor(token, device=embeds.device))
                found[kind] = (embeds == row.to(embeds)).all(-1).cpu()
    return found


def check_placeholders(
    found: Tensor, kind: str, lengths: list[int], inputs: Mapping[str, Any]
) -> None:
    """Check that each token has a placeholder, and that those of an image are in one prompt."""
    name = "inputs_embeds" if inputs.get("input_ids") is None else "input_ids"
    prompt, counts = found.nonzero()[:, 0], torch.tensor(lengths)
    ends = counts.cumsum(0)
    if len(prompt) != ends[-1] or not torch.equal(prompt[ends - counts], prompt[ends - 1]):
        raise ValueError(
            f"{name} has {found.sum(-1).tolist()} {kind} placeholders by prompt, expected those of "
            f"{len(lengths)} {kind}s of {lengths} tokens, each in one prompt: make the prompts and "
            "the pixels in one call of the processor"
        )


class Prompt:
    """The remaining tokens of prompts [B, L], and their places in shorter prompts [B, L']."""

    def __init__(
        self,
        mask: Tensor | None,
        placeholders: list[Tensor],
        kept: list[Kept],
        device: torch.device,
        padding: str,
    ) -> None:
        """Plan the new prompts.

        `mask` [B, L] and `placeholders` are on the host, the tokens on `device`. Padding moves to
        the "left", or stays on the "same" side as in `mask`.
        """
        is_visual = torch.stack(placeholders).any(0)
        batch, self.length = is_visual.shape
        real = torch.ones_like(is_visual) if mask is None else mask.bool() | is_visual
        # Padding at the ends is removed. New padding is added later where a prompt needs it.
        inside = real.cumsum(-1).bool() & real.flip(-1).cumsum(-1).bool().flip(-1)
        text = (inside & ~is_visual).flatten().nonzero()[:, 0]
        lengths = (inside & ~is_visual).sum(-1)
        visual = []
        for found, tokens in zip(placeholders, kept, strict=True):
            where = found.flatten().nonzero()[:, 0]
            visual.append(send(where, device)[tokens.places.to(device)])
            starts = torch.tensor([0, *tokens.lengths[:-1]]).cumsum(0)
            lengths.index_add_(0, where[starts] // self.length, torch.tensor(tokens.counts))
        self.removed = inside.sum(-1) - lengths
        self.new_length = int(lengths.max())

        # Without old padding, new padding goes to the left, because generation needs it there.
        left = padding == "left" or bool((~real[:, 0]).any()) or bool(real[:, -1].all())
        spare = self.new_length - lengths
        column = torch.arange(self.new_length)
        valid = column >= spare[:, None] if left else column < lengths[:, None]
        targets = send(valid.flatten().nonzero()[:, 0], device)
        ordered = torch.cat([send(text, device), *visual]).sort()
        rank = torch.empty_like(ordered.indices)
        rank[ordered.indices] = torch.arange(len(rank), device=device)
        # The number of first columns that do not change; 0 if padding moves.
        self.unchanged = 0
        if bool(real.all()) and bool(valid.all()):
            self.unchanged = int(is_visual.any(0).int().argmax())
        # [B, L'] the first token of each prompt that had no padding before it, and now has.
        first = (column == spare[:, None]) & (spare[:, None] > 0) & inside[:, :1] & left
        self.newly_padded = send(first, device)
        self.shape = batch, self.new_length
        self.padded = not bool(valid.all())
        self.padding = send(~valid, device)
        # origin [B * L']: the old index of each new token. visual: the new indices of kept tokens.
        self.origin = torch.zeros(batch * self.new_length, dtype=torch.int64, device=device)
        self.origin[targets] = ordered.values
        self.visual = targets[rank[len(text) :]]
        # [B, L'] the number of tokens of its prompt that were removed before each token.
        begin = torch.where(inside.any(-1), inside.int().argmax(-1), 0)
        offset = column - (spare[:, None] if left else 0)
        begin = send(begin[:, None] + offset, device)
        self.lost = self.origin.view(self.shape) % self.length - begin

    def take(self, x: Tensor, fill: float) -> Tensor:
        """Gather [..., B, L] into [..., B, L'], with `fill` at padding."""
        taken = x.flatten(-2)[..., self.origin.to(x.device)].unflatten(-1, self.shape)
        return taken.masked_fill(self.padding.to(x.device), fill)

    def positions(self, x: Tensor) -> Tensor:
        """Positions [B, L], or [3 or 4, B, L] in space, of the remaining tokens.

        Text positions count the remaining tokens. Positions in space do not change.
        """
        taken = self.take(x, 0)
        if x.dim() == 2:
            return (taken - self.lost).masked_fill(self.padding, 0)
        if len(x) == 4:
            taken[0] = (taken[0] - self.lost).masked_fill(self.padding, 0)
        return taken


def positions_before(
    model: Any,
    inputs: Mapping[str, Any],
    mask: Tensor | None,
    found: Mapping[str, Tensor],
    held: str | None,
) -> Tensor | None:
    """Position ids of the prompts before pruning.

    They are those of the caller or, for Qwen2.5-VL, positions in space that the model computes.
    Returns None if the model needs none. `held` is the name of the cache argument, if the cache has
    tokens.
    """
    ids, embeds, positions = given(inputs, "input_ids", "inputs_embeds", "position_ids")
    batch, length = (embeds if ids is None else ids).shape[:2]
    if positions is not None:
        return positions.expand(*positions.shape[:-2], batch, length)
    if not hasattr(model.model, "get_rope_index"):
        return None
    if held is not None:
        raise ValueError(
            f"position_ids are missing: {held} has tokens already, pass the positions after theirs"
        )
    grids: dict[str, Any] = {"image_grid_thw": None, "video_grid_thw": None}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if given_pixels(inputs, name):
            grid = grids[f"{kind}_grid_thw"] = needed(inputs, f"{kind}_grid_thw")
            # With other counts get_rope_index returns wrong positions or fails with another error.
            merged = model.model.visual.spatial_merge_size**2
            lengths = [t * h * w // merged for t, h, w in torch.as_tensor(grid).tolist()]
            check_placeholders(found[kind], kind, lengths, inputs)
    if ids is None:
        # get_rope_index reads only the shape.
        ids = torch.zeros(batch, length, dtype=torch.int64, device=embeds.device)
    types = found["image"].int() + 2 * found["video"].int()
    return model.model.get_rope_index(
        ids,
        mm_token_type_ids=types.to(ids.device),
        attention_mask=mask,
        second_per_grid_ts=inputs.get("second_per_grid_ts"),
        **grids,
    )[0]
