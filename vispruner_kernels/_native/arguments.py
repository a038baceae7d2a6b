"""Arguments of `vispruner_kernels._C` that its CPU and its CUDA operators share."""

from __future__ import annotations

import torch
from torch import Tensor

from vispruner_kernels import _checks

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MATCHINGS = {name: number for number, name in enumerate(_checks.MATCHINGS)}
# Threads of a block that the passes of `select` are walked with; any number gives the same bits.
BLOCK_THREADS = 1
# Rounds of the pairwise rule before it takes care of its bad case; any number gives the same bits.
EAGER_ROUNDS = 64
# Living tokens from which on the bipartite rule works on a copy of their similarities, a multiple
# of 16; any gives the same bits.
COMPACT_TO = 0


def tokens(x: Tensor) -> tuple[int, int, int, int]:
    """[B, N, ...] as address, dtype, stride of an image, stride of a token."""
    strides = x.stride()
    return x.data_ptr(), DTYPES[x.dtype], strides[0], strides[1]


def packed(x: Tensor) -> tuple[int, int, int, int]:
    """[total, ...]"""
    return x.data_ptr(), DTYPES[x.dtype], 0, x.stride(0)
