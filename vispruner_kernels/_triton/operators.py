"""The operators by name, each imported with Triton at its first call.

On CUDA devices. With TRITON_INTERPRET=1, which Triton reads at its import, also on CPU tensors.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

MIN_VERSION = (3, 4)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _reason() -> str:
    """Why the kernels cannot run, or nothing."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed; pip install 'triton>=3.4'"
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSION:
        return f"Triton is {version}; pip install 'triton>=3.4'"
    return ""


REASON = _reason()
INSTALLED = not REASON


@functools.cache
def _load(module: str, op: str) -> Callable[..., Any]:
    if not INSTALLED:
        raise RuntimeError(
            f"{op}: no kernels for a cuda device: {REASON}, "
            "or set VISPRUNER_KERNELS_BACKEND=reference"
        )
    function: Callable[..., Any] = getattr(
        importlib.import_module(f"vispruner_kernels._triton.{module}"), op
    )
    return function


def _lazy(module: str, op: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return _load(module, op)(*args, **kwargs)

    return call


select = _lazy("select", "select")
prune = _lazy("select", "prune")
select_varlen = _lazy("select", "select_varlen")
select_topk = _lazy("topk", "select_topk")
select_rows = _lazy("topk", "select_rows")
cls_attention = _lazy("cls_attention", "cls_attention")
cls_scores = _lazy("cls_scores", "cls_scores")
received_scores = _lazy("received_scores", "received_scores")
received_scores_varlen = _lazy("received_scores", "received_scores_varlen")
