"""What the models of transformers see: features, scores and layout of the visual tokens of a call.

A reader runs the vision tower once per kind of input (images, videos), with the scores of the layer
whose output is the feature, and says where the tokens stand in the prompt. `READERS` has one for
each class of models.

A visual token is named by its row in `Visual.source`, the features as the tower made them, flat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vispruner_kernels.integrations._attention import capturing
from vispruner_kernels.methods import Method

# In `Visual.layouts`: a token that separates rows of an image and has no feature.
NEWLINE = -1
# Prefix tokens ([CLS]) of the vision towers.
TOWERS = {"CLIPVisionModel": 1, "SiglipVisionModel": 0}


@dataclass
class Visual:
    """The visual tokens of all images, or of all videos, of a call."""

    # "image" or "video"
    kind: str
    # [G, S, C]: G grids (tiles, frames) of S tokens.
    source: Tensor
    # [G, S - first]; none for a method that needs none.
    scores: Tensor | None
    # Leading tokens of a grid that are no patches: always kept.
    first: int
    # By image, int64 on the host: the row of each of its tokens in prompt order, or NEWLINE.
    layouts: list[Tensor]
    # By row, int64 on the host: its grid, and its column there; -1 where rows make no grid.
    grid: Tensor
    column: Tensor
    # Rows -> embeddings [K, D] for the language model.
    embed: Callable[[Tensor], Tensor]
    # [D]
    newline: Tensor | None = None
    # Whether a grid is a part of an image that can have a budget of its own.
    tiles: bool = True


# ---- CLIP and SigLIP towers ----


def _layer(tower: Any, index: Any) -> Any:
    """The layer whose output is `hidden_states[index]`."""
    layers = getattr(tower, "vision_model", tower).encoder.layers
    count = len(layers)
    number = index if isinstance(index, int) and index >= 0 else 0
    if isinstance(index, int) and index < 0:
        number = count + 1 + index
    if not 1 <= number <= count:
        raise ValueError(
            f"vision_feature_layer is {index}, expected one layer of the vision tower: "
            f"1 to {count}, or -{count} to -1"
        )
    return layers[number - 1]


def _prefix(tower: Any, method: Method) -> int:
    """Prefix tokens of a tower that we know and the method can use."""
    names = [cls.__name__ for cls in type(tower).__mro__]
    name = next((name for name in names if name in TOWERS), None)
    if name is None:
        raise ValueError(
            f"the vision tower is a {names[0]}, expected one of {', '.join(sorted(TOWERS))}"
        )
    if TOWERS[name] == 0 and method.needs == "cls":
        raise _no_cls(name, method)
    return TOWERS[name]


def _no_cls(name: str, method: Method) -> ValueError:
    method_name = type(method).__name__
    return ValueError(
        f"{method_name} needs the attention of a [CLS] token, which {name} does not have: "
        f"use {method_name}(..., scores='received') or FoPru"
    )


def _run(
    tower: Any, pixels: Tensor, settings: Mapping[str, Any], method: Method
) -> tuple[Tensor, Tensor | None, int]:
    """Features [G, S, C] as the projector would get them, scores [G, S - first], and `first`."""
    prefix = _prefix(tower, method)
    layer = _layer(tower, settings["vision_feature_layer"])
    output: list[Any] = []
    hook = layer.register_forward_hook(lambda module, args, out: output.append(out))
    try:
        with capturing(layer.self_attn, method.needs, prefix) as captured:
            tower(pixels, return_dict=True)
    finally:
        hook.remove()
    hidden = output[0][0] if isinstance(output[0], tuple) else output[0]
    # SigLIP's hidden states keep the layout of its convolution, channels outermost.
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    strategy = settings["vision_feature_select_strategy"]
    if strategy not in ("default", "full"):
        raise ValueError(
            f"vision_feature_select_strategy is {strategy!r}, expected 'default' or 'full'"
        )
    # "default" drops the first token, whatever it is.
    dropped = 1 if strategy == "default" else 0
    first = max(prefix - dropped, 0)
    scores = captured[0][:, max(dropped - prefix, 0) :] if captured else None
    return hidden[:, dropped:], scores, first


def _setting(model: Any, inputs: Mapping[str, Any], name: str) -> Any:
    """What transformers lets a call override in the config."""
    value = inputs.get(name)
    return getattr(model.config, name) if value is None else value


def _tower(
    model: Any,
    inputs: Mapping[str, Any],
    method: Method,
    tower: Any,
    pixels: Tensor,
    strategy: str | None = None,
) -> tuple[Tensor, Tensor | None, int]:
    """Features [G, S, C] as the projector would get them, scores [G, S - first], and `first`."""
    prefix = _prefix(tower, method)
    layer = _layer(tower, _setting(model, inputs, "vision_feature_layer"))
    strategy = strategy or _setting(model, inputs, "vision_feature_select_strategy")
    if strategy not in ("default", "full"):
        raise ValueError(
            f"vision_feature_select_strategy is {strategy!r}, expected 'default' or 'full'"
        )
    output: list[Any] = []
    hook = layer.register_forward_hook(lambda module, args, out: output.append(out))
    try:
        with capturing(layer.self_attn, method.needs, prefix) as captured:
            tower(pixels, return_dict=True)
    finally:
        hook.remove()
    hidden = output[0][0] if isinstance(output[0], tuple) else output[0]
    # SigLIP's hidden states keep the layout of its convolution, channels outermost.
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    # "default" drops the first token, whatever it is.
    dropped = 1 if strategy == "default" else 0
    scores = captured[0][:, max(dropped - prefix, 0) :] if captured else None
    return hidden[:, dropped:], scores, max(prefix - dropped, 0)


def _grids(count: int, tokens: int, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Grid and column of every row of a source [count, tokens, C]."""
    row = torch.arange(count * tokens)
    column = (row % tokens - first) % width if width else torch.full_like(row, -1)
    return row // tokens, column


