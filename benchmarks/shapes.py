"""Shapes of real models by device, for the benchmarks attention, backends, scores and select."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Shape(NamedTuple):
    """Images, patch tokens per image, channels of the vision encoder, tokens kept per image."""

    name: str
    batch: int
    tokens: int
    channels: int
    keep: int
    dtype: torch.dtype = torch.float32

    def columns(self) -> dict[str, Any]:
        """The first columns of a row about this shape."""
        return {
            "shape": self.name,
            "B": self.batch,
            "N": self.tokens,
            "C": self.channels,
            "keep": self.keep,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


class Sequence(NamedTuple):
    """Images, tokens per image with CLS, heads and head dimension of the vision encoder."""

    name: str
    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32


class Packed(NamedTuple):
    """Images of different lengths, packed into one sequence."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32


# LLaVA-1.5: CLIP-L/336. LLaVA-NeXT: five crops of it, or all their tokens at once. LLaVA-OneVision:
# SigLIP-so400m/384. Video-LLaVA: LanguageBind ViT-L/224, eight frames.
SELECT = {
    "cpu": [
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
    ],
    "cuda": [
        Shape("llava-1.5", 1, 576, 1024, 64, torch.float16),
        Shape("llava-1.5", 1, 576, 1024, 128, torch.float16),
        Shape("llava-next", 5, 576, 1024, 32, torch.float16),
        Shape("llava-1.5", 32, 576, 1024, 64, torch.float16),
        Shape("llava-1.5", 64, 576, 1024, 64, torch.float16),
        Shape("llava-next, all crops", 1, 2880, 1024, 160, torch.float16),
    ],
}
# The other operators that select, on a batch of crops or images. For select_varlen some crops have
# padding, which is left out, so that the packed crops have different sizes.
OTHERS = {
    "cpu": [Shape("llava-next", 5, 576, 1024, 32)],
    "cuda": [
        Shape("llava-next", 5, 576, 1024, 32, torch.float16),
        Shape("llava-1.5", 64, 576, 1024, 64, torch.float16),
    ],
}
# To choose the backend that owns `select` where two can: numbers of tokens x batches x budgets.
BACKENDS = {
    "cpu": [
        Shape("video-llava", 1, 256, 1024, 32),
        Shape("video-llava", 5, 256, 1024, 64),
        Shape("llava-1.5", 1, 576, 1024, 64),
    ],
    "cuda": [
        Shape(name, batch, tokens, channels, keep, torch.float16)
        for name, tokens, channels in (
            ("video-llava", 256, 1024),
            ("llava-1.5", 576, 1024),
            ("llava-onevision", 729, 1152),
            ("siglip2-l/512", 1024, 1024),
            ("llava-next, all crops", 2880, 1024),
        )
        for batch in (1, 2, 5, 8, 32, 64, 128)
        for keep in (32, 64, 128, 192)
    ],
}
HALVES = (torch.float16, torch.bfloat16)
# CLIP-L/336, SigLIP-so400m/384 and ViT-H/14 at 448 pixels. SigLIP has no CLS token: its first token
# is used as one.
ATTENTION = {
    "cpu": [
        Sequence("clip-l/336", 1, 577, 16, 64),
        Sequence("clip-l/336", 5, 577, 16, 64),
        Sequence("siglip-so400m/384", 1, 729, 16, 72),
        Sequence("vit-h/14, 448", 1, 1025, 16, 80),
    ],
    "cuda": [
        Sequence(*shape, dtype)
        for dtype in HALVES
        for shape in (
            ("clip-l/336", 1, 577, 16, 64),
            ("clip-l/336", 5, 577, 16, 64),
            ("clip-l/336", 32, 577, 16, 64),
            ("clip-l/336", 128, 577, 16, 64),
            ("siglip-so400m/384", 1, 729, 16, 72),
            ("siglip-so400m/384", 32, 729, 16, 72),
            ("vit-h/14, 448", 1, 1025, 16, 80),
            ("vit-h/14, 448", 32, 1025, 16, 80),
        )
    ],
}
# Also SigLIP2-L/512, because flash-colsum 0.1.0 is right only for multiples of 128 tokens.
SCORES = {
    "cpu": ATTENTION["cpu"],
    "cuda": [
        *(shape for shape in ATTENTION["cuda"] if shape.dtype == torch.float16),
        Sequence("siglip2-l/512", 8, 1024, 16, 64, torch.float16),
        Sequence("clip-l/336", 1, 577, 16, 64, torch.bfloat16),
    ],
}
# Qwen2.5-VL: whole images, and the windows of one image (8 x 8 patches, fewer at an edge).
IMAGES = (1024, 576, 784, 256, 1024, 400, 576, 900)
WINDOWS = (64,) * 12 + (32,) * 4
PACKED = {
    "cpu": [Packed("qwen2.5-vl, windows", WINDOWS, 16, 80)],
    "cuda": [
        Packed("qwen2.5-vl, images", IMAGES, 16, 80, torch.float16),
        Packed("qwen2.5-vl, windows", WINDOWS, 16, 80, torch.float16),
    ],
}
