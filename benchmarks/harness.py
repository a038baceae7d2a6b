"""Parts that all benchmarks share: options, header, interleaved timing, tables and JSON.

On a CPU a time is the wall time of a call, in ms. On a GPU there are four times, in us:
    device  a call in a CUDA graph of several calls. L2 is not flushed, so small inputs are warm, as
            they are in a model, where the layer before has just written them
    cold    the same, but the calls use so many copies of the inputs in turn that L2 keeps none
    wall    an eager call by the host's clock, from an idle device to an idle device
    host    the time on the host of an eager call, while the device is busy with other work
A call that waits for the device cannot be captured in a graph. It has only a wall time, and its row
says so.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

import vispruner_kernels
from benchmarks import limits
from vispruner_kernels import _backends, _native

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

UNITS = {"cpu": ("ms", 1e3), "cuda": ("us", 1e6)}
# The clock that rates and shares are computed from.
MAIN = {"cpu": "wall", "cuda": "device"}
ROUNDS = {"cpu": 21, "cuda": 51}
# A case is timed for about this long at most. Slow cases get fewer rounds, at least MIN_ROUNDS.
CASE_SECONDS = {"cpu": 20.0, "cuda": 6.0}
MIN_ROUNDS = 3
# --json without a FILE: benchmarks/results/<device>/<benchmark>.json.
AUTO = Path("AUTO")
RESULTS = Path(__file__).parent / "results"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        folder = Path(__file__).parent
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]


def header(
    threads: int, device: str = "cpu", ops: Sequence[str] = ("select",), commit: str | None = None
) -> dict[str, Any]:
    """The machine, the versions and the command, without which a figure means nothing."""
    variables = [
        f"{name}={os.environ[name]}"
        for name in sorted(os.environ)
        if name.startswith("VISPRUNER_KERNELS_")
    ]
    return {
        "command": " ".join([*variables, "python -m", _module(), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": commit or _commit(),
        "machine": f"{_processor()}, {platform.system()} {platform.machine()}",
        **{f"owner of {op}": _backends.OWNERS[op, device] for op in ops},
        "simd": _native._C.simd() if _native.INSTALLED else "C++ core not built",
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vispruner_kernels": vispruner_kernels.__version__,
        **(limits.facts() if device == "cuda" else {}),
    }


def parser(description: str, devices: Sequence[str] = ("cpu",)) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    result = argparse.ArgumentParser(description=description)
    best = "cuda" if "cuda" in devices and limits.cuda.is_available() else "cpu"
    result.add_argument("--device", choices=devices, default=best)
    result.add_argument("--threads", type=int, help="PyTorch's thread count (default on a CPU: 1)")
    result.add_argument("--rounds", type=int, help="number of samples of each competitor")
    result.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=AUTO,
        metavar="FILE",
        help="also write the results to FILE; without FILE, into benchmarks/results/<device>/",
    )
    return result


def race_parser(description: str) -> argparse.ArgumentParser:
    """The options of a benchmark that races competitors on a CPU or a GPU."""
    result = parser(description, ("cpu", "cuda"))
    result.add_argument("--commit", help="the commit for the header, where git does not know it")
    result.add_argument("--quick", action="store_true", help="only the first case of each table")
    result.add_argument(
        "--compile",
        nargs="?",
        choices=["none", "first", "all"],
        const="all",
        help="after all other cases, measure these cases of the first table again with "
        "torch.compile as a competitor, which can take minutes; --compile alone means all; "
        "default: the first on a GPU, none on a CPU or with --quick",
    )
    return result


def check(options: argparse.Namespace, usage: argparse.ArgumentParser) -> None:
    """Reject bad options before minutes are spent on them, and fill in the defaults that depend on
    the device."""
    on_cpu = options.device == "cpu"
    if not on_cpu and not limits.cuda.is_available():
        usage.error("--device cuda: PyTorch finds no GPU here; use --device cpu")
    if options.threads is None:
        options.threads = 1 if on_cpu else torch.get_num_threads()
    if options.rounds is None:
        options.rounds = ROUNDS[options.device]
    if getattr(options, "compile", "none") is None:
        options.compile = "none" if on_cpu or options.quick else "first"
    if options.threads < 1:
        usage.error(f"--threads is {options.threads}, expected at least 1")
    if options.rounds < 1:
        usage.error(f"--rounds is {options.rounds}, expected at least 1")
    if options.json == AUTO:
        name = f"cpu {_processor()}" if on_cpu else limits.cuda.get_device_name()
        folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        folder.mkdir(parents=True, exist_ok=True)
        options.json = folder / f"{_module().split('.')[-1]}.json"
    if options.json and not options.json.resolve().parent.is_dir():
        usage.error(f"--json: the folder of {options.json} does not exist")


class Timing:
    """Percentiles p50, p10 and p90 of samples; `scale` converts seconds to the printed unit."""

    def __init__(self, samples: Sequence[float], scale: float) -> None:
        ordered = sorted(samples)
        self.seconds = statistics.median(ordered)
        self.p50 = self.seconds * scale
        self.p10 = ordered[len(ordered) // 10] * scale
        self.p90 = ordered[-1 - len(ordered) // 10] * scale
        self.rounds = len(ordered)

    def __str__(self) -> str:
        return f"{self.p50:.3f} [{self.p10:.3f}, {self.p90:.3f}]"

    def json(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("p50", "p10", "p90", "rounds")}


class Competitor(NamedTuple):
    """One way to compute the answer of a case.

    Attributes:
        run: called with the inputs of the case.
        check: called with the answer. It returns "" or None if that is right, else WRONG and a
            reason; an AssertionError means WRONG too.
        context: entered around every call, outside the measured time.
        only: the one clock to read, or "" for all.
    """

    run: Callable[..., Any]
    check: Callable[[Any], str | None]
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    only: str = ""


class Result:
    """Times of one competitor by clock, or the reason why there is none."""

    def __init__(self) -> None:
        self.state = ""
        self.times: dict[str, Timing | str] = {}

    def __getitem__(self, clock: str) -> Timing | str | None:
        return self.state or self.times.get(clock)

    def seconds(self, clock: str) -> float | None:
        timing = self[clock]
        return timing.seconds if isinstance(timing, Timing) else None


def share(part: float | None, whole: float | None) -> float | None:
    """`part / whole`, or None where one of them was not measured."""
    return part / whole if part and whole else None


def ratio(over: Result | None, under: Result, clock: str) -> float | None:
    """How many times longer `over` takes than `under`, where both have a time."""
    return share(over.seconds(clock) if over else None, under.seconds(clock))


def times(result: Result, device: str, name: str = "", cold: bool = False) -> dict[str, Any]:
    """The columns of a competitor's times."""
    unit = UNITS[device][0]
    if device == "cpu":
        return {f"{name}{unit} [p10, p90]": result["wall"]}
    return {
        f"{name}{unit} [p10, p90]": result["device"],
        **({f"cold {unit}": result["cold"]} if cold else {}),
        f"wall {unit}": result["wall"],
        f"host {unit}": result["host"],
    }


