"""Which implementation owns which operator on which device; the only place that registers.

`OWNERS` is the table. VISPRUNER_KERNELS_BACKEND picks a backend by hand and
VISPRUNER_KERNELS_CHECK=1 runs the reference beside every kernel; both are read once, here. An
empty variable is an unset one.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from vispruner_kernels import _native, _schemas, reference
from vispruner_kernels._native import cpu as _native_cpu
from vispruner_kernels._native import cuda as _native_cuda
from vispruner_kernels._triton import operators as _triton

# Device type -> dispatch key. HIP devices are "cuda" devices to PyTorch.
KEYS = {"cpu": "CPU", "cuda": "CUDA"}
# Not on AMD GPUs: there a barrier in Triton does not wait for stores, which the kernels that finish
# in one launch rely on. On CPU tensors in Triton's interpreter.
_TRITON_DEVICES = ("cuda",) * (torch.version.hip is None) + ("cpu",) * _triton.INTERPRETED
# The devices a backend can serve and the module that does, best backend first. An operator belongs
# to the first backend that is installed, serves the device and has a function of the operator's
# name, but for those in BY_HAND. Triton owns CUDA devices whether it is installed or not: without
# it the operators say what to install.
BACKENDS: dict[str, dict[str, ModuleType]] = {
    "native": {"cpu": _native_cpu, "cuda": _native_cuda},
    "triton": dict.fromkeys(_TRITON_DEVICES, _triton),
    "reference": {"cpu": reference, "cuda": reference},
}
# What owns operators only where VISPRUNER_KERNELS_BACKEND names it, and why.
BY_HAND = {
    ("triton", "cpu"): "the interpreter is for tests",
    # To own them it has to give the CPU's bits in thousands of cases on a GPU and to be faster than
    # Triton there, by results in benchmarks/results.
    ("native", "cuda"): "no results from a GPU yet",
}


def _requested() -> str:
    name = os.environ.get("VISPRUNER_KERNELS_BACKEND") or "auto"
    if name == "triton" and not _triton.INSTALLED:
        raise ImportError(
            f"VISPRUNER_KERNELS_BACKEND=triton: {_triton.REASON}, or use auto, reference or native"
        )
    if name == "native" and not _native.INSTALLED:
        raise ImportError(
            "VISPRUNER_KERNELS_BACKEND=native: vispruner_kernels._C is not built "
            f"({_native.REASON}); {_native.REMEDY}, or use auto or reference"
        )
    if name not in ("auto", *BACKENDS):
        raise ImportError(
            f"VISPRUNER_KERNELS_BACKEND={name}: expected auto, reference, native or triton"
        )
    return name


def _flag(name: str) -> bool:
    value = os.environ.get(name) or "0"
    if value not in ("0", "1"):
        raise ImportError(f"{name}={value}: expected 0 or 1")
    return value == "1"


REQUESTED = _requested()
CHECKED = _flag("VISPRUNER_KERNELS_CHECK")


def _owner(op: str, device: str) -> str:
    def has(backend: str) -> bool:
        module = BACKENDS[backend].get(device)
        installed = getattr(module, "INSTALLED", True) or (backend, device) == ("triton", "cuda")
        return hasattr(module, op) and installed

    if REQUESTED != "auto" and has(REQUESTED):
        return REQUESTED
    return next(b for b in BACKENDS if has(b) and (b, device) not in BY_HAND)


# (operator, device type) -> backend.
OWNERS: dict[tuple[str, str], str] = {
    (op, device): _owner(op, device) for op in _schemas.SCHEMAS for device in KEYS
}


def _implementation(op: str, backend: str, device: str = "cpu") -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(BACKENDS[backend][device], op)
    # The reference is made of differentiable operators; its results carry no gradient.
    return torch.no_grad()(function) if backend == "reference" else function


def _checked(op: str, function: Callable[..., Any], memory: bool = True) -> Callable[..., Any]:
    """Argument check, then the implementation. `memory`: the tensors have some."""
    check, check_memory = _schemas.SCHEMAS[op].check, _schemas.check_memory

    def entry(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return function(*args, **kwargs)

    def entry_to_memory(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        check_memory(op, *args, *kwargs.values())
        return function(*args, **kwargs)

    return entry_to_memory if memory else entry


def _compared(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """VISPRUNER_KERNELS_CHECK=1: finite inputs, and the reference's answer beside the kernel's."""
    expected = _implementation(op, "reference")
    names = [name for name, _ in _schemas.ARGUMENTS[op]]

    @torch.no_grad()
    def entry(*args: Any, **kwargs: Any) -> Any:
        from vispruner_kernels.testing import assert_matches

        for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
            if isinstance(value, torch.Tensor) and not bool(torch.isfinite(value).all()):
                raise ValueError(f"{op}: {name} has values that are not finite")
        got = function(*args, **kwargs)
        try:
            assert_matches(op, got, expected(*args, **kwargs), args, kwargs)
        except AssertionError as error:
            raise RuntimeError(f"{op}: the kernel and the reference disagree: {error}") from error
        return got

    return entry


_WARNING = threading.Lock()
# Where the frames between an operator and its caller come from.
_INNER = tuple(os.path.dirname(file) + os.sep for file in (str(torch.__file__), __file__))


def _warn() -> None:
    """Of the line that called an operator, however many of PyTorch's frames lie between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_code.co_filename.startswith(_INNER):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"vispruner_kernels: the C++ core is not built ({_native.REASON}), so the slower reference "
        f"serves CPU tensors. For the core {_native.REMEDY}. If the reference is meant, set "
        "VISPRUNER_KERNELS_BACKEND=reference",
        RuntimeWarning,
        stacklevel=level,
    )


def _warns_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """For the reference where the core is missing: at the first call of the process."""

    def entry(*args: Any, **kwargs: Any) -> Any:
        # Never released.
        if _WARNING.acquire(blocking=False):
            _warn()
        return function(*args, **kwargs)

    return entry


def _no_backward(op: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        hint = (
            "call vispruner_kernels.prune, or index the features with the indices of select"
            if op == "prune"
            else "use an attention kernel that has a backward, and cls_scores beside it"
        )
        raise RuntimeError(f"vispruner::{op} has no gradient (inference only); {hint}")

    return backward


def _mark_integers_and_scores(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(output[1])


def _register() -> torch.library.Library:
    library = torch.library.Library("vispruner", "DEF")
    for op, schema in _schemas.SCHEMAS.items():
        library.define(op + schema.signature, tags=(torch.Tag.pt2_compliant_tag,))
        for device, key in KEYS.items():
            function = _implementation(op, OWNERS[op, device], device)
            if CHECKED:
                function = _compared(op, function)
            missing = OWNERS[op, device] == "reference" != REQUESTED and not _native.INSTALLED
            if device == "cpu" and missing:
                function = _warns_once(function)
            library.impl(op, _checked(op, function), key)
        # Other devices: the check names the device; nothing comes behind it.
        library.impl(op, _checked(op, _unreachable, memory=False), "CompositeExplicitAutograd")
        fake = _checked(op, schema.fake, memory=False)
        torch.library.register_fake(f"vispruner::{op}", fake, lib=library)
        if schema.raises_on_backward:
            torch.library.register_autograd(
                f"vispruner::{op}",
                _no_backward(op),
                setup_context=_mark_integers_and_scores,
                lib=library,
            )
        else:
            library.impl(op, torch.library.fallthrough_kernel, "Autograd")
    return library


def _unreachable(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a device without an implementation passed the argument check")


LIBRARY = _register()
