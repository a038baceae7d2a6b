"""The package without the C++ core and without optional packages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from answers import ANSWER, REMEDY, WITHOUT_CORE, answers, owners, reference_answers
from fresh import python
from installed import needs_native

from vispruner_kernels import _native
from vispruner_kernels._native import cuda

ROOT = Path(__file__).parents[2]


def test_the_reference_serves_the_cpu_without_the_core():
    by_reference = reference_answers()
    got = answers(WITHOUT_CORE + ANSWER)
    assert got["digests"] == by_reference["digests"]
    assert set(owners(got["report"]).values()) == {("reference", "triton")}
    line = next(x for x in got["report"].splitlines() if x.startswith("C++ core (native)"))
    assert "not built" in line
    assert "the reference serves the CPU" in line
    assert REMEDY in line


# Calls in threads, a call by keyword through torch.ops, and one in a compiled function.
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
def test_one_call_warns_without_the_core(threads_first, tmp_path):
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
    # Nothing warns if the reference was chosen, or with the core.
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
