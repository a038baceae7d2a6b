"""Load the C++ core, `vispruner_kernels._C`, and choose its instruction set.

VISPRUNER_KERNELS_SIMD picks an instruction set by hand (see `python -m vispruner_kernels`); it is
read once at import. The operators are in `cpu` and `cuda`.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vispruner_kernels import _C
else:
    try:
        _C = importlib.import_module("vispruner_kernels._C")
    except ImportError as error:
        _C, REASON = None, str(error)


def reinstall(variable: str) -> str:
    """The command that builds a missing part. (pip would reuse its cached wheel by default.)"""
    return f"reinstall: {variable}=1 pip install --no-cache-dir --force-reinstall --no-deps ."


# The advice if the C++ core is not built.
REMEDY = f"install a C++17 compiler and {reinstall('VISPRUNER_KERNELS_NATIVE')}"

INSTALLED = _C is not None
if INSTALLED:
    REASON = ""


def _use_simd(name: str) -> None:
    if name == "auto":
        return
    if not INSTALLED:
        raise ImportError(
            f"VISPRUNER_KERNELS_SIMD={name}: vispruner_kernels._C is not built ({REASON}); "
            "unset VISPRUNER_KERNELS_SIMD"
        )
    if name not in _C.simd_sets():
        raise ImportError(
            f"VISPRUNER_KERNELS_SIMD={name}: expected auto or one of this processor's "
            f"instruction sets, {', '.join(_C.simd_sets())}"
        )
    _C.use_simd(name)


_use_simd(os.environ.get("VISPRUNER_KERNELS_SIMD") or "auto")
