"""The kernels have no races that races.py detects, and it detects races in test kernels."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from calls import ATTENTION, CLS, SCORES, SELECT_ALL, leaves

pytest.importorskip("triton")

import races
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from vispruner_kernels import _checks, reference
from vispruner_kernels._triton import operators
from vispruner_kernels.testing import (
    DTYPES,
    FEATURE_KINDS,
    SCORE_KINDS,
    assert_matches,
    assert_same_bits,
    sample_features,
    sample_offsets,
    sample_qkv,
    sample_scores,
)

pytestmark = [
    pytest.mark.skipif(not operators.INTERPRETED, reason="Triton compiles here: make test-gpu"),
    pytest.mark.skipif(bool(races.MISSING), reason=f"another interpreter: {races.MISSING}"),
]
if operators.INTERPRETED:
    from vispruner_kernels._triton import (
        bipartite,
        cls_attention,
        cls_row,
        cls_scores,
        neighbours,
        offsets,
        pairwise,
        received_scores,
        select,
    )

# Operators, and the argument that selects their code path.
ATTENTION_CASES = [
    *((op, "") for op in CLS),
    *((op, lse) for op in ("received_scores", "received_scores_varlen") for lse in ("lse", "")),
]
CASES = [
    *((op, way) for op in SELECT_ALL for way in (*_checks.MATCHINGS, "scores alone")),
    *((op, "") for op in SCORES),
    *ATTENTION_CASES,
]
# The cases in which a program reads stores of another one.
ATOMIC = [*((op, "bipartite") for op in SELECT_ALL), *ATTENTION_CASES]
# Tokens of a sweep and threads of a program of `_select_kernel` here; a real launch has 256.
SWEEP = 16


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give small inputs several blocks, chunks, sweeps and steps of heads."""
    caches = (cls_scores._plan, cls_attention._plan, received_scores._plan)
    for name, value in {"BLOCK_N": 16, "NEIGHBOURS": 8, "SMALL": 16, "EAGER": 1}.items():
        monkeypatch.setattr(select, name, value)
    for module in (select, bipartite, pairwise):
        monkeypatch.setattr(module, "SWEEP", tl.constexpr(SWEEP))
    for name, value in {"BLOCK_SHORT": SWEEP, "BLOCK_LIST": 8, "SHORT": 4, "CHUNK": 32}.items():
        monkeypatch.setattr(neighbours, name, tl.constexpr(value))
    for name, value in {"CHUNK": 32, "BLOCK_H": 2, "BLOCK_S": 16}.items():
        monkeypatch.setattr(cls_row, name, value)
    for name, value in {"OFFSETS": 2, "ZEROS": SWEEP}.items():
        monkeypatch.setattr(offsets, name, tl.constexpr(value))
    monkeypatch.setattr(received_scores, "BLOCK_H", tl.constexpr(2))
    monkeypatch.setattr(received_scores, "ADDED", 1)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def arguments(op: str, way: str, seed: int, images: int = 2, tokens: int = 33) -> tuple[Any, ...]:
    """Three or more blocks of tokens per image; three or more images in packed batches."""
    generator = torch.Generator().manual_seed(seed)
    if op in ATTENTION:
        q, k, v = sample_qkv(2, 70, 3, 8, torch.float32, seed)
        lse = 8.0 + torch.randn(2, 3, 70, generator=generator) if way else None
        if op == "received_scores_varlen":
            lse = None if lse is None else lse.movedim(1, 0).flatten(1)
            lengths = [33, 0, 70, 37]
            return (
                *(q.flatten(0, 1), k.flatten(0, 1), sample_offsets(lengths), max(lengths)),
                *(None, lse),
            )
        tail = {"cls_attention": (v,), "cls_scores": (), "received_scores": (None, 0, lse)}
        return (q, k, *tail[op])
    features = sample_features(FEATURE_KINDS[seed], images, tokens, 3, generator)
    features = features.to(DTYPES[seed % len(DTYPES)])
    scores = sample_scores(SCORE_KINDS[seed], images, tokens, generator)
    if op == "select_topk":
        return scores, 9
    if op == "select_rows":
        return scores, 3, 4
    rule = (1.0, 8, "bipartite") if way == "scores alone" else (0.25, 4, way)
    if op == "select_varlen":
        lengths, keep = [tokens, 0, 17, 6], [12, 0, 5, 6]
        packed = (x.flatten(0, 1)[: sum(lengths)] for x in (features, scores))
        return (*packed, *map(sample_offsets, (lengths, keep)), tokens, sum(keep), *rule)
    return features, scores, tokens // 3, *rule


