"""What make test-gpu runs: the tests that need a GPU, and some calls in compute-sanitizer.

Of its tools memcheck sees every access outside of memory that is allocated, racecheck hazards in
shared memory only: that no two blocks race is left to the tests that repeat and compare. The last
lines are a summary of what passed, failed and was not run. Where no GPU can run the kernels it says
so and exits with status 2. VISPRUNER_TEST_DEVICE=cpu tests the tests: fewer and smaller cases of
all that needs no CUDA, in Triton's interpreter.
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

# What is left to say when time is out has seconds to be said.
GRACE = 10.0
FILES = tuple(
    f"test_gpu_{part}.py" for part in ("select", "scores", "launch", "memory", "transformers")
)
# With the CUDA kernels of the C++ core in the place of Triton's.
NATIVE_FILES = tuple(f"test_gpu_{part}.py" for part in ("select", "launch", "memory"))
TOOLS = ("memcheck", "racecheck")
STEPS = ("tests", "native", *TOOLS)


class Outcome(NamedTuple):
    """Of a file of tests or of a tool."""

    state: str
    name: str
    note: str
    seconds: float = 0.0
    # Of pytest's own summary.
    lines: Sequence[str] = ()


class Ended(NamedTuple):
    """A process: `why` says in a word what its status was, "" for 0."""

    why: str
    output: str
    seconds: float
    status: int | None


def _environment(native: bool = False) -> dict[str, str]:
    """Of a process that tests the kernels, whatever is chosen for this one."""
    chosen = ("VISPRUNER_KERNELS_", "TRITON_INTERPRET", "PYTEST_")
    environment = {n: v for n, v in os.environ.items() if not n.startswith(chosen)}
    path = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1"}
    # Named, so that tests that cannot run fail.
    environment["VISPRUNER_TEST_DEVICE"] = str(DEVICE)
    if native:
        environment["VISPRUNER_KERNELS_BACKEND"] = "native"
    if SIMULATED:
        environment |= {"TRITON_INTERPRET": "1", "VISPRUNER_KERNELS_BACKEND": "triton"}
    return environment


def _watched(name: str, command: list[str], environment: dict[str, str], until: float) -> Ended:
    """Runs a process until then at most, and prints its output, each line after the name."""
    begin = time.monotonic()
    options = {"text": True, "errors": "replace", "cwd": ROOT, "env": environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, **options, **pipes)
    lines = []

    def read() -> None:
        with process.stdout as pipe:
            for line in pipe:
                # One write, for others write too; the last line may have no end.
                print(f"{name}: {line.rstrip()}\n", end="", flush=True)
                lines.append(line)

    # In a thread: what the process has started may keep its output open.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    late = False
    try:
        process.wait(max(0.0, until - begin))
    except subprocess.TimeoutExpired:
        late = True
        # pytest then says what failed so far.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    reader.join(GRACE)
    seconds, output, status = time.monotonic() - begin, "".join(lines), process.returncode
    why = f"status {status}" if status else ""
    # The latter is what faulthandler prints where a process ends itself.
    if late or (status and "Timeout (" in output):
        why = f"out of time after {seconds:.0f} s"
    return Ended(why, output, seconds, status)


def _pytest(
    files: list[tuple[str, bool]], arguments: list[str], jobs: int, until: float
) -> list[Outcome]:
    """Several files at once, for the time goes into compilers; in processes of their own, for an
    invalid access ends a process' use of the device."""
    # Not captured by file descriptor: what `watch` writes is to be seen. Other versions of PyTorch
    # and Triton warn of other things, at their import too.
    options = ["-m", "gpu", "-v", "-rsfE", "--capture=sys", "--durations=5", "-W", "default"]
    start = [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider"]

    def test(file: tuple[str, bool]) -> Ended:
        name, native = file
        command = [*start, f"tests/gpu/{name}", *arguments]
        label = "native " * native + name.removesuffix(".py")
        return _watched(label, command, _environment(native), until)

    with ThreadPoolExecutor(jobs) as pool:
        done = dict(zip(files, pool.map(test, files), strict=True))
    # 5: there are no tests, at least not among those that were asked for.
    asked = any(argument.startswith(("-k", "-m", "--deselect")) for argument in arguments)
    asked = asked and any(not ended.why for ended in done.values())
    outcomes = []
    for (file, native), (why, output, seconds, status) in done.items():
        state = "FAILED" if why else "passed"
        if status == 5:
            why = "it has no tests" if not asked else "its tests were not asked for"
            state = "NOT RUN" if asked else "FAILED"
        counts = re.findall(r"^=+ (.* in [\d.]+s.*?) =+$", output, re.MULTILINE)
        lines = re.findall(
            r"^(?:SKIPPED \[|FAILED tests/gpu/|ERROR tests/gpu/).*", output, re.MULTILINE
        )
        note = ": ".join(filter(None, [why, *counts[-1:]]))
        outcomes.append(Outcome(state, "native " * native + file, note, seconds, lines))
    return outcomes


def _sanitizer() -> str | None:
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    homes = [home for home in (*homes, "/usr/local/cuda") if home]
    folders = [f"{home}/{folder}" for home in homes for folder in ("bin", "compute-sanitizer")]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *folders])
    return shutil.which("compute-sanitizer", path=path)