def _whole(
    model: Any,
    read: tuple[Tensor, Tensor | None, int],
    kind: str,
    grids_each: int = 1,
) -> Visual:
    """Images of some grids each, of which the language model sees every token in order."""
    source, scores, first = read
    count, tokens = source.shape[:2]
    side = math.isqrt(tokens - first)
    grid, column = _grids(count, tokens, first, side if side * side == tokens - first else 0)
    rows = torch.arange(count * tokens)
    project = model.model.multi_modal_projector
    return Visual(
        kind=kind,
        source=source,
        scores=scores,
        first=first,
        layouts=list(rows.split(grids_each * tokens)),
        grid=grid,
        column=column,
        embed=lambda kept: project(source.flatten(0, 1)[kept]),
    )


def _llava(model: Any, inputs: Mapping[str, Any], method: Method) -> list[Visual]:
    if inputs.get("image_sizes") is not None:
        raise ValueError("image_sizes: LLaVA with images of several sizes is not supported")
    read = _tower(model, inputs, method, model.model.vision_tower, inputs["pixel_values"])
    return [_whole(model, read, "image")]


def _video_llava(model: Any, inputs: Mapping[str, Any], method: Method) -> list[Visual]:
    visuals = []
    images = inputs.get("pixel_values")
    images = inputs.get("pixel_values_images") if images is None else images
    if images is not None:
        read = _tower(model, inputs, method, model.model.image_tower, images)
        visuals.append(_whole(model, read, "image"))
    videos = inputs.get("pixel_values_videos")
    if videos is not None:
        # transformers drops the [CLS] token of images only.
        read = _tower(model, inputs, method, model.model.video_tower, videos.flatten(0, 1), "full")
        frames = videos.shape[1]
        visuals.append(_whole(model, read, "video", frames))
    return visuals


# ---- tiles: LLaVA-NeXT, LLaVA-OneVision ----


