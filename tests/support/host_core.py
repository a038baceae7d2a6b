"""Runs operators for CUDA that are registered from C++, on the CPU: the core of `benchmarks.host`.

It replaces parts of the package, so it has a process of its own. Arguments: the compiled core, and
the name of a function below.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import torch  # noqa: E402
from calls import leaves, samples  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import host  # noqa: E402
from vispruner_kernels import _backends, _schemas  # noqa: E402
from vispruner_kernels._triton import launch  # noqa: E402
from vispruner_kernels.testing import assert_same_bits, random_case  # noqa: E402


def error_of(call: Callable[..., Any], *args: Any) -> tuple[type, str]:
    try:
        call(*args)
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("no error")


def core_of_cuda(core: host.Core) -> None:
    """The CUDA kernels of the core give the bits of the CPU, in the emulation."""
    core.library.set_launch_time(-1)
    for seed in range(60):
        case = tuple(random_case(seed, max_tokens=150))
        for op in host.OPS:
            expected = getattr(torch.ops.vispruner, op)(*case)
            for one, other in zip(leaves(core.operator(op)(*case)), leaves(expected), strict=True):
                assert_same_bits(one, other)
    features, scores = torch.randn(1, 5, 4), torch.rand(1, 5)
    for wrong in ((features, scores, 6), (features.double(), scores, 2)):
        expected = error_of(torch.ops.vispruner.select, *wrong)
        assert error_of(core.operator("select"), *wrong) == expected
    assert core.operator("select")(features[:0], scores[:0], 2).shape == (0, 2)


class Launches:
    """Stands in for Triton's compiled kernels; what they were launched with."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.error: Exception | None = None
        # Called once, in the next launch.
        self.during: Callable[[], Any] | None = None
        launch._COMPILED = self
        torch.cuda.current_device = lambda: None

    # The lookup of a compiled kernel by `launch.run`.
    def get(self, key: tuple[Any, ...]) -> Any:
        hash(key)
        return _Kernel(self, key[0].__name__), tuple(map(str, key[2:]))

    def take(self) -> list[Any]:
        log, self.log = self.log, []
        return log


class _Kernel:
    def __init__(self, launches: Launches, name: str) -> None:
        self.launches, self.name = launches, name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def start(*args: Any, stream: int | None = None) -> None:
            if self.launches.error:
                raise self.launches.error
            if during := self.launches.during:
                self.launches.during = None
                during()
            self.launches.log.append((self.name, grid, args))

        return start


def named(log: list[Any], inputs: list[Tensor], results: list[Tensor]) -> list[Any]:
    """A log with names instead of addresses and tags."""
    names = {x.data_ptr(): f"result {i}" for i, x in enumerate(results)}
    names |= {x.data_ptr(): f"input {i}" for i, x in enumerate(inputs)}
    scratch: list[int] = []

    def name(value: Any) -> Any:
        # Tags have 43 bits, addresses of the CPU 44 to 47; select_varlen passes bits of a float.
        if not isinstance(value, int) or not 2**42 <= value < 2**47:
            return value
        if value in names:
            return names[value]
        if value < 2**43:
            return "tag"
        scratch.append(value)
        return "scratch"

    log = [(kernel, grid, tuple(map(name, args))) for kernel, grid, args in log]
    assert len(set(scratch)) <= 1
    return log


def tensors_of(args: tuple[Any, ...]) -> list[Tensor]:
    return [x for x in args if isinstance(x, Tensor)]


