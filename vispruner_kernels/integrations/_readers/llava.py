"""LLaVA-1.5: one grid for each image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vispruner_kernels.integrations._readers.arguments import IMAGES, pixels_of
from vispruner_kernels.integrations._readers.tower import read_tower, whole_images
from vispruner_kernels.integrations._visual import Visual
from vispruner_kernels.methods import Method


def read(model: Any, inputs: Mapping[str, Any], method: Method) -> list[Visual]:
    if inputs.get("image_sizes") is not None:
        raise ValueError("image_sizes: LLaVA with images of several sizes is not supported")
    pixels = pixels_of(inputs, "pixel_values", IMAGES)
    read = read_tower(model, inputs, method, model.model.vision_tower, pixels)
    return [whole_images(model, read, "image")]
