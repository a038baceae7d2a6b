"""VisPruner's selection as published, in eager PyTorch.

Benchmarks time it against this package, and one test uses it as an oracle. It repeats the published
code operation for operation (Theia-4869/VisPruner at aefa01a, Apache-2.0,
llava/model/llava_arch.py, lines 148-182), because benchmarks time those operations: unit vectors
once, and in every pass a batch index made on the host, a gather of all remaining tokens, a matrix
product, a maximum, a sort and a concatenation. It also raises, or keeps a wrong number of tokens,
for the same arguments as the published code.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 8


def _take(rows: Tensor, positions: Tensor, count: int) -> Tensor:
    """rows[b, positions[b]], for the `count` positions that the published code expects."""
    # On a GPU this index is a copy from the host and a synchronisation, in every pass.
    image = torch.arange(len(rows))[:, None].expand(-1, count)
    return rows[image, positions]


def _drop_duplicates(unit: Tensor, residual: Tensor, drop: int) -> Tensor:
    """One pass: drop the `drop` tokens at even positions that are most similar to an odd one."""
    count = residual.shape[1]
    remaining = _take(unit, residual, count)
    to_odd = (remaining[:, 0::2] @ remaining[:, 1::2].mT).amax(-1)
    survivors = to_odd.argsort(-1, descending=True)[:, drop:]
    # For an odd count there is one survivor more than that, and the index does not broadcast.
    even = _take(residual[:, 0::2], survivors, count // 2 - drop)
    return torch.cat([even, residual[:, 1::2]], -1)


def select_published(
    features: Tensor, scores: Tensor, keep: int, important_ratio: float = 0.5
) -> Tensor:
    """Select about `keep` tokens by features [B, N, C] and scores [B, N]: int64, ascending.

    Raises ``RuntimeError`` or ``IndexError`` for the same arguments as the published loop.
    """
    important_count = int(keep * important_ratio)
    order = scores.argsort(-1, descending=True)
    kept, residual = order[:, :important_count], order[:, important_count:]
    diverse_count = keep - important_count
    if diverse_count > 0:
        unit = features / features.norm(dim=-1, keepdim=True)
        while residual.shape[1] > diverse_count:
            drop = min(STEP, residual.shape[1] - diverse_count)
            residual = _drop_duplicates(unit, residual, drop)
        kept = torch.cat([kept, residual], -1)
    return kept.sort(-1).values
