"""The C++ core builds without PyTorch, and with flags that keep every rounding."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def sources() -> list[Path]:
    found = [*(ROOT / "csrc").rglob("*"), ROOT / "setup.py", ROOT / "pyproject.toml"]
    return [path for path in found if path.is_file()]


def test_the_core_includes_nothing_of_pytorch():
    code = [path for path in sources() if path.suffix != ".toml"]
    assert {path.suffix for path in code} >= {".cpp", ".h", ".py"}
    forbidden = re.compile(
        r"include\s*[<\"](torch|ATen|c10)|\bat::|\bc10\b|ATen|import torch|libtorch"
    )
    own = re.compile(r"include \"torch/(shim|registration)\.h\"")
    for path in code:
        assert not forbidden.search(own.sub("", path.read_text())), path
    build = (ROOT / "pyproject.toml").read_text().split("[project]")[0]
    requires = re.search(r"requires = \[(.*)\]", build)
    assert requires
    assert "torch" not in requires[1]


def test_only_the_bindings_include_python():
    for path in sources():
        if path.parent != ROOT and path.name not in ("bindings.cpp", "registration.h"):
            assert not re.search(r"include\s*[<\"](pybind11|Python\.h)", path.read_text()), path


def test_flags_keep_every_rounding():
    flags = (ROOT / "setup.py").read_text().split("CXX_FLAGS", 1)[1]
    assert "-ffp-contract=off" in flags
    # A wheel built with -march=native fails on other processors. Fast math changes results.
    assert not re.search(r"-march|(?<!no-)fast-math|-Ofast|-fopenmp", flags)