T = TypeVar("T", bound=Hashable)


def interleaved(
    clocks: dict[T, Callable[[], float]], rounds: int, seconds: float
) -> dict[T, list[float]]:
    """Read the clocks in turns, so that a disturbance of the machine affects all of them. The first
    turn is a warm-up and does not count."""
    samples: dict[T, list[float]] = {name: [] for name in clocks}
    for sample in clocks.values():
        sample()
    begin = time.perf_counter()
    for turn in range(rounds):
        for name, sample in clocks.items():
            samples[name].append(sample())
        if turn + 1 >= MIN_ROUNDS and time.perf_counter() - begin > seconds:
            break
    return samples


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    # A garbage collection would be timed, and one that unloads a kernel breaks a capture.
    # torch.cuda.graph begins with a collection, which skips frozen objects.
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def race(
    competitors: dict[T, Competitor],
    inputs: tuple[Tensor, ...],
    options: argparse.Namespace,
    cold: Tensor | None = None,
    seconds: float | None = None,
) -> dict[T, Result]:
    """Check every competitor, then time the right ones in turns.

    Args:
        cold: the input that L2 must not hold, for a cold time; None for no cold time.
        seconds: replaces CASE_SECONDS.
    """
    device, copies = options.device, 1
    if cold is not None and device == "cuda":
        copies += 2 * limits.l2_bytes() // (cold.numel() * cold.element_size())
    sets = [inputs, *(tuple(limits.place(x, device) for x in inputs) for _ in range(copies - 1))]
    results: dict[T, Result] = {}
    running: dict[tuple[T, str], Callable[[], float]] = {}
    with no_collection():
        for name, (run, check, context, only) in competitors.items():
            result = results[name] = Result()
            try:
                with context(), warnings.catch_warnings():
                    # PyTorch warns why a backend of attention cannot run these inputs.
                    warnings.simplefilter("ignore")
                    answer = run(*inputs)
                    # A kernel's error must appear here, not in the next competitor.
                    limits.synchronize(device)
                    result.state = check(answer) or ""
                clocks = {} if result.state else limits.clocks(run, context, sets, device)
            except AssertionError:
                result.state = "WRONG"
            except Exception as error:  # any error of a competitor is shown in its row
                result.state = f"raises {type(error).__name__}"
            else:
                for clock, sample in clocks.items():
                    if isinstance(sample, str):
                        result.times[clock] = sample
                    elif only in ("", clock):
                        running[name, clock] = sample
        limit = CASE_SECONDS[device] if seconds is None else seconds
        samples = interleaved(running, options.rounds, limit)
    for (name, clock), values in samples.items():
        results[name].times[clock] = Timing(values, UNITS[device][1])
    if copies == 1:
        for result in results.values():
            result.times["cold"] = result.times.get("device", "")
    return results


