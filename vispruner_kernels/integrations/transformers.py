"""Visual token pruning for models of transformers, without changes of its code.

    inputs = prune_inputs(model, processor(...), VisPruner(64))    # prune one call
    handle = attach(model, VisPruner(64))                          # prune every call of the model

The steps of a call, and the file in this folder of each:

    1. `generate` or `forward` of an attached model calls the handle     _switch.py, _attach.py
    2. find the placeholders and the padding of the prompt               _prompt.py
    3. choose the reader of the model's family                           _vision.py, _readers/
    4. run the vision tower; capture features and scores of one layer    _readers/, _attention.py
    5. select tokens within their budget; project the kept ones          _visual.py
    6. build the shorter prompt: embeddings, mask, positions, labels     _prompt.py
    7. run the original method; record the pruned prompt on its cache    _attach.py, _cache.py

`prune_inputs` does steps 2 to 6; `_prune` below has their order. docs/transformers.md lists the
models, the meaning of a budget, and the limits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "vispruner_kernels.integrations.transformers needs transformers: "
        'pip install "transformers>=5.3"'
    ) from error

from vispruner_kernels.integrations._prompt import (
    Prompt,
    check_placeholders,
    given,
    placeholders,
    positions_before,
)
from vispruner_kernels.integrations._readers.arguments import PIXELS, TOWER_OPTIONS
from vispruner_kernels.integrations._vision import Reader, asks_for_pruning, reader
from vispruner_kernels.integrations._visual import keep, lengths_of, on_host, send
from vispruner_kernels.methods import Method

__all__ = ["Handle", "PrunedInputs", "attach", "prune_inputs"]

MINIMUM = (5, 3)
if tuple(int(x) for x in transformers.__version__.split(".")[:2]) < MINIMUM:
    raise ImportError(
        f"transformers is {transformers.__version__}, expected at least "
        f"{'.'.join(map(str, MINIMUM))}: pip install -U transformers"
    )

# These modules need a recent transformers, so their import comes after the check.
from vispruner_kernels.integrations._attach import Handle  # noqa: E402
from vispruner_kernels.integrations._cache import cache_in, length_of  # noqa: E402

# Arguments that describe the images or the unpruned prompt. The model must not get them afterwards.
_DROPPED = (
    *PIXELS,
    "input_ids",
    "image_sizes",
    "image_sizes_videos",
    "image_grid_thw",
    "video_grid_thw",
    "second_per_grid_ts",
    "batch_num_images",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "vision_aspect_ratio",
    *TOWER_OPTIONS,
    "token_type_ids",
    "mm_token_type_ids",
    "cache_position",
)


class PrunedInputs(dict[str, Any]):
    """Arguments for `model.generate` and `model.forward`, and the kept tokens.

    Attributes:
        kept: for each image, then for each video: int64, ascending, the indices of its kept tokens
            among its tokens in the unpruned prompt (newlines count). For an image of plain patches
            these are the indices of `Method.select`. None if there was nothing to prune.
        input_ids: [B, L'] the prompt with the remaining placeholders. None if the caller passed
            only embeddings.
        removed: [B] the number of tokens removed from each prompt.
        features: by kind ("image", "video"), for each image or video the projected features of its
            kept tokens, [K, D]. Empty if there was nothing to prune.
    """

    kept: list[Tensor] | None = None
    input_ids: Tensor | None = None
    removed: Tensor | None = None
    features: Mapping[str, list[Tensor]] = MappingProxyType({})
    # The number of columns at the start of the prompt, before any image, that do not change.
    unchanged: int = 0


@dataclass(frozen=True)
class _Settings:
    """The checked options of `prune_inputs` and `attach`."""

    method: Method
    budget: str
    newlines: str
    small: str

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise TypeError(f"method is {self.method!r}, expected one of vispruner_kernels.methods")
        for name, values in (
            ("budget", ("image", "tile")),
            ("newlines", ("keep", "drop")),
            ("small", ("error", "keep")),
        ):
            value = getattr(self, name)
            if value not in values:
                raise ValueError(f"{name} is {value!r}, expected {values[0]!r} or {values[1]!r}")


def prune_inputs(
    model: Any,
    inputs: Mapping[str, Any],
    method: Method,
    *,
    budget: str = "image",
    newlines: str = "keep",
    small: str = "error",
) -> PrunedInputs:
    """Prune the output of a processor, for `model.generate` and `model.forward`.

    Features and scores come from one run of the vision tower. Only kept tokens are projected (see
    Cost) and get a place in the prompt.

    Args:
        model: LlavaForConditionalGeneration, LlavaNext..., LlavaOnevision..., VideoLlava... or
            Qwen2_5_VLForConditionalGeneration of transformers, not wrapped.
        inputs: the output of its processor for any number of prompts, with `input_ids` or
            `inputs_embeds`. It may have `labels` and any other argument of the call.
        method: one of `vispruner_kernels.methods`. VisPruner and FasterVLM rank by the [CLS] token;
            for a tower without one, pass `scores="received"` to them.
        budget: "image": `method.keep` counts tokens of an image. "tile": it counts tokens of each
            tile of LLaVA-NeXT or LLaVA-OneVision, after unpadding, as VisPruner was published.
            Videos always have a budget per frame (Qwen2.5-VL: per two frames).
        newlines: "keep" or "drop" the newline tokens, which end a row of an image; in
            LLaVA-OneVision they also end a video and an image of one tile. No budget includes them.
        small: what to do with an image (or tile or frame, if it has its own budget) that has fewer
            tokens than the count. "error": raise ValueError. "keep": keep all its tokens.

    Returns:
        PrunedInputs: `inputs_embeds`, `attention_mask`, `position_ids` and `labels` if needed, and
        the other arguments in `inputs`. Without images a PrunedInputs with the entries of `inputs`.

    Raises:
        TypeError: the model or the method is not supported.
        ValueError: a count above the tokens of an image (see `small`), placeholders that do not
            match the images, or a vision tower without the requested layer or the needed [CLS]
            token.

    Contract:
        The kept tokens are those of `method.select` on the features and scores of this call, with
        patches numbered tile by tile; `PrunedInputs.kept` numbers them as in the prompt. Padding is
        at the left. Other layers keep their attention implementation.
        When this returns or raises, the model is unchanged, except for `rope_deltas` of Qwen2.5-VL:
        they are those of this prompt, as after the model's own forward.
        Differentiable with respect to features, projector and embeddings; for inference, call it in
        `torch.no_grad()`. Several threads may prune at once, and hooks of the model may call this.

    Cost:
        Tower: one run for the images and one for the videos, up to the layer that outputs the
        features.
        Selection: one launch for all images, even of several sizes. FoPru rows and `Random` take
        one launch for each group of consecutive images of equal size; an interpolated image takes
        its own.
        Projector: kept tokens only. LLaVA-OneVision interpolates tokens of videos, and of images
        of more than 10.89 tiles, after the projector; there all patches are projected.
        Synchronisation: the ids, the mask, and the sizes or grids are copied to the host before the
        tower runs. Otherwise the host waits for the device only in the model's own code: the
        positions and the tower of Qwen2.5-VL, and the packing of interpolated images.

    Source:
        VisPruner, arXiv 2412.01818v2.

    Example:
        docs/transformers.md
    """
    read = reader(model)
    settings = _Settings(method, budget, newlines, small)
    if not asks_for_pruning(inputs):
        return PrunedInputs(inputs)
    with on_host():
        return _prune(model, read, dict(inputs), "left", settings)


def _prune(
    model: Any,
    read: Reader,
    inputs: dict[str, Any],
    padding: str,
    settings: _Settings,
) -> PrunedInputs:
    """`prune_inputs` for inputs with pixels. `padding` is "left", or "same" as in the inputs."""
    ids, embeds, mask = given(inputs, "input_ids", "inputs_embeds", "attention_mask")
    _check_shapes(inputs)
    length = (embeds if ids is None else ids).shape[1]
    past = None if mask is None else mask[:, : mask.shape[1] - length]
    mask = None if mask is None else mask[:, mask.shape[1] - length :]

    # Everything that waits for the device comes before the tower, so the selection is queued behind
    # the tower without a wait.
    found = placeholders(model, inputs)
    cache, cache_name = cache_in(inputs, type(model.model))
    filled_cache = cache_name if length_of(cache) else None
    positions = positions_before(model, inputs, mask, found, filled_cache)
    mask_on_host = None if mask is None else mask.cpu()
    method, tiles = settings.method, settings.budget == "tile"
    visuals = read(model, inputs, method)
    if tiles and not all(visual.tiles for visual in visuals):
        raise ValueError(
            "budget is 'tile', expected 'image': an image is interpolated, so it has no tiles"
        )
    kinds = sorted({visual.kind for visual in visuals})
    kept = []
    for kind in kinds:
        of_kind = [visual for visual in visuals if visual.kind == kind]
        check_placeholders(found[kind], kind, lengths_of(of_kind), inputs)
        per_grid, newlines = tiles or kind == "video", settings.newlines == "keep"
        kept.append(keep(of_kind, method, per_grid, newlines, settings.small == "keep"))
    where = [found[kind] for kind in kinds]
    device = (embeds if ids is None else ids).device
    prompt = Prompt(mask_on_host, where, kept, device, padding)

    pruned = PrunedInputs({k: v for k, v in inputs.items() if k not in _DROPPED and v is not None})
    if ids is not None:
        pruned.input_ids = prompt.take(ids, _padding_id(model))
    if embeds is None:
        embeds = model.get_input_embeddings()(pruned.input_ids)
    else:
        embeds = embeds.flatten(0, 1)[prompt.origin.to(embeds.device)].unflatten(0, prompt.shape)
    seen = torch.cat([tokens.embeds.to(embeds) for tokens in kept])
    embeds = embeds.flatten(0, 1).index_copy(0, prompt.visual.to(embeds.device), seen)
    pruned["inputs_embeds"] = embeds.unflatten(0, prompt.shape)
    if mask is not None or prompt.padded:
        new_mask = (~prompt.padding).long() if mask is None else prompt.take(mask, 0)
        pruned["attention_mask"] = new_mask if past is None else torch.cat([past, new_mask], 1)
    if positions is not None:
        pruned["position_ids"] = prompt.positions(positions)
    if hasattr(model.model, "rope_deltas") and positions is not None and positions.dim() == 3:
        # The model's forward adds these to its count of tokens: the next position minus the number
        # of tokens in the pruned prompt.
        last = positions[-3:] if mask is None else positions[-3:].masked_fill(mask == 0, -1)
        tokens_before = prompt.length if mask is None else mask.sum(-1)
        removed = send(prompt.removed, positions.device)
        model.model.rope_deltas = (last.amax((0, 2)) + 1 - tokens_before + removed)[:, None]
    if inputs.get("labels") is not None:
        labels = prompt.take(inputs["labels"], -100)
        # Nothing predicts the first token of a prompt, so its label must not count.
        pruned["labels"] = labels.masked_fill(prompt.newly_padded.to(labels.device), -100)
    pruned.removed, pruned.unchanged = prompt.removed, prompt.unchanged
    pruned.features = {
        kind: list(tokens.embeds.split(tokens.counts))
        for kind, tokens in zip(kinds, kept, strict=True)
    }
    pruned.kept = []
    for tokens in kept:
        starts = [0, *accumulate(tokens.lengths)]
        images = zip(tokens.places.split(tokens.counts), starts, strict=False)
        pruned.kept += [places - start for places, start in images]
    return pruned


def _check_shapes(inputs: Mapping[str, Any]) -> None:
    """Check the arguments that have a batch and a length against each other."""
    ids, embeds = given(inputs, "input_ids", "inputs_embeds")
    if ids is None and embeds is None:
        raise ValueError("inputs has neither input_ids nor inputs_embeds")
    for name, x, layout in (("input_ids", ids, "[B, L]"), ("inputs_embeds", embeds, "[B, L, D]")):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}, expected a tensor")
        if x is not None and (x.dim() != layout.count(",") + 1 or not len(x)):
            raise ValueError(f"{name}: got {list(x.shape)}, expected {layout} with B >= 1")
    batch, length = (embeds if ids is None else ids).shape[:2]

    def fits(name: str, shape: Callable[[Tensor], bool]) -> None:
        x = inputs.get(name)
        if x is not None and not (isinstance(x, Tensor) and shape(x)):
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: got {got}, expected [{batch}, {length}]")

    fits("attention_mask", lambda x: x.dim() == 2 and len(x) == batch and x.shape[1] >= length)
    fits("labels", lambda x: tuple(x.shape) == (batch, length))
    fits(
        "position_ids",
        lambda x: x.dim() in (2, 3) and x.shape[-1] == length and x.shape[-2] in (1, batch),
    )


def _padding_id(model: Any) -> int:
    """The id of padding in the model's configurations, or 0."""
    for config in (model.generation_config, model.config, model.config.get_text_config()):
        token = getattr(config, "pad_token_id", None)
        if token is not None and token >= 0:
            return token
    return 0


def attach(
    model: Any,
    method: Method,
    *,
    budget: str = "image",
    newlines: str = "keep",
    small: str = "error",
) -> Handle:
    """Make `model.generate(**inputs)` and `model(**inputs)` prune, until `remove()`.

    Args:
        model: a model that `prune_inputs` supports, not wrapped.
        method: one of `vispruner_kernels.methods`.
        budget: "image" or "tile": what `method.keep` counts. `prune_inputs` explains this and the
            next two.
        newlines: "keep" or "drop" the newline tokens.
        small: "error" or "keep" for an image with fewer tokens than the count.

    Returns:
        Handle: `remove()` restores the model; `with attach(...):` calls it at the end.

    Raises:
        TypeError: the model or the method is not supported.
        ValueError: a wrong option.
        RuntimeError: the model is already attached.

        Calls of the attached model raise the errors of `prune_inputs`. They also raise ValueError
        for assisted decoding, prompt lookup, prefill in parts, and `generate` from a cache that
        holds a pruned prompt. Copying or pickling an attached model raises RuntimeError.

    Contract:
        `generate`: sequences begin with the caller's `input_ids`, `max_length` counts them, and
        logits processors, stopping criteria and streamers get them. Padding moves to the left.
        `forward` of the model and of its core (`model.model`): logits have the pruned length.
        `out.labels` are labels of that length. Projected features in the output are those of kept
        tokens.
        Decoding by hand: pass the mask and the positions of the unpruned prompt, or neither.
        The class of the model and of its core is replaced by a subclass. So pruning stays on if
        other code wraps `model.forward`, and replicas of DataParallel prune with their own weights.

    Cost:
        That of `prune_inputs` in each call with images; none in other calls.

    Source:
        VisPruner, arXiv 2412.01818v2.

    Example:
        docs/transformers.md
    """
    read = reader(model)
    settings = _Settings(method, budget, newlines, small)

    def prune(model: Any, inputs: dict[str, Any], padding: str) -> PrunedInputs:
        with on_host():
            return _prune(model, read, inputs, padding, settings)

    return Handle(model, prune)
