"""Our rule of duplicate removal, run by one program per image.

csrc/passes.h has the same rule in C++. A round begins with the removal there, and with the search
here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vispruner_kernels._triton.neighbours import append, find_nearest
from vispruner_kernels._triton.rules import (
    INT64_MIN,
    LAST_INDEX,
    SORTED,
    pair_key,
    pair_tokens,
    pair_value,
    ranked_block,
    sort_blocks,
)

# States of a token. DEAD: removed. ALIVE: residual, may be removed. CHOSEN: important, is kept.
DEAD = tl.constexpr(0)
ALIVE = tl.constexpr(1)
CHOSEN = tl.constexpr(2)
# Tokens per iteration of a loop over all tokens.
SWEEP = tl.constexpr(256)


@triton.jit
def pairwise(
    sim_ptr,
    ld,
    lists_ptr,
    state_ptr,
    rank_ptr,
    partner_ptr,
    search_ptr,
    missed_ptr,
    living_ptr,
    pair_ptr,
    N,
    drop,
    NEIGHBOURS: tl.constexpr,
    EAGER: tl.constexpr,
):
    """Remove `drop` tokens in rounds.

    A round takes every pair that is the best pair of both its tokens, and removes the less
    important token of each.

    The caller has set partner[t] to -1 and pair[t] to INT64_MAX for every residual token, so all of
    them search in the first round. A token without a living partner is orphaned. In the first EAGER
    rounds every orphaned token searches again. Later, one removal may orphan most tokens, because
    one token may be the partner of most others. So only those search again that could form the best
    pair.
    pair[t] of a dead token is the pair that removed it.
    """
    dead = 0
    searches = 0
    done = drop <= 0
    while done == 0:
        # Phase 1: orphaned tokens with pair >= bound search again. In an early round these are all
        # of them. In a late round those with the highest upper bound search first; then `bound` is
        # the best known pair, and those that could reach it search.
        late = searches >= EAGER
        highest = tl.full([], INT64_MIN, tl.int64)
        if late:
            highest = _bound_pairs(
                state_ptr, partner_ptr, pair_ptr, search_ptr, living_ptr, N, highest
            )
            tl.debug_barrier()
        for attempt in range(0, tl.where(late, 2, 1)):
            bound = highest
            if attempt == 1:
                # Tokens that cannot form a better pair than the best known one need no search.
                bound = _best_known(state_ptr, partner_ptr, pair_ptr, N)
            count = 0
            for first in range(0, N, SWEEP):
                offs_n = first + tl.arange(0, SWEEP)
                _, orphaned, _ = _orphaned(state_ptr, partner_ptr, offs_n, N)
                pair = tl.load(pair_ptr + offs_n, mask=orphaned, other=INT64_MIN)
                count = append(search_ptr, count, offs_n, orphaned & (pair >= bound))
            tl.debug_barrier()
            find_nearest(
                sim_ptr,
                ld,
                lists_ptr,
                state_ptr,
                search_ptr,
                missed_ptr,
                partner_ptr,
                pair_ptr,
                N,
                count,
                True,
                NEIGHBOURS,
            )
        searches += 1
        # Phase 2: a later removal cannot have a better pair than the best pair of a living token.
        # So removals by better pairs than that are final.
        if dead >= drop:
            done = _count_final(state_ptr, pair_ptr, N) >= drop
        # Phase 3: remove the less important token of every mutual best pair.
        if done == 0:
            before = dead
            for first in range(0, N, SWEEP):
                offs_n = first + tl.arange(0, SWEEP)
                mask_n = offs_n < N
                alive = tl.load(state_ptr + offs_n, mask=mask_n, other=DEAD) == ALIVE
                partner = tl.load(partner_ptr + offs_n, mask=alive, other=0)
                mutual = tl.load(partner_ptr + partner, mask=alive, other=-1) == offs_n
                rank = tl.load(rank_ptr + offs_n, mask=mutual, other=0)
                removed = mutual & (rank > tl.load(rank_ptr + partner, mask=mutual, other=0))
                tl.store(state_ptr + offs_n, DEAD, mask=removed)
                dead += tl.sum(removed.to(tl.int32), axis=0)
            tl.debug_barrier()
            # Every round removes a token. If the scores are overwritten during the call, a round
            # may remove none; then end instead of running forever.
            done = dead == before
    if dead > drop:
        # The rounds removed more than `drop` tokens: undo the removals beyond the best `drop`
        # pairs.
        for first in range(0, N, SWEEP):
            offs_n = first + tl.arange(0, SWEEP)
            mask_n = offs_n < N
            kept = tl.load(state_ptr + offs_n, mask=mask_n, other=DEAD) != DEAD
            tl.store(pair_ptr + offs_n, INT64_MIN, mask=kept)
        tl.debug_barrier()
        sort_blocks(pair_ptr, N)
        for first in range(0, N, SORTED):
            pair, mask, order = ranked_block(pair_ptr, N, first)
            undone = mask & (pair != INT64_MIN) & (order >= drop)
            # The pair removed its token of lower score.
            a, b = pair_tokens(pair)
            rank_a = tl.load(rank_ptr + a, mask=undone, other=0)
            rank_b = tl.load(rank_ptr + b, mask=undone, other=0)
            tl.store(state_ptr + tl.where(rank_a > rank_b, a, b), ALIVE, mask=undone)


@triton.jit
def _orphaned(state_ptr, partner_ptr, offs_n, N):
    """(alive, orphaned, partner): whether tokens live, and live without a living partner."""
    alive = tl.load(state_ptr + offs_n, mask=offs_n < N, other=DEAD) == ALIVE
    partner = tl.load(partner_ptr + offs_n, mask=alive, other=0)
    state = tl.load(state_ptr + partner, mask=alive & (partner >= 0), other=DEAD)
    return alive, alive & (state != ALIVE), partner


@triton.jit
def _bound_pairs(state_ptr, partner_ptr, pair_ptr, search_ptr, living_ptr, N, highest):
    """Set pair[t] of orphaned tokens to an upper bound of the pairs that they can find.

    Return the highest bound.

    The lost partner was the nearest token; of equally near tokens it had the smallest index. So no
    living token is nearer, and one that is as near has a larger index than the lost partner. The
    bound is the pair with the first living token of larger index, at the old similarity.
    """
    living = 0
    for first in range(0, N, SWEEP):
        offs_n = first + tl.arange(0, SWEEP)
        mask_n = offs_n < N
        alive = tl.load(state_ptr + offs_n, mask=mask_n, other=DEAD) == ALIVE
        # search[t] counts the living tokens up to t.
        tl.store(search_ptr + offs_n, living + tl.cumsum(alive.to(tl.int32), axis=0), mask=mask_n)
        living = append(living_ptr, living, offs_n, alive)
    tl.debug_barrier()
    for first in range(0, N, SWEEP):
        offs_n = first + tl.arange(0, SWEEP)
        _, orphaned, partner = _orphaned(state_ptr, partner_ptr, offs_n, N)
        before = tl.load(search_ptr + partner, mask=orphaned, other=0)
        following = tl.load(living_ptr + before, mask=orphaned & (before < living), other=0)
        value = pair_value(tl.load(pair_ptr + offs_n, mask=orphaned, other=INT64_MIN))
        # If no living token follows, the bound is the last pair of its similarity.
        following = tl.where(before < living, following, LAST_INDEX)
        first_of_pair = tl.where(before < living, offs_n, LAST_INDEX)
        pair = pair_key(value, first_of_pair, following)
        tl.store(pair_ptr + offs_n, pair, mask=orphaned)
        highest = tl.maximum(highest, tl.max(tl.where(orphaned, pair, INT64_MIN), axis=0))
    return highest


@triton.jit
def _best_known(state_ptr, partner_ptr, pair_ptr, N):
    """The best pair of two living tokens."""
    best = tl.full([], INT64_MIN, tl.int64)
    for first in range(0, N, SWEEP):
        offs_n = first + tl.arange(0, SWEEP)
        alive, orphaned, _ = _orphaned(state_ptr, partner_ptr, offs_n, N)
        pair = tl.load(pair_ptr + offs_n, mask=alive & (orphaned == 0), other=INT64_MIN)
        best = tl.maximum(best, tl.max(pair, axis=0))
    return best


@triton.jit
def _count_final(state_ptr, pair_ptr, N):
    """The number of removals by pairs that are better than pair[t] of every living token t."""
    best = tl.full([], INT64_MIN, tl.int64)
    for first in range(0, N, SWEEP):
        offs_n = first + tl.arange(0, SWEEP)
        alive = tl.load(state_ptr + offs_n, mask=offs_n < N, other=DEAD) == ALIVE
        pair = tl.load(pair_ptr + offs_n, mask=alive, other=INT64_MIN)
        best = tl.maximum(best, tl.max(pair, axis=0))
    final = 0
    for first in range(0, N, SWEEP):
        offs_n = first + tl.arange(0, SWEEP)
        dead = tl.load(state_ptr + offs_n, mask=offs_n < N, other=ALIVE) == DEAD
        pair = tl.load(pair_ptr + offs_n, mask=dead, other=INT64_MIN)
        final += tl.sum((dead & (pair > best)).to(tl.int32), axis=0)
    return final
