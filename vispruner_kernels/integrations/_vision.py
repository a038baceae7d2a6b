"""What the models of transformers see: features, scores and layout of the visual tokens of a call.

A reader runs the vision tower once per kind of input (images, videos), with the scores of the layer
whose output is the feature, and says where the tokens stand in the prompt. `READERS` has one for
each class of models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from vispruner_kernels._schemas import MAX_TOKENS
from vispruner_kernels.integrations._attention import (
    Reading,
    is_watched,
    reading,
    standing_in,
    watching,
)
from vispruner_kernels.integrations._visual import NEWLINE, Visual, grids_of, send
from vispruner_kernels.methods import Method

PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos")
# Of pixels.
IMAGES = "[images, channels, height, width]"
VIDEOS = "[videos, frames, channels, height, width]"
PATCHES = "[patches, channels * pixels]"
# Options of a call for the vision tower, and the core models that hand them on to it.
TOWER_OPTIONS = ("interpolate_pos_encoding",)
_HAND_ON_OPTIONS = ("LlavaModel",)
# Prefix tokens ([CLS]) of the vision towers.
TOWERS = {"CLIPVisionModel": 1, "SiglipVisionModel": 0}


# ---- CLIP and SigLIP towers ----


def _layers(tower: Any, index: Any) -> tuple[Any, Sequence[Any]]:
    """The layer whose output is `hidden_states[index]`, and those after it."""
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
    return layers[number - 1], layers[number:]


def _around_layers(tower: Any) -> list[Any]:
    """The tower and the modules in it, without the layers."""
    layers = getattr(tower, "vision_model", tower).encoder.layers
    inside = {id(module) for module in layers.modules()}
    return [module for module in tower.modules() if id(module) not in inside]


def _tower_options(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: inputs[name] for name in TOWER_OPTIONS if inputs.get(name)}
    if options and not set(_HAND_ON_OPTIONS) & set(_names(model.model)):
        raise ValueError(
            f"{next(iter(options))} is given, but a {type(model.model).__name__} does not hand it "
            "on to its vision tower: leave it out"
        )
    return options


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


def given_pixels(inputs: Mapping[str, Any], name: str) -> bool:
    """Whether there are any; processors may return none, of no images."""
    pixels = inputs.get(name)
    if pixels is not None and not (isinstance(pixels, Tensor) and pixels.dim()):
        raise TypeError(
            f"{name} is a {type(pixels).__name__}, expected a tensor as the processor returns it "
            "with return_tensors='pt'"
        )
    return pixels is not None and len(pixels) > 0


def _pixels(inputs: Mapping[str, Any], name: str, layout: str) -> Tensor:
    """Those of that name, which have a layout."""
    if inputs[name].dim() != layout.count(",") + 1:
        raise ValueError(f"{name} has shape {list(inputs[name].shape)}, expected {layout}")
    return inputs[name]


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
    prefix, options = _prefix(tower, method), _tower_options(model, inputs)
    layer, unread = _layers(tower, _setting(model, inputs, "vision_feature_layer"))
    # Users see what the tower computes without us, and what they change there counts.
    skipped = [module for later in unread for module in later.modules()]
    watched = any(map(is_watched, (*_around_layers(tower), *skipped)))
    if watched:
        unread, options = (), options | {"output_hidden_states": True}
    strategy = strategy or _setting(model, inputs, "vision_feature_select_strategy")
    if strategy not in ("default", "full"):
        raise ValueError(
            f"vision_feature_select_strategy is {strategy!r}, expected 'default' or 'full'"
        )
    result = Reading(method.needs, prefix)
    with reading(layer.self_attn, result), watching(layer, result), ExitStack() as stack:
        for later in unread:
            stack.enter_context(standing_in(later, result, lambda hidden, *_, **__: hidden))
        out = tower(pixels, return_dict=True, **options)
    index = _setting(model, inputs, "vision_feature_layer")
    hidden = out.hidden_states[index] if watched else result.hidden
    # SigLIP's hidden states keep the layout of its convolution, channels outermost.
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    # "default" drops the first token, whatever it is.
    dropped = 1 if strategy == "default" else 0
    scores = result.scores[0][:, max(dropped - prefix, 0) :] if result.scores else None
    return hidden[:, dropped:], scores, max(prefix - dropped, 0)


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
    grid, column = grids_of(count, tokens, first, side if side * side == tokens - first else 0)
    layouts = list(torch.arange(count * tokens).split(grids_each * tokens))
    project = model.model.multi_modal_projector
    return Visual(
        kind=kind,
        source=source,
        scores=scores,
        first=first,
        layouts=layouts,
        numbers=[*range(len(layouts))],
        grid=grid,
        column=column,
        # Not of `flatten`, which copies where the first token is left out.
        embed=lambda kept: project(source[kept // tokens, kept % tokens]),
    )


def _llava(model: Any, inputs: Mapping[str, Any], method: Method) -> list[Visual]:
    if inputs.get("image_sizes") is not None:
        raise ValueError("image_sizes: LLaVA with images of several sizes is not supported")
    pixels = _pixels(inputs, "pixel_values", IMAGES)
    read = _tower(model, inputs, method, model.model.vision_tower, pixels)
    return [_whole(model, read, "image")]


def _video_llava(model: Any, inputs: Mapping[str, Any], method: Method) -> list[Visual]:
    visuals = []
    # Renamed on the way of transformers 5.
    for name in ("pixel_values", "pixel_values_images"):
        if given_pixels(inputs, name):
            pixels = _pixels(inputs, name, IMAGES)
            read = _tower(model, inputs, method, model.model.image_tower, pixels)
            visuals.append(_whole(model, read, "image"))
    if given_pixels(inputs, "pixel_values_videos"):
        videos = _pixels(inputs, "pixel_values_videos", VIDEOS)
        # transformers drops the [CLS] token of images only.
        read = _tower(model, inputs, method, model.model.video_tower, videos.flatten(0, 1), "full")
        frames = videos.shape[1]
        visuals.append(_whole(model, read, "video", frames))
    return visuals


# ---- tiles: LLaVA-NeXT, LLaVA-OneVision ----


class Pack(Protocol):
    """The model's own packing of images [tiles, N, K], by their numbers, with a newline [K] after
    each row: [tokens, K] each."""

    def __call__(
        self, images: Sequence[Tensor], numbers: Sequence[int], newline: Tensor
    ) -> Sequence[Tensor]: ...


def _tiled(
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
    source, scores, first = _tower(model, inputs, method, core.vision_tower, pixels)
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
        visual = _whole(model, (source, scores, 0), "image")
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


def _sizes(inputs: Mapping[str, Any]) -> list[list[int]]:
    sizes = torch.as_tensor(needed(inputs, "image_sizes")).tolist()
    return [[int(x) for x in size] for size in sizes]


def needed(inputs: Mapping[str, Any], name: str) -> Any:
    if inputs.get(name) is None:
        raise ValueError(f"{name} is missing: pass on what the processor returned")
    return inputs[name]


def _llava_next(model: Any, inputs: Mapping[str, Any], method: Method) -> list[Visual]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config, sizes = model.config, _sizes(inputs)
    strategy = _setting(model, inputs, "vision_feature_select_strategy")

    def pack(images: Sequence[Tensor], numbers: Sequence[int], newline: Tensor) -> Sequence[Tensor]:
        own = [sizes[i] for i in numbers]
        return model.model.pack_image_features(images, own, strategy, image_newline=newline)[0]

    tile = config.vision_config.image_size
    tiles = [image_size_to_num_patches(size, config.image_grid_pinpoints, tile) for size in sizes]
    return _tiled(model, inputs, method, tiles, pack)


def _llava_onevision(model: Any, inputs: Mapping[str, Any], method: Method) -> list[Visual]:
    from transformers.models.llava_onevision.modeling_llava_onevision import (
        image_size_to_num_patches,
    )

    core, config, visuals = model.model, model.config, []
    if given_pixels(inputs, "pixel_values"):
        sizes = _sizes(inputs)
        counts = inputs.get("batch_num_images")
        counts = [1] * len(sizes) if counts is None else [int(n) for n in counts]
        # A prompt with several images gets one tile of each.
        alone = [n == 1 for n in counts for _ in range(n)]
        tile = config.vision_config.image_size
        tiles = [
            image_size_to_num_patches(size, config.image_grid_pinpoints, tile) if one else 1
            for size, one in zip(sizes, alone, strict=True)
        ]

        def pack(
            images: Sequence[Tensor], numbers: Sequence[int], newline: Tensor
        ) -> Sequence[Tensor]:
            ratio = config.vision_aspect_ratio
            own = [sizes[i] for i in numbers]
            return core.pack_image_features(
                images, own, image_newline=newline, vision_aspect_ratio=ratio
            )[0]

        visuals += _tiled(model, inputs, method, tiles, pack)
    if given_pixels(inputs, "pixel_values_videos"):
        videos = _pixels(inputs, "pixel_values_videos", VIDEOS)
        frames = videos.shape[1]
        read = _tower(model, inputs, method, core.vision_tower, videos.flatten(0, 1))
        # Pooled after the projector: a token is a mixture of patches, which it needs all.
        patches, scores, _ = read
        pooled = core.apply_pooling(patches).contiguous()
        scores = None if scores is None else core.apply_pooling(scores[..., None])[..., 0]

        def project(kept: Tensor) -> Tensor:
            tokens = core.apply_pooling(core.multi_modal_projector(patches)).flatten(0, 1)
            return tokens[kept.to(tokens.device)]

        visual = _whole(model, (pooled, scores, 0), "video", frames)
        visual.embed = project
        end = torch.tensor([NEWLINE])
        visual.layouts = [torch.cat([rows, end]) for rows in visual.layouts]
        visual.newline = core.image_newline
        visuals.append(visual)
    return visuals


# ---- Qwen2.5-VL ----


def _qwen(model: Any, inputs: Mapping[str, Any], method: Method) -> list[Visual]:
    visuals = []
    _tower_options(model, inputs)
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if given_pixels(inputs, name):
            grids = needed(inputs, f"{kind}_grid_thw")
            pixels = _pixels(inputs, name, PATCHES)
            visuals.append(_merged(model, kind, pixels, grids, method))
    return visuals


def _merged(model: Any, kind: str, pixels: Tensor, grids: Tensor, method: Method) -> Visual:
    """Tokens that the merger makes of 2 x 2 patches; their feature is the four side by side."""
    if method.needs == "cls":
        raise _no_cls("the vision tower of Qwen2.5-VL", method)
    tower = model.model.visual
    if is_watched(tower) or is_watched(tower.merger):
        raise ValueError(
            "hooks on the vision tower of Qwen2.5-VL or on its merger, or a forward of your own "
            "there, are not supported: the merger sees kept tokens only. Put them on the blocks or "
            "within the merger"
        )
    merge = tower.spatial_merge_size
    unit = merge * merge
    windowed = len(tower.blocks) - 1 not in tower.fullatt_block_indexes
    # Before the tower, so that nothing waits for it.
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
        # The numbers of its outputs: the tower puts them back from window order.
        return torch.arange(len(hidden) // unit, device=hidden.device)[:, None]

    # A patch attends within its image or, in a windowed layer, its window, where shorter means of
    # fewer queries are not comparable: sums are.
    result = Reading(method.needs, 0, sums=windowed)
    with reading(tower.blocks[-1].attn, result), standing_in(tower.merger, result, merger):
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


Reader: TypeAlias = Callable[[Any, Mapping[str, Any], Method], list[Visual]]

READERS: dict[str, Reader] = {
    "LlavaForConditionalGeneration": _llava,
    "LlavaNextForConditionalGeneration": _llava_next,
    "LlavaOnevisionForConditionalGeneration": _llava_onevision,
    "Qwen2_5_VLForConditionalGeneration": _qwen,
    "VideoLlavaForConditionalGeneration": _video_llava,
}


class CoreAlone:
    """The core of a model (`model.model`), as readers want a whole one."""

    generation_config = None

    def __init__(self, core: Any) -> None:
        self.model, self.config = core, core.config
        self.get_input_embeddings = core.get_input_embeddings


def asks_for_pruning(inputs: Mapping[str, Any]) -> bool:
    """Whether there is anything to prune."""
    features = inputs.get("mm_encoder_outputs") or {}
    if any(value is not None for value in features.values()):
        raise ValueError(
            "mm_encoder_outputs: there are no scores to prune by; give pixel_values, to the model "
            "that was attached"
        )
    return any(given_pixels(inputs, name) for name in PIXELS)


def reader(model: Any) -> Reader:
    """The reader of the model's class, or of a class it inherits from."""
    inner, path = model, "model"
    while True:
        name = next((name for name in _names(inner) if name in READERS), None)
        if name is not None and inner is model:
            return READERS[name]
        if name is not None:
            raise TypeError(
                f"model is a {type(model).__name__} around a {type(inner).__name__}, expected what "
                f"is inside: pass {path}"
            )
        step = next((step for step in _UNWRAP if hasattr(inner, step)), None)
        if step is None:
            break
        inner, path = getattr(inner, step), f"{path}.{_UNWRAP[step]}"
        inner = inner() if _UNWRAP[step].endswith("()") else inner
    raise TypeError(f"model is a {type(model).__name__}, expected one of {', '.join(READERS)}")


# What leads out of a wrapper: peft; DataParallel, DistributedDataParallel, FSDP; torch.compile.
_UNWRAP = {"get_base_model": "get_base_model()", "module": "module", "_orig_mod": "_orig_mod"}


def _names(model: Any) -> list[str]:
    return [cls.__name__ for cls in type(model).__mro__]
