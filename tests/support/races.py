"""Finds races of kernels in global memory, in Triton's interpreter.

The interpreter runs the programs of a launch one after another, each like one thread, so races do
no harm there. Here every cell of memory records which program last stored to it or loaded from it,
and after which barrier. Every access is compared with the earlier ones, by vector clocks per
program. Programs run in random order, and memory outside the arguments has random bits.

Modelled:
- Threads. Two accesses of a program to one cell are ordered if a barrier lies between them. An
  atomic that acquires counts as a barrier, because its result reaches all threads through one.
  Without a barrier only a store after a load by the same thread is ordered. Two accesses are by the
  same thread if they are the same element of blocks of the same shape, and that shape has at least
  as many elements as the program has threads (otherwise several threads load each element).
- Programs. They are ordered by a release and an acquire of the same word, with more than block
  scope. One thread releases, so a release covers the stores before the last barrier only. A failed
  compare-and-swap releases nothing. A plain store to the word ends its release.
- Launches. Each one sees all stores of earlier ones.
- Atomic words. Plain scalar accesses to them are no hazards, but they may not be part of an array.
- A store of the bits that a cell already has is no hazard to another store.

Not modelled: layouts (blocks of one shape may be distributed differently over threads; then a store
waits for a load only if it depends on the loaded value), shared memory, asynchronous copies and
other reordering by the compiler, stale lines in L1, programs that wait for each other, and code
that the inputs of the tests do not reach.

This module relies on these facts about Triton's interpreter: it has the names in PRIMITIVES; all
other loads and stores call those with a mask; handles have `data` and `get_element_ty`;
`GridExecutor` has `grid`, and its `__call__` gets the arguments of a launch; it does not copy CPU
tensors.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor

PRIMITIVES = (
    *("set_grid_idx", "create_barrier", "create_masked_load", "create_masked_store"),
    *("create_atomic_rmw", "create_atomic_cas"),
)
try:
    from triton._C.libtriton.ir import MEM_SEMANTIC, MEM_SYNC_SCOPE
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    ORIGINAL = {name: getattr(interpreter_builder, name) for name in PRIMITIVES}
    MISSING = ""
except (ImportError, AttributeError) as error:
    MISSING = str(error)

# Bytes of a cell, the size of the smallest element.
CELL = 1
# Stands for several threads that loaded a cell.
MANY = -1


class Hazard(NamedTuple):
    what: str
    # `file:line` of both accesses; "" if there is none.
    earlier: str
    later: str


def _line() -> str:
    frame: Any = sys._getframe()
    while frame.f_code.co_filename.startswith((str(Path(triton.__file__).parent), __file__)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(f"u{x.itemsize}")


class _Memory:
    """All tensors, and the primitives of the interpreter, which check each access and then do it.

    A time is the number of a barrier of a program, counted from 1; 0 is before the launch, -1 is
    never.
    """

    def __init__(self, seed: int) -> None:
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        # By address: bytes, kept alive so that the address is not reused, and times of last stores.
        self.bytes: dict[int, Tensor] = {}
        self.times: dict[int, np.ndarray] = {}
        self.hazards: Counter[Hazard] = Counter()

    def add(self, x: Tensor, is_argument: bool) -> None:
        memory = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
        start = memory.data_ptr()
        if start not in self.bytes:
            self.bytes[start], self.times[start] = memory, np.full(len(memory) // CELL, -1)
            if not is_argument:
                memory.random_(0, 256, generator=self.generator)
        if is_argument:
            times = self.times[start].reshape(-1, x.element_size() // CELL)
            elements = torch.arange(len(times)).as_strided(x.shape, x.stride(), x.storage_offset())
            times[elements.flatten()] = 0

    @contextlib.contextmanager
    def launch(self, programs: int, threads: int) -> Iterator[None]:
        self.order, self.threads = self.rng.sample(range(programs), programs), threads
        starts = sorted(self.times)
        sizes = np.array([len(self.times[start]) for start in starts])
        self.starts, self.first = np.array(starts), np.cumsum(sizes) - sizes
        self.ends = self.starts + sizes * CELL
        # By cell: time, program and line of the last store; thread and line of the last load;
        # whether it was accessed as part of a block, and atomically.
        self.stored = np.concatenate([self.times[start] for start in starts])
        self.storer, self.store_line, self.load_line = np.zeros((3, len(self.stored)), int)
        self.loader = np.full(len(self.stored), MANY)
        self.in_block, self.atomic = np.zeros((2, len(self.stored)), bool)
        # By program and cell: the time of the last load.
        self.loaded = np.full((programs, len(self.stored)), -1, np.int32)
        # The time up to which a program (row) sees the stores of each program; the same per atomic
        # word.
        self.clock = np.zeros((programs, programs), int)
        self.released: dict[int, np.ndarray] = {}
        # Lines and shapes by number; 0 is no line.
        self.numbers: dict[Any, int] = {"": 0}
        self.found: list[tuple[int, Hazard]] = []
        yield
        mixed = self.atomic & self.in_block
        self.hazards.update(x for cell, x in self.found if mixed[cell] or not self.atomic[cell])
        if mixed.any():
            self.hazards[Hazard("an atomic word in an array", "", "")] += 1
        parts = np.split(np.minimum(self.stored, 0), self.first[1:])
        self.times = dict(zip(starts, parts, strict=True))

    def number(self, name: Any) -> int:
        return self.numbers.setdefault(name, len(self.numbers))

    def cells(self, pointers: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the elements in `mask`, and their cells [elements, cells per element]."""
        taken = np.flatnonzero(np.broadcast_to(mask, pointers.data.shape))
        address = pointers.data.ravel()[taken].astype(int)
        size = pointers.get_element_ty().primitive_bitwidth // 8
        region = np.searchsorted(self.starts, address, side="right") - 1
        if ((region < 0) | (address + size > self.ends[region])).any():
            raise IndexError(f"{_line()}: an address outside all tensors")
        first = self.first[region] + (address - self.starts[region]) // CELL
        return taken, first[:, None] + np.arange(size // CELL)

    def report(self, what: str, bad: np.ndarray, cells: np.ndarray, lines: np.ndarray) -> None:
        if bad.any():
            cell = cells[bad][0]
            self.found.append((cell, Hazard(what, list(self.numbers)[lines[cell]], _line())))

    def access(self, pointers: Any, mask: Any, value: Any = None, how: Any = ()) -> None:
        """Check a load, or a store of `value`; `how` differs between versions of Triton."""
        does, shape = "load" if value is None else "store", pointers.data.shape
        taken, cells = self.cells(pointers, mask.data)
        changes: Any = np.ones(shape, bool)
        if value is not None:
            before = ORIGINAL["create_masked_load"](pointers, mask, None, *how, False).data
            changes = np.broadcast_to(_bits(before) != _bits(value.data), shape)
        changes = changes.ravel()[taken].repeat(cells.shape[1])
        thread: Any = np.full(cells.shape, MANY)
        if pointers.data.size >= self.threads:
            thread[:] = ((self.number(shape) << 32) + taken)[:, None]
        thread, cells = thread.ravel(), cells.ravel()
        self.in_block[cells] |= pointers.data.size > 1
        seen, here = self.clock[self.program], self.number(_line())
        own = self.storer[cells] == self.program
        unseen = changes & (self.stored[cells] > seen[self.storer[cells]])
        self.report(f"threads: {does} after store", unseen & own, cells, self.store_line)
        self.report(f"programs: {does} after store", unseen & ~own, cells, self.store_line)
        if value is None:
            never = self.stored[cells] < 0
            self.report("load of a cell without a value", never, cells, self.store_line)
            again = self.loaded[self.program, cells] == self.time
            thread[again & (self.loader[cells] != thread)] = MANY
            self.loader[cells] = thread
            # If two elements share a cell, the line above stored only one of their threads.
            self.loader[cells[self.loader[cells] != thread]] = MANY
            self.loaded[self.program, cells], self.load_line[cells] = self.time, here
            return
        unseen = self.loaded[:, cells] > seen[:, None]
        own = unseen[self.program] & ((self.loader[cells] != thread) | (thread == MANY))
        self.report("threads: store after load", own, cells, self.load_line)
        unseen[self.program] = False
        self.report("programs: store after load", unseen.any(axis=0), cells, self.load_line)
        self.stored[cells], self.storer[cells] = self.time, self.program
        self.store_line[cells] = here
        twice = np.ones(len(cells), bool)
        twice[np.unique(cells, return_index=True)[1]] = False
        self.report("threads: two stores at once", twice, cells, self.store_line)
        if pointers.data.size == 1 and len(cells):
            self.released.pop(cells[0], None)

    def synchronise(
        self, pointers: Any, mask: Any, semantic: Any, scope: Any, done: bool = True
    ) -> None:
        _, cells = self.cells(pointers, mask)
        self.atomic[cells] = True
        wide, both = scope != MEM_SYNC_SCOPE.CTA, MEM_SEMANTIC.ACQUIRE_RELEASE
        acquires = wide and semantic in (MEM_SEMANTIC.ACQUIRE, both)
        seen = self.clock[self.program]
        for word in cells[:, 0]:
            released = self.released.setdefault(word, np.zeros_like(seen))
            if done and wide and semantic in (MEM_SEMANTIC.RELEASE, both):
                np.maximum(released, seen, out=released)
            if acquires:
                np.maximum(released, seen, out=seen)
        if acquires:
            self.create_barrier()

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        self.program, self.time = self.order[x], 1
        ORIGINAL["set_grid_idx"](self.program, y, z)

    def create_barrier(self) -> None:
        self.clock[self.program, self.program] = self.time
        self.time += 1

    def create_masked_load(self, pointers: Any, mask: Any, *how: Any) -> Any:
        self.access(pointers, mask)
        return ORIGINAL["create_masked_load"](pointers, mask, *how)

    def create_masked_store(self, pointers: Any, value: Any, mask: Any, *how: Any) -> Any:
        self.access(pointers, mask, value, how)
        return ORIGINAL["create_masked_store"](pointers, value, mask, *how)

    def create_atomic_rmw(self, op: Any, pointers: Any, value: Any, mask: Any, *how: Any) -> Any:
        self.synchronise(pointers, mask.data, *how)
        return ORIGINAL["create_atomic_rmw"](op, pointers, value, mask, *how)

    def create_atomic_cas(
        self, pointers: Any, expected: Any, value: Any, semantic: Any, scope: Any
    ) -> Any:
        # Check the addresses before the swap stores to them.
        self.cells(pointers, True)
        found = ORIGINAL["create_atomic_cas"](pointers, expected, value, semantic, scope)
        done = bool((found.data == expected.data).all())
        self.synchronise(pointers, True, semantic, scope, done)
        return found


@contextlib.contextmanager
def watch(
    arguments: Iterable[Any], seed: int = 0, threads: int | None = None
) -> Iterator[Counter[Hazard]]:
    """Collect the hazards of the launches in the context.

    Only `arguments`, those of the operator that launches, have values beforehand. `seed` decides
    the order of programs and the random bits. A program has `threads` threads, by default 32 per
    warp.
    """
    memory, run = _Memory(seed), GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        for x in args:
            if isinstance(x, Tensor):
                memory.add(x, is_argument=False)
        (programs,) = executor.grid
        with memory.launch(programs, threads or 32 * kwargs.get("num_warps", 4)):
            run(executor, *args, **kwargs)

    for x in arguments:
        if isinstance(x, Tensor):
            memory.add(x, is_argument=True)
    with (
        mock.patch.object(GridExecutor, "__call__", launch),
        mock.patch.multiple(
            interpreter_builder, **{name: getattr(memory, name) for name in PRIMITIVES}
        ),
    ):
        yield memory.hazards
