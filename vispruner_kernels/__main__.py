"""``python -m vispruner_kernels``: print versions, built parts and the owner of every operator."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from vispruner_kernels import __version__, _backends, _native
from vispruner_kernels._native import cuda, registration
from vispruner_kernels._schemas import SCHEMAS
from vispruner_kernels._triton import operators


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if torch.cuda.is_available():
        kind = "hip" if torch.version.hip else "cuda"
        return f"{torch.cuda.get_device_name()} ({kind})"
    return "none"


def _native_state() -> str:
    if not _native.INSTALLED:
        return (
            f"not built ({_native.REASON}); the reference serves the CPU. "
            f"For the core {_native.REMEDY}"
        )
    sets = ", ".join(_native._C.simd_sets())
    return f"{_native._C.simd()} in use (this processor has {sets})"


def _cuda_state() -> str:
    if not cuda.INSTALLED:
        return cuda.REASON
    architectures = ", ".join(f"sm_{name}" for name in _native._C.cuda_architectures.split())
    state = f"select, prune and select_varlen for {architectures}"
    if next(iter(_backends.IMPLEMENTATIONS["select", "cuda"])) == "native":
        return state
    return f"{state}; only with VISPRUNER_KERNELS_BACKEND=native: no results from a GPU yet"


def _registration_state() -> str:
    """The operators that a call reaches without Python."""
    if _backends.BY_PYTHON:
        return "by Python (VISPRUNER_KERNELS_REGISTRATION)"
    if registration.REASON:
        return f"by Python, slower to call: {registration.REASON}"
    devices = [
        f"{device} {', '.join(sorted(op for op, on in _backends.FROM_CPP if on == device))}"
        for device in sorted({device for _, device in _backends.FROM_CPP})
    ]
    return "from C++: " + "; ".join(devices) if devices else "by Python"


def _triton_state() -> str:
    if not operators.INSTALLED:
        return operators.REASON
    if torch.version.hip:
        return f"for HIP devices, {', '.join(_backends.HIP_TRITON)} only; no AMD GPU has run them"
    interpreted = " and, in Triton's interpreter, CPU tensors" if operators.INTERPRETED else ""
    return f"for CUDA devices{interpreted}"


def report() -> str:
    """The text to print."""
    facts = {
        "vispruner_kernels": __version__,
        "Python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "GPU": _gpu(),
        "C++ core (native)": _native_state(),
        "CUDA kernels": _cuda_state(),
        "Triton kernels": _triton_state(),
        "registration": _registration_state(),
        "backend": f"{_backends.REQUESTED} (VISPRUNER_KERNELS_BACKEND)",
        "checks": f"{'on' if _backends.CHECKED else 'off'} (VISPRUNER_KERNELS_CHECK)",
    }
    lines = [f"{name:<18} {value}" for name, value in facts.items()]
    devices = list(_backends.KEYS)
    # HIP devices are "cuda" devices to PyTorch.
    heads = ["cpu", "hip" if torch.version.hip else "cuda"]
    lines += ["", f"{'operator':<24}" + "".join(f"{head:<12}" for head in heads)]
    for op in SCHEMAS:
        owners = "".join(f"{_backends.OWNERS[op, device]:<12}" for device in devices)
        lines.append(f"{op:<24}{owners}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
    sys.exit(0)
