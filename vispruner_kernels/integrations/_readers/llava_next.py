"""LLaVA-NeXT: several tiles for each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vispruner_kernels.integrations._readers.arguments import setting
from vispruner_kernels.integrations._readers.tiles import sizes_of, tiled_images
from vispruner_kernels.integrations._visual import Visual
from vispruner_kernels.methods import Method


def read(model: Any, inputs: Mapping[str, Any], method: Method) -> list[Visual]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config, sizes = model.config, sizes_of(inputs)
    strategy = setting(model, inputs, "vision_feature_select_strategy")

    def pack(images: Sequence[Tensor], numbers: Sequence[int], newline: Tensor) -> Sequence[Tensor]:
        own = [sizes[i] for i in numbers]
        return model.model.pack_image_features(images, own, strategy, image_newline=newline)[0]

    tile = config.vision_config.image_size
    tiles = [image_size_to_num_patches(size, config.image_grid_pinpoints, tile) for size in sizes]
    return tiled_images(model, inputs, method, tiles, pack)
