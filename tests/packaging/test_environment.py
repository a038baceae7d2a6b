"""What is read or missing at import: environment variables, the C++ core, optional packages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fresh import python
from installed import needs_native

import vispruner_kernels
from vispruner_kernels import _backends, _native
from vispruner_kernels._native import cuda

ROOT = Path(__file__).parents[2]
OPERATORS = vispruner_kernels.__all__
SELECTIONS = [op for op in OPERATORS if op.startswith(("select", "prune"))]
SIMD_SETS = _native._C.simd_sets() if _native.INSTALLED else []

# Prints one JSON object: what the operators answer, as digests, and the report.
ANSWER = """
import contextlib, hashlib, io, json, runpy
import torch
import vispruner_kernels as vk
from vispruner_kernels import _native, testing

generator = torch.Generator().manual_seed(0)
features = testing.sample_features("clustered", 2, 100, 33, generator)
scores = testing.sample_scores("ties", 2, 100, generator)
lengths, keep = testing.sample_offsets([60, 0, 40]), testing.sample_offsets([20, 0, 11])
q, k, v = testing.sample_qkv(2, 40, 3, 16, torch.float32, 0)
calls = {
    "select": (features, scores, 30),
    "prune": (features, scores, 30, 0.3, 5, "pairwise"),
    "select_varlen": (features[0], scores[0], lengths, keep, 60, 31),
    "select_topk": (scores, 30),
    "select_rows": (scores, 10, 3),
    "cls_attention": (q, k, v),
    "cls_scores": (q, k, 0.3, 5),
    "received_scores": (q, k),
    "received_scores_varlen": (q[0], k[0], testing.sample_offsets([25, 0, 15]), 25),
}

def digest(op):
    answer = getattr(vk, op)(*calls[op])
    answer = answer if isinstance(answer, tuple) else (answer,)
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in answer)).hexdigest()

def report():
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runpy.run_module("vispruner_kernels", run_name="__main__")
    return out.getvalue()

def answer():
    digests = {op: digest(op) for op in calls}
    simd = _native._C.simd() if _native.INSTALLED else None
    print(json.dumps({"digests": digests, "report": report(), "simd": simd}))
