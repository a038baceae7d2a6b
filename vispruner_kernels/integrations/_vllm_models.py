"""Models of vLLM that prune visual tokens between the vision tower and the projector.

The scores come from q and k of the last layer that vLLM builds, which is the layer that returns the
features. A hook reads q and k; the layer itself runs unchanged on the attention backend that vLLM
chose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vispruner_kernels.integrations._visual import keep
from vispruner_kernels.integrations._vllm_settings import Settings, Size
from vispruner_kernels.integrations.vllm import check_version

try:
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
        tensor_model_parallel_all_gather,
        tensor_model_parallel_all_reduce,
    )
    from vllm.model_executor.models.llava import (
        LlavaDummyInputsBuilder,
        LlavaForConditionalGeneration,
    )
    from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.utils.torch_utils import async_tensor_h2d

    from vispruner_kernels.integrations._vllm_processing import (
        KEEP,
        PrunedLlavaInfo,
        PrunedLlavaNextInfo,
        PrunedLlavaNextProcessor,
        PrunedLlavaProcessor,
        from_field,
    )
except ImportError:
    # Most likely the version of vLLM is not supported; that message is clearer.
    check_version()
    raise

# The base of mixins for classes of vLLM; mypy does not know the attributes of those classes.
_Mixin: Any = object


class _Pruned(_Mixin):
    """Runs the vision tower, prunes its tokens, and projects the kept ones."""

    # The LoRA mapping counts the tokens of one call of the tower; this class makes several calls.
    supports_tower_connector_lora = False
    supports_encoder_tp_data = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.settings = Settings.of(vllm_config.model_config.hf_config)
        # The scheduler counts kept tokens, so it admits many more images a step. The tower takes
        # them in parts with at most as many tokens as a step has without pruning.
        self.tower_budget = vllm_config.scheduler_config.max_num_encoder_input_tokens

    def embed_multimodal(self, **kwargs: Any) -> Any:
        settings, budgets = self.settings, kwargs.pop(KEEP, None)
        if kwargs.get("pixel_values") is None and kwargs.get("image_embeds") is not None:
            # Embeddings from the client are not pruned. They may differ in length; the processor
            # has checked them.
            return kwargs["image_embeds"]
        inputs = self._parse_and_validate_image_input(**kwargs)
        if inputs is None:
            return []
        sizes = self._sizes(inputs)
        images = [
            # The images of a request are padded to the same number of tiles; drop the padding.
            pixels.reshape(-1, *pixels.shape[-3:])[: settings.tiles(size)]
            for pixels, size in zip(inputs["pixel_values"], sizes, strict=True)
        ]
        keeps = budgets.flatten().tolist()
        embeds: list[Tensor] = []
        for part in self._parts(images):
            embeds += self._prune(images[part], sizes[part], keeps[part])
        return embeds

    def _sizes(self, inputs: Any) -> list[Size]:
        return [self.settings.largest] * len(inputs["pixel_values"])

    def _parts(self, images: Sequence[Tensor]) -> Iterator[slice]:
        """Consecutive images that fit the budget of the tower together; at least one image each."""
        start, tokens = 0, 0
        for number, image in enumerate(images):
            added = len(image) * self.settings.tower_tokens
            if number > start and tokens + added > self.tower_budget:
                yield slice(start, number)
                start, tokens = number, 0
            tokens += added
        yield slice(start, len(images))

    def _prune(
        self, images: Sequence[Tensor], sizes: Sequence[Size], keeps: Sequence[float]
    ) -> list[Tensor]:
        """The embeddings of the kept tokens of each image."""
        settings = self.settings
        device = next(self.multi_modal_projector.parameters()).device
        features, scores = self._encode(async_tensor_h2d(torch.cat([*images]), device=device))
        tiles = torch.arange(len(features)).split([len(image) for image in images])
        embeds: list[Any] = [None] * len(images)
        for budget in dict.fromkeys(keeps):
            # Images with the same budget are pruned in one call.
            numbers = [i for i, other in enumerate(keeps) if other == budget]
            source, source_scores = features, scores
            if len(numbers) < len(images):
                chosen = torch.cat([tiles[i] for i in numbers]).to(features.device)
                source = features[chosen]
                source_scores = None if scores is None else scores[chosen]
            visual = settings.visual(
                [sizes[i] for i in numbers],
                source,
                source_scores,
                embed=partial(self._project, source),
                newline=getattr(self, "image_newline", None),
            )
            method = replace(settings.method, keep=from_field(budget))
            kept = keep(
                [visual],
                method,
                per_grid=settings.budget == "tile",
                newlines=settings.newlines == "keep",
                keep_small=settings.small == "keep",
            )
            for i, part in zip(numbers, kept.embeds.split(kept.counts), strict=True):
                embeds[i] = part
        return embeds

    def _project(self, source: Tensor, rows: Tensor) -> Tensor:
        tokens = self.settings.tokens
        return self.multi_modal_projector(source[rows // tokens, rows % tokens])

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features [G, tokens, C], as the projector gets them without pruning, and scores
        [G, tokens]; both are the same on every rank."""
        attention = self.vision_tower.vision_model.encoder.layers[-1].self_attn
        ranks, count = get_tensor_model_parallel_world_size(), len(pixels)
        # With mm_encoder_tp_mode="data" each rank has the whole tower.
        shared = ranks > attention.tp_size
        if shared:
            # Each rank encodes the same number of tiles; zeros fill the last ones.
            each = -(-count // ranks)
            spare = pixels.new_zeros(each * ranks - count, *pixels.shape[1:])
            rank = get_tensor_model_parallel_rank()
            pixels = torch.cat([pixels, spare])[rank * each : (rank + 1) * each]
        with self._capture_scores(attention.attn) as captured:
            features = self._image_pixels_to_features(self.vision_tower, pixels)
        scores = captured[0] if captured else None
        if shared:
            gather = tensor_model_parallel_all_gather
            features = gather(features.contiguous(), dim=0)[:count]
            scores = None if scores is None else gather(scores.contiguous(), dim=0)[:count]
        elif ranks > 1 and scores is not None:
            # Each rank has the mean over its own heads; all ranks have the same number of heads.
            scores = tensor_model_parallel_all_reduce(scores.contiguous()) / ranks
        if features.stride(-1) != 1:
            features = features.contiguous()
        return features, scores

    @contextmanager
    def _capture_scores(self, attention: Any) -> Iterator[list[Tensor]]:
        """While the context is open, collect scores [G, tokens] from each call of this attention;
        collect nothing if the method needs no scores."""
        settings = self.settings
        captured: list[Tensor] = []

        def capture(module: Any, args: tuple[Tensor, ...]) -> None:
            # q and k are slices of one qkv tensor, [G, S, H * D] each.
            q, k = (x.unflatten(-1, (module.num_heads, module.head_size)) for x in args[:2])
            scores = settings.method.attention_scores(q, k, module.scale, settings.prefix)
            assert scores is not None
            captured.append(scores[:, settings.dropped - settings.prefix :])

        if settings.method.needs is None:
            yield captured
            return
        hook = attention.register_forward_pre_hook(capture)
        try:
            yield captured
        finally:
            hook.remove()


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaProcessor, info=PrunedLlavaInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class VisPrunerLlavaForConditionalGeneration(_Pruned, LlavaForConditionalGeneration):
    """LLaVA-1.5, and other models that vLLM serves with the same class, if their vision tower is
    CLIP or SigLIP."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaNextProcessor, info=PrunedLlavaNextInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class VisPrunerLlavaNextForConditionalGeneration(_Pruned, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""

    def _sizes(self, inputs: Any) -> list[Size]:
        return [(int(height), int(width)) for height, width in inputs["image_sizes"].tolist()]
