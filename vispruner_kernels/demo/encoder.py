"""What an encoder hands to the pruning methods, and the one of the demo: the tiny VLM's tower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vispruner_kernels.demo import tiny_vlm

SIZE = tiny_vlm.SIDE * tiny_vlm.PATCH


@dataclass(frozen=True)
class Encoded:
    """What an encoder hands to the pruning methods.

    Attributes:
        features: `[1, side * side, C]` float32, the patch features that a projector would read.
        q: `[1, 1 + side * side, H, D]` float32, queries of the layer that made them, CLS first.
        k: keys of that layer, shaped as `q`.
        side: patches along one side of the picture.
        label: what the encoder is, for people.
    """

    features: Tensor
    q: Tensor
    k: Tensor
    side: int
    label: str


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for all: many small products on several threads wait for each other when a
    machine is busy, and their sums depend on how many those are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def encode(image: Tensor) -> Encoded:
    """Encode a picture with the vision tower of the tiny VLM, on one thread.

    Args:
        image: `[3, 192, 192]`, RGB between 0 and 1.

    Returns:
        Features `[1, 576, 128]`, queries and keys `[1, 577, 2, 64]`.

    Raises:
        ValueError: an image of another shape.
    """
    if tuple(image.shape) != (3, SIZE, SIZE):
        raise ValueError(f"image: got the shape {list(image.shape)}, want [3, {SIZE}, {SIZE}]")
    tower = tiny_vlm.load().model.vision_tower
    return Encoded(*read(tower, (2 * image - 1)[None]), tiny_vlm.SIDE, "tiny VLM")


@torch.no_grad()
def read(tower: Any, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features, queries and keys of a CLIP tower, as LLaVA and VisPruner use it.

    Hooks read all three, so the tower keeps its attention kernel and no attention map is ever made.

    Args:
        tower: CLIPVisionModel.
        pixels: `[B, 3, h, w]`, scaled as the tower wants them.

    Returns:
        Features `[B, N, C]`: `hidden_states[-2]` without CLS; q and k `[B, 1 + N, H, D]`: those of
        the layer whose output that is.
    """
    seen: dict[str, Tensor] = {}

    def keep(key: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            seen[key] = output[0] if isinstance(output, tuple) else output

        return hook

    # transformers 4 has one module more between the model and its encoder.
    layer = getattr(tower, "vision_model", tower).encoder.layers[-2]
    attention = layer.self_attn
    watched = {"features": layer, "q": attention.q_proj, "k": attention.k_proj}
    handles = [module.register_forward_hook(keep(key)) for key, module in watched.items()]
    try:
        tower(pixel_values=pixels)
    finally:
        for handle in handles:
            handle.remove()
    heads = tower.config.num_attention_heads
    q, k = (seen[key].unflatten(-1, (heads, -1)) for key in ("q", "k"))
    return seen["features"][:, 1:], q, k
