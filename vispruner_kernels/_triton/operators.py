"""The operators by name; the first call of one imports its kernels, and Triton with them.

They run on CUDA devices. With TRITON_INTERPRET=1, which Triton reads at its import, they also run
on CPU tensors.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

MIN_VERSION = (3, 4)
# The last two come with PyTorch for AMD GPUs; all are imported as `triton`.
PACKAGES = ("triton", "triton-rocm", "pytorch-triton-rocm")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _reason() -> str:
    """Why the kernels cannot run; empty if they can."""
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    else:
        return "Triton is not installed; pip install 'triton>=3.4'"
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSION:
        return f"Triton is {version}; pip install 'triton>=3.4'"
    return ""


REASON = _reason()
INSTALLED = not REASON


@functools.cache
def _load(path: str) -> Callable[..., Any]:
    module, op = path.rsplit(".", 1)
    if not INSTALLED:
        raise RuntimeError(
            f"{op}: no kernels for a cuda device: {REASON}, "
            "or set VISPRUNER_KERNELS_BACKEND=reference"
        )
    function: Callable[..., Any] = getattr(importlib.import_module(module), op)
    return function


def _lazy(path: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return _load(path)(*args)

    return call


select = _lazy("vispruner_kernels._triton.select.select")
prune = _lazy("vispruner_kernels._triton.select.prune")
select_varlen = _lazy("vispruner_kernels._triton.select.select_varlen")
select_topk = _lazy("vispruner_kernels._triton.topk.select_topk")
select_rows = _lazy("vispruner_kernels._triton.topk.select_rows")
cls_attention = _lazy("vispruner_kernels._triton.cls_attention.cls_attention")
cls_scores = _lazy("vispruner_kernels._triton.cls_scores.cls_scores")
received_scores = _lazy("vispruner_kernels._triton.received_scores.received_scores")
received_scores_varlen = _lazy("vispruner_kernels._triton.received_scores.received_scores_varlen")