"""

REMEDY = (
    "install a C++17 compiler and reinstall: VISPRUNER_KERNELS_NATIVE=1 "
    "pip install --no-cache-dir --force-reinstall --no-deps ."
)

# As if the C++ core had not been built.
WITHOUT_CORE = "import sys; sys.modules['vispruner_kernels._C'] = None\n"


def answers(code: str = ANSWER, **environment: str) -> dict[str, object]:
    done = python(code + "\nanswer()", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def owners(report: str) -> dict[str, tuple[str, str]]:
    rows = (line.split() for line in report.splitlines())
    return {row[0]: (row[1], row[2]) for row in rows if row and row[0] in OPERATORS}


@pytest.fixture(scope="module")
def auto():
    return answers()


@pytest.fixture(scope="module")
def by_reference():
    return answers(VISPRUNER_KERNELS_BACKEND="reference")


def test_auto(auto, by_reference):
    best = "native" if _native.INSTALLED else "reference"
    assert owners(auto["report"]) == dict.fromkeys(OPERATORS, (best, "triton"))
    assert "backend            auto (VISPRUNER_KERNELS_BACKEND)" in auto["report"]
    assert "checks             off (VISPRUNER_KERNELS_CHECK)" in auto["report"]
    assert f"vispruner_kernels  {vispruner_kernels.__version__}" in auto["report"]
    for op in SELECTIONS:
        assert auto["digests"][op] == by_reference["digests"][op]


def test_reference(by_reference):
    report = by_reference["report"]
    assert owners(report) == dict.fromkeys(OPERATORS, ("reference", "reference"))
    assert "backend            reference (VISPRUNER_KERNELS_BACKEND)" in report


@needs_native
def test_native(auto):
    got = answers(VISPRUNER_KERNELS_BACKEND="native")
    in_cuda = ("select", "prune", "select_varlen") if cuda.INSTALLED else ()
    wanted = {op: "native" if op in in_cuda else "triton" for op in OPERATORS}
    assert owners(got["report"]) == {op: ("native", owner) for op, owner in wanted.items()}
    assert "backend            native (VISPRUNER_KERNELS_BACKEND)" in got["report"]
    assert got["digests"] == auto["digests"]


def test_cuda_kernels_serve_by_hand_alone(auto):
    line = next(x for x in auto["report"].splitlines() if x.startswith("CUDA kernels"))
    if not cuda.INSTALLED:
        assert "not built" in line
    else:
        assert "sm_90" in line
        assert "only with VISPRUNER_KERNELS_BACKEND=native: no results from a GPU yet" in line


def test_triton_serves_a_cpu_only_in_its_interpreter(auto):
    pytest.importorskip("triton")
    best = "native" if _native.INSTALLED else "reference"
    compiled = answers(VISPRUNER_KERNELS_BACKEND="triton", TRITON_INTERPRET="0")
    assert owners(compiled["report"]) == dict.fromkeys(OPERATORS, (best, "triton"))
    assert "Triton kernels     for CUDA devices\n" in compiled["report"]
    interpreted = answers(VISPRUNER_KERNELS_BACKEND="triton", TRITON_INTERPRET="1")
    assert owners(interpreted["report"]) == dict.fromkeys(OPERATORS, ("triton", "triton"))
    for op in SELECTIONS:
        assert interpreted["digests"][op] == auto["digests"][op]
    # The interpreter has to be asked for.
    assert owners(answers(TRITON_INTERPRET="1")["report"])["select"] == (best, "triton")


def test_read_once_at_import():
    code = ANSWER + (
        "import os; os.environ['VISPRUNER_KERNELS_BACKEND'] = 'nonsense'\n"
        "os.environ['VISPRUNER_KERNELS_CHECK'] = 'nonsense'\n"
    )
    got = answers(code, VISPRUNER_KERNELS_BACKEND="reference")
    assert set(owners(got["report"]).values()) == {("reference", "reference")}
    assert "checks             off" in got["report"]


def test_values_that_raise_at_import():
    # One interpreter: an import that raises registers nothing, so the next one can be tried.
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
    assert messages["no core"].startswith(f"{backend}native: vispruner_kernels._C is not built")
    assert REMEDY in messages["no core"]
    assert "or use auto or reference" in messages["no core"]
    if _native.INSTALLED:
        assert messages["simd"].startswith("VISPRUNER_KERNELS_SIMD=nonsense: expected auto or one")
        assert messages["simd"].endswith(", ".join(SIMD_SETS))


@needs_native
@pytest.mark.parametrize("simd", SIMD_SETS)
def test_simd(auto, simd):
    got = answers(VISPRUNER_KERNELS_SIMD=simd)
    assert got["simd"] == simd
    assert f"C++, {simd} in use" in got["report"]
    assert auto["simd"] == SIMD_SETS[0]
    for op in SELECTIONS:
        assert got["digests"][op] == auto["digests"][op]


@needs_native
def test_portable_code_is_always_there():
    assert SIMD_SETS[-1] == "portable"


# VISPRUNER_KERNELS_CHECK=1. Under -O, where assert statements are gone.

CHECK = (
    ANSWER
    + """
def error(op, *args, **kwargs):
    try:
        getattr(vk, op)(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)

nan, inf = torch.full_like(scores, torch.nan), features.clone()
inf[1, 99, 32] = -torch.inf
minus = q.clone()
minus[0, 0, 0, 0] = torch.nan
got = {
    "features": error("select", inf, scores, 30),
    "scores": error("prune", features, scores=nan, keep=30),
    "topk": error("select_topk", nan, 30),
    "varlen": error("select_varlen", inf[1], *calls["select_varlen"][1:]),
    "q": error("cls_scores", minus, k),
    "k": error("received_scores", q, minus),
    "v": error("cls_attention", q, k, minus),
    "lse": error("received_scores", q, k, lse=torch.full((2, 3, 40), torch.inf)),
    "argument": error("select", inf, scores, 0),
    "no images": error("select", features[:0], scores[:0], 30),
    "fine": error("select", features, scores, 30),
}
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("error")
    for op in calls:
        args = [x.clone().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x
                for x in calls[op]]
        got[f"gradient {op}"] = error(op, *args)
