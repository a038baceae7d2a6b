"""Visual token pruning for models of transformers, without patched model code.

    inputs = prune_inputs(model, processor(...), VisPruner(64))    # for generate and forward
    handle = attach(model, VisPruner(64))                          # both prune by themselves

docs/transformers.md has the models, what counts as a token, and what is not supported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import update_wrapper
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "vispruner_kernels.integrations.transformers needs transformers: "
        "pip install vispruner_kernels[transformers]"
    ) from error

from vispruner_kernels.integrations._cache import HeldPrompt, held, hold
from vispruner_kernels.integrations._prompt import (
    Prompt,
    check_placeholders,
    given,
    placeholders,
    positions_before,
)
from vispruner_kernels.integrations._vision import PIXELS, has_pixels, reader
from vispruner_kernels.integrations._visual import keep, lengths_of, send
from vispruner_kernels.methods import Method

__all__ = ["Handle", "PrunedInputs", "attach", "prune_inputs"]

MINIMUM = (5, 3)
if tuple(int(x) for x in transformers.__version__.split(".")[:2]) < MINIMUM:
    raise ImportError(
        f"transformers is {transformers.__version__}, expected at least "
        f"{'.'.join(map(str, MINIMUM))}: pip install -U transformers"
    )

# What describes images or the prompt before pruning, and must not reach the model after it.
_SPENT = (
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
    "token_type_ids",
    "mm_token_type_ids",
    "cache_position",
)
# Decoding that goes back and forth in the cache by the length of the prompt, or fills it in parts.
_REFUSED = (
    "assistant_model",
    "assistant_early_exit",
    "prompt_lookup_num_tokens",
    "prefill_chunk_size",
)


class PrunedInputs(dict[str, Any]):
    """Arguments for `model.generate` and `model.forward`, and what was kept.

    Attributes:
        kept: by image, then by video: int64, ascending, the kept ones of its tokens in the prompt,
            from 0; for an image of plain patches the indices of `Method.select`. None if there was
            nothing to prune.
        input_ids: [B, L'] the prompt with the placeholders that are left; none where the caller
            gave only embeddings.
        removed: [B] how many tokens each prompt lost.
    """

    kept: list[Tensor] | None = None
    input_ids: Tensor | None = None
    removed: Tensor | None = None


def _check(method: Any, budget: Any, newlines: Any, small: Any) -> None:
    if not isinstance(method, Method):
        raise TypeError(f"method is {method!r}, expected one of vispruner_kernels.methods")
    if budget not in ("image", "tile"):
        raise ValueError(f"budget is {budget!r}, expected 'image' or 'tile'")
    if newlines not in ("keep", "drop"):
        raise ValueError(f"newlines is {newlines!r}, expected 'keep' or 'drop'")
    if small not in ("error", "keep"):
        raise ValueError(f"small is {small!r}, expected 'error' or 'keep'")


def prune_inputs(
    model: Any,
    inputs: Mapping[str, Any],
    method: Method,
    *,
    budget: str = "image",
    newlines: str = "keep",
    small: str = "error",
) -> PrunedInputs:
    """Prune what a processor returned, for `model.generate` and `model.forward`.

    Features and scores come from one run of the vision tower; only kept tokens are projected (see
    Cost), and the placeholders shrink with them.

    Args:
        model: LlavaForConditionalGeneration, LlavaNext..., LlavaOnevision..., VideoLlava... or
            Qwen2_5_VLForConditionalGeneration of transformers, not wrapped.
        inputs: what its processor returned for any number of prompts, with `input_ids` or
            `inputs_embeds`; may hold `labels` and any other argument of the call.
        method: one of `vispruner_kernels.methods`. On a tower without a [CLS] token a method that
            ranks by it wants `scores="received"`.
        budget: "image": `method.keep` of all tokens of an image; "tile": of each tile of LLaVA-NeXT
            or LLaVA-OneVision, after unpadding, as VisPruner was published. Videos always have it
            per frame.
        newlines: "keep" or "drop" the tokens that end a row of an image, which are in no budget.
        small: what has no more tokens than the count (an image; a tile or a frame that has its own
            budget): "keep" keeps all of them, "error" refuses a count above them.

    Returns:
        PrunedInputs: `inputs_embeds`, `attention_mask`, where needed `position_ids` and `labels`,
        and whatever else `inputs` held. Without images the inputs themselves.

    Raises:
        TypeError: a model or a method that is not supported.
        ValueError: a count above the tokens of an image (see `small`), placeholders that do not
            match the images, a vision tower without the layer asked for, or without the [CLS] token
            needed.

    Contract:
        Indices are those of `method.select` on the features and scores of this call; patches are
        numbered tile by tile. Other layers keep their attention implementation; the model is as it
        was when this returns or raises, but for `rope_deltas` of Qwen2.5-VL, which belongs to the
        last prompt as after its own forward. Differentiable with respect to features, projector
        and embeddings. Calls from several threads take turns in the tower.

    Cost:
        One run of the tower for the images and one for the videos, of the layers up to the one that
        is read. One launch selects, for images of one size or of several; FoPru rows and `Random`
        take one for each run of equal sizes, and interpolated images have their own. The ids and
        the mask are copied to the host before the tower runs, and nothing waits for it afterwards,
        but the model's own packing of interpolated images. All patches are projected where tokens
        are interpolated after the projector: videos, and images above 9 tiles, of LLaVA-OneVision.

    Source:
        VisPruner, arXiv 2412.01818v2.

    Example:
        docs/transformers.md
    """
    read = reader(model)
    _check(method, budget, newlines, small)
    if not _any_pixels(inputs):
        return PrunedInputs(inputs)
    ids, embeds, mask = given(inputs, "input_ids", "inputs_embeds", "attention_mask")
    if ids is None and embeds is None:
        raise ValueError("inputs has neither input_ids nor inputs_embeds")
    batch, length = (embeds if ids is None else ids).shape[:2]
    _check_shapes(inputs, batch, length)
    past = None if mask is None else mask[:, : mask.shape[1] - length]
    mask = None if mask is None else mask[:, mask.shape[1] - length :]

    # All that waits for the device comes before the tower; the selection is queued behind it.
    found = placeholders(model, inputs)
    positions = positions_before(model, inputs, mask, found)
    mask_on_host = None if mask is None else mask.cpu()
    visuals = read(model, inputs, method)
    if budget == "tile" and not all(visual.tiles for visual in visuals):
        raise ValueError(
            "budget is 'tile', expected 'image': an image is interpolated, so it has no tiles"
        )
    kinds = sorted({visual.kind for visual in visuals})
    kept = []
    for kind in kinds:
        of_kind = [visual for visual in visuals if visual.kind == kind]
        lengths = lengths_of(of_kind)
        check_placeholders(
            found[kind], kind, lengths, "inputs_embeds" if ids is None else "input_ids"
        )
        per_grid = budget == "tile" or kind == "video"
        kept.append(keep(of_kind, method, per_grid, newlines == "keep", small == "keep"))
    where = [found[kind] for kind in kinds]
    prompt = Prompt(mask_on_host, where, kept, (embeds if ids is None else ids).device)

    pruned = PrunedInputs({k: v for k, v in inputs.items() if k not in _SPENT and v is not None})
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
        # From these the model's own forward goes on: the next position less the tokens before it.
        last = positions[-3:] if mask is None else positions[-3:].masked_fill(mask == 0, -1)
        held = prompt.length if mask is None else mask.sum(-1)
        removed = send(prompt.removed, positions.device)
        model.model.rope_deltas = (last.amax((0, 2)) + 1 - held + removed)[:, None]
    if inputs.get("labels") is not None:
        pruned["labels"] = prompt.take(inputs["labels"], -100)
    pruned.removed = prompt.removed
    pruned.kept = []
    for tokens in kept:
        starts = [0, *accumulate(tokens.lengths)]
        images = zip(tokens.places.split(tokens.counts), starts, strict=False)
        pruned.kept += [places - start for places, start in images]
    return pruned


class Handle:
    """What `attach` returns. Also a context manager that removes itself at the end."""

    def __init__(self, model: Any, **settings: Any) -> None:
        self._model = model
        self._settings = settings
        # Instance attributes of the model that ours stand before, if there were any.
        self._before: dict[str, Any] = {}
        self._ours: dict[str, Any] = {}
        for name, wrapper in (("forward", self._forward), ("generate", self._generate)):
            original = getattr(model, name)
            if isinstance(original, _Wrapped):
                raise RuntimeError("the model prunes already: call remove() of its handle first")
            self._ours[name] = _Wrapped(original, wrapper)
        for name, ours in self._ours.items():
            if name in model.__dict__:
                self._before[name] = model.__dict__[name]
            setattr(model, name, ours)

    def remove(self) -> None:
        """Makes `generate` and `forward` what they were. Does nothing the second time."""
        replaced = [n for n, ours in self._ours.items() if self._model.__dict__.get(n) is not ours]
        if replaced:
            raise RuntimeError(
                f"model.{replaced[0]} was replaced after attach: undo that before remove()"
            )
        for name in self._ours:
            delattr(self._model, name)
            if name in self._before:
                setattr(self._model, name, self._before[name])
        self._ours = {}

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _forward(self, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        before = held(arguments.get("past_key_values"))
        if before is not None:
            arguments = before.translate(arguments)
        if not _any_pixels(arguments):
            return original(**arguments)
        if isinstance(arguments.get("logits_to_keep"), Tensor):
            raise ValueError("logits_to_keep is a tensor of positions before pruning, expected int")
        cache = arguments.get("past_key_values")
        cached = 0 if cache is None else cache.get_seq_length()
        ids, embeds, positions = given(arguments, "input_ids", "inputs_embeds", "position_ids")
        prompt = embeds if ids is None else ids
        if positions is None and not hasattr(self._model.model, "get_rope_index"):
            # What the model would take them for, so that padding made anew does not count.
            columns = torch.arange(cached, cached + prompt.shape[1], device=prompt.device)
            arguments["position_ids"] = columns.expand(len(prompt), -1)
        pruned = prune_inputs(self._model, arguments, **self._settings)
        out = original(**pruned)
        values = out if isinstance(out, tuple) else out.values()
        cache = next((x for x in (cache, *values) if isinstance(x, transformers.Cache)), None)
        if cache is not None:
            hold(cache, HeldPrompt.of(self._model, pruned, prompt.shape[1], before))
        return out

    @torch.no_grad()
    def _generate(self, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        cache = arguments.get("past_key_values")
        if held(cache) is not None:
            raise ValueError(
                "past_key_values holds a pruned prompt: generate from the whole conversation "
                "without it, or go on by forward"
            )
        if arguments.get("inputs") is not None:
            if arguments.get("input_ids") is not None:
                raise ValueError("inputs and input_ids are given, expected one of them")
            arguments["input_ids"] = arguments.pop("inputs")
        if not _any_pixels(arguments):
            return original(**arguments)
        if cache is not None and cache.get_seq_length():
            raise ValueError(
                "past_key_values holds tokens, and there are new images: generate from the whole "
                "conversation without it"
            )

        # As transformers resolves them.
        configs = (arguments.get("generation_config"), self._model.generation_config)

        def setting(name: str) -> Any:
            values = (arguments.get(name), *(getattr(config, name, None) for config in configs))
            return next((value for value in values if value is not None), None)

        for name in _REFUSED:
            if setting(name) is not None:
                raise ValueError(f"{name} is given: not supported with a pruned prompt")
        ids = arguments.get("input_ids")
        if ids is not None and arguments.get("attention_mask") is None:
            arguments["attention_mask"] = _inferred_mask(ids, setting)
        pruned = prune_inputs(self._model, arguments, **self._settings)
        embeds = pruned["inputs_embeds"]
        if pruned.get("attention_mask") is None:
            # transformers would make one of the caller's length.
            pruned["attention_mask"] = torch.ones_like(embeds[..., 0], dtype=torch.int64)
        old, new = (arguments["inputs_embeds"] if ids is None else ids).shape[1], embeds.shape[1]
        if old != new:
            # transformers takes the length of the embeddings off, where ids differ from it.
            shift = new - old if ids is None else new
            for name in ("max_length", "min_length"):
                if setting(name) is not None:
                    pruned[name] = max(setting(name) + shift, 0)
        if ids is not None:
            # Beside the embeddings of what is left: sequences, processors of logits, criteria and
            # streamers go by the caller's prompt.
            pruned["input_ids"] = ids
        out = original(**pruned)
        cache = getattr(out, "past_key_values", None)
        if cache is not None:
            copies = max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
            hold(cache, HeldPrompt.of(self._model, pruned, old, copies=copies))
        return out


class _Wrapped:
    """A method of the model, called through `wrapper` with all arguments by name."""

    def __init__(
        self,
        original: Callable[..., Any],
        wrapper: Callable[[Callable[..., Any], dict[str, Any]], Any],
    ) -> None:
        self._original, self._wrapper = original, wrapper
        # transformers reads it.
        self.__signature__ = inspect.signature(original)
        update_wrapper(self, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(self.__signature__.bind(*args, **kwargs).arguments)
        for parameter in self.__signature__.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(parameter.name, {}))
        return self._wrapper(self._original, arguments)

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("the model prunes: call remove() of its handle before copying it")

    def __reduce__(self) -> Any:
        raise RuntimeError("the model prunes: call remove() of its handle before saving it whole")


def _any_pixels(inputs: Mapping[str, Any]) -> bool:
    """Whether there is something to prune."""
    features = inputs.get("mm_encoder_outputs") or {}
    if any(value is not None for value in features.values()):
        raise ValueError("mm_encoder_outputs: there are no scores to prune by; give pixel_values")
    return has_pixels(inputs)


def _check_shapes(inputs: Mapping[str, Any], batch: int, length: int) -> None:
    mask, labels, positions = given(inputs, "attention_mask", "labels", "position_ids")
    if mask is not None and not (
        isinstance(mask, Tensor)
        and mask.dim() == 2
        and mask.shape[0] == batch
        and mask.shape[1] >= length
    ):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: got {got}, expected [{batch}, {length}]")
    if labels is not None and tuple(labels.shape) != (batch, length):
        raise ValueError(f"labels: got {list(labels.shape)}, expected [{batch}, {length}]")
    if positions is not None and (
        positions.dim() not in (2, 3)
        or positions.shape[-1] != length
        or positions.shape[-2] not in (1, batch)
    ):
        raise ValueError(f"position_ids: got {list(positions.shape)}, expected [{batch}, {length}]")


def _padding_id(model: Any) -> int:
    for config in (model.generation_config, model.config, model.config.get_text_config()):
        token = getattr(config, "pad_token_id", None)
        if token is not None and token >= 0:
            return token
    return 0


def _inferred_mask(ids: Tensor, setting: Callable[[str], Any]) -> Tensor | None:
    """The mask that generate makes where it gets none."""
    pad, eos = setting("pad_token_id"), setting("eos_token_id")
    if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        return None
    return ids.ne(pad).long() if bool((ids == pad).any()) else None


def attach(
    model: Any,
    method: Method,
    *,
    budget: str = "image",
    newlines: str = "keep",
    small: str = "error",
) -> Handle:
    """`model.generate(**inputs)` and `model(**inputs)` prune by themselves until `remove()`.

    Args:
        model: as in `prune_inputs`.
        method: as in `prune_inputs`.
        budget: as in `prune_inputs`.
        newlines: as in `prune_inputs`.
        small: as in `prune_inputs`.

    Returns:
        Handle: `remove()` leaves the model as it was; `with attach(...):` does so by itself.

    Raises:
        TypeError: a model or a method that is not supported.
        ValueError: here for a wrong option, in a call as `prune_inputs`, and for decoding that is
            not supported with a pruned prompt: assisted, prompt lookup, prefill in parts, and
            `generate` from a cache that holds one.
        RuntimeError: the model prunes already; or, from copying or saving it whole, that it does.

    Contract:
        For `generate` the prompt is the caller's: sequences begin with its `input_ids`,
        `max_length` counts them, and processors of logits, stopping criteria and streamers see
        them. `forward` returns logits of the pruned length and uses labels of that length. Decoding
        by hand goes on with the mask and the positions of the unpruned prompt, or without.

    Cost:
        That of `prune_inputs` in each call that has images, none in others.

    Source:
        VisPruner, arXiv 2412.01818v2.

    Example:
        docs/transformers.md
    """
    reader(model)
    _check(method, budget, newlines, small)
    return Handle(model, method=method, budget=budget, newlines=newlines, small=small)
