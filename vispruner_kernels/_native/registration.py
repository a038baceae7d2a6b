"""Registers operators of the C++ core in PyTorch from C++ (csrc/torch/registration.h).

Python takes most of the host's time of a call. It needs PyTorch's stable C interface, which PyTorch
has from 2.10 on; one build of the core serves every version.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vispruner_kernels import _native
from vispruner_kernels._native import _C, arguments, cuda


def load(core: Any, cpu_library: str, cuda_library: str) -> None:
    """Find PyTorch's functions in its libraries; raise what is missing.

    Without a library for CUDA, no operator for CUDA devices may be registered.
    """
    to_tensors = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs
    to_handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors
    x = torch.empty(0, device="cpu")
    (same,) = to_tensors(to_handles([x]))
    if same is not x:
        raise RuntimeError("torch._C._aoti makes other tensors of handles")
    core.load_torch(
        cpu_library=cpu_library,
        cuda_library=cuda_library,
        block_threads=arguments.BLOCK_THREADS,
        eager_rounds=arguments.EAGER_ROUNDS,
        compact_to=arguments.COMPACT_TO,
        to_tensors=to_tensors,
        to_handles=to_handles,
        cuda_variant=cuda._tuned_variant,
    )


def _reason() -> str:
    """Why no operator can be registered from C++; empty if they can be."""
    if not _native.INSTALLED:
        return "the C++ core is not built"
    # Exceptions of Python cross frames of PyTorch, which is tested on Linux only.
    if sys.platform != "linux":
        return f"not for {sys.platform}"
    libraries = Path(torch.__file__).parent / "lib"
    try:
        load(
            _C,
            str(libraries / "libtorch_cpu.so"),
            str(libraries / "libtorch_cuda.so") if torch.version.cuda else "",
        )
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        return f"PyTorch {torch.__version__}: {error}"
    return ""


REASON = _reason()
# Names and device types of the core's operators.
OPERATORS: frozenset[tuple[str, str]] = frozenset(
    (op, device)
    for op, device in (() if REASON else _C.torch_operators)
    if device == "cpu" or torch.version.cuda
)


def register(op: str, device: str, key: str, function: Callable[..., Any]) -> None:
    """Register the operator of the core for a dispatch key. Calls that are not surely valid go to
    `function`, which takes all arguments by position."""
    _C.register_operator(device=device, name=op, library="vispruner", key=key, function=function)
