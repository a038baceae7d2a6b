"""The variants of csrc/cuda/variants.h, in its order, without a build."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def native() -> list[dict[str, int]]:
    source = (ROOT / "csrc" / "cuda" / "variants.h").read_text()
    enum = re.search(r"enum class Fit \{ (.*) \}", source)
    assert enum
    fits = enum[1].split(", ")
    fields = re.findall(r"^  (?:int32_t|Fit) (\w+);$", source, re.MULTILINE)
    found = []
    for text in re.findall(r"\{([^{}]*Fit::[^{}]*)\}", source):
        values = text.replace("Fit::", "").split(", ")
        numbers = [fits.index(value) if value in fits else int(value) for value in values]
        found.append(dict(zip(fields, numbers, strict=True)))
    assert found
    return found
