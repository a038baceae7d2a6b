"""The program of `make test-gpu`: the tests that need a GPU, and some calls in compute-sanitizer.

Of the sanitizer's tools, memcheck finds every access outside allocated memory. racecheck finds
races in shared memory only; races between blocks are left to the tests that repeat a call and
compare the answers. The output ends with a summary of the steps that passed, failed or did not run.
Without a GPU that can run the kernels, the program prints the reason and exits with status 2.

VISPRUNER_TEST_DEVICE=cpu checks the tests themselves without a GPU: every test that needs no CUDA
runs in Triton's interpreter, with fewer and smaller cases.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

try:
    import torch
    from gpu import DEVICE, LIMIT, SIMULATED, native, unavailable
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"test-gpu: {sys.executable} has no {error.name}; pip install it", file=sys.stderr)
    raise SystemExit(2) from None

# Seconds that a process has to print its failures after its time is over.
GRACE = 10.0
FILES = tuple(
    f"test_gpu_{part}.py" for part in ("select", "scores", "launch", "memory", "transformers")
)
# The files that also run with the CUDA kernels of the C++ core instead of Triton's.
NATIVE_FILES = tuple(f"test_gpu_{part}.py" for part in ("select", "launch", "memory"))
TOOLS = ("memcheck", "racecheck")
STEPS = ("tests", "native", *TOOLS)


class Outcome(NamedTuple):
    """The result of a file of tests or of a tool."""

    # "passed", "FAILED" or "NOT RUN"
    state: str
    name: str
    note: str
    seconds: float = 0.0
    # Lines of pytest's own summary.
    lines: Sequence[str] = ()


class Ended(NamedTuple):
    """A process that has ended."""

    # The reason why it failed, or "".
    why: str
    output: str
    seconds: float
    status: int | None


def _environment(native: bool = False) -> dict[str, str]:
    """The environment of a test process. It does not inherit the backend that this process has
    chosen, the use of the interpreter, or options of pytest."""
    chosen = ("VISPRUNER_KERNELS_", "TRITON_INTERPRET", "PYTEST_")
    environment = {n: v for n, v in os.environ.items() if not n.startswith(chosen)}
    path = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1"}
    # Tests that cannot run then fail instead of being skipped.
    environment["VISPRUNER_TEST_DEVICE"] = str(DEVICE)
    if native:
        environment["VISPRUNER_KERNELS_BACKEND"] = "native"
    if SIMULATED:
        environment |= {"TRITON_INTERPRET": "1", "VISPRUNER_KERNELS_BACKEND": "triton"}
    return environment


def _watched(name: str, command: list[str], environment: dict[str, str], until: float) -> Ended:
    """Run a process, at most until the time `until`. Print its output, each line after the name."""
    begin = time.monotonic()
    options = {"text": True, "errors": "replace", "cwd": ROOT, "env": environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, **options, **pipes)
    lines = []

    def read() -> None:
        with process.stdout as pipe:
            for line in pipe:
                # One write for each line, because several threads write. The last line may lack its
                # line break.
                print(f"{name}: {line.rstrip()}\n", end="", flush=True)
                lines.append(line)

    # In a thread, because children of the process may keep its output open after its end.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    late = False
    try:
        process.wait(max(0.0, until - begin))
    except subprocess.TimeoutExpired:
        late = True
        # pytest then prints the failures so far.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    reader.join(GRACE)
    seconds, output, status = time.monotonic() - begin, "".join(lines), process.returncode
    why = f"status {status}" if status else ""
    # faulthandler prints "Timeout (" when a process ends itself.
    if late or (status and "Timeout (" in output):
        why = f"out of time after {seconds:.0f} s"
    return Ended(why, output, seconds, status)


def _pytest(
    files: list[tuple[str, bool]], arguments: list[str], jobs: int, until: float
) -> list[Outcome]:
    """Run several files at once, because compilers take most of the time. Each file has a process
    of its own, because after an invalid access a process cannot use the device again."""
    # Capture sys only, not file descriptors, so that the messages of `watch` are printed. Warnings
    # are no errors: they differ by version of PyTorch and Triton, and some come at import.
    options = ["-m", "gpu", "-v", "-rsfE", "--capture=sys", "--durations=5", "-W", "default"]
    start = [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider"]

    def test(file: tuple[str, bool]) -> Ended:
        name, native = file
        command = [*start, f"tests/gpu/{name}", *arguments]
        label = "native " * native + name.removesuffix(".py")
        return _watched(label, command, _environment(native), until)

    with ThreadPoolExecutor(jobs) as pool:
        done = dict(zip(files, pool.map(test, files), strict=True))
    # Status 5: the file has no tests, or the arguments select none of them.
    selecting = any(argument.startswith(("-k", "-m", "--deselect")) for argument in arguments)
    selecting = selecting and any(not ended.why for ended in done.values())
    outcomes = []
    for (file, native), (why, output, seconds, status) in done.items():
        state = "FAILED" if why else "passed"
        if status == 5:
            why = "the arguments select none of its tests" if selecting else "it has no tests"
            state = "NOT RUN" if selecting else "FAILED"
        counts = re.findall(r"^=+ (.* in [\d.]+s.*?) =+$", output, re.MULTILINE)
        lines = re.findall(
            r"^(?:SKIPPED \[|FAILED tests/gpu/|ERROR tests/gpu/).*", output, re.MULTILINE
        )
        note = ": ".join(filter(None, [why, *counts[-1:]]))
        outcomes.append(Outcome(state, "native " * native + file, note, seconds, lines))
    return outcomes


def _sanitizer() -> str | None:
    """The path of compute-sanitizer, if it is installed."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    homes = [home for home in (*homes, "/usr/local/cuda") if home]
    folders = [f"{home}/{folder}" for home in homes for folder in ("bin", "compute-sanitizer")]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *folders])
    return shutil.which("compute-sanitizer", path=path)


