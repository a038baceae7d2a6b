"""Which function implements which operator on which device; the only module that registers.

`IMPLEMENTATIONS` is the table: from an operator to the function that calls its kernel. `OWNERS`
follows from it. VISPRUNER_KERNELS_BACKEND names a backend, VISPRUNER_KERNELS_CHECK=1 runs the
reference beside every kernel, and VISPRUNER_KERNELS_REGISTRATION=python registers no operator from
C++. All are read once, here. An empty variable counts as unset.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

from vispruner_kernels import _native, _schemas, reference
from vispruner_kernels._native import cpu, cuda, registration
from vispruner_kernels._triton import operators as triton

# Device type -> dispatch key. HIP devices are "cuda" devices to PyTorch.
KEYS = {"cpu": "CPU", "cuda": "CUDA"}

# (operator, device type) -> backend -> function. The first backend of an entry that serves the
# device owns the operator. A backend after "reference" owns it only if VISPRUNER_KERNELS_BACKEND
# names it: Triton's interpreter on a CPU is for tests, and the CUDA kernels of the C++ core have no
# results from a GPU yet. To come first, these kernels must give the CPU's bits in thousands of
# cases on a GPU and be faster than Triton there, by results in benchmarks/results.
IMPLEMENTATIONS: dict[tuple[str, str], dict[str, Callable[..., Any]]] = {
    ("select", "cpu"): {
        "native": cpu.select,
        "reference": reference.select,
        "triton": triton.select,
    },
    ("select", "cuda"): {
        "triton": triton.select,
        "reference": reference.select,
        "native": cuda.select,
    },
    ("prune", "cpu"): {
        "native": cpu.prune,
        "reference": reference.prune,
        "triton": triton.prune,
    },
    ("prune", "cuda"): {
        "triton": triton.prune,
        "reference": reference.prune,
        "native": cuda.prune,
    },
    ("select_varlen", "cpu"): {
        "native": cpu.select_varlen,
        "reference": reference.select_varlen,
        "triton": triton.select_varlen,
    },
    ("select_varlen", "cuda"): {
        "triton": triton.select_varlen,
        "reference": reference.select_varlen,
        "native": cuda.select_varlen,
    },
    ("select_topk", "cpu"): {
        "native": cpu.select_topk,
        "reference": reference.select_topk,
        "triton": triton.select_topk,
    },
    ("select_topk", "cuda"): {
        "triton": triton.select_topk,
        "reference": reference.select_topk,
    },
    ("select_rows", "cpu"): {
        "native": cpu.select_rows,
        "reference": reference.select_rows,
        "triton": triton.select_rows,
    },
    ("select_rows", "cuda"): {
        "triton": triton.select_rows,
        "reference": reference.select_rows,
    },
    ("cls_attention", "cpu"): {
        "native": cpu.cls_attention,
        "reference": reference.cls_attention,
        "triton": triton.cls_attention,
    },
    ("cls_attention", "cuda"): {
        "triton": triton.cls_attention,
        "reference": reference.cls_attention,
    },
    ("cls_scores", "cpu"): {
        "native": cpu.cls_scores,
        "reference": reference.cls_scores,
        "triton": triton.cls_scores,
    },
    ("cls_scores", "cuda"): {
        "triton": triton.cls_scores,
        "reference": reference.cls_scores,
    },
    ("received_scores", "cpu"): {
        "native": cpu.received_scores,
        "reference": reference.received_scores,
        "triton": triton.received_scores,
    },
    ("received_scores", "cuda"): {
        "triton": triton.received_scores,
        "reference": reference.received_scores,
    },
    ("received_scores_varlen", "cpu"): {
        "native": cpu.received_scores_varlen,
        "reference": reference.received_scores_varlen,
        "triton": triton.received_scores_varlen,
    },
    ("received_scores_varlen", "cuda"): {
        "triton": triton.received_scores_varlen,
        "reference": reference.received_scores_varlen,
    },
}
# (backend, device type) -> whether the backend serves the device in this process.
SERVES: dict[tuple[str, str], bool] = {
    ("native", "cpu"): cpu.INSTALLED,
    ("native", "cuda"): cuda.INSTALLED,
    ("reference", "cpu"): True,
    ("reference", "cuda"): True,
    ("triton", "cpu"): triton.INSTALLED and triton.INTERPRETED,
    # Also where Triton is not installed: its operators then raise and say what to install.
    ("triton", "cuda"): True,
}
# The operators that Triton serves on AMD GPUs. The kernels of the others finish in one launch by
# arrival at a counter. That needs a barrier that waits for stores, and on AMD GPUs Triton's barrier
# does not wait. The kernels of these run as three launches, or have no counters.
HIP_TRITON = ("select", "prune", "select_varlen", "select_topk", "select_rows")


def _requested() -> str:
    name = os.environ.get("VISPRUNER_KERNELS_BACKEND") or "auto"
    if name == "triton" and not triton.INSTALLED:
        raise ImportError(
            f"VISPRUNER_KERNELS_BACKEND=triton: {triton.REASON}, or use auto, reference or native"
        )
    if name == "native" and not _native.INSTALLED:
        raise ImportError(
            "VISPRUNER_KERNELS_BACKEND=native: vispruner_kernels._C is not built "
            f"({_native.REASON}); {_native.REMEDY}, or use auto or reference"
        )
    if name not in ("auto", "reference", "native", "triton"):
        raise ImportError(
            f"VISPRUNER_KERNELS_BACKEND={name}: expected auto, reference, native or triton"
        )
    return name


def _flag(name: str) -> bool:
    value = os.environ.get(name) or "0"
    if value not in ("0", "1"):
        raise ImportError(f"{name}={value}: expected 0 or 1")
    return value == "1"


def _by_python() -> bool:
    value = os.environ.get("VISPRUNER_KERNELS_REGISTRATION") or "auto"
    if value not in ("auto", "python"):
        raise ImportError(f"VISPRUNER_KERNELS_REGISTRATION={value}: expected auto or python")
    return value == "python"


REQUESTED = _requested()
CHECKED = _flag("VISPRUNER_KERNELS_CHECK")
BY_PYTHON = _by_python()


def _serves(op: str, backend: str, device: str) -> bool:
    if torch.version.hip and (backend, device) == ("triton", "cuda") and op not in HIP_TRITON:
        return False
    return SERVES[backend, device]


def _owner(op: str, device: str) -> str:
    backends = [name for name in IMPLEMENTATIONS[op, device] if _serves(op, name, device)]
    return REQUESTED if REQUESTED in backends else backends[0]


# (operator, device type) -> backend.
OWNERS: dict[tuple[str, str], str] = {
    (op, device): _owner(op, device) for op, device in IMPLEMENTATIONS
}

# The operators that are registered from C++, by device; the others are Python functions.
FROM_CPP: frozenset[tuple[str, str]] = frozenset(
    (op, device)
    for (op, device), owner in OWNERS.items()
    if owner == "native" and (op, device) in registration.OPERATORS and not (CHECKED or BY_PYTHON)
)


def _implementation(op: str, backend: str, device: str = "cpu") -> Callable[..., Any]:
    function = IMPLEMENTATIONS[op, device][backend]
    # The reference is made of differentiable operators; its results carry no gradient.
    return torch.no_grad()(function) if backend == "reference" else function


def _checked(op: str, function: Callable[..., Any], memory: bool = True) -> Callable[..., Any]:
    """Complete and check the arguments, then call the implementation.

    `memory`: the tensors have memory to check; those of a fake have none.
    """
    check, check_memory = _schemas.SCHEMAS[op].check, _schemas.check_memory
    defaults, tensors = _schemas.DEFAULTS[op], _schemas.TENSORS[op]

    def entry(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            args = _schemas.complete(op, args, kwargs)
        elif len(args) < len(defaults):
            # As `complete` does, without a function call.
            args += defaults[len(args) :]
        check(*args)
        if memory:
            check_memory(op, args[:tensors])
        return function(*args)

    return entry


def _compared(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """VISPRUNER_KERNELS_CHECK=1: require finite inputs, compare with the reference."""
    expected = _implementation(op, "reference")
    names = [name for name, _ in _schemas.ARGUMENTS[op]]

    @torch.no_grad()
    def entry(*args: Any) -> Any:
        from vispruner_kernels.testing import assert_matches

        for name, value in zip(names, args, strict=True):
            if isinstance(value, torch.Tensor) and not bool(torch.isfinite(value).all()):
                raise ValueError(f"{op}: {name} has values that are not finite")
        got = function(*args)
        try:
            assert_matches(op, got, expected(*args), args, {})
        except AssertionError as error:
            raise RuntimeError(f"{op}: the kernel and the reference disagree: {error}") from error
        return got

    return entry


_WARNING = threading.Lock()
# Folders of the frames between an operator and its caller.
_INNER = tuple(os.path.dirname(file) + os.sep for file in (str(torch.__file__), __file__))


def _warn() -> None:
    """Warn at the line that called an operator: skip the frames of PyTorch and of this package."""
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
    """The reference where the core is missing: warn at the first call of the process."""

    def entry(*args: Any) -> Any:
        # Never released, so that only one thread ever gets it.
        if _WARNING.acquire(blocking=False):
            _warn()
        return function(*args)

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


def _mark_second_output(ctx: Any, inputs: Any, output: Any) -> None:
    """Indices and scores, the second outputs of `prune` and `cls_attention`, carry no gradient."""
    ctx.mark_non_differentiable(output[1])


def _register() -> torch.library.Library:
    library = torch.library.Library("vispruner", "DEF")
    for op, schema in _schemas.SCHEMAS.items():
        library.define(op + schema.signature, tags=(torch.Tag.pt2_compliant_tag,))
        for device, key in KEYS.items():
            owner = OWNERS[op, device]
            function = _implementation(op, owner, device)
            if CHECKED:
                function = _compared(op, function)
            falls_back = owner == "reference" and REQUESTED != "reference"
            if device == "cpu" and falls_back and not _native.INSTALLED:
                function = _warns_once(function)
            function = _checked(op, function)
            if (op, device) in FROM_CPP:
                registration.register(op, device, key, function)
            else:
                library.impl(op, function, key)
        # On another device the check raises and names it, so the implementation is never reached.
        library.impl(op, _checked(op, _unreachable, memory=False), "CompositeExplicitAutograd")
        fake = _checked(op, schema.fake, memory=False)
        torch.library.register_fake(f"vispruner::{op}", fake, lib=library)
        if schema.raises_on_backward:
            torch.library.register_autograd(
                f"vispruner::{op}",
                _no_backward(op),
                setup_context=_mark_second_output,
                lib=library,
            )
        else:
            library.impl(op, torch.library.fallthrough_kernel, "Autograd")
    return library


def _unreachable(*args: Any) -> Any:
    raise AssertionError("a device without an implementation passed the argument check")


LIBRARY = _register()