"""
)


@pytest.fixture(scope="module")
def checked():
    done = python(CHECK + "print(json.dumps(got)); answer()", "-O", VISPRUNER_KERNELS_CHECK="1")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_check_finds_what_is_not_finite(checked):
    errors = checked[0]
    for name, op, argument in [
        ("features", "select", "features"),
        ("scores", "prune", "scores"),
        ("topk", "select_topk", "scores"),
        ("varlen", "select_varlen", "features"),
        ("q", "cls_scores", "q"),
        ("k", "received_scores", "k"),
        ("v", "cls_attention", "v"),
        ("lse", "received_scores", "lse"),
    ]:
        assert errors[name] == ["ValueError", f"{op}: {argument} has values that are not finite"]
    assert errors["argument"][1].startswith("select: keep is 0, ")
    assert errors["no images"] is None
    assert errors["fine"] is None


def test_check_takes_tensors_that_require_gradients(checked):
    assert {op: checked[0][f"gradient {op}"] for op in OPERATORS} == dict.fromkeys(OPERATORS)


def test_check_changes_no_answer(checked, auto):
    assert checked[1]["digests"] == auto["digests"]
    assert "checks             on (VISPRUNER_KERNELS_CHECK)" in checked[1]["report"]
    assert owners(checked[1]["report"]) == owners(auto["report"])


@needs_native
def test_check_catches_a_broken_kernel():
    code = (
        CHECK
        + """
from types import SimpleNamespace
real, broken = _native._C, SimpleNamespace()

def rule(ratio, *rest):
    return (1.0, *rest)

def shape(dtype, images, sequence, heads, head_dim, scale, prefix):
    return dtype, images, sequence, heads, head_dim, 2 * scale, prefix

broken.select = lambda *a: real.select(*a[:6], rule(*a[6]), *a[7:])
broken.select_varlen = lambda *a: real.select_varlen(*a[:6], rule(*a[6]), *a[7:])
broken.select_topk = lambda *a: None
broken.select_rows = lambda *a: None
broken.cls_scores = lambda q, k, s, *a: real.cls_scores(q, k, shape(*s), *a)
broken.received_scores = lambda q, k, l, s, *a: real.received_scores(q, k, l, shape(*s), *a)
broken.received_scores_varlen = lambda q, k, l, c, t, s, *a: real.received_scores_varlen(
    q, k, l, c, t, shape(*s), *a)
_native.cpu._C = broken
print(json.dumps({op: error(op, *calls[op]) for op in calls}))
"""
    )
    done = python(code, "-O", VISPRUNER_KERNELS_CHECK="1")
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert sorted(errors) == sorted(OPERATORS)
    for op, (kind, message) in errors.items():
        assert kind == "RuntimeError", message
        assert message.startswith(f"{op}: the kernel and the reference disagree: ")


@pytest.mark.parametrize("backend", _backends.BACKENDS)
def test_compared_catches_a_broken_kernel_of_any_backend(backend):
    # The wrapper that VISPRUNER_KERNELS_CHECK=1 puts around kernels.
    import torch

    from vispruner_kernels import reference

    entry = _backends._compared("select_topk", lambda scores, keep: torch.zeros(1, 2).long())
    with pytest.raises(RuntimeError, match="select_topk: the kernel and the reference disagree"):
        entry(torch.rand(1, 5), 2)
    entry = _backends._compared("select_topk", reference.select_topk)
    assert entry(torch.tensor([[1.0, 3.0, 2.0]]), keep=2).tolist() == [[1, 2]]


# Without what is optional.


def test_without_the_core(by_reference):
    got = answers(WITHOUT_CORE + ANSWER)
    assert got["digests"] == by_reference["digests"]
    assert set(owners(got["report"]).values()) == {("reference", "triton")}
    line = next(x for x in got["report"].splitlines() if x.startswith("native core"))
    assert "not built" in line
    assert "the reference serves the CPU" in line
    assert REMEDY in line


def test_empty_variables_are_unset_ones(auto):
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
def test_empty_variables_of_the_build(variables, words):
    code = f"""
import os, runpy, sys
os.chdir({str(ROOT)!r})
sys.argv = ["setup.py", "--name"]
runpy.run_path("setup.py", run_name="__main__")
"""
    done = python(code, **{f"VISPRUNER_KERNELS_{name}": value for name, value in variables.items()})
    assert (done.returncode != 0) == bool(words), done.stderr
    assert words in done.stderr


# A call in a thread, one by keyword through torch.ops, one in a compiled function.
WARNING = """
import threading, warnings, torch, vispruner_kernels as vk

