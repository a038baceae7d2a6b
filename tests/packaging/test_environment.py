"""Environment variables choose a backend, an instruction set and the parts of the build."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from answers import (
    ANSWER,
    OPERATORS,
    REMEDY,
    SELECTIONS,
    answers,
    default_answers,
    owners,
    reference_answers,
)
from fresh import python
from installed import needs_native

import vispruner_kernels
from vispruner_kernels import _backends, _native
from vispruner_kernels._native import cuda

ROOT = Path(__file__).parents[2]
SIMD_SETS = _native._C.simd_sets() if _native.INSTALLED else []


def test_the_best_installed_backend_owns_every_operator():
    auto = default_answers()
    by_reference = reference_answers()
    best = "native" if _native.INSTALLED else "reference"
    assert owners(auto["report"]) == dict.fromkeys(OPERATORS, (best, "triton"))
    assert "backend            auto (VISPRUNER_KERNELS_BACKEND)" in auto["report"]
    assert "checks             off (VISPRUNER_KERNELS_CHECK)" in auto["report"]
    assert f"vispruner_kernels  {vispruner_kernels.__version__}" in auto["report"]
    for op in SELECTIONS:
        assert auto["digests"][op] == by_reference["digests"][op]


def test_the_reference_owns_every_operator_if_it_is_chosen():
    by_reference = reference_answers()
    report = by_reference["report"]
    assert owners(report) == dict.fromkeys(OPERATORS, ("reference", "reference"))
    assert "backend            reference (VISPRUNER_KERNELS_BACKEND)" in report


@needs_native
def test_the_core_owns_every_operator_that_it_has_if_it_is_chosen():
    auto = default_answers()
    got = answers(VISPRUNER_KERNELS_BACKEND="native")
    in_cuda = ("select", "prune", "select_varlen") if cuda.INSTALLED else ()
    wanted = {op: "native" if op in in_cuda else "triton" for op in OPERATORS}
    assert owners(got["report"]) == {op: ("native", owner) for op, owner in wanted.items()}
    assert "backend            native (VISPRUNER_KERNELS_BACKEND)" in got["report"]
    assert got["digests"] == auto["digests"]


def test_report_says_that_cuda_kernels_serve_only_if_the_core_is_chosen():
    auto = default_answers()
    line = next(x for x in auto["report"].splitlines() if x.startswith("CUDA kernels"))
    if not cuda.INSTALLED:
        assert "not built" in line
    else:
        assert "sm_90" in line
        assert "only with VISPRUNER_KERNELS_BACKEND=native: no results from a GPU yet" in line


def test_triton_serves_a_cpu_only_in_its_interpreter():
    auto = default_answers()
    pytest.importorskip("triton")
    best = "native" if _native.INSTALLED else "reference"
    compiled = answers(VISPRUNER_KERNELS_BACKEND="triton", TRITON_INTERPRET="0")
    assert owners(compiled["report"]) == dict.fromkeys(OPERATORS, (best, "triton"))
    assert "Triton kernels     for CUDA devices\n" in compiled["report"]
    interpreted = answers(VISPRUNER_KERNELS_BACKEND="triton", TRITON_INTERPRET="1")
    assert owners(interpreted["report"]) == dict.fromkeys(OPERATORS, ("triton", "triton"))
    for op in SELECTIONS:
        assert interpreted["digests"][op] == auto["digests"][op]
    # TRITON_INTERPRET alone chooses no backend.
    assert owners(answers(TRITON_INTERPRET="1")["report"])["select"] == (best, "triton")


def test_variables_are_read_once_at_import():
    code = ANSWER + (
        "import os; os.environ['VISPRUNER_KERNELS_BACKEND'] = 'nonsense'\n"
        "os.environ['VISPRUNER_KERNELS_CHECK'] = 'nonsense'\n"
    )
    got = answers(code, VISPRUNER_KERNELS_BACKEND="reference")
    assert set(owners(got["report"]).values()) == {("reference", "reference")}
    assert "checks             off" in got["report"]


def test_wrong_values_raise_at_import():
    # One interpreter tries all values: an import that raises registers nothing.
    code = """
import importlib.metadata, json, os, sys, torch

installed = importlib.metadata.version

def version_of_triton(version):
    def answer(package):
        if package != "triton":
            return installed(package)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version
    return answer

