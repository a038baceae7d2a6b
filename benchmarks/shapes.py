"""Shapes of real models, the one registry of the benchmarks."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Shape(NamedTuple):
    """Images, patch tokens of each, channels of the vision encoder, tokens kept of each image."""

    name: str
    batch: int
    tokens: int
    channels: int
    keep: int
    dtype: torch.dtype = torch.float32


# LLaVA-1.5: CLIP-L/336. LLaVA-NeXT: five crops of it, or all their tokens at once. LLaVA-OneVision:
# SigLIP-so400m/384. Video-LLaVA: LanguageBind ViT-L/224, eight frames.
SELECT = [
    Shape("llava-1.5", 1, 576, 1024, 64),
    Shape("llava-1.5", 1, 576, 1024, 32),
    Shape("llava-1.5", 1, 576, 1024, 128),
    Shape("llava-1.5", 1, 576, 1024, 192),
    Shape("llava-1.5", 1, 576, 1024, 64, torch.float16),
    Shape("llava-1.5", 1, 576, 1024, 64, torch.bfloat16),
    Shape("llava-1.5", 8, 576, 1024, 64),
    Shape("llava-next", 5, 576, 1024, 32),
    Shape("llava-next, all crops", 1, 2880, 1024, 160),
    Shape("llava-onevision", 1, 729, 1152, 64),
    Shape("video-llava", 8, 256, 1024, 64),
]