x = torch.tensor([[0.0, 2.0, 1.0]])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    vk.select_topk(x.to("meta"), 1)
    assert not caught, caught
    threads = [threading.Thread(target=vk.select_topk, args=(x, 1)) for _ in range(8)]
    for thread in threads * FIRST:
        thread.start()
    for thread in threads * FIRST:
        thread.join()
    compiled = torch.compile(lambda x: vk.select_topk(x, 2), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.ops.vispruner.select_topk(scores=x, keep=1).tolist() == [[1]]
        assert compiled(x).tolist() == [[1, 2]]
        vk.select_rows(x, 1, 1)
for warning in caught:
    print(warning.category.__name__, warning.filename, warning.lineno, warning.message)
"""


@pytest.mark.parametrize("threads_first", [False, True])
def test_without_the_core_one_call_warns(threads_first, tmp_path):
    script = tmp_path / "calls.py"
    script.write_text(WITHOUT_CORE + WARNING.replace("FIRST", str(int(threads_first))))
    run = f"import runpy; runpy.run_path({str(script)!r})"
    done = python(run)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("RuntimeWarning ")
    assert "vispruner_kernels: the C++ core is not built (" in line
    assert REMEDY in line
    if not threads_first:
        lines = script.read_text().splitlines()
        (where,) = (i for i, text in enumerate(lines, 1) if "assert torch.ops" in text)
        assert f"{script} {where} " in line
    if threads_first:
        return
    # Not where the reference was asked for, and not with the core.
    silent = python(run, VISPRUNER_KERNELS_BACKEND="reference")
    assert (silent.returncode, silent.stdout) == (0, ""), silent.stderr
    if _native.INSTALLED:
        script.write_text(script.read_text().removeprefix(WITHOUT_CORE))
        silent = python(run)
        assert (silent.returncode, silent.stdout) == (0, ""), silent.stderr


def test_hints_to_reinstall_keep_pip_from_its_cached_wheel():
    options = "pip install --no-cache-dir --force-reinstall --no-deps"
    assert options in (ROOT / "setup.py").read_text()
    if not cuda.INSTALLED and _native.INSTALLED:
        assert options in cuda.REASON or "HIP" in cuda.REASON
    for path in [*(ROOT / "vispruner_kernels").rglob("*.py"), *ROOT.glob("docs/*.md")]:
        assert not re.search(r"\breinstall (the package )?with\b", path.read_text()), path


@pytest.mark.parametrize("core", [pytest.param(True, marks=needs_native), False])
def test_optional_packages_are_not_imported(core):
    optional = ["matplotlib", "PIL", "tqdm", "transformers", "triton", "vllm", "hypothesis"]
    code = f"""
import sys
import torch
for name in {optional!r}:
    sys.modules[name] = None  # an import of it raises
import vispruner_kernels.__main__, vispruner_kernels.methods, vispruner_kernels.testing
print(vispruner_kernels.__main__.report())
print(vispruner_kernels.select_topk(torch.tensor([[0.0, 2.0, 1.0]]), 1).tolist())
"""
    done = python(code if core else WITHOUT_CORE + code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[[1]]"


def test_run_as_a_module():
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


# The sources.


def sources() -> list[Path]:
    found = [*(ROOT / "csrc").rglob("*"), ROOT / "setup.py", ROOT / "pyproject.toml"]
    return [path for path in found if path.is_file()]


def test_the_core_knows_nothing_of_pytorch():
    code = [path for path in sources() if path.suffix != ".toml"]
    assert {path.suffix for path in code} >= {".cpp", ".h", ".py"}
    forbidden = re.compile(
        r"include\s*[<\"](torch|ATen|c10)|\bat::|\bc10\b|ATen|import torch|libtorch"
    )
    for path in code:
        assert not forbidden.search(path.read_text()), path
    build = (ROOT / "pyproject.toml").read_text().split("[project]")[0]
    requires = re.search(r"requires = \[(.*)\]", build)
    assert requires
    assert "torch" not in requires[1]


def test_only_the_bindings_know_python():
    for path in sources():
        if path.parent != ROOT and path.name != "bindings.cpp":
            assert not re.search(r"include\s*[<\"](pybind11|Python\.h)", path.read_text()), path


def test_flags_keep_every_rounding():
    flags = (ROOT / "setup.py").read_text().split("CXX_FLAGS", 1)[1]
    assert "-ffp-contract=off" in flags
    # -march=native would end up in a wheel, and fast math changes results.
    assert not re.search(r"-march|(?<!no-)fast-math|-Ofast|-fopenmp", flags)
