"""Our rule of duplicate removal, by one program. csrc/passes.h has the same rounds."""

from __future__ import annotations

import triton
import triton.language as tl

from vispruner_kernels._triton.neighbours import append, find_nearest
from vispruner_kernels._triton.rules import (
    INT64_MIN,
    LAST_INDEX,
    RANKED,
    count_larger,
    pair_key,
    pair_value,
    ranked_offsets,
)

# States of a token.
DEAD = tl.constexpr(0)
ALIVE = tl.constexpr(1)
CHOSEN = tl.constexpr(2)
# Tokens per step of a sweep.
SWEEP = tl.constexpr(256)


@triton.jit
def pairwise(
    sim_ptr,
    ld,
    lists_ptr,
    state_ptr,
    place_ptr,
    partner_ptr,
    todo_ptr,
    missed_ptr,
    living_ptr,
    pair_ptr,
    N,
    drop,
    NEIGHBOURS: tl.constexpr,
    EAGER: tl.constexpr,
):
    """Our rule, in rounds: pairs that are the best of both their tokens are resolved at once.

    At first partner[t] is -1 and pair[t] INT64_MAX. In the first EAGER rounds who lost the partner
    looks for another; after them only who may be in the best pair, because by then a token may be
    the partner of most others (csrc/passes.h does the same). pair[t] of a dead token is the pair
    that removed it.
    """
    dead = 0
    searches = 0
    done = drop <= 0
    while done == 0:
        # Phase 1: who lost the partner looks for another, if its pair may be as good as `bound`.
        late = searches >= EAGER
        highest = tl.full([], INT64_MIN, tl.int64)
        if late:
            highest = _lower_bounds(
                state_ptr, partner_ptr, pair_ptr, todo_ptr, living_ptr, N, highest
            )
            tl.debug_barrier()
        for attempt in range(0, tl.where(late, 2, 1)):
            bound = highest
            if attempt == 1:
                # A pair of two living tokens: who cannot be in a better one need not look.
                bound = _best_known(state_ptr, partner_ptr, pair_ptr, N)
            todo = 0
            for first in range(0, N, SWEEP):
                offs_n = first + tl.arange(0, SWEEP)
                _, lost, _ = _lost(state_ptr, partner_ptr, offs_n, N)
                pair = tl.load(pair_ptr + offs_n, mask=lost, other=INT64_MIN)
                todo = append(todo_ptr, todo, offs_n, lost & (pair >= bound))
            tl.debug_barrier()
            find_nearest(
                sim_ptr,
                ld,
                lists_ptr,
                state_ptr,
                todo_ptr,
                missed_ptr,
                partner_ptr,
                pair_ptr,
                N,
                todo,
                True,
                NEIGHBOURS,
            )
        searches += 1
        # Phase 2: later removals have a pair that lives now, so those above all of these are final.
        if dead >= drop:
            done = _count_final(state_ptr, pair_ptr, N) >= drop
        # Phase 3: the less important token of every mutual best pair dies.
        if done == 0:
            before = dead
            for first in range(0, N, SWEEP):
                offs_n = first + tl.arange(0, SWEEP)
                mask_n = offs_n < N
                alive = tl.load(state_ptr + offs_n, mask=mask_n, other=DEAD) == ALIVE
                partner = tl.load(partner_ptr + offs_n, mask=alive, other=0)
                mutual = tl.load(partner_ptr + partner, mask=alive, other=-1) == offs_n
                place = tl.load(place_ptr + offs_n, mask=mutual, other=0)
                falls = mutual & (place > tl.load(place_ptr + partner, mask=mutual, other=0))
                tl.store(state_ptr + offs_n, DEAD, mask=falls)
                dead += tl.sum(falls.to(tl.int32), axis=0)
            tl.debug_barrier()
            # Every round has a victim, unless somebody writes to the scores meanwhile.
            done = dead == before
    if dead > drop:
        # The last removals did not come to pass.
        for first in range(0, N, SWEEP):
            offs_n = first + tl.arange(0, SWEEP)
            mask_n = offs_n < N
            lives = tl.load(state_ptr + offs_n, mask=mask_n, other=DEAD) != DEAD
            tl.store(pair_ptr + offs_n, INT64_MIN, mask=lives)
        tl.debug_barrier()
        for first in range(0, N, RANKED):
            offs_n = first + ranked_offsets()
            mask_n = offs_n < N
            fell = tl.load(state_ptr + offs_n, mask=mask_n, other=ALIVE) == DEAD
            pair = tl.load(pair_ptr + offs_n, mask=fell, other=INT64_MIN)
            rank = count_larger(pair_ptr, N, pair)
            tl.store(state_ptr + offs_n, ALIVE, mask=fell & (rank >= drop))


@triton.jit
def _lost(state_ptr, partner_ptr, offs_n, N):
    """Which tokens live, and which of them have no living partner; their partner."""
    alive = tl.load(state_ptr + offs_n, mask=offs_n < N, other=DEAD) == ALIVE
    partner = tl.load(partner_ptr + offs_n, mask=alive, other=0)
    state = tl.load(state_ptr + partner, mask=alive & (partner >= 0), other=DEAD)
    return alive, alive & (state != ALIVE), partner


@triton.jit
def _lower_bounds(state_ptr, partner_ptr, pair_ptr, todo_ptr, living_ptr, N, highest):
    """Makes pair[t] of who lost the partner a bound of what it can find, and returns the highest.

    It finds nothing more similar, and nothing as similar before the first living token behind the
    lost partner, the first that was so similar.
    """
    living = 0
    for first in range(0, N, SWEEP):
        offs_n = first + tl.arange(0, SWEEP)
        mask_n = offs_n < N
        alive = tl.load(state_ptr + offs_n, mask=mask_n, other=DEAD) == ALIVE
        # todo[t]: living tokens before t, if t is dead.
        tl.store(todo_ptr + offs_n, living + tl.cumsum(alive.to(tl.int32), axis=0), mask=mask_n)
        living = append(living_ptr, living, offs_n, alive)
    tl.debug_barrier()
    for first in range(0, N, SWEEP):
        offs_n = first + tl.arange(0, SWEEP)
        _, lost, partner = _lost(state_ptr, partner_ptr, offs_n, N)
        behind = tl.load(todo_ptr + partner, mask=lost, other=0)
        following = tl.load(living_ptr + behind, mask=lost & (behind < living), other=0)
        value = pair_value(tl.load(pair_ptr + offs_n, mask=lost, other=INT64_MIN))
        following = tl.where(behind < living, following, LAST_INDEX)
        first_of_pair = tl.where(behind < living, offs_n, LAST_INDEX)
        pair = pair_key(value, first_of_pair, following)
        tl.store(pair_ptr + offs_n, pair, mask=lost)
        highest = tl.maximum(highest, tl.max(tl.where(lost, pair, INT64_MIN), axis=0))
    return highest


@triton.jit
def _best_known(state_ptr, partner_ptr, pair_ptr, N):
    best = tl.full([], INT64_MIN, tl.int64)
    for first in range(0, N, SWEEP):
        offs_n = first + tl.arange(0, SWEEP)
        alive, lost, _ = _lost(state_ptr, partner_ptr, offs_n, N)
        pair = tl.load(pair_ptr + offs_n, mask=alive & (lost == 0), other=INT64_MIN)
        best = tl.maximum(best, tl.max(pair, axis=0))
    return best


@triton.jit
def _count_final(state_ptr, pair_ptr, N):
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
