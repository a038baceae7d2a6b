"""Operators make the stated number of launches and call no PyTorch operator that launches more.

A launch costs microseconds, and so does filling, sorting or converting a tensor. Triton's
interpreter counts launches, also those that do not use launch.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import arguments, offsets
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import vispruner_kernels
from vispruner_kernels import _backends, _checks, _schemas
from vispruner_kernels._triton import operators

# PyTorch operators that launch nothing: allocations and views.
FREE = (
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "squeeze"),
    *("t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view"),
)


class Operators(TorchDispatchMode):
    """Records the PyTorch operators that an operator of this package calls."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vispruner":
            # Call the registered function here: modes are off inside a registered operator.
            op = func._schema.name.split("::")[1]
            function = _backends._implementation(op, _backends.OWNERS[op, "cpu"])
            with self:
                return _backends._checked(op, function)(*args, **(kwargs or {}))
        self.called.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def cases() -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """Operators with the name of the case, the number of launches and the arguments."""
    for op in _schemas.SCHEMAS:
        kwargs = arguments(op)
        if "matching" in kwargs:
            for matching in _checks.MATCHINGS:
                yield op, matching, 1, kwargs | {"matching": matching}
            yield op, "ratio 0", 1, kwargs | {"important_ratio": 0.0}
            yield op, "ratio 1", 1, kwargs | {"important_ratio": 1.0}
        elif "lse" in kwargs:
            yield op, "lse", 1, kwargs
            yield op, "no lse", 2, kwargs | {"lse": None}
        else:
            yield op, "", 1, kwargs
        if "cu_seqlens" not in kwargs:
            tensors = {n: x[:0] for n, x in kwargs.items() if isinstance(x, torch.Tensor)}
            yield op, "no images", 0, kwargs | tensors
            continue
        none = {"cu_seqlens": offsets(0), "max_seqlen": 0}
        if "cu_keep" in kwargs:
            none |= {"cu_keep": offsets(0), "total_keep": 0}
        for name in ("features", "scores", "q", "k"):
            if name in kwargs:
                none[name] = kwargs[name][:0]
        if "lse" in kwargs:
            none["lse"] = kwargs["lse"][:, :0]
        yield op, "no images", 0, kwargs | none


CASES = {(op, case): launches for op, case, launches, _ in cases()}


def unrecorded(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


def count() -> dict[str, Any]:
    """Count the launches and list the PyTorch operators of every case."""
    from triton.runtime.interpreter import GridExecutor

    launches = 0
    run = unrecorded(GridExecutor.__call__)

    def launch(*args: Any, **kwargs: Any) -> None:
        nonlocal launches
        launches += 1
        run(*args, **kwargs)

    GridExecutor.__call__ = launch
    # On a GPU, offsets are not checked.
    _checks.check_offsets = unrecorded(_checks.check_offsets)
    counted = {}
    for op, case, _, kwargs in cases():
        launches = 0
        try:
            with Operators() as seen:
                getattr(vispruner_kernels, op)(**kwargs)
            counted[f"{op} {case}"] = [launches, seen.called]
        except Exception as error:
            counted[f"{op} {case}"] = [repr(error), [repr(error)]]
    return {"owners": [_backends.OWNERS[op, "cpu"] for op in _schemas.SCHEMAS], "cases": counted}


@pytest.fixture(scope="module")
def counted() -> Any:
    if not operators.INSTALLED:
        pytest.skip(operators.REASON)
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "VISPRUNER_KERNELS_BACKEND": "triton",
        "VISPRUNER_KERNELS_CHECK": "0",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(vispruner_kernels.__file__).parent.parent), *filter(None, sys.path)]
        ),
    }
    done = subprocess.run(
        [sys.executable, __file__],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report["owners"]) == {"triton"}
    return report["cases"]


@pytest.mark.parametrize(("op", "case"), CASES)
def test_number_of_launches(counted, op, case):
    assert counted[f"{op} {case}"][0] == CASES[op, case]


@pytest.mark.parametrize(("op", "case"), CASES)
def test_no_other_pytorch_operator_runs(counted, op, case):
    # Without images all outputs are zeros.
    free = {*FREE, "zeros"} if case == "no images" else {*FREE}
    assert set(counted[f"{op} {case}"][1]) <= free
    # At least the allocation of the outputs is recorded.
    assert counted[f"{op} {case}"][1]


if __name__ == "__main__":
    print(json.dumps(count()))