def watched(
    op: str, args: tuple[Any, ...], seed: int, change: Any = None
) -> tuple[Any, set[races.Hazard]]:
    """The result of an operator and the hazards of its launches, in the context `change`."""
    with (
        races.watch(args, seed, SWEEP if op in SELECT_ALL else None) as hazards,
        change or contextlib.nullcontext(),
    ):
        got = getattr(operators, op)(*args)
    if op in CLS:
        # Rows of logits are loaded to the end of a vector; the values after the row are not used.
        unset = "load of a cell without a value"
        return got, {hazard for hazard in hazards if hazard.what != unset}
    return got, set(hazards)


# `prune` is `select` and a gather, so they have one seed each.
SEEDS = {"select": [1], "prune": [2]}
AGAIN = pytest.mark.kernels


@pytest.mark.parametrize(
    ("op", "way", "seed"),
    [
        pytest.param(*case, seed, marks=AGAIN if turn else ())
        for case in CASES
        for turn, seed in enumerate(SEEDS.get(case[0], [1, 2]))
    ],
)
def test_operators_have_no_hazards(op, way, seed):
    args = arguments(op, way, seed)
    got, hazards = watched(op, args, seed)
    assert not hazards
    assert_matches(op, got, getattr(reference, op)(*args), args, {})


@pytest.mark.kernels
@pytest.mark.parametrize(("op", "way"), ATTENTION_CASES)
def test_neither_order_nor_scratch_changes_a_bit(op, way):
    args = arguments(op, way, 0)
    first, *others = (leaves(watched(op, args, seed)[0]) for seed in range(3))
    for other in others:
        for x, y in zip(first, other, strict=True):
            assert_same_bits(x, y)


def barriers() -> set[str]:
    lines = set()
    for path in Path(select.__file__).parent.glob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.strip() == "tl.debug_barrier()":
                lines.add(f"{path.name}:{number}")
    return lines


@pytest.mark.kernels
def test_every_barrier_is_needed(monkeypatch):
    """Removing any one barrier causes a hazard, so the cases reach all barriers."""
    missing = ""
    reached = set()

    def barrier() -> None:
        frame = sys._getframe(1)
        line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        reached.add(line)
        if line != missing:
            races.interpreter_builder.create_barrier()

    monkeypatch.setattr(tl, "debug_barrier", barrier)
    needed: set[str] = set()
    for case in [
        ("prune", "scores alone"),
        ("cls_scores", ""),
        ("prune", "pairwise"),
        ("prune", "bipartite"),
    ]:
        args = arguments(*case, 1, images=1, tokens=32)
        reached.clear()
        watched(case[0], args, 1)
        for missing in sorted(reached - needed):
            if watched(case[0], args, 1)[1]:
                needed.add(missing)
        missing = ""
    assert needed == barriers()


@pytest.mark.kernels
@pytest.mark.parametrize(("op", "way"), ATOMIC)
def test_without_barriers_programs_load_too_early(op, way, monkeypatch):
    monkeypatch.setattr(tl, "debug_barrier", lambda: None)
    _, hazards = watched(op, arguments(op, way, 1), 1)
    assert "programs: load after store" in {hazard.what for hazard in hazards}


@contextlib.contextmanager
def weaker_atomics(semantic: Any) -> Iterator[None]:
    """Replace acquire-release atomics by atomics of `semantic`."""
    strong = races.MEM_SEMANTIC.ACQUIRE_RELEASE

    def weaker(name: str) -> Callable[..., Any]:
        call = getattr(races.interpreter_builder, name)
        return lambda *args: call(
            *args[:-2], semantic if args[-2] == strong else args[-2], args[-1]
        )

    names = ("create_atomic_rmw", "create_atomic_cas")
    changed = {name: weaker(name) for name in names}
    with mock.patch.multiple(races.interpreter_builder, **changed):
        yield


@pytest.mark.kernels
@pytest.mark.parametrize("semantic", ["RELAXED", "ACQUIRE", "RELEASE"])
@pytest.mark.parametrize(("op", "way"), [case for case in ATOMIC if case[0] != "prune"])
def test_with_weaker_atomics_programs_load_too_early(op, way, semantic):
    change = weaker_atomics(getattr(races.MEM_SEMANTIC, semantic))
    _, hazards = watched(op, arguments(op, way, 1), 1, change)
    assert "programs: load after store" in {hazard.what for hazard in hazards}


