"""`benchmarks.host`: CUDA operators that are registered from C++, in the emulation, and a run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vispruner_kernels._native import registration

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    bool(registration.REASON), reason="operators cannot be registered from C++"
)

# Compiles for a minute.
CALLS = """
import sys, tempfile
from pathlib import Path
import torch
from benchmarks import host
from vispruner_kernels import _backends, select
from vispruner_kernels.testing import assert_same_bits, random_case

with tempfile.TemporaryDirectory() as folder:
    core = host.Core(host.compile_core(Path(folder)))
    core.library.set_launch_time(-1)
    compared = 0
    for seed in range(60):
        case = tuple(random_case(seed, max_tokens=150))
        for op in host.OPS:
            expected = getattr(torch.ops.vispruner, op)(*case)
            got = core.operator(op)(*case)
            pairs = zip(got, expected) if op == "prune" else [(got, expected)]
            for one, other in pairs:
                assert_same_bits(one, other)
            compared += 1
    features, scores = torch.randn(1, 5, 4), torch.rand(1, 5)
    # Errors of the check, and a batch without images, which Python answers.
    for wrong in ((features, scores, 6), (features.double(), scores, 2)):
        errors = []
        for call in (core.operator("select"), select):
            try:
                call(*wrong)
            except (TypeError, ValueError) as error:
                errors.append((type(error), str(error)))
        assert len(errors) == 2 and errors[0] == errors[1], errors
    assert core.operator("select")(features[:0], scores[:0], 2).shape == (0, 2)
    print("compared", compared)
    core.library.set_launch_time(host.LAUNCH)
    host.CALLS = 20
    rows = host.rows_of(host.times(core, 3))
    for row in rows:
        parts = [row[part] for part in (*host.PARTS, "launch", "glue")]
        total = row["call us [p10, p90]"].p50
        assert abs(sum(parts) - total) < 1e-6 * total, row
        assert total > host.LAUNCH / 1e3
        print(row["operator"], row["registered by"])
"""


@pytest.mark.slow
def test_operators_of_cuda_registered_from_cpp_give_the_bits_of_the_cpu():
    done = subprocess.run(
        [sys.executable, "-c", CALLS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, *rows = done.stdout.splitlines()
    assert first == "compared 120"
    assert rows == ["select C++", "select Python", "prune C++", "prune Python"]


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
