"""The C++ core: the arguments of its functions, its machine code, and setup.py, which builds it."""

from __future__ import annotations

import ast
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import variants
from installed import needs_native

from vispruner_kernels import _native
from vispruner_kernels._native import arguments, cpu

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
needs_cuda_build = pytest.mark.skipif(
    not hasattr(_native._C, "cuda_select"), reason="vispruner_kernels._C has no CUDA kernels"
)
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")


@needs_nvcc
def test_no_load_uses_the_cache_that_is_not_coherent(tmp_path):
    """The kernels read memory that other blocks wrote. The compiler uses ld.global.nc where it
    assumes that no block writes."""
    ptx = tmp_path / "select.ptx"
    command = ["nvcc", "-std=c++17", "-O3", "-fmad=false", "-arch=sm_90", "-ptx", f"-I{CSRC}"]
    command += ["-Werror", "all-warnings"]
    done = subprocess.run(
        [*command, str(CSRC / "cuda" / "select.cu"), "-o", str(ptx)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    text = ptx.read_text()
    # For each rule.
    assert text.count(".entry") == 2 * len(variants.native())
    assert "mma.sync.aligned.m16n8k32" in text
    assert "ld.global.nc" not in text
    # The contract has no fused multiply-add and no approximations.
    assert not re.search(r"\bfma\.|\.approx|\.ftz|rsqrt", text)


def resources(library: str) -> list[dict[str, str]]:
    """The registers, stack and memory of every kernel in a library, for every architecture."""
    triton = pytest.importorskip("triton")
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = []
    for part in text.split("arch = ")[1:]:
        for function, usage in re.findall(r"Function (\S+select_kernel\S+):\s+(.*)", part):
            numbers = dict(re.findall(r"([A-Z]+):(\d+)", usage))
            found.append({"arch": part.split()[0], "function": function, **numbers})
    return found


@needs_cuda_build
def test_every_architecture_is_in_the_build_and_nothing_spills():
    names = _native._C.cuda_architectures.split()
    found = resources(_native._C.__file__)
    # For each rule.
    assert len(found) == 2 * len(_native._C.cuda_variants) * len(names) > 0
    assert {kernel["arch"] for kernel in found} == {f"sm_{name}" for name in names}
    for kernel in found:
        print(kernel)
        # Spilled registers count as STACK; 512 threads share 65536 registers.
        assert int(kernel["STACK"]) == int(kernel["LOCAL"]) == 0, kernel
        assert int(kernel["REG"]) <= 128, kernel
    if "VISPRUNER_KERNELS_CUDA_ARCHITECTURES" not in os.environ:
        assert set(names) <= {"80", "86", "89", "90", "100", "120"}


# Hardening


def readelf(*options: str) -> str:
    done = subprocess.run(["readelf", "-W", *options, _native._C.__file__], capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


@pytest.mark.skipif(
    not (_native.INSTALLED and sys.platform == "linux" and shutil.which("readelf")),
    reason="there is no library of Linux, or no readelf",
)
def test_the_library_is_hardened():
    segments = dict(re.findall(r"^ +(GNU_\w+)(?: +0x\w+){5} +(R?W?E?) ", readelf("-l"), re.M))
    # Full RELRO: the linker's tables are read-only from the start. The stack is not executable.
    assert segments["GNU_RELRO"] == "R"
    assert segments["GNU_STACK"] == "RW"
    assert "BIND_NOW" in readelf("-d")
    symbols = readelf("--dyn-syms")
    assert "__stack_chk_fail" in symbols
    # Only the C library of GNU has it.
    assert platform.libc_ver()[0] != "glibc" or "__memcpy_chk" in symbols


def compiler_that_refuses(folder: Path, *words: str) -> list[str]:
    compiler = folder / "compiler"
    patterns = "|".join(f"*{word}*" for word in words)
    compiler.write_text(f'#!/bin/sh\ncase "$*" in {patterns}) exit 1 ;; esac\n')
    compiler.chmod(0o755)
    return [str(compiler)]


def test_flags_that_a_compiler_lacks_are_left_out(setup, tmp_path):
    names = setup()
    find, compiling, linking = (
        names[name] for name in ("find_flags", "HARDENING", "LINK_HARDENING")
    )
    has_all = compiler_that_refuses(tmp_path, "nothing")
    assert find(has_all, compiling + linking, names["nvcc_flag"]) == [
        "-Xcompiler=-U_FORTIFY_SOURCE",
        "-Xcompiler=-D_FORTIFY_SOURCE=3",
        "-Xcompiler=-fstack-protector-strong",
        "-Xlinker=-z,relro,-z,now",
        "-Xlinker=-z,noexecstack",
    ]
    old = compiler_that_refuses(tmp_path, "FORTIFY_SOURCE=3", "-Wl,-z")
    assert find(old, compiling) == [
        "-U_FORTIFY_SOURCE",
        "-D_FORTIFY_SOURCE=2",
        "-fstack-protector-strong",
    ]
    assert find(old, linking) == []


# The arguments of the core.

STRIDES = {"image_stride": 0, "token_stride": 0}
TOKENS = {"data": 0, "dtype": 0, **STRIDES}
HEADS = {"data": 0, "head_stride": 0, **STRIDES}
OFFSETS = {"data": 0, "stride": 0}


def cuda_call(images: int) -> dict[str, Any]:
    names = ("total_keep", "indices", "kept", "scratch", "matching", "variant")
    numbers = dict.fromkeys(names, 0)
    return numbers | {
        "features": {"data": 0, "dtype": 1, "image_stride": 16384 * 8, "token_stride": 8},
        "scores": {"data": 0, "dtype": 1, "image_stride": 16384 * 8, "token_stride": 8},
        "cu_seqlens": OFFSETS,
        "cu_keep": OFFSETS,
        "images": images,
        "tokens": 16384,
        "channels": 8,
        "total": images * 16384,
        "keep": 9,
        "important": 4,
        "important_ratio": 0.5,
        "step": 8,
        "eager_rounds": 64,
    }


def launch(images: int) -> None:
    _native._C.cuda_select(call=cuda_call(images), device=0, stream=0)


SCORES = torch.arange(6.0)[None]
EXACTLY = "must be a dict with exactly these names"


def topk_arguments(indices: torch.Tensor) -> dict[str, Any]:
    """Ask for the two best of SCORES."""
    sizes = {"images": 1, "tokens": 6, "keep": 2, "threads": 1}
    return {"scores": arguments.tokens(SCORES), "indices": indices.data_ptr(), **sizes}


@needs_native
def test_fields_go_by_name_in_any_order():
    indices = torch.zeros(1, 2, dtype=torch.int64)
    call = topk_arguments(indices)
    call["scores"] = dict(reversed(call["scores"].items()))
    _native._C.select_topk(**dict(reversed(call.items())))
    assert indices.tolist() == [[4, 5]]


@needs_native
def test_arguments_are_keywords():
    call = topk_arguments(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(TypeError):
        _native._C.select_topk(*call.values())
    for name in call:
        rest = {key: value for key, value in call.items() if key != name}
        with pytest.raises(TypeError):
            _native._C.select_topk(**rest)
        with pytest.raises(TypeError):
            _native._C.select_topk(**rest, **{f"{name}_": call[name]})


@needs_native
def test_a_struct_has_exactly_its_fields():
    call = topk_arguments(torch.zeros(1, 2, dtype=torch.int64))
    scores = call.pop("scores")
    message = f"^Tokens {EXACTLY}: data dtype image_stride token_stride$"
    for name in scores:
        rest = {key: value for key, value in scores.items() if key != name}
        for wrong in (rest, rest | {"other": 0}, scores | {"other": 0}):
            with pytest.raises(TypeError, match=message):
                _native._C.select_topk(scores=wrong, **call)
        with pytest.raises(TypeError, match=f"^Tokens: {name} has a wrong type$"):
            _native._C.select_topk(scores=scores | {name: 0.5}, **call)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _native._C.select_topk(scores=tuple(scores.values()), **call)


def fields_in_the_stub() -> dict[str, list[str]]:
    tree = ast.parse((ROOT / "vispruner_kernels" / "_C.pyi").read_text())
    return {
        node.name: [line.target.id for line in node.body if isinstance(line, ast.AnnAssign)]
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


@needs_native
def test_the_stub_has_the_fields_of_each_struct():
    core, rule = _native._C, cpu._rule(0.5, 8, "bipartite")
    one = {"threads": 1, "scores": 0}
    numbers = {"images": 1, "tokens": 1, "channels": 1, "keep": 1, "threads": 1}
    calls = {
        "Tokens": lambda: core.select_topk(**topk_arguments(torch.zeros(2)) | {"scores": {}}),
        "Heads": lambda: core.cls_scores(q={}, k={}, shape={}, **one),
        "LogSumExp": lambda: core.received_scores(q=HEADS, k=HEADS, lse={}, shape={}, **one),
        "AttentionShape": lambda: core.cls_scores(q=HEADS, k=HEADS, shape={}, **one),
        "SelectRule": lambda: core.select(
            features=TOKENS, scores=TOKENS, rule={}, indices=0, kept=0, **numbers
        ),
    }
    if hasattr(core, "cuda_select"):
        offsets = cuda_call(1) | {"cu_seqlens": {}}
        calls["CudaSelect"] = lambda: core.cuda_select(call={}, device=0, stream=0)
        calls["Offsets"] = lambda: core.cuda_select(call=offsets, device=0, stream=0)
    stub = fields_in_the_stub()
    assert stub["SelectRule"] == list(rule)
    # Only results have it.
    assert stub.pop("Variant") == list(variants.native()[0])
    assert stub.keys() - {"CudaSelect", "Offsets"} == calls.keys() - {"CudaSelect", "Offsets"}
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"^{name} {EXACTLY}: {' '.join(stub[name])}$"):
            call()


# The launch path without a GPU.


@needs_cuda_build
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU; test_cuda_grid.py emulates one")
def test_refuses_a_grid_that_is_too_large():
    with pytest.raises(ValueError, match="2155872256 blocks, expected at most 2147483647"):
        launch(2**16)


@needs_cuda_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_error_of_cuda_raises():
    message = r"^vispruner_kernels: the current device: cudaError\w+: .*; VISPRUNER_KERNELS_BACKEND"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            launch(1)


# setup.py


@pytest.fixture
def setup(monkeypatch):
    """Load the functions of setup.py without running a command."""

    def load(**environment: str) -> dict[str, object]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("setuptools.setup", lambda **kwargs: None)
        monkeypatch.chdir(ROOT)
        return runpy.run_path(str(ROOT / "setup.py"))

    return load


def nvcc_that_knows(folder: Path, *codes: str) -> str:
    nvcc = folder / "nvcc"
    nvcc.write_text("#!/bin/sh\n" + "".join(f"echo sm_{code}\n" for code in codes))
    nvcc.chmod(0o755)
    return str(nvcc)


def test_compiles_for_the_architectures_that_nvcc_knows(setup, tmp_path, capsys):
    find = setup()["find_architectures"]
    names, flags = find(nvcc_that_knows(tmp_path, "75", "80", "86", "89", "90"))
    assert names == ["80", "86", "89", "90"]
    assert flags[0] == "-gencode=arch=compute_80,code=sm_80"
    assert flags[-1] == "-gencode=arch=compute_90,code=compute_90"
    assert "cannot compile for sm_100" in capsys.readouterr().err
    names, flags = find(nvcc_that_knows(tmp_path, "80", "86", "89", "90", "100", "103", "120"))
    assert names == ["80", "86", "89", "90", "100", "120"]
    assert flags[-1] == "-gencode=arch=compute_100,code=compute_100"


def test_compiles_for_the_architectures_of_the_variable(setup, tmp_path):
    find = setup(VISPRUNER_KERNELS_CUDA_ARCHITECTURES="80;90")["find_architectures"]
    names, flags = find(nvcc_that_knows(tmp_path, "80", "90", "100"))
    assert names == ["80", "90"]
    assert len(flags) == 3
    with pytest.raises(Exception, match=r"CUDA_ARCHITECTURES names 90, .* knows 80, 86"):
        find(nvcc_that_knows(tmp_path, "80", "86"))


def test_an_nvcc_without_a_known_architecture_fails(setup, tmp_path):
    with pytest.raises(Exception, match="knows none of sm_80"):
        setup()["find_architectures"](nvcc_that_knows(tmp_path, "52"))


def test_resources_are_printed(setup, capsys):
    log = "".join(
        f"ptxas info    : Compiling entry function '_Z{name}' for '{arch}'\n"
        f"    {stack} bytes stack frame, {spill} bytes spill stores, 4 bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 1 barriers\n"
        for name, arch, stack, spill, registers in (
            ("a", "sm_80", 0, 0, 90),
            ("b", "sm_80", 16, 8, 128),
            ("a", "sm_90", 0, 0, 126),
        )
    )
    setup()["print_resources"](log)
    assert capsys.readouterr().out.splitlines() == [
        "vispruner_kernels: sm_80: 2 kernels, at most 128 registers, 16 bytes of stack, "
        "8 bytes spilled",
        "vispruner_kernels: sm_90: 1 kernels, at most 126 registers, 0 bytes of stack, "
        "0 bytes spilled",
    ]


@pytest.mark.parametrize("wanted", ["auto", "1"])
def test_builds_without_cuda_kernels_if_nvcc_fails(setup, tmp_path, capsys, wanted):
    from setuptools import Distribution, Extension
    from setuptools.errors import BaseError

    (tmp_path / "bin").mkdir()
    nvcc_that_knows(tmp_path / "bin", "80")
    names = setup(CUDA_HOME=str(tmp_path), VISPRUNER_KERNELS_CUDA=wanted)
    command = names["NinjaBuildExt"](Distribution())
    command.get_ext_fullpath = lambda name: str(tmp_path / "_C.so")
    built = []

    def build(ext: object, output: Path, nvcc: str | None, sources: list[Path]) -> None:
        built.append([path.name for path in sources])
        if sources:
            raise BaseError("unsupported GNU version")

    command._build = build
    if wanted == "1":
        with pytest.raises(BaseError, match="_C was not built: unsupported GNU version"):
            command.build_extension(Extension("vispruner_kernels._C", []))
        assert built == [["select.cu"]]
        return
    command.build_extension(Extension("vispruner_kernels._C", []))
    assert built == [["select.cu"], []]
    assert "WITHOUT the CUDA kernels: unsupported GNU version" in capsys.readouterr().err
