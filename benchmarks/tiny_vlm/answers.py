"""Answers of the tiny VLM from some of the visual tokens, for many questions at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softmax

from benchmarks.tiny_vlm import model as tiny
from benchmarks.tiny_vlm.scenes import ASKED, Scene
from vispruner_kernels.demo import encoder
from vispruner_kernels.methods import Method

# FastV drops tokens after this layer, counted from 1, by the attention weights of this layer.
FASTV_LAYER = 2


class Batch(NamedTuple):
    """Outputs of the vision tower for some pictures, and the questions about them.

    Attributes:
        features: `[B, 576, C]`, the patch tokens after the last layer but one.
        q, k: `[B, 577, H, D]`, queries and keys of that layer.
        ids, labels: `[B, Q * SLOT]`, the questions as `tiny.pack` returns them.
    """

    features: Tensor
    q: Tensor
    k: Tensor
    ids: Tensor
    labels: Tensor


def encode(model: Any, scenes: list[Scene]) -> Batch:
    tower = model.model.vision_tower
    pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes]))
    features, q, k = encoder.read(tower, tiny.pixel_values(pixels).to(tower.device, tower.dtype))
    packed = [tiny.pack(scene.questions, len(ASKED)) for scene in scenes]
    ids, labels = (torch.stack(x).to(tower.device) for x in zip(*packed, strict=True))
    return Batch(features, q, k, ids, labels)


def select(method: Method, batch: Batch) -> Tensor:
    """`[B, T]`, the tokens that the method keeps."""
    scores = method.attention_scores(batch.q, batch.k, num_prefix=1)
    return method.select(batch.features, scores)


def project(model: Any, batch: Batch, kept: Tensor | None = None) -> Tensor:
    """The kept visual tokens after the projector, as the language model reads them."""
    projector = model.model.multi_modal_projector
    return projector(gather(batch.features, kept).to(projector.linear_1.weight.dtype))


def gather(features: Tensor, kept: Tensor | None) -> Tensor:
    if kept is None:
        return features
    return features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))


@torch.no_grad()
def right(model: Any, batch: Batch, kept: Tensor | None) -> Tensor:
    """`[B, Q]` bool: whether greedy decoding gives the answer and then ends.

    It does if each token is the most likely one after the true tokens before it.
    """
    visual = project(model, batch, kept)
    return _right(tiny.logits(model, visual, batch.ids), batch.labels)


@torch.no_grad()
def answers(model: Any, batch: Batch, kept: Tensor | None) -> Tensor:
    """`[B, Q, SLOT]` int64: tokens of greedy decoding at the places of the true answer and its END,
    -1 at all other places. Each token follows the decoded ones, not the true ones."""
    visual = project(model, batch, kept)
    ids = batch.ids.clone()
    wanted = batch.labels >= 0
    # Where an answer goes on after a token, the decoded token is the next input.
    after = wanted & wanted.roll(1, -1)
    # An answer has at most two words and END.
    for _ in range(3):
        best = tiny.logits(model, visual, ids).argmax(-1)
        ids = torch.where(after, best.roll(1, -1), ids)
    return torch.where(wanted, best, -1).unflatten(-1, (len(ASKED), -1))


@torch.no_grad()
def fastv(model: Any, batch: Batch, keeps: list[int]) -> dict[int, Tensor]:
    """As `right`, but each question keeps the visual tokens that its last token attends to most.

    The first FASTV_LAYER layers see all tokens. The later layers see those with the largest
    attention weights in layer FASTV_LAYER, mean over heads (FastV, arXiv 2403.06764). Kept tokens
    keep their positions.
    """
    llama = model.model.language_model
    visual = project(model, batch)
    hidden, mask, positions = tiny.packed(model, visual, batch.ids)
    rope = llama.rotary_emb(hidden, positions)
    first, count, questions = 1, visual.shape[1], len(ASKED)
    for number, layer in enumerate(llama.layers[:FASTV_LAYER], 1):
        if number == FASTV_LAYER:
            attention = _attention(layer, hidden, rope, mask)
        hidden = _run(layer, hidden, mask, positions, rope)
    # The last token of a question is the one whose label is the answer's first token.
    wanted = (batch.labels >= 0).unflatten(-1, (questions, -1))
    asked = first + count + torch.arange(questions) * tiny.SLOT + wanted.int().argmax(-1)
    attention = attention.gather(1, asked[..., None].expand(-1, -1, attention.shape[-1]))
    attention = attention[..., first : first + count].flatten(0, 1)

    pictures = len(hidden)
    slots = hidden[:, first + count :].unflatten(1, (questions, -1)).flatten(0, 1)
    before = hidden[:, : first + count].repeat_interleave(questions, 0)
    labels = batch.labels.unflatten(-1, (questions, -1)).flatten(0, 1)
    results = {}
    for keep in keeps:
        kept = first + attention.topk(keep).indices.sort().values
        kept = torch.cat([torch.zeros_like(kept[:, :1]), kept], 1)
        inputs = torch.cat([gather(before, kept), slots], 1)
        inside = torch.arange(tiny.SLOT).expand(len(kept), -1)
        places = torch.cat([kept, first + count + inside], 1)
        causal = torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool).tril()
        turned = llama.rotary_emb(inputs, places)
        for layer in llama.layers[FASTV_LAYER:]:
            inputs = _run(layer, inputs, causal[None, None], places, turned)
        words = model.lm_head(llama.norm(inputs[:, -tiny.SLOT :]))
        results[keep] = _right(words, labels).view(pictures, questions)
    return results


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    hits = (logits.argmax(-1) == labels) | (labels < 0)
    return hits.unflatten(-1, (-1, tiny.SLOT)).all(-1)


def _run(layer: Any, hidden: Tensor, mask: Tensor, positions: Tensor, rope: Any) -> Tensor:
    mask = mask.expand(len(hidden), -1, -1, -1)
    out = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rope)
    return out[0] if isinstance(out, tuple) else out


def _attention(layer: Any, hidden: Tensor, rope: Any, mask: Tensor) -> Tensor:
    """`[B, S, S]`, the attention weights of a Llama layer, mean over heads."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    q, k = (
        project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *rope)
    logits = (q @ k.mT * attention.scaling).masked_fill(~mask, -torch.inf)
    return softmax(logits.float(), -1).mean(1)
