"""Who is nearest to a token: its list of neighbours, and the whole row of similarities behind it.

`sim` [N, ld] are ordered similarity keys, INT32_MIN on the diagonal and behind a row. `lists`
[N, NEIGHBOURS] hold each token's nearest neighbours as `index_key`s. A token is a candidate while
its `state` is odd.
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

# Tokens per step of looks at the beginnings of lists, at whole lists and at whole rows.
LOOK = tl.constexpr(256)
LOOK_AGAIN = tl.constexpr(32)
ROWS = tl.constexpr(8)
# The beginning of a list, which has one of b in most looks (docs/measured.md).
FIRST = tl.constexpr(8)
# Columns of a row per step.
CHUNK = tl.constexpr(256)
# Halvings of the interval of similarities when a list is made.
HALVINGS = tl.constexpr(12)


@triton.jit
def list_neighbours(sim_ptr, ld, lists_ptr, N, token, NEIGHBOURS: tl.constexpr):
    """Lists for tokens [ROWS]: who is at least as similar as some threshold, most similar first,
    then INT64_MIN.

    The threshold is one that between half of NEIGHBOURS and all reach, if halving finds it. Results
    do not depend on it: who is not in a list is less similar than who is.
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
    rank = tl.sum((neighbour[:, :, None] > neighbour[:, None, :]).to(tl.int32), axis=1)
    tl.debug_barrier()
    place = tl.where(listed, rank, offs_k[None, :])
    tl.store(list_ptr[:, None] + place, neighbour, mask=mask[:, None])


@triton.jit
def _row_chunk(row_ptr, mask, first, N):
    offs_n = first + tl.arange(0, CHUNK)
    # To the end of a vector: there is INT32_MIN behind the row.
    valid = mask[:, None] & (offs_n < tl.cdiv(N, 16) * 16)[None, :]
    return tl.load(row_ptr[:, None] + offs_n[None, :], mask=valid, other=INT32_MIN)


@triton.jit
def _nearest_listed(
    lists_ptr, state_ptr, token, mask, NEIGHBOURS: tl.constexpr, LENGTH: tl.constexpr
):
    """The nearest candidate among the first LENGTH of a token's list as `index_key`, or INT64_MIN
    if there is none.

    `token` and `mask` have every token LENGTH times: in one dimension a list's keys and their
    states are loaded in one layout.
    """
    offs_k = tl.arange(0, token.shape[0]) % LENGTH
    list_ptr = lists_ptr + token.to(tl.int64) * NEIGHBOURS
    key = tl.load(list_ptr + offs_k, mask=mask, other=INT64_MIN)
    state = tl.load(state_ptr + key_index(key), mask=key != INT64_MIN, other=0)
    key = tl.where((state & 1) == 1, key, INT64_MIN)
    return tl.max(tl.reshape(key, [token.shape[0] // LENGTH, LENGTH]), axis=1)


@triton.jit
def _nearest_in_row(sim_ptr, ld, state_ptr, token, mask, N):
    """The same from the whole row."""
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
    """The nearest candidate to each of `count` tokens: to every second of `tokens` for the
    bipartite rule, which wants keys by place, to all for the pairwise rule, which wants pairs by
    token. In the beginning of a token's list, else in the list, else in its row.
    """
    stride = 1 if PAIRWISE else 2
    missed = 0
    for first in range(0, count, LOOK):
        place = first + tl.arange(0, LOOK * FIRST) // FIRST
        token = tl.load(tokens_ptr + place * stride, mask=place < count, other=0)
        nearest = _nearest_listed(lists_ptr, state_ptr, token, place < count, NEIGHBOURS, FIRST)
        place = first + tl.arange(0, LOOK)
        mask = place < count
        _store_nearest(partner_ptr, keys_ptr, tokens_ptr, place, nearest, mask, PAIRWISE)
        missed = append(missed_ptr, missed, place, mask & (nearest == INT64_MIN))
    tl.debug_barrier()
    if missed > 0:
        again = 0
        for first in range(0, missed, LOOK_AGAIN):
            offs = first + tl.arange(0, LOOK_AGAIN * NEIGHBOURS) // NEIGHBOURS
            mask = offs < missed
            place = tl.load(missed_ptr + offs, mask=mask, other=0)
            token = tl.load(tokens_ptr + place * stride, mask=mask, other=0)
            nearest = _nearest_listed(lists_ptr, state_ptr, token, mask, NEIGHBOURS, NEIGHBOURS)
            offs = first + tl.arange(0, LOOK_AGAIN)
            mask = offs < missed
            place = tl.load(missed_ptr + offs, mask=mask, other=0)
            _store_nearest(partner_ptr, keys_ptr, tokens_ptr, place, nearest, mask, PAIRWISE)
            # In place: behind what has been read.
            tl.debug_barrier()
            again = append(missed_ptr, again, place, mask & (nearest == INT64_MIN))
        tl.debug_barrier()
        if again > 0:
            for first in range(0, again, ROWS):
                offs = first + tl.arange(0, ROWS)
                mask = offs < again
                place = tl.load(missed_ptr + offs, mask=mask, other=0)
                token = tl.load(tokens_ptr + place * stride, mask=mask, other=0)
                nearest = _nearest_in_row(sim_ptr, ld, state_ptr, token, mask, N)
                _store_nearest(partner_ptr, keys_ptr, tokens_ptr, place, nearest, mask, PAIRWISE)
            tl.debug_barrier()


@triton.jit
def _store_nearest(partner_ptr, keys_ptr, tokens_ptr, place, nearest, mask, PAIRWISE: tl.constexpr):
    if PAIRWISE:
        token = tl.load(tokens_ptr + place, mask=mask, other=0)
        # The last living token has itself as partner, and no pair.
        alone = nearest == INT64_MIN
        partner = tl.where(alone, token, key_index(nearest))
        pair = pair_key(key_value(nearest), token, partner)
        tl.store(partner_ptr + token, partner, mask=mask)
        tl.store(keys_ptr + token, tl.where(alone, INT64_MIN, pair), mask=mask)
    else:
        tl.store(keys_ptr + place, index_key(key_value(nearest), place), mask=mask)


@triton.jit
def append(list_ptr, count, item, mask):
    more = tl.sum(mask.to(tl.int32), axis=0)
    if more > 0:
        place = count + tl.cumsum(mask.to(tl.int32), axis=0) - 1
        tl.store(list_ptr + place, item, mask=mask)
    return count + more
