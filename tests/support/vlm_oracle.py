"""An independent, slow implementation of pruning in transformers.

Scores come from the attention maps of `output_attentions`. The model projects all tokens, and this
module drops tokens from the embeddings. Prompts run one by one, without padding.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from vlms import IMAGE, VIDEO

from vispruner_kernels.methods import Method

PLACEHOLDER = {"image": IMAGE, "video": VIDEO}


def eager(model: Any) -> Any:
    """A copy of the model that uses eager attention everywhere."""
    copy = type(model)(deepcopy(model.config))
    copy.load_state_dict(model.state_dict())
    copy.set_attn_implementation("eager")
    return copy.eval()


@torch.no_grad()
def embeddings(model: Any, inputs: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """The model's own embeddings at the placeholders, for each image [tokens, D]."""
    found: dict[str, list[Tensor]] = {}
    images = inputs.get("pixel_values", inputs.get("pixel_values_images"))
    if images is not None:
        names = ("image_sizes", "image_grid_thw", "batch_num_images")
        rest = {name: inputs[name] for name in names if name in inputs}
        out = model.model.get_image_features(images, **rest, return_dict=True)
        found["image"] = list(out.pooler_output)
    videos = inputs.get("pixel_values_videos")
    if videos is not None:
        grid = inputs.get("video_grid_thw")
        rest = {} if grid is None else dict(video_grid_thw=grid)
        out = model.model.get_video_features(videos, **rest, return_dict=True).pooler_output
        if isinstance(out, Tensor) and len(out) != len(videos):
            out = out.reshape(len(videos), -1, out.shape[-1])
        if hasattr(model.model, "apply_pooling") and out.shape[1] % videos.shape[1] == 0:
            # Before transformers 5.6 the newline was added in forward.
            newline = model.model.image_newline.expand(len(out), 1, -1)
            out = torch.cat([out, newline], 1)
        found["video"] = list(out)
    return found


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor], kept: list[Tensor], new: int = 0) -> list[Tensor]:
    """Logits [L', V] of each prompt without the visual tokens that are not in `kept`.

    With `new`, return instead the tokens [new] that greedy decoding adds without a cache.
    """
    features = embeddings(model, inputs)
    numbers = {kind: iter(range(len(images))) for kind, images in features.items()}
    kept_of = {"image": iter(kept[: len(features.get("image", []))])}
    kept_of["video"] = iter(kept[len(features.get("image", [])) :])
    positions = spatial_positions(model, inputs)
    results = []
    for b, ids in enumerate(inputs["input_ids"]):
        real = inputs["attention_mask"][b].bool()
        ids = ids[real]
        position = None if positions is None else positions[:, b, real]
        embeds, columns, i = [], [], 0
        while i < len(ids):
            kind = next((k for k, token in PLACEHOLDER.items() if ids[i] == token), None)
            if kind is None:
                embeds.append(model.get_input_embeddings()(ids[i])[None])
                columns.append(i)
                i += 1
            else:
                image = features[kind][next(numbers[kind])]
                chosen = next(kept_of[kind])
                embeds.append(image[chosen])
                columns += (i + chosen).tolist()
                i += len(image)
        x = torch.cat(embeds)[None]
        position = None if position is None else position[:, None, columns]
        tokens = []
        for _ in range(max(new, 1)):
            hidden = model.model.language_model(
                inputs_embeds=x, position_ids=position, use_cache=False
            ).last_hidden_state
            out = model.lm_head(hidden)[0]
            token = out[-1].argmax()
            tokens.append(token)
            x = torch.cat([x, model.get_input_embeddings()(token)[None, None]], 1)
            if position is not None:
                # The next position follows all earlier tokens, including dropped ones.
                following = positions[:, b, real].max() + len(tokens)
                position = torch.cat([position, following.expand(3, 1, 1)], -1)
        results.append(torch.stack(tokens) if new else out)
    return results


