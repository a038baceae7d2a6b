"""The tokens that pruning in vLLM must keep, computed by the reference from features, q and k."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm_models import SIDE, TILE, N

from vispruner_kernels import reference
from vispruner_kernels.methods import FasterVLM, FoPru, Method, VisPruner


def scores_of(method: Method, q: Tensor, k: Tensor, prefix: int) -> Tensor | None:
    """The scores of the operator, compared with a mean of the attention over heads (and queries) in
    float64. The selection needs the operator's bits, so those are returned."""
    scores = method.attention_scores(q, k, num_prefix=prefix)
    if scores is None:
        return None
    q, k = q.double().transpose(1, 2), k.double().transpose(1, 2)
    attention = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
    rows = attention[:, :, :1] if method.needs == "cls" else attention
    exact = rows.mean((1, 2))[:, prefix:]
    assert (scores - exact).abs().max() < 1e-6
    return scores


def chosen(method: Method, features: Tensor, scores: Tensor | None) -> Tensor:
    """The indices that a method keeps, by the reference, from features [n, C]."""
    method = method.on_grid(SIDE)
    keep = method.retained_tokens(len(features))
    if isinstance(method, VisPruner):
        rule = method.important_ratio, method.step, method.matching
        return reference.select(features[None], scores[None], keep, *rule)[0]
    if isinstance(method, FasterVLM) or getattr(method, "strategy", "") == "rank":
        return reference.select_topk(scores[None], keep)[0]
    if isinstance(method, FoPru):
        return reference.select_rows(scores[None], SIDE, keep // SIDE)[0]
    return method.select(features[None])[0]


def packing(model: Any, sizes: list[tuple[int, int]]) -> list[tuple[Tensor, int]]:
    """For each image, the layout that transformers gives it (the row of each token, or -1 for a
    newline) and its number of tiles."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    found = []
    for size in sizes:
        tiles = image_size_to_num_patches(list(size), model.config.image_grid_pinpoints, TILE)
        rows = torch.arange(tiles * N, dtype=torch.float64).view(tiles, N, 1)
        newline = torch.tensor([-1.0]).double()
        packed, _ = model.model.pack_image_features(
            [rows], [list(size)], "default", image_newline=newline
        )
        found.append((packed[0][:, 0].long(), tiles))
    return found


def expected(
    packed: list[tuple[Tensor, int]],
    features: Tensor,
    scores: Tensor,
    method: Method,
    budget: str,
    newlines: str = "keep",
) -> tuple[Tensor, list[Tensor]]:
    """The features that the projector must get, and the places of each image's kept tokens."""
    rows, places, start = [], [], 0
    for layout, tiles in packed:
        image_features = features[start : start + tiles].flatten(0, 1)
        image_scores = scores[start : start + tiles].flatten()
        present = layout[layout >= 0].sort().values
        groups = [present]
        if budget == "tile":
            groups = [present[present // N == tile] for tile in range(tiles)]
        kept = torch.cat([g[chosen(method, image_features[g], image_scores[g])] for g in groups])
        stays = torch.isin(layout, kept) | ((layout < 0) & (newlines == "keep"))
        places.append(stays.nonzero()[:, 0])
        rows.append(image_features[kept])
        start += tiles
    return torch.cat(rows), places
