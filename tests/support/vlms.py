"""Make tiny models of the real transformers classes with random weights, and inputs for them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

VERSION = tuple(int(x) for x in version("transformers").split(".")[:2])
# Names of the cache argument that this version accepts, its own name first.
CACHE_NAMES = ("cache", "past_key_values") if VERSION >= (5, 24) else ("past_key_values",)
IMAGE, VIDEO, PAD = 90, 91, 0
SIDE, PATCH = 4, 14
TILE = SIDE * PATCH
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE], [3 * TILE, TILE]]
TEXT = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=3,
    max_position_embeddings=1024,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=2,
)
VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=TILE,
    patch_size=PATCH,
)


def _config(family: str, side: int, text_changes: dict[str, int]) -> Any:
    import transformers as tf

    if family != "qwen2.5-vl":
        siglip = family in ("llava-siglip", "llava-onevision")
        vision = VISION | dict(image_size=side * PATCH)
        if siglip:
            tower = tf.SiglipVisionConfig(**vision, vision_use_head=False)
        else:
            tower = tf.CLIPVisionConfig(**vision)
        text_config = tf.Qwen2Config if family == "llava-onevision" else tf.LlamaConfig
        rest: dict[str, Any] = dict(image_token_id=IMAGE)
        if family in ("video-llava", "llava-onevision"):
            rest["video_token_id"] = VIDEO
        if family in ("llava-next", "llava-onevision"):
            rest["image_grid_pinpoints"] = PINPOINTS
        if family == "llava-onevision":
            # Images of more than two tiles are interpolated.
            rest["vision_aspect_ratio"] = "anyres_max_2"
        if family == "llava-siglip":
            rest |= dict(vision_feature_select_strategy="full", vision_feature_layer=-1)
        config = getattr(tf, CLASSES[family].replace("ForConditionalGeneration", "Config"))
        return config(vision_config=tower, text_config=text_config(**TEXT | text_changes), **rest)
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3])
    return tf.Qwen2_5_VLConfig(
        vision_config=dict(
            depth=3,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            patch_size=PATCH,
            spatial_merge_size=2,
            temporal_patch_size=2,
            # Two by two merged tokens.
            window_size=4 * PATCH,
            fullatt_block_indexes=[2],
            out_hidden_size=TEXT["hidden_size"],
            tokens_per_second=2,
        ),
        text_config=TEXT | dict(rope_parameters=rope),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )


CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava-siglip": "LlavaForConditionalGeneration",
    "llava-next": "LlavaNextForConditionalGeneration",
    "video-llava": "VideoLlavaForConditionalGeneration",
    "llava-onevision": "LlavaOnevisionForConditionalGeneration",
    "qwen2.5-vl": "Qwen2_5_VLForConditionalGeneration",
}
FAMILIES = [*CLASSES]
CLS_FAMILIES = ["llava", "llava-next", "video-llava"]


def make(
    family: str, side: int = SIDE, seed: int = 0, text: dict[str, int] | None = None, **changes: Any
) -> Any:
    """A new model in float32. Its weights are large, so that scores and cosines differ clearly."""
    import transformers

    config = _config(family, side, text or {})
    for name, value in changes.items():
        *parts, last = name.split("__")
        target = config
        for part in parts:
            target = getattr(target, part)
        setattr(target, last, value)
    torch.manual_seed(seed)
    model = getattr(transformers, CLASSES[family])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
            elif parameter.numel() == VISION["hidden_size"]:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        # The model never generates a placeholder and never ends a sequence.
        model.lm_head.weight[80:] = 0
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


@cache
def shared(family: str) -> Any:
    """A model that several tests use. No test may change it."""
    return make(family)


def cache_of(out: Any) -> Any:
    """The cache in the output of a model."""
    return getattr(out, CACHE_NAMES[0])


@dataclass
class Picture:
    """An image or a video for a prompt: its number of placeholders and the model's arguments."""

    kind: str
    tokens: int
    arguments: dict[str, Tensor]


