"""Attention in training: initial weights of the tower, a fast form for CPUs, and a loss."""

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


def attend_to_neighbours(tower: Any) -> None:
    """Initialise the tower so that each head attends to one neighbour of a patch.

    The layers then start as convolutions do, as Zheng et al. (arXiv:2404.01139) propose. The
    authors fit q and k to such attention. Here the position embeddings are sines and cosines, for
    which q and k have a closed form.
    """
    width, heads = tower.config.hidden_size, tower.config.num_attention_heads
    waves = math.pi / 40 * torch.arange(1, width // 4 + 1)

    def shift(by: int) -> Tensor:
        """The matrix that maps the sines and cosines of a place to those `by` patches further."""
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
            # Each head uses every `heads`-th wave.
            waves_of = slice(head, None, heads)
            block = layer.self_attn
            mine = slice(head * block.head_dim, (head + 1) * block.head_dim)
            moved = torch.block_diag(shift(down), shift(right))
            block.q_proj.weight[mine] += 2 * moved[waves_of]
            block.k_proj.weight[mine] += 2 * torch.eye(width)[waves_of]


def explicit_attention(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention with the signature that transformers calls. For this tower, forward and backward in
    bfloat16 on a CPU, it takes half the time of PyTorch's fused attention (35 and 67 ms for a layer
    and 16 pictures)."""
    logits = (q * scaling) @ k.mT
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return (logits.softmax(-1, dtype=v.dtype) @ v).transpose(1, 2), None


class Recorder:
    """Records the inputs of some layers of a language model in each forward pass, to compute their
    attention weights."""

    def __init__(self, llama: Any, layers: tuple[int, ...]) -> None:
        self.llama = llama
        self.inputs: dict[int, tuple[Tensor, Any]] = {}
        self.hooks = [
            llama.layers[i].register_forward_pre_hook(self._record(i), with_kwargs=True)
            for i in layers
        ]

    def _record(self, layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            self.inputs[layer] = args[0], kwargs["position_embeddings"]

        return hook

    def log_weights(self, layer: int, rows: Tensor, visual: int) -> Tensor:
        """`[B, Q, 1 + visual]`: logarithms of the attention weights of a layer's first head, from
        the tokens `rows` `[B, Q]` to START and the picture only."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        block, (hidden, rope) = self.llama.layers[layer], self.inputs[layer]
        size = block.self_attn.head_dim
        normed = block.input_layernorm(hidden)
        q, k = (
            F.linear(normed, projection.weight[:size])[:, None]
            for projection in (block.self_attn.q_proj, block.self_attn.k_proj)
        )
        q, k = (x[:, 0].float() for x in apply_rotary_pos_emb(q, k, *rope))
        q = q.gather(1, rows[..., None].expand(-1, -1, size))
        return (q @ k[:, : 1 + visual].mT * size**-0.5).log_softmax(-1)


def attention_loss(recorder: Recorder, s: Sample, things: Tensor, middle: Tensor | None) -> Tensor:
    """The loss on the attention of one head in layer 2 and one in layer 3.

    At the end of a question, and at the last word before END, layer 2 is to attend to the things
    that the question is about. At the end of a question about a relation, layer 3 is to attend to
    the thing that answers it. For a question that counts, layer 2 is to attend to START and to the
    middle of each counted thing, with equal weights: then the weight of START tells the count.

    Args:
        things, middle: `[B, T]`, labels of the visual tokens; `middle` is None where middles may be
            missing among them, and then there is no loss on counts.
    """
    count = things.shape[1]
    spoken = (s.labels >= 0).unflatten(-1, (SLOTS, -1))
    begin = spoken.int().argmax(-1)
    last = (begin + spoken.sum(-1) - 2).clamp_min(0)
    slots = 1 + count + torch.arange(SLOTS, device=begin.device) * tiny.SLOT
    which = things[:, None].expand(-1, SLOTS, -1)
    about, target = s.about.gather(2, which), s.target.gather(2, which)
    counts = s.types == TYPES.index("count")
    asked = about & ~counts[..., None]
    second = recorder.log_weights(1, slots + begin, count)
    pairs = (
        (second, asked),
        (recorder.log_weights(1, slots + last, count), asked),
        (recorder.log_weights(2, slots + begin, count), target),
    )
    losses = [
        -logs[..., 1:].masked_fill(~wanted, -1e9).logsumexp(-1)[wanted.any(-1)].mean()
        for logs, wanted in pairs
    ]
    if middle is not None:
        equal = F.pad(about & middle[:, None], (1, 0), value=True).float()
        equal = equal / equal.sum(-1, keepdim=True)
        losses.append((equal * (equal.clamp_min(1e-9).log() - second)).sum(-1)[counts].mean())
    return torch.stack(losses).nan_to_num().sum()
