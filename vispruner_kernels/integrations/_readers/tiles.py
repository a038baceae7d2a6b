"""Images in tiles, for LLaVA-NeXT and LLaVA-OneVision.

The model crops the padding of the tiles, may interpolate the result, and appends a newline token to
each row. This module lets the model's own code do that with marked rows, and reads the position of
each patch from the marks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vispruner_kernels.integrations._readers.arguments import needed
from vispruner_kernels.integrations._readers.tower import read_tower, whole_images
from vispruner_kernels.integrations._visual import NEWLINE, Visual, send
from vispruner_kernels.methods import Method


class Pack(Protocol):
    """The model's own packing: images [tiles, N, K] with these numbers become [tokens, K] each.

    The newline [K] comes after each row.
    """

    def __call__(
        self, images: Sequence[Tensor], numbers: Sequence[int], newline: Tensor
    ) -> Sequence[Tensor]: ...


def tiled_images(
    model: Any, inputs: Mapping[str, Any], method: Method, tiles: list[int], pack: Pack
) -> list[Visual]:
    """Read images in tiles. `pack` is the packing function of the model."""
    core, pixels = model.model, inputs["pixel_values"]
    if pixels.dim() == 5:
        # The processor pads images to the same number of tiles.
        pixels = torch.cat([image[:n] for image, n in zip(pixels, tiles, strict=False)])
    if pixels.dim() != 4 or len(pixels) != sum(tiles):
        raise ValueError(
            f"pixel_values has the shape {list(inputs['pixel_values'].shape)}, expected the "
            f"{sum(tiles)} tiles of {len(tiles)} images that image_sizes asks for"
        )
    if core.image_newline.device.type == "meta":
        raise ValueError(
            f"image_newline of the {type(core).__name__} is offloaded, expected weights on a "
            "device: load the model without offloading"
        )
    source, scores, first = read_tower(model, inputs, method, core.vision_tower, pixels)
    count, tokens = source.shape[:2]
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    if first or tokens != side * side:
        raise ValueError(
            f"a tile has {tokens} tokens, expected {side} x {side} patches: "
            "see vision_feature_select_strategy"
        )
    # Pack the index of each row and its square. Where the second is not the square of the first, a
    # token is a mixture of rows: the image is interpolated.
    row = torch.arange(count * tokens, dtype=torch.float64).view(count, tokens, 1)
    images = torch.cat([row, row * row], -1).split(tiles)
    packed = pack(images, range(len(tiles)), torch.tensor([-1.0, 1.0]).double())
    exact = [torch.equal(image[:, 0] ** 2, image[:, 1]) for image in packed]
    visuals = []
    if any(exact):
        visual = whole_images(model, (source, scores, 0), "image")
        visual.numbers = [i for i, plain in enumerate(exact) if plain]
        visual.layouts = [packed[i][:, 0].long() for i in visual.numbers]
        visual.newline = core.image_newline
        visuals.append(visual)
    if not all(exact):
        mixed = [i for i, plain in enumerate(exact) if not plain]
        lengths = [len(packed[i]) for i in mixed]
        visuals.append(_interpolated(core, source, scores, tiles, mixed, lengths, pack))
    return visuals


def _interpolated(
    core: Any,
    source: Tensor,
    scores: Tensor | None,
    tiles: list[int],
    numbers: list[int],
    lengths: list[int],
    pack: Pack,
) -> Visual:
    """Read images that the model interpolates after the projector.

    A token is a mixture of patches, so the projector needs all patches. Features and scores are
    interpolated in the same way.
    """

    def packed(x: Tensor) -> Tensor:
        images = x.split(tiles)
        newline = x.new_zeros(x.shape[-1])
        return torch.cat([*pack([images[i] for i in numbers], numbers, newline)])

    marks = packed(torch.ones(*source.shape[:2], 1))[:, 0] > 0.5
    places = send(marks.nonzero()[:, 0], source.device)
    layout = torch.where(marks, marks.cumsum(0) - 1, NEWLINE)
    image = torch.arange(len(numbers)).repeat_interleave(torch.tensor(lengths))[marks]

    def project(kept: Tensor) -> Tensor:
        tokens = packed(core.multi_modal_projector(source))
        return tokens[places[kept].to(tokens.device)]

    return Visual(
        kind="image",
        source=packed(source)[places][None],
        scores=None if scores is None else packed(scores[..., None])[places, 0][None],
        first=0,
        layouts=list(layout.split(lengths)),
        numbers=numbers,
        grid=image,
        column=torch.full_like(image, -1),
        embed=project,
        newline=core.image_newline,
        tiles=False,
    )


def sizes_of(inputs: Mapping[str, Any]) -> list[list[int]]:
    """Height and width of each image."""
    sizes = torch.as_tensor(needed(inputs, "image_sizes")).tolist()
    return [[int(x) for x in size] for size in sizes]
