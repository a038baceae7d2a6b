"""Runs the CUDA kernels on the CPU, and compares them with the core; see test_cuda_on_cpu.py.

It runs in its own process. A fault of a kernel ends this process, and standard error names the
fault. Arguments: the library, and the task as JSON.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from calls import leaves  # noqa: E402
from torch import Tensor  # noqa: E402

from vispruner_kernels import _native, _tuned, reference  # noqa: E402
from vispruner_kernels._native import cuda  # noqa: E402
from vispruner_kernels.testing import (  # noqa: E402
    assert_same_bits,
    hub_cases,
    random_case,
    random_packed_case,
    sample_features,
    sample_scores,
)

GUARD = 256
Calls = list[tuple[str, tuple[Any, ...]]]


class Memory:
    """Stands in for torch: uninitialised tensors hold random bytes, and guards surround them.

    `run` runs the launches since the last `run`, or those again. Tensors in `reused` are given out
    once more before new ones.
    """

    def __init__(self, seed: int, emulator: ctypes.CDLL) -> None:
        self.run = emulator.cuda_on_cpu_run
        self.watch = emulator.cuda_on_cpu_watch
        self.generator = torch.Generator().manual_seed(seed)
        self.guarded: list[tuple[Tensor, Tensor]] = []
        self.given: list[Tensor] = []
        self.reused: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, size: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.empty_strided([size] if isinstance(size, int) else size, (), dtype, device)

    def empty_strided(
        self, size: Any, strides: Any, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        if self.reused:
            return self.reused.pop(0)
        shape = torch.Size(size)
        count = shape.numel() * dtype.itemsize
        # PyTorch's allocations on a GPU begin at multiples of 512.
        memory = torch.empty(count + 2 * GUARD + 512, dtype=torch.uint8)
        memory.random_(generator=self.generator)
        begin = GUARD + (-(memory.data_ptr() + GUARD)) % 512
        self.guarded.append((memory, torch.cat([memory[:begin], memory[begin + count :]])))
        inner = memory[begin : begin + count]
        self.watch(ctypes.c_void_p(inner.data_ptr()), ctypes.c_size_t(count))
        self.given.append(inner.view(dtype).view(shape))
        return self.given[-1]

    def check(self) -> None:
        """Assert that no kernel wrote to a guard."""
        for memory, guards in self.guarded:
            count = len(memory) - len(guards)
            begin = GUARD + (-(memory.data_ptr() + GUARD)) % 512
            assert torch.equal(torch.cat([memory[:begin], memory[begin + count :]]), guards)
        self.guarded.clear()
        self.given.clear()
        self.watch(None, 0)


def load(library: str, seed: int, shared: int, device: int = 0, resident: int = 1) -> Memory:
    """Replace the kernels for a GPU by those of `library`, compiled for a CPU.

    `seed` sets the order of threads, `shared` the bytes of shared memory of a block, `resident` how
    many blocks run at a time, at most. All devices have the same properties; kernels store those of
    devices 0 to 63 only.
    """
    # This build lacks the operators for the CPU. Lazy binding resolves them only in a call.
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    spec = importlib.util.spec_from_file_location("_C", library)
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.setdlopenflags(flags)
    emulator = ctypes.CDLL(library)
    emulator.cuda_on_cpu_configure(ctypes.c_uint64(seed), shared, 132, resident)
    memory = Memory(seed, emulator)
    cuda._C = module
    cuda.torch = memory
    cuda.VARIANTS = module.cuda_variants
    cuda._device_and_stream = lambda tensor: (device, 0)
    # tuned.json has no row for it.
    _tuned.capability = lambda device: "emulated"
    cuda._scratch_bytes.cache_clear()
    return memory


def expected(op: str, args: tuple[Any, ...]) -> Any:
    return getattr(_native.cpu if _native.INSTALLED else reference, op)(*args)


def random_calls(seeds: range, most: int) -> Calls:
    calls: Calls = []
    for seed in seeds:
        case = random_case(seed, max_tokens=most)
        calls.append(("prune" if seed % 3 == 0 else "select", tuple(case)))
        if seed % 4 == 0:
            calls.append(("select_varlen", tuple(random_packed_case(seed, most))))
    return calls


def model_calls(sizes: list[list[int]], kind: str, dtype: str) -> Calls:
    """Images, tokens, channels, tokens kept."""
    calls: Calls = []
    for images, tokens, channels, keep in sizes:
        generator = torch.Generator().manual_seed(tokens)
        features = sample_features(kind, images, tokens, channels, generator)
        features = features.to(getattr(torch, dtype))
        scores = sample_scores("softmax", images, tokens, generator)
        for matching in ("bipartite", "pairwise"):
            calls.append(("prune", (features, scores, keep, 0.5, 8, matching)))
    return calls


def differences(case: str, got: Any, wanted: Any) -> list[str]:
    try:
        for x, y in zip(leaves(got), leaves(wanted), strict=True):
            assert_same_bits(x, y)
    except AssertionError as error:
        return [f"{case}: {error}"]
    return []


def call(number: int, op: str, args: tuple[Any, ...]) -> Any:
    """Call a kernel: the variants in turns, or the core's choice where one does not fit."""
    cuda.VARIANT = number % (1 + len(cuda._C.cuda_variants))
    try:
        return getattr(cuda, op)(*args)
    except ValueError as error:
        if "do not fit" not in str(error):
            raise
    cuda.VARIANT = 0
    return getattr(cuda, op)(*args)


