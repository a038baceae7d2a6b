"""Fixtures: the backends that are installed, one at a time."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import interpreter
import pytest
import torch

# Triton reads it at its import: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from installed import needs_native

from vispruner_kernels import _backends, _native, _schemas
from vispruner_kernels._triton import operators

if operators.INTERPRETED and operators.INSTALLED:
    interpreter.patch_once()


def pytest_configure(config: pytest.Config) -> None:
    # tests/packaging/test_environment.py looks for it.
    if not _native.INSTALLED:
        filter_ = r"ignore:vispruner_kernels. the C\+\+ core is not built:RuntimeWarning"
        config.addinivalue_line("filterwarnings", filter_)


def pytest_collection_finish() -> None:
    # What is imported stays: the garbage collector need not look at it again and again.
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than such small inputs, above all on a busy
    machine; tests/pytorch/test_threads.py takes more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(
    params=[
        "registered",
        *(
            pytest.param(name, marks=needs_native if name == "native" else ())
            for name, devices in _backends.BACKENDS.items()
            # The interpreter is slow: test_triton.py, or as "registered" make test-triton.
            if "cpu" in devices and name != "triton"
        ),
    ]
)
def backend(request: pytest.FixtureRequest) -> Any:
    """The operators of one backend, by name; "registered" is whoever owns them."""
    if request.param == "registered":
        return SimpleNamespace(
            **{op: getattr(torch.ops.vispruner, op).default for op in _schemas.SCHEMAS}
        )
    return _backends.BACKENDS[request.param]["cpu"]


@pytest.fixture
def backends() -> list[Any]:
    """The operators of each backend, for tests whose expected values take longer than the calls."""
    names = [name for name in ("reference", "native") if name != "native" or _native.INSTALLED]
    return [_backends.BACKENDS[name]["cpu"] for name in names]


@pytest.fixture(params=_native._C.simd_sets() if _native.INSTALLED else [])
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native core with each instruction set of this processor in turn."""
    before = _native._C.simd()
    _native._C.use_simd(request.param)
    yield request.param
    _native._C.use_simd(before)


@pytest.fixture(params=["registered", "reference", pytest.param("native", marks=needs_native)])
def kernel(request):
    """An operator's implementation by the operator's name."""
    if request.param == "registered":
        return lambda op: getattr(torch.ops.vispruner, op).default
    return lambda op: _backends._implementation(op, request.param)
