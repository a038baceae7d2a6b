"""Nearest-neighbour search: the beginning of a list, the whole list, the full row of similarities.

`sim` [N, ld] holds ordered similarity keys, INT32_MIN on the diagonal and in the padding of a row.
`lists` [N, NEIGHBOURS] holds the nearest neighbours of each token as `index_key`s. A token is a
candidate while its `state` is odd.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vispruner_kernels._triton.rules import (
    INT32_MIN,
    INT64_MIN,
    index_key,
    key_index,
    key_value,
    ordered,
    pair_key,
)

# Tokens per step of a search in short lists, in whole lists and in full rows; ROWS is also the
# number of lists that are made at once.
BLOCK_SHORT = tl.constexpr(256)
BLOCK_LIST = tl.constexpr(32)
ROWS = tl.constexpr(16)
# Neighbours in a short list, the beginning of a list. Most searches of the bipartite rule end there
# (docs/measured.md).
SHORT = tl.constexpr(8)
# Columns of a row per step.
CHUNK = tl.constexpr(128)
# The most bisections of the similarity threshold of a list.
HALVINGS = tl.constexpr(12)


@triton.jit
def list_neighbours(sim_ptr, ld, lists_ptr, N, token, NEIGHBOURS: tl.constexpr):
    """List the tokens that reach a similarity threshold, most similar first, then INT64_MIN.

    `token` [ROWS]. Bisection searches a threshold that NEIGHBOURS / 2 to NEIGHBOURS tokens reach.
    If HALVINGS bisections find none, the list has fewer tokens, or none. Results do not depend on
    the threshold: a token outside a list is less similar than each token in it.
    """
    mask = token < N
    row_ptr = sim_ptr + token.to(tl.int64) * ld
    below = tl.full([ROWS], -2.0, tl.float32)
    threshold = tl.full([ROWS], 2.0, tl.float32)
    searching = N - 1 > NEIGHBOURS
    if searching == 0:
        threshold = below
    step = 0
    while searching:
        middle = (below + threshold) * 0.5
        key = ordered(middle)
        reached = tl.zeros([ROWS, CHUNK], tl.int32)
        for first in range(0, N, CHUNK):
            value = _row_chunk(row_ptr, mask, first, N)
            reached += (value >= key[:, None]).to(tl.int32)
        count = tl.sum(reached, axis=1)
        fits = count <= NEIGHBOURS
        below = tl.where(fits, below, middle)
        threshold = tl.where(fits, middle, threshold)
        step += 1
        good = (fits & (count >= NEIGHBOURS // 2)) | (mask == 0)
        searching = (step < HALVINGS) & (tl.sum(good.to(tl.int32), axis=0) < ROWS)
    key = ordered(threshold)
    filled = tl.zeros([ROWS], tl.int32)
    list_ptr = lists_ptr + token.to(tl.int64) * NEIGHBOURS
    for first in range(0, N, CHUNK):
        offs_n = first + tl.arange(0, CHUNK)
        value = _row_chunk(row_ptr, mask, first, N)
        listed = value >= key[:, None]
        place = filled[:, None] + tl.cumsum(listed.to(tl.int32), axis=1) - 1
        tl.store(list_ptr[:, None] + place, index_key(value, offs_n[None, :]), mask=listed)
        filled += tl.sum(listed.to(tl.int32), axis=1)
    tl.debug_barrier()
    offs_k = tl.arange(0, NEIGHBOURS)
    listed = mask[:, None] & (offs_k[None, :] < filled[:, None])
    neighbour = tl.load(list_ptr[:, None] + offs_k[None, :], mask=listed, other=INT64_MIN)
    neighbour = tl.sort(neighbour, descending=True)
    tl.store(list_ptr[:, None] + offs_k[None, :], neighbour, mask=mask[:, None])


@triton.jit
def _row_chunk(row_ptr, mask, first, N):
    offs_n = first + tl.arange(0, CHUNK)
    # Up to the next multiple of 16 columns; the padding holds INT32_MIN.
    valid = mask[:, None] & (offs_n < tl.cdiv(N, 16) * 16)[None, :]
    return tl.load(row_ptr[:, None] + offs_n[None, :], mask=valid, other=INT32_MIN)


@triton.jit
def _nearest_listed(
    lists_ptr, state_ptr, token, mask, NEIGHBOURS: tl.constexpr, LENGTH: tl.constexpr
):
    """The `index_key` of the nearest candidate among the first LENGTH of a token's list, or
    INT64_MIN.

    `token` and `mask` are one-dimensional and repeat every token LENGTH times, so that the keys of
    a list and their states are loaded in one layout.
    """
    offs_k = tl.arange(0, token.shape[0]) % LENGTH
    list_ptr = lists_ptr + token.to(tl.int64) * NEIGHBOURS
    key = tl.load(list_ptr + offs_k, mask=mask, other=INT64_MIN)
    state = tl.load(state_ptr + key_index(key), mask=key != INT64_MIN, other=0)
    key = tl.where((state & 1) == 1, key, INT64_MIN)
    return tl.max(tl.reshape(key, [token.shape[0] // LENGTH, LENGTH]), axis=1)


@triton.jit
def _nearest_in_row(sim_ptr, ld, state_ptr, token, mask, N):
    """The `index_key` of the nearest candidate in the full row, or INT64_MIN."""
    row_ptr = sim_ptr + token.to(tl.int64) * ld
    best = tl.full([ROWS, CHUNK], INT64_MIN, tl.int64)
    for first in range(0, N, CHUNK):
        offs_n = first + tl.arange(0, CHUNK)
        state = tl.load(state_ptr + offs_n, mask=offs_n < N, other=0)
        value = _row_chunk(row_ptr, mask, first, N)
        candidate = ((state & 1) == 1)[None, :] & (value != INT32_MIN)
        best = tl.maximum(best, tl.where(candidate, index_key(value, offs_n[None, :]), INT64_MIN))
    return tl.max(best, axis=1)


@triton.jit
def find_nearest(
    sim_ptr,
    ld,
    lists_ptr,
    state_ptr,
    tokens_ptr,
    missed_ptr,
    partner_ptr,
    keys_ptr,
    N,
    count,
    PAIRWISE: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    """Find the nearest candidate to each of `count` tokens.

    Pairwise: the i-th token is tokens[i]; its candidate goes to partner[token], and the pair of
    both to keys[token]. Bipartite: the i-th token is tokens[2 * i]; its sort key goes to keys[i].
    The search covers the short list, then the whole list, then the full row. `missed` holds the i
    for which no candidate is found yet.
    """
    stride = 1 if PAIRWISE else 2
    missed = 0
    for first in range(0, count, BLOCK_SHORT):
        place = first + tl.arange(0, BLOCK_SHORT * SHORT) // SHORT
        token = tl.load(tokens_ptr + place * stride, mask=place < count, other=0)
        nearest = _nearest_listed(lists_ptr, state_ptr, token, place < count, NEIGHBOURS, SHORT)
        place = first + tl.arange(0, BLOCK_SHORT)
        mask = place < count
        _store_nearest(partner_ptr, keys_ptr, tokens_ptr, place, nearest, mask, PAIRWISE)
        missed = append(missed_ptr, missed, place, mask & (nearest == INT64_MIN))
    tl.debug_barrier()
    if missed > 0:
        unlisted = 0
        for first in range(0, missed, BLOCK_LIST):
            offs = first + tl.arange(0, BLOCK_LIST * NEIGHBOURS) // NEIGHBOURS
            mask = offs < missed
            place = tl.load(missed_ptr + offs, mask=mask, other=0)
            token = tl.load(tokens_ptr + place * stride, mask=mask, other=0)
            nearest = _nearest_listed(lists_ptr, state_ptr, token, mask, NEIGHBOURS, NEIGHBOURS)
            offs = first + tl.arange(0, BLOCK_LIST)
            mask = offs < missed
            place = tl.load(missed_ptr + offs, mask=mask, other=0)
            _store_nearest(partner_ptr, keys_ptr, tokens_ptr, place, nearest, mask, PAIRWISE)
            # Overwrites only entries that have been read.
            tl.debug_barrier()
            unlisted = append(missed_ptr, unlisted, place, mask & (nearest == INT64_MIN))
        tl.debug_barrier()
        if unlisted > 0:
            for first in range(0, unlisted, ROWS):
                offs = first + tl.arange(0, ROWS)
                mask = offs < unlisted
                place = tl.load(missed_ptr + offs, mask=mask, other=0)
                token = tl.load(tokens_ptr + place * stride, mask=mask, other=0)
                nearest = _nearest_in_row(sim_ptr, ld, state_ptr, token, mask, N)
                _store_nearest(partner_ptr, keys_ptr, tokens_ptr, place, nearest, mask, PAIRWISE)
            tl.debug_barrier()


@triton.jit
def _store_nearest(partner_ptr, keys_ptr, tokens_ptr, place, nearest, mask, PAIRWISE: tl.constexpr):
    if PAIRWISE:
        token = tl.load(tokens_ptr + place, mask=mask, other=0)
        # The last living token is its own partner and has no pair.
        alone = nearest == INT64_MIN
        partner = tl.where(alone, token, key_index(nearest))
        pair = pair_key(key_value(nearest), token, partner)
        tl.store(partner_ptr + token, partner, mask=mask)
        tl.store(keys_ptr + token, tl.where(alone, INT64_MIN, pair), mask=mask)
    else:
        tl.store(keys_ptr + place, index_key(key_value(nearest), place), mask=mask)


@triton.jit
def append(list_ptr, count, item, mask):
    """Append the items of `mask` to the list of `count` items; return its new length."""
    more = tl.sum(mask.to(tl.int32), axis=0)
    if more > 0:
        place = count + tl.cumsum(mask.to(tl.int32), axis=0) - 1
        tl.store(list_ptr + place, item, mask=mask)
    return count + more