def kinds(
    kernel: Any, programs: int, *args: Any, uses: Any = None, seed: int = 0, **meta: Any
) -> set[str]:
    """The kinds of hazards of a launch. The arguments `uses` have values, by default all."""
    with races.watch(args if uses is None else uses, seed) as hazards:
        kernel[(programs,)](*args, **meta)
    return {hazard.what for hazard in hazards}


@triton.jit
def _neighbour_kernel(x_ptr, FIRST: tl.constexpr, THEN: tl.constexpr, BARRIER: tl.constexpr):
    """The second access of a thread is to the element of its neighbour's first access."""
    offs = tl.arange(0, 32)
    # All accesses follow some barrier.
    tl.debug_barrier()
    if FIRST == "load":
        tl.load(x_ptr + offs)
    else:
        tl.store(x_ptr + offs, offs)
    if BARRIER:
        tl.debug_barrier()
    if THEN == "load":
        tl.load(x_ptr + (offs + 1) % 32)
    else:
        tl.store(x_ptr + (offs + 1) % 32, offs)


@pytest.mark.parametrize(
    ("first", "then"), [("store", "load"), ("load", "store"), ("store", "store"), ("load", "load")]
)
def test_a_barrier_orders_accesses_of_threads(first, then):
    x = torch.zeros(32, dtype=torch.int32)
    expected = {f"threads: {then} after {first}"} if "store" in (first, then) else set()
    assert kinds(_neighbour_kernel, 1, x, first, then, False, num_warps=1) == expected
    assert kinds(_neighbour_kernel, 1, x, first, then, True, num_warps=1) == set()


def test_a_hazard_names_both_lines():
    with races.watch([]) as hazards:
        _neighbour_kernel[(1,)](torch.zeros(32, dtype=torch.int32), "store", "load", False)
    (hazard,) = hazards
    source = Path(__file__).read_text().splitlines()
    lines = [source[int(place.split(":")[1]) - 1].strip() for place in hazard[1:]]
    assert lines == ["tl.store(x_ptr + offs, offs)", "tl.load(x_ptr + (offs + 1) % 32)"]


@triton.jit
def _add_kernel(x_ptr, CELLS: tl.constexpr, STORES: tl.constexpr, FLIPPED: tl.constexpr):
    """Each of 32 threads loads one of CELLS cells, and the last STORES threads store to theirs."""
    offs = tl.arange(0, 32)
    if FLIPPED:
        tl.load(x_ptr + 31 - offs)
    value = tl.load(x_ptr + offs % CELLS)
    tl.store(x_ptr + offs % CELLS, value + offs, mask=offs >= 32 - STORES)


@pytest.mark.parametrize(
    ("cells", "stores", "flipped", "warps", "expected"),
    [
        pytest.param(32, 32, False, 1, set(), id="its own"),
        pytest.param(32, 32, False, 2, {"threads: store after load"}, id="more threads"),
        pytest.param(16, 16, False, 1, {"threads: store after load"}, id="two loads at once"),
        pytest.param(32, 32, True, 1, {"threads: store after load"}, id="another one before"),
        pytest.param(
            *(16, 32, False, 1),
            {"threads: store after load", "threads: two stores at once"},
            id="two stores at once",
        ),
    ],
)
def test_a_thread_may_store_to_the_cell_that_it_loaded(cells, stores, flipped, warps, expected):
    x = torch.zeros(32, dtype=torch.int32)
    assert kinds(_add_kernel, 1, x, cells, stores, flipped, num_warps=warps) == expected


@triton.jit
def _two_programs_kernel(x_ptr, LOADS: tl.constexpr):
    """Both programs store, or the first one loads the cells that the second one stores to."""
    offs = tl.arange(0, 32)
    if LOADS and tl.program_id(0) == 0:
        tl.load(x_ptr + offs)
    else:
        tl.store(x_ptr + offs, tl.program_id(0) + offs)


def test_programs_run_in_random_order_and_conflict():
    x = torch.zeros(32, dtype=torch.int32)
    found = {frozenset(kinds(_two_programs_kernel, 2, x, True, seed=seed)) for seed in range(20)}
    assert found == {
        frozenset({"programs: load after store"}),
        frozenset({"programs: store after load"}),
    }
    assert kinds(_two_programs_kernel, 2, x, False) == {"programs: store after store"}
    assert kinds(_two_programs_kernel, 1, x, False) == set()


