"""Compare the sources of the GPU kernels with those that `make test-kernels` has passed with.

    kernels.py             print the sources that changed since the record; status 1 if any changed
    kernels.py --now       print the hashes of the sources
    kernels.py --passed    read hashes from before the tests; write the record if they still hold

The record, tests/support/kernels.sha256, has a hash for every source and the version of Triton.
Only `make test-kernels` writes it, after a pass: commit it with the kernels. CI runs
`make test-kernels` if the record and the sources differ.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests" / "support" / "kernels.sha256"
# The files that the results of `make test-kernels` depend on.
SOURCES = (
    "csrc/*.h",
    "csrc/cuda/*",
    "vispruner_kernels/_native/arguments.py",
    "vispruner_kernels/_native/cuda.py",
    "vispruner_kernels/_triton/*.py",
    "vispruner_kernels/testing.py",
    "tests/support/aot*.py",
    "tests/support/calls.py",
    "tests/support/cuda_on_cpu/**/*.*",
    "tests/support/emulated.py",
    "tests/support/gpu*.py",
    "tests/support/races.py",
    "tests/support/sanitize.py",
    "tests/kernels/test_aot.py",
    "tests/kernels/test_cuda_on_cpu.py",
    "tests/gpu/test_gpu_*.py",
    "tests/kernels/test_race_detector.py",
    "tests/kernels/test_races.py",
    "tests/kernels/test_triton.py",
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
    print(f"test-kernels: has passed with these kernels and this Triton ({RECORD.name})")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
