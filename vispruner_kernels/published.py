"""The published VisPruner selection loop in eager PyTorch: what this package replaces.

Written anew from the description in arXiv 2412.01818v2, section 3, with the order of operations,
the host-built batch index and the limits of the published code (Theia-4869/VisPruner at aefa01a,
llava/model/llava_arch.py): where that raises or keeps a wrong number of tokens, so does this. It is
the competitor of the benchmarks and the oracle of a test, not an operator.
"""

from __future__ import annotations

import torch
from torch import Tensor


def select_published(
    features: Tensor, scores: Tensor, keep: int, important_ratio: float = 0.5
) -> Tensor:
    """Kept tokens of features [B, N, C] and scores [B, N], ascending, int64 [B, about `keep`].

    Raises ``RuntimeError`` or ``IndexError`` wherever a pass meets an odd number of tokens.
    """
    important_count = int(keep * important_ratio)
    diverse_count = keep - important_count
    by_score = scores.argsort(dim=-1, descending=True)
    important, residual = by_score.split(
        [important_count, by_score.shape[1] - important_count], dim=-1
    )
    if diverse_count == 0:
        return important.sort(dim=-1).values
    unit = features / features.norm(dim=-1, keepdim=True)

    def rows(count: int) -> Tensor:
        # Made on the host in every pass: on a GPU each use is a copy and a synchronisation.
        return torch.arange(features.shape[0]).unsqueeze(-1).expand(-1, count)

    while (drop := min(8, residual.shape[1] - diverse_count)) > 0:
        count = residual.shape[1]
        living = unit[rows(count), residual]
        similarity = living[:, 0::2] @ living[:, 1::2].transpose(-1, -2)
        nearest = similarity.max(dim=-1).values
        distinct = nearest.argsort(dim=-1, descending=True)[:, drop:]
        even, odd = residual[:, 0::2], residual[:, 1::2]
        residual = torch.cat([even[rows(count // 2 - drop), distinct], odd], dim=-1)
    return torch.cat([important, residual], dim=-1).sort(dim=-1).values
