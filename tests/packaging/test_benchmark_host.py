"""`benchmarks.host`: CUDA operators that are registered from C++, in the emulation, and a run."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import host
from vispruner_kernels._native import registration

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    bool(registration.REASON), reason="operators cannot be registered from C++"
)


@pytest.fixture(scope="session")
def core(tmp_path_factory) -> Path:
    """The compiled core, which takes a minute; one for all processes of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "host"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / "_C.so"
        return library if library.exists() else host.compile_core(folder)


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_operators_for_cuda_that_are_registered_from_cpp(core):
    assert run("tests/support/host_core.py", str(core), "core_of_cuda") == "done\n"


RUN = """
import sys
from pathlib import Path
from benchmarks import host
host.compile_core = lambda folder: Path(sys.argv[1])
host.CALLS = 20
sys.exit(host.main(["--rounds", "3"]))
"""


@pytest.mark.slow
def test_parts_add_up(core):
    lines = run("-c", RUN, str(core)).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("operator "))
    rows = [re.split(r"  +", line) for line in lines[head + 1 :]]
    assert {tuple(row[:2]) for row in rows} >= {("select", "C++"), ("prune", "Python")}
    for row in rows:
        total = float(row[2].split()[0])
        assert total > 0


def test_a_missing_compiler_is_named():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.host"],
        cwd=ROOT,
        env={"PATH": "", "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert re.search(r"needs Linux and the C\+\+ compiler no-such-compiler", done.stderr)
