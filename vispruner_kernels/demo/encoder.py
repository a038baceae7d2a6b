"""The vision tower of the tiny VLM, and the inputs that the pruning methods need from a tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vispruner_kernels.demo import tiny_vlm

SIZE = tiny_vlm.SIDE * tiny_vlm.PATCH


@dataclass(frozen=True)
class Encoded:
    """One encoded picture.

    Attributes:
        features: `[1, side * side, C]` float32, the patch features that a projector would read.
        q: `[1, 1 + side * side, H, D]` float32, queries of the layer that made them, CLS first.
        k: keys of that layer, shaped as `q`.
        side: patches along one side of the picture.
        label: the encoder's name in the report.
    """

    features: Tensor
    q: Tensor
    k: Tensor
    side: int
    label: str


def encode(image: Tensor) -> Encoded:
    """Encode a picture `[3, 192, 192]`, RGB between 0 and 1, with the tower of the tiny VLM."""
    if tuple(image.shape) != (3, SIZE, SIZE):
        raise ValueError(f"image: got the shape {list(image.shape)}, want [3, {SIZE}, {SIZE}]")
    tower = tiny_vlm.load().model.vision_tower
    return Encoded(*read(tower, (2 * image - 1)[None]), tiny_vlm.SIDE, "tiny VLM")


@torch.no_grad()
def read(tower: Any, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features, queries and keys of a CLIP tower, as LLaVA and VisPruner use it.

    The queries and keys are projected again, so the tower keeps its fast attention kernel.

    Args:
        tower: CLIPVisionModel.
        pixels: `[B, 3, h, w]`, normalised for the tower.

    Returns:
        Features `[B, N, C]`: the output of the layer before the last, without CLS; q and k
        `[B, 1 + N, H, D]` of the same layer.
    """
    states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    # Some versions of transformers put a module between the model and its encoder.
    layer = getattr(tower, "vision_model", tower).encoder.layers[-2]
    attention, inputs = layer.self_attn, layer.layer_norm1(states[-3])
    heads = (tower.config.num_attention_heads, -1)
    q, k = (
        project(inputs).unflatten(-1, heads) for project in (attention.q_proj, attention.k_proj)
    )
    return states[-2][:, 1:], q, k