def attempt(variables, without_core=False, triton="3.4.0"):
    importlib.metadata.version = version_of_triton(triton)
    for name in [name for name in sys.modules if name.split(".")[0] == "vispruner_kernels"]:
        del sys.modules[name]
    if without_core:
        sys.modules["vispruner_kernels._C"] = None
    os.environ.update(variables)
    try:
        import vispruner_kernels
        message = None
    except ImportError as error:
        message = str(error)
    for name in variables:
        del os.environ[name]
    return message

print(json.dumps({
    "no triton": attempt({"VISPRUNER_KERNELS_BACKEND": "triton"}, triton=None),
    "old triton": attempt({"VISPRUNER_KERNELS_BACKEND": "triton"}, triton="3.3.1+git"),
    "nonsense": attempt({"VISPRUNER_KERNELS_BACKEND": "nonsense"}),
    "module": attempt({"VISPRUNER_KERNELS_BACKEND": "_native"}),
    "check": attempt({"VISPRUNER_KERNELS_CHECK": "yes"}),
    "registration": attempt({"VISPRUNER_KERNELS_REGISTRATION": "c++"}),
    "no core": attempt({"VISPRUNER_KERNELS_BACKEND": "native"}, without_core=True),
    "simd": attempt({"VISPRUNER_KERNELS_SIMD": "nonsense"}),
    "nothing": attempt({}, triton=None),
}))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    messages = json.loads(done.stdout)
    backend = "VISPRUNER_KERNELS_BACKEND="
    assert messages["nothing"] is None
    remedy = "pip install 'triton>=3.4', or use auto, reference or native"
    assert messages["no triton"] == f"{backend}triton: Triton is not installed; {remedy}"
    assert messages["old triton"] == f"{backend}triton: Triton is 3.3.1+git; {remedy}"
    every = "expected auto, reference, native or triton"
    assert messages["nonsense"] == f"{backend}nonsense: {every}"
    assert messages["module"] == f"{backend}_native: {every}"
    assert messages["check"] == "VISPRUNER_KERNELS_CHECK=yes: expected 0 or 1"
    wrong = "VISPRUNER_KERNELS_REGISTRATION=c++: expected auto or python"
    assert messages["registration"] == wrong
    assert messages["no core"].startswith(f"{backend}native: vispruner_kernels._C is not built")
    assert REMEDY in messages["no core"]
    assert "or use auto or reference" in messages["no core"]
    if _native.INSTALLED:
        assert messages["simd"].startswith("VISPRUNER_KERNELS_SIMD=nonsense: expected auto or one")
        assert messages["simd"].endswith(", ".join(SIMD_SETS))


@needs_native
@pytest.mark.parametrize("simd", SIMD_SETS)
def test_every_instruction_set_selects_the_same_tokens(simd):
    auto = default_answers()
    got = answers(VISPRUNER_KERNELS_SIMD=simd)
    assert got["simd"] == simd
    assert f"C++ core (native)  {simd} in use" in got["report"]
    assert auto["simd"] == SIMD_SETS[0]
    for op in SELECTIONS:
        assert got["digests"][op] == auto["digests"][op]


@needs_native
def test_portable_code_is_always_built():
    assert SIMD_SETS[-1] == "portable"


def test_an_empty_variable_counts_as_unset():
    names = ("BACKEND", "CHECK", "SIMD")
    got = answers(**{f"VISPRUNER_KERNELS_{name}": "" for name in names}, TRITON_INTERPRET="")
    assert got == answers(TRITON_INTERPRET="0")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"NATIVE": "", "CUDA": "", "CUDA_ARCHITECTURES": ""}, ""),
        ({"NATIVE": "", "CUDA": "2"}, "VISPRUNER_KERNELS_CUDA must be auto, 0 or 1, not '2'"),
    ],
)
def test_setup_treats_an_empty_variable_as_unset_and_refuses_other_values(variables, words):
    code = f"""
import os, runpy, sys
os.chdir({str(ROOT)!r})
sys.argv = ["setup.py", "--name"]
runpy.run_path("setup.py", run_name="__main__")
"""
    done = python(code, **{f"VISPRUNER_KERNELS_{name}": value for name, value in variables.items()})
    assert (done.returncode != 0) == bool(words), done.stderr
    assert words in done.stderr


def test_python_m_prints_the_owners():
    done = subprocess.run(
        [sys.executable, "-m", "vispruner_kernels"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {op: row[0] for op, row in owners(done.stdout).items()} == {
        op: _backends.OWNERS[op, "cpu"] for op in OPERATORS
    }
    assert all(len(row) == 2 for row in owners(done.stdout).values())
