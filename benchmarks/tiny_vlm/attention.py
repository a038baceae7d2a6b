"""Attention in training: its start in the vision tower, a fast form for a CPU, and its loss."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.tiny_vlm import model as tiny
from benchmarks.tiny_vlm.scenes import SIDE, TYPES
from benchmarks.tiny_vlm.supervision import SLOTS, Sample


def look_around(tower: Any) -> None:
    """Positions start as waves, and heads looking at a neighbour each, from which the layers learn
    as convolutions would: Zheng et al. (arXiv:2404.01139), who fit q and k to such attention; with
    waves these can be written down."""
    width, heads = tower.config.hidden_size, tower.config.num_attention_heads
    waves = math.pi / 40 * torch.arange(1, width // 4 + 1)

    def shift(by: int) -> Tensor:
        """Of sines and cosines of a place, those of the place so much further on."""
        cos, sin = (waves * by).cos().diag(), (waves * by).sin().diag()
        return torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])

    angles = torch.arange(SIDE)[:, None] * waves
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = axis[:, None].expand(-1, SIDE, -1), axis[None].expand(SIDE, -1, -1)
    neighbours = [(0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)]
    neighbours += [(0, 2), (0, -2), (2, 0), (-2, 0)]
    with torch.no_grad():
        positions = tower.embeddings.position_embedding.weight
        positions[1:] = 0.3 * torch.cat([rows, columns], 2).flatten(0, 1)
        every = itertools.product(tower.encoder.layers, range(heads))
        for (layer, head), (down, right) in zip(every, neighbours, strict=True):
            # Each head has a share of the waves.
            waves_of = slice(head, None, heads)
            block = layer.self_attn
            mine = slice(head * block.head_dim, (head + 1) * block.head_dim)
            moved = torch.block_diag(shift(down), shift(right))
            block.q_proj.weight[mine] += 2 * moved[waves_of]
            block.k_proj.weight[mine] += 2 * torch.eye(width)[waves_of]


def attention(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    **unused: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it. Forward and backward in bfloat16 on a CPU it takes half the time of
    PyTorch's fused one, for this tower (35 and 67 ms a layer of 16 pictures)."""
    logits = (q * scaling) @ k.mT
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return (logits.softmax(-1, dtype=v.dtype) @ v).transpose(1, 2), None


class Watch:
    """Attention of a language model's layers: what they saw in the last forward pass."""

    def __init__(self, llama: Any, layers: tuple[int, ...]) -> None:
        self.llama = llama
        self.seen: dict[int, tuple[Tensor, Any]] = {}
        self.hooks = [
            llama.layers[i].register_forward_pre_hook(self._keep(i), with_kwargs=True)
            for i in layers
        ]

    def _keep(self, layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            self.seen[layer] = args[0], kwargs["position_embeddings"]

        return hook

    def logs(self, layer: int, rows: Tensor, visual: int) -> Tensor:
        """`[B, Q, 1 + visual]`: logs of the attention of a layer's first head at `rows` `[B, Q]`,
        to START and the picture only."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        block, (hidden, rope) = self.llama.layers[layer], self.seen[layer]
        size = block.self_attn.head_dim
        normed = block.input_layernorm(hidden)
        q, k = (
            F.linear(normed, projection.weight[:size])[:, None]
            for projection in (block.self_attn.q_proj, block.self_attn.k_proj)
        )
        q, k = (x[:, 0].float() for x in apply_rotary_pos_emb(q, k, *rope))
        q = q.gather(1, rows[..., None].expand(-1, -1, size))
        return (q @ k[:, : 1 + visual].mT * size**-0.5).log_softmax(-1)


def pointing(watch: Watch, s: Sample, things: Tensor, middle: Tensor | None) -> Tensor:
    """At the end of a question, and at the last word before END, the second layer looks at what is
    asked about; at the end of a question about a relation the third at what is there. To count, the
    second looks at START and the middles of what is asked about, each alike, so that the share of
    START tells how many there are.

    Args:
        things, middle: `[B, T]`, of the visual tokens; no middle where some may be missing.
    """
    count = things.shape[1]
    spoken = (s.labels >= 0).unflatten(-1, (SLOTS, -1))
    begin = spoken.int().argmax(-1)
    last = (begin + spoken.sum(-1) - 2).clamp_min(0)
    slots = 1 + count + torch.arange(SLOTS, device=begin.device) * tiny.SLOT
    which = things[:, None].expand(-1, SLOTS, -1)
    seen, then = s.seen.gather(2, which), s.then.gather(2, which)
    counts = s.types == TYPES.index("count")
    asked = seen & ~counts[..., None]
    second = watch.logs(1, slots + begin, count)
    looks = (
        (second, asked),
        (watch.logs(1, slots + last, count), asked),
        (watch.logs(2, slots + begin, count), then),
    )
    losses = [
        -logs[..., 1:].masked_fill(~wanted, -1e9).logsumexp(-1)[wanted.any(-1)].mean()
        for logs, wanted in looks
    ]
    if middle is not None:
        alike = F.pad(seen & middle[:, None], (1, 0), value=True).float()
        alike = alike / alike.sum(-1, keepdim=True)
        losses.append((alike * (alike.clamp_min(1e-9).log() - second)).sum(-1)[counts].mean())
    return torch.stack(losses).nan_to_num().sum()