def spatial_positions(model: Any, inputs: dict[str, Tensor]) -> Tensor | None:
    """Positions [3, B, L] of Qwen2.5-VL before pruning."""
    if not hasattr(model.model, "get_rope_index"):
        return None
    names = ("image_grid_thw", "video_grid_thw", "attention_mask", "mm_token_type_ids")
    rest = {name: inputs[name] for name in names if name in inputs}
    return model.model.get_rope_index(inputs["input_ids"], **rest)[0]


@torch.no_grad()
def grids_of(
    model: Any, inputs: dict[str, Tensor], kind: str, needs: str
) -> list[list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """For each image its grids (tiles, frames).

    A grid is the places of its patches among the image's tokens [n], features [n, C], scores [n]
    and columns [n], in patch order.
    """
    if hasattr(model.model, "visual"):
        return _qwen(model, inputs, kind)
    core, config = model.model, model.config
    tower = getattr(core, f"{kind}_tower", getattr(core, "vision_tower", None))
    pixels = inputs.get("pixel_values", inputs.get("pixel_values_images"))
    counts = [1] * (0 if pixels is None else len(pixels))
    if kind == "video":
        pixels = inputs["pixel_values_videos"]
        counts = [pixels.shape[1]] * len(pixels)
        pixels = pixels.flatten(0, 1)
    elif pixels.dim() == 5:
        counts = [_tiles(config, size) for size in inputs["image_sizes"].tolist()]
        if "batch_num_images" in inputs:
            alone = [n == 1 for n in inputs["batch_num_images"].tolist() for _ in range(n)]
            counts = [n if one else 1 for n, one in zip(counts, alone, strict=True)]
        pixels = torch.cat([image[:n] for image, n in zip(pixels, counts, strict=True)])
    out = tower(pixels, output_hidden_states=True, output_attentions=True)
    h = config.vision_feature_layer % len(out.hidden_states)
    attention = out.attentions[h - 1].double().mean(1)
    prefix = 1 if "CLIP" in type(tower).__name__ else 0
    scores = (attention[:, 0] if needs == "cls" else attention.mean(1))[:, prefix:].float()
    features = out.hidden_states[h][:, prefix:]
    side = int(features.shape[1] ** 0.5)
    assert side * side == features.shape[1]
    column = torch.arange(side * side) % side
    if hasattr(core, "pack_image_features") and kind == "image":
        return _packed(model, inputs, features, scores, column, counts)
    first = 0
    if kind == "video" and hasattr(core, "apply_pooling"):
        features = core.apply_pooling(features)
        scores = core.apply_pooling(scores[..., None])[..., 0]
        side = -(-side // 2)
        column = torch.arange(side * side) % side
    elif config.vision_feature_select_strategy == "full" or kind == "video":
        first = prefix
    images, start = [], 0
    n = features.shape[1]
    for count in counts:
        images.append(
            [
                (
                    torch.arange(n) + g * (n + first) + first,
                    features[start + g],
                    scores[start + g],
                    column,
                )
                for g in range(count)
            ]
        )
        start += count
    return images


def _tiles(config: Any, size: list[int]) -> int:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return image_size_to_num_patches(
        size, config.image_grid_pinpoints, config.vision_config.image_size
    )


def _packed(
    model: Any,
    inputs: dict[str, Tensor],
    features: Tensor,
    scores: Tensor,
    column: Tensor,
    counts: list[int],
) -> list[list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """Let the model pack the features, with score, tile and patch as further channels."""
    grids, n, _ = features.shape
    numbers = torch.stack(
        [
            scores,
            torch.arange(grids).float()[:, None].expand(-1, n),
            torch.arange(n).float().expand(grids, -1),
            torch.ones(grids, n),
        ],
        -1,
    )
    x = torch.cat([features, numbers], -1)
    newline = torch.zeros(x.shape[-1])
    rest = {"image_newline": newline}
    if "vision_aspect_ratio" in model.config.to_dict():
        rest["vision_aspect_ratio"] = model.config.vision_aspect_ratio
    else:
        rest["vision_feature_select_strategy"] = "default"
    packed, _ = model.model.pack_image_features(x.split(counts), inputs["image_sizes"], **rest)
    images = []
    for image in packed:
        *_, score, tile, patch, token = image.unbind(-1)
        places = (token > 0.5).nonzero()[:, 0]
        tiles = tile[places]
        if not torch.equal(tiles, tiles.round()) or not torch.equal(patch, patch.round()):
            # The image is interpolated: it is one grid, in the order of the prompt.
            images.append([(places, image[places, :-4], score[places], torch.tensor([]))])
            continue
        parts = []
        for t in tiles.unique():
            mine = places[tiles == t]
            mine = mine[patch[mine].argsort()]
            parts.append((mine, image[mine, :-4], score[mine], column[patch[mine].long()]))
        images.append(parts)
    return images


def _qwen(
    model: Any, inputs: dict[str, Tensor], kind: str
) -> list[list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """Grids of Qwen2.5-VL, in raster order, from attention that stores its map."""
    visual = model.model.visual
    grids = inputs[f"{kind}_grid_thw"].tolist()
    pixels = inputs["pixel_values" if kind == "image" else "pixel_values_videos"]
    received: list[Tensor] = []
    entered: list[Tensor] = []
    last = visual.blocks[-1].attn

    def attention(module, q, k, v, attention_mask=None, scaling=None, **_):
        weights = (q @ k.mT * scaling).softmax(-1)
        if module is last:
            received.append(weights[0].double().mean(0).sum(0))
        return (weights @ v).transpose(1, 2), weights

    from transformers import AttentionInterface

    AttentionInterface.register("tests_recording", attention)
    before = visual.config._attn_implementation
    visual.config._attn_implementation = "tests_recording"
    hook = visual.merger.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    try:
        visual(pixels, grid_thw=inputs[f"{kind}_grid_thw"])
    finally:
        visual.config._attn_implementation = before
        hook.remove()
    scores, hidden = torch.cat(received).float().view(-1, 4).mean(1), entered[0]
    # List the tokens in window order. A window has two by two merged tokens.
    side = visual.window_size // visual.patch_size // visual.spatial_merge_size
    images, start = [], 0
    for t, h, w in grids:
        h, w = h // 2, w // 2
        order = [
            (f, y, x)
            for f in range(t)
            for wy in range(0, h, side)
            for wx in range(0, w, side)
            for y in range(wy, min(wy + side, h))
            for x in range(wx, min(wx + side, w))
        ]
        raster = sorted(range(len(order)), key=order.__getitem__)
        index = torch.tensor(raster) + start
        features = hidden.view(len(hidden) // 4, -1)[index]
        frames = []
        for f in range(t):
            mine = slice(f * h * w, (f + 1) * h * w)
            places = torch.arange(f * h * w, (f + 1) * h * w)
            frames.append((places, features[mine], scores[index][mine], places % w))
        images.append(frames)
        start += t * h * w
    return images


def select(
    grids: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    tokens: int,
    method: Method,
    per_grid: bool,
    newlines: bool = True,
) -> Tensor:
    """The kept places of an image with `tokens` tokens."""
    units = [[grid] for grid in grids] if per_grid else [grids]
    kept = []
    for unit in units:
        places, features, scores, column = map(torch.cat, zip(*unit, strict=True))
        width = int((column == column.min()).sum()) if len(column) else 0
        width = len(places) // width if width else None
        kept.append(places[method.on_grid(width).select(features[None], scores[None])[0]])
    patches = torch.cat([grid[0] for grid in grids])
    others = torch.ones(tokens, dtype=torch.bool)
    others[patches] = False
    # The other tokens are newlines, or the [CLS] token, which is always kept.
    if newlines:
        kept.append(others.nonzero()[:, 0])
    return torch.cat(kept).sort().values
