"""Video-LLaVA: one grid for each image and for each frame of a video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vispruner_kernels.integrations._readers.arguments import (
    IMAGES,
    VIDEOS,
    given_pixels,
    pixels_of,
)
from vispruner_kernels.integrations._readers.tower import read_tower, whole_images
from vispruner_kernels.integrations._visual import Visual
from vispruner_kernels.methods import Method


def read(model: Any, inputs: Mapping[str, Any], method: Method) -> list[Visual]:
    visuals = []
    # The name depends on the version of transformers 5.
    for name in ("pixel_values", "pixel_values_images"):
        if given_pixels(inputs, name):
            pixels = pixels_of(inputs, name, IMAGES)
            read = read_tower(model, inputs, method, model.model.image_tower, pixels)
            visuals.append(whole_images(model, read, "image"))
    if given_pixels(inputs, "pixel_values_videos"):
        videos = pixels_of(inputs, "pixel_values_videos", VIDEOS)
        # transformers drops the [CLS] tokens of images, and keeps those of frames.
        read = read_tower(
            model, inputs, method, model.model.video_tower, videos.flatten(0, 1), "full"
        )
        frames = videos.shape[1]
        visuals.append(whole_images(model, read, "video", frames))
    return visuals