def picture(
    family: str,
    seed: int,
    size: tuple[int, int] | None = None,
    frames: int = 0,
    side: int = SIDE,
) -> Picture:
    """An image, or a video of `frames` frames.

    `size` is in patches for Qwen2.5-VL, in pixels for models with tiles. Others have one size.
    """
    generator = torch.Generator().manual_seed(seed)

    def pixels(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tile = side * PATCH
    if family in ("llava", "llava-siglip"):
        return Picture("image", side * side, dict(pixel_values=pixels(1, 3, tile, tile)))
    if family == "video-llava":
        if not frames:
            # transformers 5 renamed the argument.
            names = inspect.signature(shared(family).forward).parameters
            name = "pixel_values" if "pixel_values" in names else "pixel_values_images"
            return Picture("image", side * side, {name: pixels(1, 3, tile, tile)})
        video = dict(pixel_values_videos=pixels(1, frames, 3, tile, tile))
        return Picture("video", frames * (side * side + 1), video)
    if family == "qwen2.5-vl":
        h, w = size or (8, 12)
        t = frames or 1
        patches = pixels(t * h * w, 3 * 2 * PATCH * PATCH)
        grid = torch.tensor([[t, h, w]])
        if frames:
            video = dict(pixel_values_videos=patches, video_grid_thw=grid)
            return Picture("video", t * h * w // 4, video)
        return Picture("image", h * w // 4, dict(pixel_values=patches, image_grid_thw=grid))
    if frames:
        video = dict(pixel_values_videos=pixels(1, frames, 3, tile, tile))
        return Picture("video", frames * ((side + 1) // 2) ** 2 + 1, video)
    model = shared(family)
    size = size or (100, 80)
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    tiles = image_size_to_num_patches(list(size), PINPOINTS, tile)
    arguments = dict(pixel_values=pixels(tiles, 3, tile, tile), image_sizes=torch.tensor([size]))
    with torch.no_grad():
        tokens = len(_features(model, arguments)[0])
    return Picture("image", tokens, arguments)


def _features(model: Any, arguments: dict[str, Tensor]) -> list[Tensor]:
    out = model.get_image_features(**arguments, return_dict=True)
    return out if isinstance(out, list) else out.pooler_output


def prompts(
    family: str, *rows: list[int | Picture], padding: str = "left", extra: int = 0
) -> dict[str, Tensor]:
    """The output of a processor for prompts. A row lists counts of words, and pictures."""
    generator = torch.Generator().manual_seed(sum(map(len, rows)))
    ids = []
    pictures: dict[str, list[Picture]] = {"image": [], "video": []}
    for row in rows:
        prompt = [1]
        several = sum(isinstance(p, Picture) and p.kind == "image" for p in row) > 1
        for part in row:
            if isinstance(part, Picture):
                if family == "llava-onevision" and several and part.kind == "image":
                    # An image that is not alone in its prompt is one tile and a newline.
                    rest = part.arguments | dict(pixel_values=part.arguments["pixel_values"][:1])
                    part = Picture("image", SIDE * SIDE + 1, rest)
                placeholder = {"image": IMAGE, "video": VIDEO}[part.kind]
                prompt += [placeholder] * part.tokens
                pictures[part.kind].append(part)
            else:
                prompt += torch.randint(3, 80, (part,), generator=generator).tolist()
        ids.append(torch.tensor(prompt))
    length = max(map(len, ids)) + extra
    inputs: dict[str, Tensor] = {}
    columns = torch.arange(length)
    starts = [length - len(prompt) if padding == "left" else 0 for prompt in ids]
    inputs["input_ids"] = torch.full((len(ids), length), PAD)
    inputs["attention_mask"] = torch.zeros(len(ids), length, dtype=torch.int64)
    for i, (start, prompt) in enumerate(zip(starts, ids, strict=True)):
        inside = (columns >= start) & (columns < start + len(prompt))
        inputs["input_ids"][i, inside] = prompt
        inputs["attention_mask"][i, inside] = 1
    if family == "qwen2.5-vl":
        types = (inputs["input_ids"] == IMAGE) + 2 * (inputs["input_ids"] == VIDEO)
        inputs["mm_token_type_ids"] = types.int()
    for kind in pictures.values():
        for name in kind[0].arguments if kind else ():
            parts = [p.arguments[name] for p in kind]
            if name == "pixel_values" and family in ("llava-next", "llava-onevision"):
                # As processors do, pad all images to the largest number of tiles.
                most = max(map(len, parts))
                padded = [torch.cat([p, p.new_zeros(most - len(p), *p.shape[1:])]) for p in parts]
                inputs[name] = torch.stack(padded)
            else:
                inputs[name] = torch.cat(parts)
    if family == "llava-onevision" and pictures["image"]:
        counts = [sum(getattr(p, "kind", "") == "image" for p in row) for row in rows]
        inputs["batch_num_images"] = torch.tensor(counts)
    return inputs
