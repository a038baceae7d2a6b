"""What every benchmark shares: the header, interleaved timing, the table and the JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import vispruner_kernels
from vispruner_kernels import _backends, _native


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


def header(threads: int) -> dict[str, Any]:
    """The machine, the versions and the command: what a figure means nothing without."""
    variables = [
        f"{name}={os.environ[name]}"
        for name in sorted(os.environ)
        if name.startswith("VISPRUNER_KERNELS_")
    ]
    return {
        "command": " ".join([*variables, "python -m", _module(), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "machine": f"{_processor()}, {platform.system()} {platform.machine()}",
        "owner of select": _backends.OWNERS["select", "cpu"],
        "simd": _native._C.simd() if _native.INSTALLED else "native core not built",
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vispruner_kernels": vispruner_kernels.__version__,
    }


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--device", choices=["cpu"], default="cpu")
    result.add_argument("--threads", type=int, default=1, help="PyTorch's thread count")
    result.add_argument("--rounds", type=int, default=21, help="timed calls of each competitor")
    result.add_argument("--json", type=Path, metavar="FILE", help="write the results here as well")
    return result


def check(options: argparse.Namespace, usage: argparse.ArgumentParser) -> None:
    """Refuses options before minutes are spent on them."""
    if options.threads < 1:
        usage.error(f"--threads is {options.threads}, expected at least 1")
    if options.rounds < 1:
        usage.error(f"--rounds is {options.rounds}, expected at least 1")
    if options.json and not options.json.resolve().parent.is_dir():
        usage.error(f"--json: the folder of {options.json} does not exist")


class Timing:
    """Milliseconds of one competitor."""

    def __init__(self, samples: Sequence[float]) -> None:
        ordered = sorted(samples)
        self.p50 = statistics.median(ordered)
        self.p10 = ordered[len(ordered) // 10]
        self.p90 = ordered[-1 - len(ordered) // 10]
        self.rounds = len(ordered)

    def __str__(self) -> str:
        return f"{self.p50:.3f} [{self.p10:.3f}, {self.p90:.3f}]"


# A case takes about this long at most, with fewer rounds if need be, but never under MIN_ROUNDS.
CASE_SECONDS = 20.0
MIN_ROUNDS = 3


def interleaved(competitors: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Times the competitors in turns, so that what disturbs one disturbs all. The first turn warms
    up and is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in competitors}
    for run in competitors.values():
        run()
    begin = time.perf_counter()
    for turn in range(rounds):
        for name, run in competitors.items():
            start = time.perf_counter()
            run()
            samples[name].append((time.perf_counter() - start) * 1e3)
        if turn + 1 >= MIN_ROUNDS and time.perf_counter() - begin > CASE_SECONDS:
            break
    return {name: Timing(values) for name, values in samples.items()}


def progress(cases: Sequence[Any]) -> Any:
    """A bar on standard error, where that is a terminal."""
    return tqdm(cases, unit="case", leave=False, disable=None)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def report(head: dict[str, Any], rows: list[dict[str, Any]], file: Path | None) -> None:
    """Prints the header and the table, and writes both as JSON."""
    for name, value in head.items():
        print(f"{name:<18} {value}")
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print()
    for line in cells:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )
    if file:
        file.write_text(json.dumps({**head, "rows": rows}, indent=1, default=vars) + "\n")