def _sanitize(program: str, tools: list[str], until: float) -> list[Outcome]:
    # Each tensor in memory of its own: what lies beyond it is seen.
    environment = _environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        environment.pop(name, None)
    options = ["--error-exitcode", "86", "--print-limit", "20"]
    # PyTorch asks for what a driver may not have, and is content with an error.
    options += ["--report-api-errors", "no", "--target-processes", "application-only"]
    outcomes: list[Outcome] = []
    # Alone first: after it everything is compiled, and what fails fails for another reason.
    steps = {"alone": [], **{tool: [program, "--tool", tool, *options] for tool in tools}}
    for left, (name, start) in zip(range(len(steps), 0, -1), steps.items(), strict=True):
        if outcomes and outcomes[0].state == "FAILED":
            outcomes.append(Outcome("NOT RUN", name, "sanitize.py fails without a tool"))
            continue
        # Each has its part of the time, and what others left; where it hangs, the script says.
        now = time.monotonic()
        seconds = max(2.0, (until - now) / left)
        command = [*start, sys.executable, "tests/support/sanitize.py", f"{seconds - 1:.0f}"]
        print(f"test-gpu: {' '.join(command)}", flush=True)
        why, output, took, _ = _watched(name, command, environment, now + seconds)
        state = "FAILED" if why else "passed"
        notes = {"alone": "sanitize.py without a tool", "racecheck": "sees shared memory only"}
        if start and "Device not supported" in output and "agree" not in output:
            state, why = "NOT RUN", "cannot watch this device"
        elif not why and ("agree" not in output or (start and "SUMMARY" not in output)):
            state, why = "FAILED", "status 0, but no summary"
        note = "; ".join(filter(None, [why, notes.get(name)]))
        outcomes.append(Outcome(state, name, note, took))
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="test-gpu", description="Other arguments are pytest's.", allow_abbrev=False
    )
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, help="some of the steps")
    jobs = len(FILES) + len(NATIVE_FILES)
    parser.add_argument("--jobs", type=int, default=jobs, help="files tested at once")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all of it")
    options, arguments = parser.parse_known_args(argv)
    begin = time.monotonic()
    # In the background of a shell it is ignored, also by what is started here, which then would not
    # hear that time is out.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if why := unavailable():
        print(f"test-gpu: {why}", file=sys.stderr)
        return 2
    name = "Triton's interpreter" if SIMULATED else torch.cuda.get_device_name()
    print(f"test-gpu: {name}, PyTorch {torch.__version__}", flush=True)

    program = _sanitizer()
    without = "" if program else "no compute-sanitizer here; it comes with the CUDA toolkit"
    reasons = {step: "not asked for" for step in STEPS if step not in options.only}
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
        # The tools are left a third of the time.
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
