"""Clocks of the benchmarks: times on a stand-in for a GPU, turns and progress."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace

import fake_cuda
import pytest
import torch

from benchmarks import harness, limits


@pytest.fixture
def gpu(monkeypatch):
    yield from fake_cuda.install(monkeypatch)


def test_device_time_is_of_one_call(gpu):
    inputs = [(torch.zeros(i + 1),) for i in range(100)]
    seen = []

    def call(x):
        if gpu.capturing:
            seen.append(len(x))
        gpu.launch(7e-6)

    one = limits.Graph(call, contextlib.nullcontext, inputs[:1])
    assert 1 < len(seen) == one.calls <= limits.MAX_CALLS
    assert one() == pytest.approx(7e-6)
    seen.clear()
    many = limits.Graph(call, contextlib.nullcontext, inputs)
    assert seen == list(range(1, 101))
    assert many() == pytest.approx(7e-6)


def test_the_row_names_the_error_of_a_failed_capture(gpu):
    def call():
        if gpu.capturing:
            raise MemoryError

    competitors = {"x": harness.Competitor(call, lambda answer: "")}
    result = harness.race(competitors, (), SimpleNamespace(device="cuda", rounds=1))["x"]
    assert result["device"] == "no graph: MemoryError"
    assert result.seconds("wall") > 0
    assert gpu.stream_now == "default"
    assert gpu.mode == 0


def test_host_time_does_not_wait_for_the_device(gpu, monkeypatch):
    """The device gets work before the calls, and no call waits for it."""
    events = []
    monkeypatch.setattr(gpu, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr(limits, "_occupy", lambda seconds: events.append("work"))

    def call():
        events.append("call")
        time.sleep(1e-4)

    host = limits.Host(call, contextlib.nullcontext, ())
    events.clear()
    assert 1e-4 <= host() < 1e-2
    assert events == ["wait", "work", *["call"] * host.calls]


def test_long_calls_are_not_captured(gpu, monkeypatch):
    monkeypatch.setattr(limits, "LONG_CALL", 0.0)
    clocks = limits.clocks(lambda: None, contextlib.nullcontext, [()], "cuda")
    assert clocks["device"] == "too long to capture"


def test_cycles_are_counted_at_the_highest_clock(gpu, monkeypatch):
    """An idle device is slow at first."""
    clocks = iter([3e8, 3e8, 6e8])
    monkeypatch.setattr(gpu, "_sleep", lambda cycles: gpu.launch(cycles / next(clocks, 2e9)))
    assert limits._cycles_per_second() == pytest.approx(2e9)


def test_clocks_are_read_in_turns():
    turns = []

    def clock(name):
        turns.append(name)
        return float(len(turns))

    samples = harness.interleaved({"a": lambda: clock("a"), "b": lambda: clock("b")}, 3, 1.0)
    assert turns == ["a", "b"] * 4
    assert samples == {"a": [3.0, 5.0, 7.0], "b": [4.0, 6.0, 8.0]}
    timing = harness.Timing(samples["a"], 1e3)
    assert (timing.p10, timing.p50, timing.p90, timing.seconds) == (3e3, 5e3, 7e3, 5.0)


def test_progress_without_a_terminal_is_a_line_for_each_case(monkeypatch, capsys):
    monkeypatch.setattr(harness, "tqdm", None)
    assert list(harness.progress(["x", "y"])) == ["x", "y"]
    assert [line.split()[2:] for line in capsys.readouterr().err.splitlines()] == [
        ["1/2", "x"],
        ["2/2", "y"],
    ]
