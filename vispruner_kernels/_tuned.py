"""The fastest variants of the GPU kernels of `select`, by GPU and shape: tuned.json.

`python -m benchmarks.tune --device cuda --write` measures them and writes the file. A variant
changes no bit of a result. A row says which variant is the fastest for a compute capability, a
matching, and a number of images and of tokens per image; null stands for the launcher's own choice.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("tuned.json")
# Backend -> rows.
ROWS: dict[str, list[dict[str, Any]]] = json.loads(PATH.read_text())


@functools.cache
def capability(device: int) -> str:
    """The compute capability of a device, as in "9.0"; of an AMD GPU the architecture, as in
    "gfx942". Triton's interpreter has no device: its tensors have the index -1."""
    if device < 0:
        return "interpreter"
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def number(
    backend: str,
    variants: Sequence[Any],
    device: int,
    images: int,
    tokens: int,
    matching: str,
) -> int:
    """The number of the fastest variant in `variants`, counted from 1; 0 for the launcher's choice.

    The row of the smallest shape that is at least as large in both sizes decides, so a variant fits
    wherever it fitted when it was measured. Without such a row the launcher chooses.
    """
    gpu = capability(device)
    rows = [
        row
        for row in ROWS[backend]
        if row["images"] >= images
        and row["tokens"] >= tokens
        and row["capability"] == gpu
        and row["matching"] == matching
    ]
    nearest = min(rows, key=lambda row: row["images"] * row["tokens"], default={"variant": None})
    variant = nearest["variant"]
    if variant is None:
        return 0
    if variant in variants:
        return variants.index(variant) + 1
    # The result stays right, so this is no error.
    warnings.warn(
        f"vispruner_kernels: {PATH.name} names the {backend} variant {variant} of select for GPUs "
        f"of {gpu}, which this build does not have, so the launcher chooses another "
        "one. Measure again: python -m benchmarks.tune --device cuda --write",
        RuntimeWarning,
        stacklevel=2,
    )
    return 0
