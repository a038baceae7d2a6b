"""LLaVA-OneVision: tiles for each image, pooled frames for each video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vispruner_kernels.integrations._readers.arguments import VIDEOS, given_pixels, pixels_of
from vispruner_kernels.integrations._readers.tiles import sizes_of, tiled_images
from vispruner_kernels.integrations._readers.tower import read_tower, whole_images
from vispruner_kernels.integrations._visual import NEWLINE, Visual
from vispruner_kernels.methods import Method


def read(model: Any, inputs: Mapping[str, Any], method: Method) -> list[Visual]:
    from transformers.models.llava_onevision.modeling_llava_onevision import (
        image_size_to_num_patches,
    )

    core, config, visuals = model.model, model.config, []
    if given_pixels(inputs, "pixel_values"):
        sizes = sizes_of(inputs)
        counts = inputs.get("batch_num_images")
        counts = [1] * len(sizes) if counts is None else [int(n) for n in counts]
        # An image is only cut into tiles if it is alone in its prompt.
        alone = [n == 1 for n in counts for _ in range(n)]
        tile = config.vision_config.image_size
        tiles = [
            image_size_to_num_patches(size, config.image_grid_pinpoints, tile) if one else 1
            for size, one in zip(sizes, alone, strict=True)
        ]

        def pack(
            images: Sequence[Tensor], numbers: Sequence[int], newline: Tensor
        ) -> Sequence[Tensor]:
            ratio = config.vision_aspect_ratio
            own = [sizes[i] for i in numbers]
            return core.pack_image_features(
                images, own, image_newline=newline, vision_aspect_ratio=ratio
            )[0]

        visuals += tiled_images(model, inputs, method, tiles, pack)
    if given_pixels(inputs, "pixel_values_videos"):
        videos = pixels_of(inputs, "pixel_values_videos", VIDEOS)
        frames = videos.shape[1]
        read = read_tower(model, inputs, method, core.vision_tower, videos.flatten(0, 1))
        # The model pools after the projector, so all patches are projected.
        patches, scores, _ = read
        pooled = core.apply_pooling(patches).contiguous()
        scores = None if scores is None else core.apply_pooling(scores[..., None])[..., 0]

        def project(kept: Tensor) -> Tensor:
            tokens = core.apply_pooling(core.multi_modal_projector(patches)).flatten(0, 1)
            return tokens[kept.to(tokens.device)]

        visual = whole_images(model, (pooled, scores, 0), "video", frames)
        visual.embed = project
        end = torch.tensor([NEWLINE])
        visual.layouts = [torch.cat([rows, end]) for rows in visual.layouts]
        visual.newline = core.image_newline
        visuals.append(visual)
    return visuals
