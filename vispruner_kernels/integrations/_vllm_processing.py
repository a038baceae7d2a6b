"""Processing of requests in vLLM: placeholders for the kept tokens, and hashes of images.

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
from vispruner_kernels.integrations.vllm import option_names


def to_field(keep: int | float) -> float:
    """The budget as one float: a count is positive, a fraction is negative."""
    return -keep if isinstance(keep, float) else float(keep)


def from_field(number: float) -> int | float:
    """The budget that `to_field` wrote."""
    return -number if number < 0 else int(number)


# The base of mixins for classes of vLLM; mypy does not know the attributes of those classes.
_Mixin: Any = object


class _Info(_Mixin):
    """Token counts for the scheduler and for profiling.

    Counts are those after pruning. The largest image is the one with the most tokens before
    pruning, because the vision tower runs on all of them.
    """

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
            # Embeddings from the client are not pruned.
            most = max(most, len(self.settings.layout(self.settings.largest)))
        return {"image": most}


class PrunedLlavaInfo(_Info, LlavaProcessingInfo):
    """Token counts of LLaVA-1.5."""


class PrunedLlavaNextInfo(_Info, LlavaNextProcessingInfo):
    """Token counts of LLaVA-NeXT."""


class _Processor(_Mixin):
    """Keeps the pixels of the model's own processor; replaces its placeholders and its hashes."""

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
                # The size that the model uses. For arrays it can differ from `get_image_size`,
                # because channels may be first or last.
                height, width = processed["image_sizes"].data.tolist()
            return [token] * self.info.settings.count_of_request(keep, (height, width))

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
            method = self.info.settings.method_of_request(_keep(hf_processor_mm_kwargs))
            count = len(processed["pixel_values"])
            processed[KEEP] = torch.full((count,), to_field(method.keep), dtype=torch.float64)
        return processed

    def _check_pixels(self, images: Any, sizes: Any) -> None:
        """Raise ValueError for pixels of a wrong shape. In the model they would fail all other
        requests too."""
        settings = self.info.settings
        expected = [3, settings.pixels, settings.pixels]
        if settings.pinpoints:
            # All images are padded to the tiles of the image with the most tiles.
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
        # The model copies pixels to the device part by part.
        host = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return {**fields, "pixel_values": host, KEEP: host}

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Add the settings and the budget to the hash of each image, also if the client names the
        image: two budgets never share an entry of a cache."""
        kwargs = inputs.hf_processor_mm_kwargs
        plain = replace(inputs, hf_processor_mm_kwargs=_without_keep(kwargs))
        hashes = super()._get_mm_hashes(plain)
        images = inputs.mm_data_items.get("image")
        if images is None or isinstance(images, ImageEmbeddingItems):
            return hashes
        settings = self.info.settings
        identity = settings.identity(settings.method_of_request(_keep(kwargs)))
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        images = [
            MultiModalHasher.hash_kwargs(algorithm, image=image, vispruner=identity)
            for image in hashes["image"]
        ]
        return {**hashes, "image": images}


class PrunedLlavaProcessor(_Processor, LlavaMultiModalProcessor):
    """The processor of LLaVA-1.5."""


class PrunedLlavaNextProcessor(_Processor, LlavaNextMultiModalProcessor):
    """The processor of LLaVA-NeXT."""


def _keep(kwargs: Mapping[str, object]) -> Any:
    """The budget of a request, or None. Raises ValueError for a `vispruner*` option with another
    name or in a nested option."""
    for name in option_names(kwargs):
        if name.startswith("vispruner") and (name != KEEP or name not in kwargs):
            raise ValueError(
                f"mm_processor_kwargs has {name}, expected {KEEP}, not nested in another option"
            )
    return kwargs.get(KEEP)


def _without_keep(kwargs: Mapping[str, object]) -> dict[str, object]:
    """The options without the budget, for the processor of transformers."""
    _keep(kwargs)
    return {name: value for name, value in kwargs.items() if name != KEEP}
