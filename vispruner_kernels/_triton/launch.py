"""Launches: the only place that starts a kernel."""

from __future__ import annotations

import functools
import random
import threading
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

# Whether Triton interprets kernels: they run on CPU tensors, one program after another.
INTERPRETED = bool(triton.knobs.runtime.interpret)
# HIP devices are "cuda" devices to PyTorch.
HIP = torch.version.hip is not None
MIN_CAPABILITY = (7, 5)
# The most programs of a launch; all grids have one axis.
MAX_GRID = 2**31 - 1

# Triton's interpreter keeps its state in globals, and only one thread at a time may compile.
_LOCK = threading.Lock()
# Seeded by the system, so that the caller's generators stay unchanged and calls share no tag.
_RANDOM = random.Random()
_TAG_BITS = 42
# Compiled kernels and the values of their constants, by kernel, device, argument classes
# (_describe) and constants. Triton has a cache too, but a lookup there takes three times as long as
# the rest of a launch.
_COMPILED: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def new_tag() -> int:
    """A random tag for the counters of a call.

    It is never 0, Triton always takes it for an int64, and tag << 20 is positive.
    """
    return 2**_TAG_BITS + _RANDOM.getrandbits(_TAG_BITS)


@functools.cache
def _check_device(index: int) -> None:
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        raise RuntimeError(
            f"vispruner_kernels: {torch.cuda.get_device_name(index)} has compute capability "
            f"{capability[0]}.{capability[1]}, the Triton kernels need 7.5; "
            "set VISPRUNER_KERNELS_BACKEND=reference"
        )


@functools.cache
def _specialized(kernel: Any) -> tuple[bool, ...]:
    return tuple(name not in (kernel.do_not_specialize or ()) for name in kernel.arg_names)


def _describe(kernel: Any, args: Any) -> tuple[list[Any], list[Any]]:
    """(classes, values): the properties of arguments for which Triton compiles another variant, and
    the arguments with addresses instead of tensors.

    Given a tensor, Triton would ask the driver at every launch which device owns its memory.
    """
    classes: list[Any] = []
    values: list[Any] = []
    for arg, specialized in zip(args, _specialized(kernel), strict=False):
        value = arg
        if isinstance(arg, Tensor):
            value = arg.data_ptr()
            classes += arg.dtype, value % 16 == 0
            if HIP:
                # Offsets of 32 bits serve smaller storages.
                classes.append(arg.untyped_storage().size() < 2**31)
        elif not isinstance(arg, int):
            classes.append(type(arg))
        elif specialized:
            classes.append((-(2**31) <= arg < 2**31, arg == 1, arg % 16 == 0))
        else:
            classes.append(-(2**31) <= arg < 2**31)
        values.append(value)
    return classes, values


def run(kernel: Any, grid: int, like: Tensor, *args: Any, **meta: Any) -> None:
    """Launch `grid` programs on the device and current stream of `like`.

    `meta` has the kernel's constants and options of the compiler.
    """
    if grid > MAX_GRID:
        raise ValueError(
            f"vispruner_kernels: {kernel.__name__} needs {grid} programs, expected at most "
            f"{MAX_GRID}; call it with fewer images at a time"
        )
    if INTERPRETED:
        # Kernels compute inf - inf on purpose.
        with _LOCK, np.errstate(all="ignore"):
            kernel[(grid,)](*args, **meta)
        return
    if HIP:
        # An option of NVIDIA's assembler.
        meta.pop("maxnreg", None)
    device = like.device.index
    if device == torch.cuda.current_device():
        _run_on(device, kernel, grid, args, meta)
    else:
        with torch.cuda.device(device):
            _run_on(device, kernel, grid, args, meta)


def _run_on(device: int, kernel: Any, grid: int, args: Any, meta: dict[str, Any]) -> None:
    classes, values = _describe(kernel, args)
    key = (kernel, device, *classes, *meta.values())
    found = _COMPILED.get(key)
    if found:
        compiled, constants = found
        compiled[(grid, 1, 1)](*values, *constants)
        return
    _check_device(device)
    with _LOCK:
        compiled = kernel[(grid,)](*args, **meta)
    # A compiled kernel takes the constants after the arguments, in the order of the signature.
    _COMPILED[key] = compiled, tuple(meta[name] for name in kernel.arg_names[len(args) :])
