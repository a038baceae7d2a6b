"""Has make test-kernels passed with these kernels, this Triton and these tests?

    python tests/kernels.py             status 1 and what has changed since, if something has
    python tests/kernels.py --now       what is here now
    python tests/kernels.py --passed    reads such a list, from before the tests, and records it

The record is tests/kernels.sha256. Only make test-kernels writes it, after it has passed: commit it
with the kernels. CI runs make test-kernels where the record and the sources differ.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "kernels.sha256"
# What the results depend on.
SOURCES = (
    "csrc/*.h",
    "csrc/cuda/*",
    "vispruner_kernels/_native/cuda.py",
    "vispruner_kernels/_triton/*.py",
    "tests/aot*.py",
    "tests/calls.py",
    "tests/cuda_on_cpu/**/*.*",
    "tests/emulated.py",
    "tests/gpu*.py",
    "tests/races.py",
    "tests/sanitize.py",
    "tests/test_aot.py",
    "tests/test_cuda_on_cpu.py",
    "tests/test_gpu_*.py",
    "tests/test_races.py",
    "tests/test_triton.py",
)


def now() -> list[str]:
    paths = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern))
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(ROOT).as_posix()}"
        for path in paths
    ]
    return [f"triton=={importlib.metadata.version('triton')}", *lines]


def changed(recorded: list[str], found: list[str]) -> list[str]:
    """The names in which two lists differ."""
    lines = {*recorded} ^ {*found}
    return sorted({line.split("==")[0].split("  ")[-1] for line in lines})


def main(argument: str = "") -> int:
    found = now()
    if argument == "--now":
        print("\n".join(found))
        return 0
    if argument == "--passed":
        tested = sys.stdin.read().splitlines()
        if names := changed(tested, found):
            print(f"test-kernels: changed while it ran: {' '.join(names)}", file=sys.stderr)
            return 1
        RECORD.write_text("\n".join(found) + "\n")
        print(f"test-kernels: passed; commit {RECORD.relative_to(ROOT)} with the kernels")
        return 0
    recorded = RECORD.read_text().splitlines() if RECORD.exists() else []
    if names := changed(recorded, found):
        print(f"test-kernels: has not passed since these changed: {' '.join(names)}")
        return 1
    print("test-kernels: has passed with these kernels and this Triton (tests/kernels.sha256)")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
