"""Structs and constants that the CPU and the CUDA operators pass to `vispruner_kernels._C`.

A struct of C++ is a dict with the names of its fields; `_C.pyi` has their types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vispruner_kernels import _checks

if TYPE_CHECKING:
    from vispruner_kernels import _C

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MATCHINGS = {name: number for number, name in enumerate(_checks.MATCHINGS)}
# The next three change no bit of an answer; tests set them.
# Threads of the thread block that the CPU walks as a loop in the passes of `select`.
BLOCK_THREADS = 1
# Rounds of the pairwise rule in which every orphaned token searches again.
EAGER_ROUNDS = 64
# When this many tokens are left, the bipartite rule copies their similarities to a smaller matrix.
# A multiple of 16; 0 switches it off.
COMPACT_TO = 0


def tokens(x: Tensor) -> _C.Tokens:
    """Describe features [B, N, C] or scores [B, N]."""
    strides = x.stride()
    return {
        "data": x.data_ptr(),
        "dtype": DTYPES[x.dtype],
        "image_stride": strides[0],
        "token_stride": strides[1],
    }


def packed_tokens(x: Tensor) -> _C.Tokens:
    """Describe packed features [total, C] or scores [total]."""
    return {
        "data": x.data_ptr(),
        "dtype": DTYPES[x.dtype],
        "image_stride": 0,
        "token_stride": x.stride(0),
    }