def _tiled(
    model: Any,
    inputs: Mapping[str, Any],
    method: Method,
    tiles: list[int],
    pack: Callable[[Sequence[Tensor], Tensor], Sequence[Tensor]],
) -> Visual:
    """Images cut into tiles, which the model unpads and packs with a newline after each row.

    `pack` is the model's own: [tiles, N, K] of each image and a newline [K] -> [tokens, K].
    """
    core = model.model
    pixels = inputs["pixel_values"]
    if pixels.dim() == 5:
        # Padded to the same number of tiles.
        pixels = torch.cat([image[:n] for image, n in zip(pixels, tiles, strict=False)])
    if pixels.dim() != 4 or len(pixels) != sum(tiles):
        raise ValueError(
            f"pixel_values has the shape {list(inputs['pixel_values'].shape)}, expected the "
            f"{sum(tiles)} tiles of {len(tiles)} images that image_sizes asks for"
        )
    source, scores, first = _tower(model, inputs, method, core.vision_tower, pixels)
    count, tokens = source.shape[:2]
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    if first or tokens != side * side:
        raise ValueError(
            f"a tile has {tokens} tokens, expected {side} x {side} patches: "
            "see vision_feature_select_strategy"
        )
    # Where each row goes. A mixture of rows has a variance: the image was interpolated.
    row = torch.arange(count * tokens, dtype=torch.float64).view(count, tokens, 1)
    moments = pack(torch.cat([row, row * row], -1).split(tiles), torch.tensor([-1.0, 1.0]).double())
    if all(torch.equal(image[:, 0] ** 2, image[:, 1]) for image in moments):
        visual = _whole(model, (source, scores, 0), "image")
        visual.layouts = [image[:, 0].long() for image in moments]
        visual.newline = core.image_newline
        return visual

    # Tokens are mixtures of patches after the projector, so it needs all patches.
    lengths = [len(image) for image in moments]
    marks = (
        torch.cat([*pack(torch.ones(count, tokens, 1).split(tiles), torch.zeros(1))])[:, 0] > 0.5
    )
    places = marks.nonzero()[:, 0].to(source.device, non_blocking=True)
    layout = torch.where(marks, marks.cumsum(0) - 1, NEWLINE)
    image = torch.arange(len(tiles)).repeat_interleave(torch.tensor(lengths))[marks]

    def packed(x: Tensor) -> Tensor:
        return torch.cat([*pack(x.split(tiles), x.new_zeros(x.shape[-1]))])[places][None]

    return Visual(
        kind="image",
        source=packed(source),
        scores=None if scores is None else packed(scores[..., None])[..., 0],
        first=0,
        layouts=list(layout.split(lengths)),
        grid=image,
        column=torch.full_like(image, -1),
        embed=lambda kept: packed(core.multi_modal_projector(source))[0, kept],
        newline=core.image_newline,
        tiles=False,
    )


def _llava_next(model: Any, inputs: Mapping[str, Any], method: Method) -> list[Visual]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config, sizes = model.config, inputs["image_sizes"].tolist()

    def pack(images: Sequence[Tensor], newline: Tensor) -> Sequence[Tensor]:
        strategy = _setting(model, inputs, "vision_feature_select_strategy")
        return model.model.pack_image_features(images, sizes, strategy, image_newline=newline)[0]

    tiles = [
        image_size_to_num_patches(
            size, config.image_grid_pinpoints, config.vision_config.image_size
        )
        for size in sizes
    ]
    return [_tiled(model, inputs, method, tiles, pack)]


def _llava_onevision(model: Any, inputs: Mapping[str, Any], method: Method) -> list[Visual]:
    from transformers.models.llava_onevision.modeling_llava_onevision import (
        image_size_to_num_patches,
    )

    core, config, visuals = model.model, model.config, []
    if inputs.get("pixel_values") is not None:
        sizes = inputs["image_sizes"].tolist()
        counts = inputs.get("batch_num_images")
        counts = [1] * len(sizes) if counts is None else torch.as_tensor(counts).tolist()
        # A prompt with several images gets one tile of each.
        tiles = [
            image_size_to_num_patches(
                size, config.image_grid_pinpoints, config.vision_config.image_size
            )
            if alone
            else 1
            for size, alone in zip(sizes, [n == 1 for n in counts for _ in range(n)], strict=True)
        ]

        def pack(images: Sequence[Tensor], newline: Tensor) -> Sequence[Tensor]:
            return core.pack_image_features(
                images,
                sizes,
                image_newline=newline,
                vision_aspect_ratio=config.vision_aspect_ratio,
            )[0]

        visuals.append(_tiled(model, inputs, method, tiles, pack))
    videos = inputs.get("pixel_values_videos")
    if videos is not None:
        frames = videos.shape[1]
        read = _tower(model, inputs, method, core.vision_tower, videos.flatten(0, 1))
        # Pooled after the projector: a token is a mixture of patches, which it needs all.
        patches, scores, _ = read
        pooled = core.apply_pooling(patches).contiguous()
        scores = None if scores is None else core.apply_pooling(scores[..., None])[..., 0]
        visual = _whole(model, (pooled, scores, 0), "video", frames)
        visual.embed = lambda kept: core.apply_pooling(core.multi_modal_projector(patches)).flatten(
            0, 1
        )[kept]
        end = torch.tensor([NEWLINE])
        visual.layouts = [torch.cat([rows, end]) for rows in visual.layouts]
        visual.newline = core.image_newline
        visuals.append(visual)
    return visuals


