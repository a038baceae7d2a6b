"""A stand-in for torch.cuda, whose time passes only when a test says so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from benchmarks import limits


class FakeGraph:
    def __init__(self, gpu):
        self.gpu, self.seconds = gpu, 0.0

    def replay(self):
        self.gpu.now += self.seconds


class FakeEvent:
    def __init__(self, gpu):
        self.gpu, self.at = gpu, None

    def record(self):
        self.at = self.gpu.now

    def synchronize(self):
        self.gpu.synchronize()

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


class FakeCuda:
    """The part of torch.cuda that `limits` uses."""

    def __init__(self):
        self.now, self.mode, self.stream_now, self.capturing = 0.0, 0, "default", None
        self.CUDAGraph = lambda: FakeGraph(self)
        self.Event = lambda enable_timing: FakeEvent(self)
        self.Stream = self.current_stream = lambda: SimpleNamespace(wait_stream=lambda other: None)

    def launch(self, seconds):
        """Run a kernel that takes `seconds`."""
        if self.capturing:
            self.capturing.seconds += seconds
        else:
            self.now += seconds

    def wait(self):
        """Wait for the device, as a copy from the host does."""
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def is_available(self):
        return True

    def get_device_name(self):
        return "Fake GPU (1)"

    def get_device_properties(self, index):
        sizes = {"multi_processor_count": 2, "total_memory": 1 << 30, "L2_cache_size": 1 << 12}
        return SimpleNamespace(name=self.get_device_name(), major=9, minor=0, **sizes)

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    def synchronize(self):
        assert not self.capturing

    def _sleep(self, cycles):
        self.launch(cycles * 1e-9)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.stream_now = self.stream_now, stream
        try:
            yield
        finally:
            self.stream_now = before

    @contextlib.contextmanager
    def graph(self, graph, stream):
        # As with torch.cuda.graph, an error inside leaves the stream current.
        self.capturing, self.stream_now = graph, stream
        try:
            yield
        finally:
            self.capturing = None


def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the limits of a device with small matrices."""
    monkeypatch.setattr(limits, "SIDE", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(limits, "COPIED", {"cpu": 2, "cuda": 2})


def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Let the benchmarks use a FakeCuda, with tensors on the CPU."""
    fake = FakeCuda()
    small_limits(monkeypatch)
    monkeypatch.setattr(limits, "cuda", fake)
    monkeypatch.setattr(limits, "target", lambda device: torch.device("cpu"))
    monkeypatch.setattr(limits, "ROUNDS", 2)
    limits._cycles_per_second.cache_clear()
    yield fake
    limits._cycles_per_second.cache_clear()
