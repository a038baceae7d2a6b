"""The published rule of duplicate removal, run by one program per image.

A pass is a chain of dependent loads and barriers. At 576 tokens sorting takes some 30 % of its
time by simulation (docs/log.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vispruner_kernels._triton.neighbours import find_nearest
from vispruner_kernels._triton.rules import (
    INT32_MIN,
    INT64_MIN,
    SORTED,
    index_key,
    key_index,
    ranked_block,
    sort_blocks,
    sorted_keys,
)

# States of a token. The state of a living residual token is the parity of its position: a are the
# even positions, b the odd ones. The other states are even too, so only tokens of b have an odd
# state, which is what a search tests.
DROPPED = tl.constexpr(-2)
IMPORTANT = tl.constexpr(-4)
# Tokens per iteration of a loop over all tokens.
SWEEP = tl.constexpr(256)


@triton.jit
def bipartite(
    sim_ptr,
    ld,
    lists_ptr,
    state_ptr,
    residual_ptr,
    next_ptr,
    missed_ptr,
    keys_ptr,
    N,
    n,
    keep,
    step,
    NEIGHBOURS: tl.constexpr,
    SMALL: tl.constexpr,
):
    """Drop tokens of a until `keep` of the `n` tokens of `residual` are left.

    Before and after, `state` is the parity of the position of each token that is left; it is
    DROPPED for the other residual tokens.
    """
    while n > tl.maximum(keep, SMALL):
        size_a = (n + 1) // 2
        drop = tl.minimum(tl.minimum(step, n - keep), size_a)
        # Phase 1: find the nearest of b to each of a.
        find_nearest(
            sim_ptr,
            ld,
            lists_ptr,
            state_ptr,
            residual_ptr,
            missed_ptr,
            keys_ptr,
            keys_ptr,
            N,
            size_a,
            False,
            NEIGHBOURS,
        )
        # Phase 2: the next residual is sorted a without its first `drop`, then b in its order.
        if size_a <= SORTED // 2:
            key, offs_a = sorted_keys(keys_ptr, size_a, SORTED // 2)
            _place(residual_ptr, next_ptr, state_ptr, key, offs_a < size_a, offs_a - drop)
        else:
            _place_blocks(residual_ptr, next_ptr, state_ptr, keys_ptr, size_a, drop)
        for first in range(0, n // 2, SWEEP):
            offs_b = first + tl.arange(0, SWEEP)
            mask_b = offs_b < n // 2
            token = tl.load(residual_ptr + 2 * offs_b + 1, mask=mask_b, other=0)
            position = size_a - drop + offs_b
            tl.store(next_ptr + position, token, mask=mask_b)
            tl.store(state_ptr + token, _state(position), mask=mask_b)
        tl.debug_barrier()
        residual_ptr, next_ptr = next_ptr, residual_ptr
        n -= drop
    if n > keep:
        # The same passes on similarities in registers.
        offs = tl.arange(0, SMALL)
        mask = offs < n
        token = tl.load(residual_ptr + offs, mask=mask, other=0)
        value = tl.load(
            sim_ptr + token.to(tl.int64)[:, None] * ld + token[None, :],
            mask=mask[:, None] & mask[None, :],
            other=INT32_MIN,
        )  # [SMALL, SMALL], symmetric: columns are a, rows are b
        position = tl.where(mask, offs, DROPPED)
        while n > keep:
            size_a = (n + 1) // 2
            drop = tl.minimum(tl.minimum(step, n - keep), size_a)
            in_b = (position & 1) == 1
            in_a = (position >= 0) & (in_b == 0)
            nearest = tl.max(tl.where(in_b[:, None], value, INT32_MIN), axis=0)
            key = tl.where(in_a, index_key(nearest, position), INT64_MIN)
            rank = tl.sum((key[:, None] > key[None, :]).to(tl.int32), axis=0)
            sorted_a = tl.where(in_a & (rank >= drop), rank - drop, DROPPED)
            position = tl.where(in_b, size_a - drop + position // 2, sorted_a)
            n -= drop
        tl.store(state_ptr + token, _state(position), mask=mask)


@triton.jit
def _place(residual_ptr, next_ptr, state_ptr, key, mask, position):
    """Move the tokens of these keys to their positions; those of negative positions are dropped."""
    token = tl.load(residual_ptr + 2 * key_index(key), mask=mask, other=0)
    tl.store(next_ptr + position, token, mask=mask & (position >= 0))
    tl.store(state_ptr + token, _state(position), mask=mask)


@triton.jit
def _place_blocks(residual_ptr, next_ptr, state_ptr, keys_ptr, size_a, drop):
    sort_blocks(keys_ptr, size_a)
    for first in range(0, size_a, SORTED):
        key, mask, rank = ranked_block(keys_ptr, size_a, first)
        _place(residual_ptr, next_ptr, state_ptr, key, mask, rank - drop)


@triton.jit
def _state(position):
    return tl.where(position >= 0, position & 1, DROPPED)