# ---- Qwen2.5-VL ----


@contextmanager
def _standing_in(module: Any, forward: Callable[..., Tensor]) -> Iterator[None]:
    """`module` calls `forward` meanwhile."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _qwen(model: Any, inputs: Mapping[str, Any], method: Method) -> list[Visual]:
    visuals = []
    if inputs.get("pixel_values") is not None:
        pixels, grids = inputs["pixel_values"], inputs["image_grid_thw"]
        visuals.append(_merged(model, "image", pixels, grids, method))
    if inputs.get("pixel_values_videos") is not None:
        pixels, grids = inputs["pixel_values_videos"], inputs["video_grid_thw"]
        visuals.append(_merged(model, "video", pixels, grids, method))
    return visuals


def _merged(model: Any, kind: str, pixels: Tensor, grids: Tensor, method: Method) -> Visual:
    """Tokens that the merger makes of 2 x 2 patches; their feature is the four side by side."""
    if method.needs == "cls":
        raise _no_cls("the vision tower of Qwen2.5-VL", method)
    tower = model.model.visual
    unit = tower.spatial_merge_size**2
    windowed = len(tower.blocks) - 1 not in tower.fullatt_block_indexes
    # Before the tower, so that nothing waits for it.
    shapes = grids.tolist()
    entered: list[Tensor] = []

    def merger(hidden: Tensor) -> Tensor:
        # The numbers of its outputs: the tower puts them back from window order.
        entered.append(hidden)
        return torch.arange(len(hidden) // unit, device=hidden.device)[:, None]

    # A patch attends within its image or, in a windowed layer, its window, where shorter means of
    # fewer queries are not comparable: sums are.
    with (
        capturing(tower.blocks[-1].attn, method.needs, 0, sums=windowed) as captured,
        _standing_in(tower.merger, merger),
    ):
        out = tower(pixels.type(tower.dtype), grid_thw=grids)
    raster = (out if isinstance(out, Tensor) else out.pooler_output)[:, 0]
    source = entered[0].unflatten(0, (-1, unit))[raster].flatten(1)
    scores = None
    if captured:
        in_windows = torch.cat([score.flatten() for score in captured])
        scores = in_windows.unflatten(0, (-1, unit)).mean(-1)[raster][None]

    merge = tower.spatial_merge_size
    area = [h * w // unit for t, h, w in shapes for _ in range(t)]
    grid = torch.arange(len(area)).repeat_interleave(torch.tensor(area))
    column = torch.cat([torch.arange(t * h * w // unit) % (w // merge) for t, h, w in shapes])
    return Visual(
        kind=kind,
        source=source[None],
        scores=scores,
        first=0,
        layouts=list(torch.arange(len(source)).split([t * h * w // unit for t, h, w in shapes])),
        grid=grid,
        column=column,
        embed=lambda kept: tower.merger(source[kept].unflatten(1, (unit, -1)).flatten(0, 1)),
    )


READERS: dict[str, Callable[[Any, Mapping[str, Any], Method], list[Visual]]] = {
    "LlavaForConditionalGeneration": _llava,
    "LlavaNextForConditionalGeneration": _llava_next,
    "LlavaOnevisionForConditionalGeneration": _llava_onevision,
    "Qwen2_5_VLForConditionalGeneration": _qwen,
    "VideoLlavaForConditionalGeneration": _video_llava,
}


def reader(model: Any) -> Callable[[Any, Mapping[str, Any], Method], list[Visual]]:
    """The reader of the model's class, or of a class it inherits from."""
    names = [cls.__name__ for cls in type(model).__mro__]
    for name in names:
        if name in READERS:
            return READERS[name]
    raise TypeError(f"model is a {names[0]}, expected one of {', '.join(READERS)}")
