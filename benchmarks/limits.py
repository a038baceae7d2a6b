"""Clocks that time a call on a device, and the device's limits, measured with these clocks.

A clock is made for one call. Calling the clock returns one sample, in seconds.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, cuda

Inputs = Sequence[Tensor]
Run = Callable[..., Any]
Context = Callable[[], contextlib.AbstractContextManager[Any]]

# A graph holds calls for about GRAPH_SECONDS, so that the time to start it does not count, but at
# most MAX_CALLS. A call that takes longer than LONG_CALL is not captured, because it may have a
# hundred thousand kernels.
GRAPH_SECONDS = 4e-3
MAX_CALLS = 50
LONG_CALL = 0.3
# A graph for a cold time has a call for each copy of the inputs. It is made only if all these calls
# together take at most this long.
COLD_SECONDS = 20e-3
# A sample of host time has few enough calls for the launch queue, which holds about 1000 kernels.
HOST_SECONDS = 0.5e-3
HOST_CALLS = 20
# Optional packages whose versions are in the header.
PEERS = ("triton", "flash-attn", "flash-colsum", "flash-colreduce")
# For the limits: the side of the matrices, the number of them in a copy, the number of samples.
SIDE = {"cpu": 1024, "cuda": 8192}
COPIED = {"cpu": 32, "cuda": 4}
ROUNDS = 11


def target(device: str) -> torch.device:
    """The device of a benchmark's inputs."""
    return torch.device(device)


def synchronize(device: str) -> None:
    if device == "cuda":
        cuda.synchronize()


def place(x: Tensor, device: str) -> Tensor:
    """A copy on the device with the same strides; `Tensor.to` does not keep those of a slice."""
    empty = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=target(device))
    return empty.copy_(x)


def l2_bytes() -> int:
    """The size of the GPU's L2 cache."""
    return int(getattr(cuda.get_device_properties(0), "L2_cache_size", 1 << 26))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def facts() -> dict[str, Any]:
    """The facts about a GPU that are in the header."""
    gpu = cuda.get_device_properties(0)
    return {
        "gpu": f"{gpu.name}, {gpu.multi_processor_count} SMs, compute capability "
        f"{gpu.major}.{gpu.minor}, {gpu.total_memory >> 30} GiB, {l2_bytes() >> 20} MiB of L2",
        "driver": _driver(),
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        **{name: _version(name) for name in PEERS},
        "times": "us by replay of a CUDA graph of several calls, L2 not flushed; cold: inputs not "
        "in L2; wall: an eager call, synchronised; host: an eager call's launching alone",
    }


