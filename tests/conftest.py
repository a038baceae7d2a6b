"""Fixtures: the operators of each installed backend, and the settings of every test."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import interpreter
import pytest
import torch

# Triton reads this at its import. Without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from calls import operators_of
from installed import needs_native

from vispruner_kernels import _native
from vispruner_kernels._triton import operators

if operators.INTERPRETED and operators.INSTALLED:
    interpreter.patch_once()


def pytest_configure(config: pytest.Config) -> None:
    # tests/packaging/test_without_optional_parts.py expects this warning.
    if not _native.INSTALLED:
        filter_ = r"ignore:vispruner_kernels. the C\+\+ core is not built:RuntimeWarning"
        config.addinivalue_line("filterwarnings", filter_)


def pytest_collection_finish() -> None:
    # Imported modules stay in memory, so the garbage collector need not scan them.
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: with inputs this small, threads that wait for each other cost more than the
    work. tests/pytorch/test_threads.py uses more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(
    # Triton's interpreter is slow: make test-triton runs it as "registered".
    params=["registered", pytest.param("native", marks=needs_native), "reference"]
)
def backend(request: pytest.FixtureRequest) -> Any:
    """The operators of one backend by name; "registered" stands for their owner."""
    return operators_of(request.param)


@pytest.fixture
def backends() -> list[Any]:
    """The operators of each backend, for tests whose expected values take longer than the calls."""
    names = ["reference", "native"] if _native.INSTALLED else ["reference"]
    return [operators_of(name) for name in names]


@pytest.fixture(params=_native._C.simd_sets() if _native.INSTALLED else [])
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the C++ core with each instruction set of this processor in turn."""
    before = _native._C.simd()
    _native._C.use_simd(request.param)
    yield request.param
    _native._C.use_simd(before)


@pytest.fixture(params=["registered", "reference", pytest.param("native", marks=needs_native)])
def kernel(request: pytest.FixtureRequest) -> Callable[[str], Callable[..., Any]]:
    """An operator's implementation by the operator's name."""
    operators = operators_of(request.param)
    return lambda op: getattr(operators, op)
