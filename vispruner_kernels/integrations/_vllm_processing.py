"""The prompt in vLLM: placeholders of the tokens that will be kept, and what identifies an image.

The budget of an image travels to the model beside its pixels, as the field `vispruner_keep`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.llava import LlavaMultiModalProcessor, LlavaProcessingInfo
from vllm.model_executor.models.llava_next import (
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems, ImageSize
from vllm.multimodal.processing import PromptReplacement, PromptUpdate

from vispruner_kernels.integrations._vllm_settings import KEEP, Settings
from vispruner_kernels.integrations.vllm import names_of


def to_field(keep: int | float) -> float:
    """A budget as one number: a fraction is negative."""
    return -keep if isinstance(keep, float) else float(keep)


def from_field(number: float) -> int | float:
    """The budget that `to_field` wrote."""
    return -number if number < 0 else int(number)


# Of classes of vLLM, whose attributes mypy does not know.
_Mixin: Any = object


class _Info(_Mixin):
    """Counts after pruning; the largest image is the one with the most tokens before it."""

    @cached_property
    def settings(self) -> Settings:
        return Settings.of(self.get_hf_config())

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return self.settings.count((image_height, image_width))

    def get_image_size_with_most_features(self) -> ImageSize:
        height, width = self.settings.largest
        return ImageSize(width=width, height=height)

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        most = self.settings.most
        if self.ctx.get_mm_config().enable_mm_embeds:
            # They are not pruned.
            most = max(most, len(self.settings.layout(self.settings.largest)))
        return {"image": most}


class PrunedLlavaInfo(_Info, LlavaProcessingInfo):
    """Of LLaVA-1.5."""


class PrunedLlavaNextInfo(_Info, LlavaNextProcessingInfo):
    """Of LLaVA-NeXT."""


class _Processor(_Mixin):
    """Pixels as the model's own processor makes them; placeholders and identity of our own."""

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        token = self.info.get_hf_config().image_token_index
        keep = _keep(hf_processor_mm_kwargs)

        def replacement(item: int) -> list[int]:
            images = mm_items.get_items("image", (ImageEmbeddingItems, ImageProcessorItems))
            if isinstance(images, ImageEmbeddingItems):
                if keep is not None:
                    raise ValueError(f"{KEEP}: image_embeds are not pruned; leave it out")
                return [token] * images.get_feature_size(item)
            size = images.get_image_size(item)
            height, width = size.height, size.width
            processed = out_mm_kwargs["image"][item]
            if "image_sizes" in processed:
                # As the model will see it; of arrays there are two readings.
                height, width = processed["image_sizes"].data.tolist()
            return [token] * self.info.settings.requested(keep, (height, width))

        return [PromptReplacement("image", target=[token], replacement=replacement)]

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> Any:
        return super()._call_hf_processor(hf_data, _without_keep(hf_kwargs))

    def _postprocess_hf_mm_data(
        self, mm_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object], processed_data: Any
    ) -> Any:
        processed = super()._postprocess_hf_mm_data(
            mm_inputs, hf_processor_mm_kwargs, processed_data
        )
        if "pixel_values" in processed:
            self._check_pixels(processed["pixel_values"], processed.get("image_sizes"))
            method = self.info.settings.asked(_keep(hf_processor_mm_kwargs))
            count = len(processed["pixel_values"])
            processed[KEEP] = torch.full((count,), to_field(method.keep), dtype=torch.float64)
        return processed

    def _check_pixels(self, images: Any, sizes: Any) -> None:
        """What does not fit the model would fail there, and every other request with it."""
        settings = self.info.settings
        expected = [3, settings.pixels, settings.pixels]
        if settings.pinpoints:
            # All are padded to the tiles of the image that has most.
            expected.insert(0, max(settings.tiles((int(h), int(w))) for h, w in sizes))
        for image in images:
            shape = [*image.shape] if isinstance(image, Tensor) else type(image).__name__
            if shape != expected:
                raise ValueError(
                    f"the processor made pixel_values {shape} of an image, expected {expected}: "
                    "mm_processor_kwargs, or the settings of the processor, do not fit the model"
                )

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        # The model takes pixels to the device part by part.
        host = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return {**fields, "pixel_values": host, KEEP: host}

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Also of images that the client names: two budgets never share an entry of a cache."""
        kwargs = inputs.hf_processor_mm_kwargs
        own = replace(inputs, hf_processor_mm_kwargs=_without_keep(kwargs))
        hashes = super()._get_mm_hashes(own)
        images = inputs.mm_data_items.get("image")
        if images is None or isinstance(images, ImageEmbeddingItems):
            return hashes
        settings = self.info.settings
        identity = settings.identity(settings.asked(_keep(kwargs)))
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        images = [
            MultiModalHasher.hash_kwargs(algorithm, image=image, vispruner=identity)
            for image in hashes["image"]
        ]
        return {**hashes, "image": images}


class PrunedLlavaProcessor(_Processor, LlavaMultiModalProcessor):
    """Of LLaVA-1.5."""


class PrunedLlavaNextProcessor(_Processor, LlavaNextMultiModalProcessor):
    """Of LLaVA-NeXT."""


def _keep(kwargs: Mapping[str, object]) -> Any:
    """The budget of a request, or None; ValueError where it has another name or place."""
    for name in names_of(kwargs):
        if name.startswith("vispruner") and (name != KEEP or name not in kwargs):
            raise ValueError(f"mm_processor_kwargs has {name}, expected {KEEP}, in no other option")
    return kwargs.get(KEEP)


def _without_keep(kwargs: Mapping[str, object]) -> dict[str, object]:
    _keep(kwargs)
    return {name: value for name, value in kwargs.items() if name != KEEP}
