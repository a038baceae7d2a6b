"""Runs operators for CUDA that are registered from C++, on the CPU: the core of `benchmarks.host`.

It replaces parts of the package, so it has a process of its own. Arguments: the compiled core, and
the name of a function below.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import torch  # noqa: E402
from calls import leaves  # noqa: E402

from benchmarks import host  # noqa: E402
from vispruner_kernels.testing import assert_same_bits, random_case  # noqa: E402


def error_of(call: Callable[..., Any], *args: Any) -> tuple[type, str]:
    try:
        call(*args)
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("no error")


def core_of_cuda(core: host.Core) -> None:
    """The CUDA kernels of the core give the bits of the CPU, in the emulation."""
    core.library.set_launch_time(-1)
    for seed in range(60):
        case = tuple(random_case(seed, max_tokens=150))
        for op in host.OPS:
            expected = getattr(torch.ops.vispruner, op)(*case)
            for one, other in zip(leaves(core.operator(op)(*case)), leaves(expected), strict=True):
                assert_same_bits(one, other)
    features, scores = torch.randn(1, 5, 4), torch.rand(1, 5)
    for wrong in ((features, scores, 6), (features.double(), scores, 2)):
        expected = error_of(torch.ops.vispruner.select, *wrong)
        assert error_of(core.operator("select"), *wrong) == expected
    assert core.operator("select")(features[:0], scores[:0], 2).shape == (0, 2)


if __name__ == "__main__":
    globals()[sys.argv[2]](host.Core(Path(sys.argv[1])))
    print("done")