def progress(cases: Sequence[Any]) -> Iterator[Any]:
    """Yield the cases. Show progress on standard error: a bar on a terminal, else lines."""
    if tqdm is not None and sys.stderr.isatty():
        yield from tqdm(cases, unit="case", leave=False)
        return
    begin = time.perf_counter()
    for number, case in enumerate(cases, 1):
        seconds = time.perf_counter() - begin
        print(f"{seconds:5.0f} s  {number}/{len(cases)}  {case}", file=sys.stderr, flush=True)
        yield case


Rows = list[dict[str, Any]]
# The name of a table -> its cases, and the function that makes the rows of one case.
Tables = Mapping[str, tuple[Sequence[Any], Callable[..., Rows]]]


def run(head: dict[str, Any], tables: Tables, options: argparse.Namespace) -> dict[str, Rows]:
    """Make the tables and report them. Results are written after every case, because the next case
    may fail. torch.compile may never end, so it runs after all else is written and printed."""
    head["limits"] = options.limits = limits.measure(options.device)
    done: dict[str, Rows] = {name: [] for name in tables}
    count = 1 if options.quick else None
    for name, (cases, rows_of) in tables.items():
        for case in progress(cases[:count]):
            done[name] += rows_of(case, options)
            _write(head, done, options.json)
    _print(head, done)
    if options.compile != "none":
        cases, rows_of = next(iter(tables.values()))
        print("\nwith torch.compile:", flush=True)
        for case in progress(cases[: 1 if options.compile == "first" else count]):
            done["compiled"] = done.get("compiled", []) + rows_of(case, options, compiled=True)
            _write(head, done, options.json)
        _print({}, {"compiled": done["compiled"]})
    return done


def status(tables: dict[str, Rows]) -> int:
    """The exit status: 1 if one of our answers was wrong or missing, or has no time by the main
    clock."""
    for row in (row for rows in tables.values() for row in rows):
        (value,) = (row[name] for name in row if name.endswith("[p10, p90]"))
        if not isinstance(value, Timing) and row.get("by", "ours").startswith("ours"):
            return 1
    return 0


def report(head: dict[str, Any], tables: dict[str, Rows], file: Path | None) -> None:
    """Print the header and the tables, and write both as JSON."""
    _print(head, tables)
    _write(head, tables, file)


def _write(head: dict[str, Any], tables: dict[str, Rows], file: Path | None) -> None:
    if file:
        file.write_text(
            json.dumps({**head, **tables}, indent=1, default=lambda value: value.json()) + "\n"
        )


def _cell(name: str, value: Any) -> str:
    if isinstance(value, Timing) and "p10" not in name:
        value = value.p50
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def _print(head: dict[str, Any], tables: dict[str, Rows]) -> None:
    for name, value in head.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {_cell(key, x)}" for key, x in value.items())
        print(f"{name:<{max(map(len, head))}} {value}")
    for rows in tables.values():
        names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
        lines = [names, *([_cell(name, row[name]) for name in names] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print()
        for line in lines:
            cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            print("  ".join(cells).rstrip())