def copies(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Other tensors of the same layout."""

    def copy(x: Tensor) -> Tensor:
        span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        itemsize = x.element_size()
        memory = torch.empty(span * itemsize + 64, dtype=torch.uint8)
        shift = (x.data_ptr() - memory.data_ptr()) % 64
        flat = memory[shift : shift + span * itemsize].view(x.dtype)
        return flat.as_strided(x.shape, x.stride()).copy_(x)

    return tuple(copy(x) if isinstance(x, Tensor) else x for x in args)


class Recorded:
    """The operators of Triton, registered as on CUDA devices, and the calls that Python got."""

    def __init__(self, core: host.Core) -> None:
        self.python_calls = 0
        self.tags: set[int] = set()
        self.launches = Launches()
        self.module = core.module
        self.operators = {op: core.register_triton(op, self._count) for op in _schemas.SCHEMAS}

    def _count(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def entry(*args: Any) -> Any:
            self.python_calls += 1
            return function(*args)

        return entry

    def call(self, op: str, args: tuple[Any, ...], by_python: int) -> Any:
        """Call; assert whether Python answers, and that launches and results are those of it."""
        before = self.python_calls
        answer = self.operators[op](*args)
        assert self.python_calls - before == by_python, (op, args)
        inputs = tensors_of(args)
        log = self.launches.take()
        for tag in {x for *_, args in log for x in args if isinstance(x, int) and x >> 42 == 1}:
            assert tag not in self.tags
            self.tags.add(tag)
        got = named(log, inputs, list(leaves(answer)))
        expected = _backends._implementation(op, "triton")(*_schemas.complete(op, args, {}))
        wanted = named(self.launches.take(), inputs, list(leaves(expected)))
        assert got == wanted, (op, got, wanted)
        assert got
        for one, other in zip(leaves(answer), leaves(expected), strict=True):
            assert one.shape == other.shape
            assert one.stride() == other.stride()
            assert (one.dtype, one.device.type) == (other.dtype, other.device.type)
        return answer


def changes(op: str, args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Calls of other layouts: another shape, dtype, alignment or stride, other numbers."""
    half = tuple(x.half() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
    first = args[0]
    memory = torch.empty(first.numel() + 1, dtype=first.dtype)
    moved = memory[1:].view(first.shape).copy_(first)
    wide = torch.empty(*first.shape[:-1], first.shape[-1] + 3)[..., : first.shape[-1]].copy_(first)
    result = [(moved, *args[1:]), (wide, *args[1:])]
    if op != "received_scores_varlen" and op != "received_scores":
        result.append(half)
    numbers = [i for i, x in enumerate(args) if isinstance(x, int) and i == 2 and x > 1]
    result += [(*args[:i], args[i] - 1, *args[i + 1 :]) for i in numbers if op in host.OPS]
    if op in host.OPS:
        result += [(*args[:3], 1.0), (*args[:3], 0.5, 3), (*args[:3], 0.5, 8, "pairwise")]
    return result


def recorded(core: host.Core) -> None:
    """Later calls of a layout repeat the launches of the first, with their own addresses."""
    run = Recorded(core)
    for op in _schemas.SCHEMAS:
        for args in samples(op):
            run.call(op, args, by_python=1)
            for _ in range(2):
                run.call(op, copies(args), by_python=0)
        for args in changes(op, samples(op)[0]):
            run.call(op, args, by_python=1)
            run.call(op, copies(args), by_python=0)
        # Without images there is nothing to launch.
        if not op.endswith("_varlen"):
            empty = tuple(x[:0] if isinstance(x, Tensor) else x for x in samples(op)[0])
            for _ in range(2):
                before = run.python_calls
                run.operators[op](*empty)
                assert run.python_calls == before + 1
                assert run.launches.take() == []
    # One tensor as two arguments has no plan, because another call may have two tensors.
    q, k, _ = samples("cls_attention")[0]
    q = q[:1]
    for _ in range(2):
        run.call("cls_scores", (q, q), by_python=1)
    run.call("cls_scores", (q, k[:1]), by_python=1)
    run.call("cls_scores", (k[:1], q), by_python=0)
    nested(run)
    errors(run)
    threads(run)


def nested(run: Recorded) -> None:
    """A hook of Triton or the garbage collector may call another operator during a launch."""
    q, k, *_ = samples("received_scores", size=1)[0]
    other = torch.rand(1, 77)
    run.launches.during = lambda: run.operators["select_topk"](other, 3)
    run.operators["received_scores"](q, k)
    run.launches.take()
    run.call("received_scores", copies((q, k)), by_python=0)
    run.call("select_topk", (other, 3), by_python=0)
    # After this every layout goes to Python again.
    run.module.forget_recorded()
    run.call("select_topk", (other, 3), by_python=1)
    run.call("select_topk", (other, 3), by_python=0)


def errors(run: Recorded) -> None:
    scores = torch.rand(3, 50)
    topk = run.operators["select_topk"]
    for wrong in ((scores, 51), (scores.double(), 5)):
        for _ in range(2):
            assert error_of(topk, *wrong) == error_of(torch.ops.vispruner.select_topk, *wrong)
    run.call("select_topk", (scores, 5), by_python=1)
    run.launches.error = OSError("the launch failed")
    assert error_of(topk, scores, 5) == (OSError, "the launch failed")
    run.launches.error = None
    run.call("select_topk", (scores, 5), by_python=0)
    # Memory that is gone is seen in a layout that is known.
    scores.untyped_storage().resize_(8)
    kind, text = error_of(topk, scores, 5)
    assert kind is ValueError
    assert "has a storage of 8 bytes" in text


def threads(run: Recorded) -> None:
    """Calls of several threads at once: each has the results of its own launch."""
    problems = []

    def work(seed: int) -> None:
        try:
            for i in range(300):
                scores = torch.rand(2, 40 + (seed + i) % 5)
                answer = run.operators["select_topk"](scores, 7)
                assert answer.shape == (2, 7)
                mine = [args for _, _, args in list(run.launches.log) if answer.data_ptr() in args]
                assert any(scores.data_ptr() in args for args in mine)
        except BaseException as error:
            problems.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not problems, problems
    assert len(run.launches.take()) == 1200


if __name__ == "__main__":
    globals()[sys.argv[2]](host.Core(Path(sys.argv[1])))
    print("done")
