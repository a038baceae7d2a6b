"""races.py detects the races of small kernels, and nothing else in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import races
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from vispruner_kernels._triton import operators

pytestmark = [
    pytest.mark.skipif(not operators.INTERPRETED, reason="Triton compiles here: make test-gpu"),
    pytest.mark.skipif(bool(races.MISSING), reason=f"another interpreter: {races.MISSING}"),
]


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
        with pytest.raises(
            InterpreterError, match=r"test_race_detector\.py:\d+: an address outside"
        ):
            kinds(kernel, 1, *args)
