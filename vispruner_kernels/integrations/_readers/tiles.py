"""Images in tiles: LLaVA-NeXT, LLaVA-OneVision."""

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
    """The model's own packing of images [tiles, N, K], by their numbers, with a newline [K] after
    each row: [tokens, K] each."""

    def __call__(
        self, images: Sequence[Tensor], numbers: Sequence[int], newline: Tensor
    ) -> Sequence[Tensor]: ...


def tiled_images(
    model: Any, inputs: Mapping[str, Any], method: Method, tiles: list[int], pack: Pack
) -> list[Visual]:
    """Images cut into tiles, which the model unpads, may interpolate, and packs."""
    core, pixels = model.model, inputs["pixel_values"]
    if pixels.dim() == 5:
        # Padded to the same number of tiles.
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
    # Where each row goes. A mixture of rows has a variance: the image is interpolated.
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
        visuals.append(_mixed(core, source, scores, tiles, mixed, lengths, pack))
    return visuals


def _mixed(
    core: Any,
    source: Tensor,
    scores: Tensor | None,
    tiles: list[int],
    numbers: list[int],
    lengths: list[int],
    pack: Pack,
) -> Visual:
    """Images that are interpolated after the projector, which therefore needs all their patches: a
    token, its feature and its score are mixtures."""

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
    sizes = torch.as_tensor(needed(inputs, "image_sizes")).tolist()
    return [[int(x) for x in size] for size in sizes]