def _sanitize(program: str, tools: list[str], until: float) -> list[Outcome]:
    """Run sanitize.py without a tool, then with each tool."""
    # Each tensor gets an allocation of its own, so that memcheck finds accesses beyond it.
    environment = _environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        environment.pop(name, None)
    options = ["--error-exitcode", "86", "--print-limit", "20"]
    # PyTorch calls functions that a driver may lack, and handles their errors.
    options += ["--report-api-errors", "no", "--target-processes", "application-only"]
    outcomes: list[Outcome] = []
    # Without a tool first: this compiles all kernels, and shows failures that need no tool.
    steps = {"alone": [], **{tool: [program, "--tool", tool, *options] for tool in tools}}
    for left, (name, start) in zip(range(len(steps), 0, -1), steps.items(), strict=True):
        if outcomes and outcomes[0].state == "FAILED":
            outcomes.append(Outcome("NOT RUN", name, "sanitize.py fails without a tool"))
            continue
        # Each step has its share of the time that is left. A script that hangs prints its stack.
        now = time.monotonic()
        seconds = max(2.0, (until - now) / left)
        command = [*start, sys.executable, "tests/support/sanitize.py", f"{seconds - 1:.0f}"]
        print(f"test-gpu: {' '.join(command)}", flush=True)
        why, output, took, _ = _watched(name, command, environment, now + seconds)
        state = "FAILED" if why else "passed"
        notes = {"alone": "sanitize.py without a tool", "racecheck": "checks shared memory only"}
        if start and "Device not supported" in output and "agree" not in output:
            state, why = "NOT RUN", "cannot check this device"
        elif not why and ("agree" not in output or (start and "SUMMARY" not in output)):
            state, why = "FAILED", "status 0, but no summary"
        note = "; ".join(filter(None, [why, notes.get(name)]))
        outcomes.append(Outcome(state, name, note, took))
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="test-gpu", description="Other arguments are passed to pytest.", allow_abbrev=False
    )
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, help="some of the steps")
    jobs = len(FILES) + len(NATIVE_FILES)
    parser.add_argument("--jobs", type=int, default=jobs, help="files tested at once")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all of it")
    options, arguments = parser.parse_known_args(argv)
    begin = time.monotonic()
    # In the background of a shell, this process and its children ignore SIGINT. The children need
    # it: it ends them when their time is over.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if why := unavailable():
        print(f"test-gpu: {why}", file=sys.stderr)
        return 2
    name = "Triton's interpreter" if SIMULATED else torch.cuda.get_device_name()
    print(f"test-gpu: {name}, PyTorch {torch.__version__}", flush=True)

    program = _sanitizer()
    without = "" if program else "compute-sanitizer is not installed; the CUDA toolkit has it"
    reasons = {step: "not in --only" for step in STEPS if step not in options.only}
    for tool in TOOLS:
        if SIMULATED or without:
            reasons.setdefault(tool, "the interpreter has no CUDA" if SIMULATED else without)
    if SIMULATED or native.REASON:
        why = "the interpreter has no CUDA" if SIMULATED else f"CUDA kernels: {native.REASON}"
        reasons.setdefault("native", why)
    tools = [tool for tool in TOOLS if tool not in reasons]
    files = [(file, False) for file in FILES if "tests" not in reasons]
    files += [(file, True) for file in NATIVE_FILES if "native" not in reasons]
    outcomes = []
    if files:
        # The tools get the last third of the time.
        part = 2 / 3 if tools else 1.0
        outcomes += _pytest(files, arguments, options.jobs, begin + part * options.limit)
    if tools:
        outcomes += _sanitize(program, tools, begin + options.limit)
    outcomes += [Outcome("NOT RUN", step, why) for step, why in reasons.items()]
    states = {outcome.state for outcome in outcomes}
    passed = "passed" in states and "FAILED" not in states

    print("test-gpu: summary")
    for state, name, note, seconds, lines in outcomes:
        print(f"  {state:<7} {name:<26} {seconds:4.0f} s  {note}")
        for line in lines:
            print(f"{'':10}{line}")
    print(f"test-gpu: {'passed' if passed else 'FAILED'}", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
