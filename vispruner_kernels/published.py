"""VisPruner's selection as published, in eager PyTorch: what this package replaces.

Not an operator: the competitor of the benchmarks and the oracle of a test. It does what the
published code does (Theia-4869/VisPruner at aefa01a, Apache-2.0, llava/model/llava_arch.py, lines
148-182), operation for operation, because that is what is timed: unit vectors once, and in every
pass a batch index made on the host, a gather of all living tokens, a matrix product, a maximum, a
sort and a concatenation. Its limits are kept too: where the published code raises or keeps a wrong
number of tokens, so does this.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 8


def _take(rows: Tensor, positions: Tensor, count: int) -> Tensor:
    """rows[b, positions[b]], with `count` positions as the published code expects them."""
    # On a GPU this index is a copy from the host and a synchronisation, in every pass.
    image = torch.arange(len(rows))[:, None].expand(-1, count)
    return rows[image, positions]


def _drop_duplicates(unit: Tensor, residual: Tensor, drop: int) -> Tensor:
    """One pass: the `drop` tokens at even positions that are nearest to an odd one fall."""
    count = residual.shape[1]
    living = _take(unit, residual, count)
    to_odd = (living[:, 0::2] @ living[:, 1::2].mT).amax(-1)
    survivors = to_odd.argsort(-1, descending=True)[:, drop:]
    # For an odd count there is one survivor more than this, and the index does not broadcast.
    even = _take(residual[:, 0::2], survivors, count // 2 - drop)
    return torch.cat([even, residual[:, 1::2]], -1)


def select_published(
    features: Tensor, scores: Tensor, keep: int, important_ratio: float = 0.5
) -> Tensor:
    """Kept tokens of features [B, N, C] and scores [B, N], ascending, int64 [B, about `keep`].

    Raises ``RuntimeError`` or ``IndexError`` wherever the published loop does.
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