@functools.cache
def _cycles_per_second() -> float:
    start, stop = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    cycles, rates = 10_000_000, []
    # The largest of several rates: an idle device is slow at first, and too low a rate would make
    # `_occupy` too short.
    for _ in range(20):
        cuda._sleep(cycles // 10)
        start.record()
        cuda._sleep(cycles)
        stop.record()
        stop.synchronize()
        rates.append(cycles / (start.elapsed_time(stop) * 1e-3))
    return max(rates)


def _occupy(seconds: float) -> None:
    """Keep the device busy, so that the host can run ahead of it."""
    cuda._sleep(int(seconds * _cycles_per_second()))


def _elapsed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Wall:
    """Time of an eager call by the host's clock, from an idle device to an idle device."""

    def __init__(self, run: Run, context: Context, inputs: Inputs, device: str) -> None:
        self.run, self.context, self.inputs, self.device = run, context, inputs, device

    def __call__(self) -> float:
        with self.context():
            synchronize(self.device)
            start = time.perf_counter()
            self.run(*self.inputs)
            synchronize(self.device)
            return time.perf_counter() - start


class Host:
    """Time on the host of an eager call: several in a row, while the device has other work."""

    def __init__(self, run: Run, context: Context, inputs: Inputs) -> None:
        self.run, self.context, self.inputs = run, context, inputs
        with context():
            run(*inputs)
            cuda.synchronize()
            self.seconds = _elapsed(lambda: run(*inputs))
        self.calls = max(1, min(HOST_CALLS, int(HOST_SECONDS / self.seconds)))

    def __call__(self) -> float:
        with self.context():
            cuda.synchronize()
            _occupy(1.5 * self.calls * self.seconds)
            start = time.perf_counter()
            for _ in range(self.calls):
                self.run(*self.inputs)
            return (time.perf_counter() - start) / self.calls


class Graph:
    """Device time of a call, from CUDA events around the replay of a graph of several calls, which
    use the sets of inputs in turn."""

    def __init__(self, run: Run, context: Context, sets: Sequence[Inputs]) -> None:
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        # torch.cuda.graph leaves its stream current when a capture fails; `cuda.stream` restores
        # the previous one.
        with cuda.stream(side), context():
            for inputs in (*sets, sets[0])[:3]:
                run(*inputs)
            call = Wall(run, contextlib.nullcontext, sets[0], "cuda")()
            self.calls = max(len(sets), min(MAX_CALLS, int(GRAPH_SECONDS / call)))
            self.graph = cuda.CUDAGraph()
            with cuda.graph(self.graph, stream=side):
                for i in range(self.calls):
                    run(*sets[i % len(sets)])
        cuda.current_stream().wait_stream(side)
        cuda.synchronize()
        self.start, self.stop = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        self.graph.replay()
        cuda.synchronize()
        self.launch = _elapsed(self.graph.replay)

    def __call__(self) -> float:
        cuda.synchronize()
        # The device must not reach the first event before the host has launched the graph.
        _occupy(2.0 * self.launch + 20e-6)
        self.start.record()
        self.graph.replay()
        self.stop.record()
        self.stop.synchronize()
        return self.start.elapsed_time(self.stop) * 1e-3 / self.calls


def _synchronises(run: Run, context: Context, inputs: Inputs) -> bool:
    """Whether a call waits for the device. Such a call is not captured: the attempt would leave
    PyTorch's allocator and generators in the state of a capture."""
    with warnings.catch_warnings(), context():
        # PyTorch warns that this mode is a prototype.
        warnings.simplefilter("ignore")
        before = cuda.get_sync_debug_mode()
        cuda.set_sync_debug_mode("error")
        try:
            run(*inputs)
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            return True
        finally:
            cuda.set_sync_debug_mode(before)
    return False


def _graph(run: Run, context: Context, sets: Sequence[Inputs]) -> Graph | str:
    try:
        return Graph(run, context, sets)
    except Exception as error:  # shown in the row; the other clocks go on
        return f"no graph: {type(error).__name__}"


def clocks(
    run: Run, context: Context, sets: Sequence[Inputs], device: str
) -> dict[str, Callable[[], float] | str]:
    """The clocks of a call on a device by name, or the reason why there is none. With several sets
    of inputs there is a cold time too: L2 must not keep a set until its next use."""
    wall = Wall(run, context, sets[0], device)
    if device == "cpu":
        return {"wall": wall}
    if _synchronises(run, context, sets[0]):
        waits = "synchronises"
        return {"device": waits, "cold": waits, "wall": wall, "host": waits}
    graph = _graph(run, context, sets[:1]) if wall() < LONG_CALL else "too long to capture"
    result: dict[str, Callable[[], float] | str] = {
        "device": graph,
        "wall": wall,
        "host": Host(run, context, sets[0]),
    }
    if len(sets) > 1 and isinstance(graph, Graph):
        short = graph() * len(sets) <= COLD_SECONDS
        result["cold"] = _graph(run, context, sets) if short else "too long to repeat"
    return result


def _p50(clock: Callable[[], float] | str) -> float | None:
    if isinstance(clock, str):
        return None
    clock()
    return statistics.median(clock() for _ in range(ROUNDS))


def measure(device: str) -> dict[str, float | None]:
    """Measure the rates of a large copy (bytes read and written) and of large matrix products, and
    the times of an empty kernel. The data are random, because zeros are faster."""
    on_gpu = device == "cuda"
    side = SIDE[device]
    square = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    source = square.repeat(COPIED[device], 1).to(target(device))
    small = (square * 40.0).clamp(-127, 127).to(torch.int8).to(target(device))
    work: dict[str, tuple[Run, Inputs, float]] = {
        "copy GB/s": (torch.Tensor.copy_, (torch.empty_like(source), source), 2e-9 * source.nbytes),
        # The second factor is column-major, as tensor cores read it.
        "int8 TOP/s": (torch._int_mm, (small, small.T), 2e-12 * side**3),
    }
    for dtype in (torch.float16, torch.bfloat16) if on_gpu else (torch.float32,):
        x = square.to(target(device), dtype)
        name = f"{str(dtype).removeprefix('torch.')} TFLOP/s"
        work[name] = (torch.matmul, (x, x), 2e-12 * side**3)

    found: dict[str, float | None] = {}
    for name, (run, inputs, amount) in work.items():
        try:
            times = clocks(run, contextlib.nullcontext, [inputs], device)
            seconds = _p50(times["device" if on_gpu else "wall"])
        except RuntimeError:  # older GPUs have no int8 product
            seconds = None
        found[name] = amount / seconds if seconds else None
    if on_gpu:
        times = clocks(lambda: cuda._sleep(0), contextlib.nullcontext, [()], device)
        for name, clock in times.items():
            seconds = _p50(clock)
            found[f"empty kernel, {name} us"] = seconds and seconds * 1e6
    return found
