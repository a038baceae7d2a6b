"""Deterministic operators for training-free visual token pruning in vision-language models."""

from vispruner_kernels import _backends as _backends  # registers torch.ops.vispruner.*
from vispruner_kernels.ops import (
    cls_attention,
    cls_scores,
    prune,
    received_scores,
    received_scores_varlen,
    select,
    select_rows,
    select_topk,
    select_varlen,
)

__version__ = "0.1.0"

__all__ = [
    "cls_attention",
    "cls_scores",
    "prune",
    "received_scores",
    "received_scores_varlen",
    "select",
    "select_rows",
    "select_topk",
    "select_varlen",
]