def compare(calls: Calls, memory: Memory, turns: int = 1) -> int:
    """Each call so many times; every time is the turn of another variant."""
    wrong = []
    assert turns in (1, 1 + len(cuda._C.cuda_variants))
    for number, (op, args) in enumerate(calls * turns):
        got = call(number // len(calls) if turns > 1 else number, op, args)
        memory.run(False)
        case = f"{number}: {op}{tuple(args[0].shape)}{args[2:]}, variant {cuda.VARIANT}"
        wrong += differences(case, got, expected(op, args))
        memory.check()
    assert not wrong, f"{len(wrong)} of {len(calls) * turns} differ\n" + "\n".join(wrong[:8])
    return len(calls) * turns


def long_calls(begin: int, most: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Random calls for images of several tiles."""
    for seed in itertools.count(begin):
        for op, args in random_calls(range(seed, seed + 1), most):
            packed = op == "select_varlen"
            lengths = args[2].diff().tolist() if packed else [args[0].shape[1]] * len(args[0])
            if max(lengths, default=0) > 64:
                yield op, args


def compare_interleaved(calls: Calls, memory: Memory) -> int:
    """Two calls run at the same time, as on two streams. Then both run again with other inputs and
    with the scratch as it is: as a CUDA graph that is replayed, or as the next calls, which get the
    same memory and other tags."""
    wrong = []
    for number in range(0, len(calls), 2):
        pair = [
            (op, (args[0].clone(), args[1].clone(), *args[2:]))
            for op, args in calls[number : number + 2]
        ]
        for again in (False, True):
            replayed = again and number % 4 == 0
            if not replayed:
                memory.reused = memory.given[:]
                got = [call(number // 2 + k, *pair[k]) for k in range(len(pair))]
            memory.run(replayed)
            for k, (op, args) in enumerate(pair):
                case = f"{number + k}{' again' * again}: {op}{tuple(args[0].shape)}{args[2:]}"
                wrong += differences(case, got[k], expected(op, args))
                for x in leaves(got[k]):
                    x.fill_(-1)
                args[0].copy_(args[0].flip(-2))
                args[1].copy_(args[1].flip(-1))
        memory.check()
    assert not wrong, f"{len(wrong)} of {2 * len(calls)} differ\n" + "\n".join(wrong[:8])
    return len(calls)


def stay_in_bounds(seeds: range, total: int, memory: Memory) -> int:
    """Assert that offsets that contradict each other or the tensors leave no output element
    unwritten or outside [0, total)."""
    from gpu import random_offsets

    generator = torch.Generator().manual_seed(5)
    features = sample_features("clustered", 1, total, 16, generator)[0]
    scores = sample_scores("ties", 1, total, generator)[0]
    for seed in seeds:
        rng = random.Random(seed)
        count = rng.choice([2, 3, 6, 41])
        offsets = random_offsets(rng, count, total), random_offsets(rng, count, total)
        sizes = rng.choice([3, 70, 157, 16383]), rng.randint(1, total)
        rule = rng.choice([0.2, 0.5, 1.0]), 8, rng.choice(["bipartite", "pairwise"])
        got = call(seed, "select_varlen", (features, scores, *offsets, *sizes, *rule))
        memory.run(False)
        assert ((got >= 0) & (got < total)).all(), (seed, got)
        memory.check()
    return len(seeds)


def tune(file: str, sizes: list[list[int]], memory: Memory) -> int:
    """Run `benchmarks.tune`; a stand-in for a GPU takes as long as this CPU."""
    import fake_cuda
    import pytest

    from benchmarks import limits, shapes, tune
    from vispruner_kernels import _backends
    from vispruner_kernels._triton import operators

    with pytest.MonkeyPatch.context() as patches:
        installed = fake_cuda.install(patches)
        gpu = next(installed)

        def select(*args: Any) -> Tensor:
            begin = time.perf_counter()
            answer = cuda.select(*args)
            memory.run(False)
            gpu.launch(time.perf_counter() - begin)
            memory.check()
            return answer

        cases = [shapes.Shape("emulated", *size, torch.float16) for size in sizes]
        patches.setattr(tune, "cases", lambda device: cases)
        patches.setitem(_backends.IMPLEMENTATIONS["select", "cuda"], "native", select)
        patches.setitem(_backends.SERVES, ("native", "cuda"), True)
        patches.setattr(operators, "INSTALLED", False)
        # No call of this stand-in is too long, however busy the CPU is.
        patches.setattr(limits, "LONG_CALL", float("inf"))
        assert tune.main(["--device", "cuda", "--rounds", "3", "--write", file]) == 0
    return len(cases)


def main(library: str, task: str) -> int:
    todo = json.loads(task)
    torch.set_num_threads(1)
    device, resident = todo.get("device", 0), todo.get("resident", 1)
    memory = load(library, todo["seed"], todo["shared"], device, resident)
    _native.arguments.EAGER_ROUNDS = todo.get("eager_rounds", _native.arguments.EAGER_ROUNDS)
    count = 0
    if "random" in todo:
        begin, end, most = todo["random"]
        count += compare(random_calls(range(begin, end), most), memory)
    if "interleaved" in todo:
        begin, number, most = todo["interleaved"]
        calls = itertools.islice(long_calls(begin, most), number)
        count += compare_interleaved(list(calls), memory)
    if "models" in todo:
        count += compare(model_calls(*todo["models"]), memory, todo.get("turns", 1))
    for rounds in todo.get("hubs", []):
        _native.arguments.EAGER_ROUNDS = rounds
        count += compare([("select", tuple(x)) for x in hub_cases(todo["tokens"])], memory)
    if "offsets" in todo:
        count += stay_in_bounds(range(todo["offsets"]), 151, memory)
    if "tune" in todo:
        count += tune(*todo["tune"], memory)
    print(count)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