@triton.jit
def _mailbox_kernel(
    words_ptr,
    x_ptr,
    EXPECTED: tl.constexpr,
    SEM: tl.constexpr,
    SCOPE: tl.constexpr,
    BARRIER: tl.constexpr,
    STORE: tl.constexpr,
):
    """Programs store and then arrive at words[0], which is 0; the last one loads all stores."""
    offs = tl.arange(0, 32)
    # Like read_counter before a program has opened the counter.
    tl.load(words_ptr + 2)
    tl.atomic_add(words_ptr + 2, 1, sem="relaxed")
    tl.store(x_ptr + tl.program_id(0) * 32 + offs, offs)
    if BARRIER:
        tl.debug_barrier()
    tl.atomic_cas(words_ptr, EXPECTED, 0, sem=SEM, scope=SCOPE)
    if STORE:
        tl.store(words_ptr, 0)
    if tl.atomic_add(words_ptr + 1, 1, sem="relaxed") == tl.num_programs(0) - 1:
        for program in range(tl.num_programs(0)):
            tl.load(x_ptr + program * 32 + offs)


@pytest.mark.parametrize(
    ("expected", "sem", "scope", "barrier", "store", "safe"),
    [
        pytest.param(0, "acq_rel", "gpu", True, False, True, id="safe"),
        pytest.param(0, "acq_rel", "cta", True, False, False, id="block scope"),
        pytest.param(0, "acq_rel", "gpu", False, False, False, id="no barrier"),
        pytest.param(1, "acq_rel", "gpu", True, False, False, id="the swap fails"),
        pytest.param(0, "acq_rel", "gpu", True, True, False, id="a store follows"),
        *(
            pytest.param(0, sem, "gpu", True, False, False, id=sem)
            for sem in ("relaxed", "acquire", "release")
        ),
    ],
)
def test_atomics_order_programs(expected, sem, scope, barrier, store, safe):
    words, x = torch.zeros(3, dtype=torch.int32), torch.zeros(96, dtype=torch.int32)
    how = (expected, sem, scope, barrier, store)
    found = kinds(_mailbox_kernel, 3, words, x, *how, uses=[words[:2], x])
    assert found == (set() if safe else {"programs: load after store"})


@triton.jit
def _copy_kernel(x_ptr, out_ptr, SAME: tl.constexpr, COUNTS: tl.constexpr):
    offs = tl.arange(0, 32)
    if COUNTS:
        tl.atomic_add(x_ptr, 0)
        tl.debug_barrier()
    value = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, value)
    if SAME:
        tl.store(out_ptr + 31 - offs, tl.flip(value, 0))


def test_only_arguments_and_stored_cells_have_values():
    x, out = (torch.zeros(32, dtype=torch.int32) for _ in range(2))
    unset = {"load of a cell without a value"}
    assert kinds(_copy_kernel, 1, x, out, False, False) == set()
    assert kinds(_copy_kernel, 1, x, out, False, False, uses=[x]) == set()
    assert kinds(_copy_kernel, 1, x, out, False, False, uses=[out]) == unset
    # Memory between the elements of a strided argument has no values.
    assert kinds(_copy_kernel, 1, x, out, False, False, uses=[x[::2]]) == unset
    # Stores of an earlier launch are values.
    with races.watch([x]) as hazards:
        _copy_kernel[(1,)](x, out, False, False)
        _copy_kernel[(1,)](out, x, False, False)
    assert not hazards


def test_memory_without_values_is_random():
    x, out = (torch.zeros(32, dtype=torch.int32) for _ in range(2))
    kinds(_copy_kernel, 1, x, out, False, False, uses=[])
    assert len(x.unique()) == 32


def test_two_stores_of_the_same_bits_are_no_hazard():
    x, out = torch.arange(32), torch.zeros(32, dtype=torch.int64)
    assert kinds(_copy_kernel, 1, x, out, True, False) == set()


def test_an_atomic_word_in_an_array_is_a_hazard():
    x, out = (torch.zeros(32, dtype=torch.int32) for _ in range(2))
    assert kinds(_copy_kernel, 1, x, out, False, True) == {"an atomic word in an array"}


@triton.jit
def _swap_kernel(x_ptr):
    tl.atomic_cas(x_ptr + 31, 0, 1)


@pytest.mark.parametrize("elements", [31, 0])
def test_addresses_outside_all_tensors_raise(elements):
    x, out = torch.zeros(elements, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    copies = (False, False)
    for kernel, *args in (
        (_copy_kernel, x, out, *copies),
        (_copy_kernel, out, x, *copies),
        (_swap_kernel, x),
    ):
        with pytest.raises(InterpreterError, match=r"test_races\.py:\d+: an address outside"):
            kinds(kernel, 1, *args)
