"""Qwen2.5-VL: images and videos of any size, packed.

The merger makes one token of 2 x 2 patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vispruner_kernels._checks import MAX_TOKENS
from vispruner_kernels.integrations._attention import (
    Capture,
    capture_scores,
    has_user_code,
    replace_forward,
)
from vispruner_kernels.integrations._readers.arguments import (
    PATCHES,
    given_pixels,
    needed,
    pixels_of,
    tower_options,
)
from vispruner_kernels.integrations._readers.tower import no_cls_error
from vispruner_kernels.integrations._visual import Visual
from vispruner_kernels.methods import Method


def read(model: Any, inputs: Mapping[str, Any], method: Method) -> list[Visual]:
    visuals = []
    tower_options(model, inputs)
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if given_pixels(inputs, name):
            grids = needed(inputs, f"{kind}_grid_thw")
            pixels = pixels_of(inputs, name, PATCHES)
            visuals.append(_merged(model, kind, pixels, grids, method))
    return visuals


def _merged(model: Any, kind: str, pixels: Tensor, grids: Tensor, method: Method) -> Visual:
    """Read images or videos. The feature of a token is its four patches, concatenated."""
    if method.needs == "cls":
        raise no_cls_error("the vision tower of Qwen2.5-VL", method)
    tower = model.model.visual
    if has_user_code(tower) or has_user_code(tower.merger):
        raise ValueError(
            "hooks on the vision tower of Qwen2.5-VL or on its merger, or a replaced forward "
            "there, are not supported: the merger gets kept tokens only. Put them on the blocks or "
            "inside the merger"
        )
    merge = tower.spatial_merge_size
    unit = merge * merge
    windowed = len(tower.blocks) - 1 not in tower.fullatt_block_indexes
    # Copy to the host before the tower runs, so that nothing waits for the tower.
    shapes = torch.as_tensor(grids).tolist()
    patches = sum(t * h * w for t, h, w in shapes)
    if len(pixels) != patches:
        raise ValueError(
            f"the pixels of the {kind}s have {len(pixels)} patches, expected the {patches} that "
            f"{kind}_grid_thw asks for"
        )
    for number, (_, h, w) in enumerate(shapes):
        if h * w > MAX_TOKENS and method.needs and not windowed:
            raise ValueError(
                f"{kind} {number} of the batch has {h} x {w} patches, expected at most "
                f"{MAX_TOKENS}: lower max_pixels of the processor"
            )

    def merger(hidden: Tensor) -> Tensor:
        result.hidden = hidden
        # Return the number of each merged token; the tower reorders them from windows to raster.
        return torch.arange(len(hidden) // unit, device=hidden.device)[:, None]

    # In a windowed layer a patch attends within its window. Windows have different sizes, so means
    # over their queries are not comparable, but sums are.
    result = Capture(method.needs, 0, sums=windowed)
    with (
        capture_scores(tower.blocks[-1].attn, result),
        replace_forward(tower.merger, result, merger),
    ):
        out = tower(pixels.type(tower.dtype), grid_thw=grids)
    raster = (out if isinstance(out, Tensor) else out.pooler_output)[:, 0]
    source = result.hidden.unflatten(0, (-1, unit))[raster].flatten(1)
    scores = None
    if result.scores:
        in_windows = torch.cat([score.flatten() for score in result.scores])
        scores = in_windows.unflatten(0, (-1, unit)).mean(-1)[raster][None]

    area = [h * w // unit for t, h, w in shapes for _ in range(t)]
    tokens = [t * h * w // unit for t, h, w in shapes]
    return Visual(
        kind=kind,
        source=source[None],
        scores=scores,
        first=0,
        layouts=list(torch.arange(len(source)).split(tokens)),
        numbers=[*range(len(tokens))],
        grid=torch.arange(len(area)).repeat_interleave(torch.tensor(area)),
        column=torch.cat(
            [torch.arange(n) % (w // merge) for n, (_, _, w) in zip(tokens, shapes, strict=True)]
        ),
        embed=lambda kept: tower.merger(source[kept].unflatten(1, (unit, -1)).flatten(0, 1)),
    )
