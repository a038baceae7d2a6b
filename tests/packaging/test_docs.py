"""Links, commands, code, docstrings and figures of the documentation are true."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import os
import re
from pathlib import Path

import pytest
import torch
from pages import ROOT, blocks, page

import vispruner_kernels
from vispruner_kernels import _backends, _native, _schemas, ops

PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "vispruner_kernels/**/*.md")
    for path in ROOT.glob(pattern)
)
SECTIONS = ["Args", "Returns", "Raises", "Contract", "Cost", "Source", "Example"]


def test_the_main_pages_exist():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "contract.md"} <= {
        path.name for path in PAGES
    }


def anchors(path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)[^)]*\)", page(path)):
        if "://" not in target:
            # By its text: the package may be a link to an installation.
            file = Path(os.path.normpath(path.parent / target)) if target else path
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), anchor


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_paths_in_code_spans_exist(path):
    tops = {entry.name for entry in ROOT.iterdir() if entry.is_dir()} - {"build", "dist"}
    for span in re.findall(r"`([\w./-]+/[\w./<>*-]*)`", page(path)):
        if span.split("/")[0] in tops and not set("<>*") & set(span):
            assert (ROOT / span).exists(), span


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_tests_in_code_spans_exist(path):
    files = {file.stem: page(file) for file in (ROOT / "tests").glob("**/*.py")}
    for file, name in re.findall(r"`(?:[\w/]*?(\w*)\.py)?(?:::)?(test_\w+)`", page(path)):
        code = files[file] if file else "".join(files.values())
        assert re.search(rf"^def {name}\(", code, re.MULTILINE), (file, name)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", page(ROOT / "Makefile"), re.MULTILINE))
    text = page(path)
    for line in "\n".join(blocks(text, "(?:bash|sh)") + re.findall(r"`([^`\n]+)`", text)).split(
        "\n"
    ):
        for target in re.findall(r"^(?:\w+=\S+ )*make ([a-z -]+)", line):
            assert set(target.split()) <= targets, line
        for module in re.findall(r"python -m ([\w.]+)", line):
            if module not in ("venv", "build"):
                assert importlib.util.find_spec(module), line


def test_code_of_the_readme_runs():
    code = blocks(page(ROOT / "README.md"), "python")
    assert code
    for block in code:
        exec(compile(block, "README.md", "exec"), {})


def test_code_of_the_transformers_page_runs(monkeypatch, capsys):
    """A tiny model and its prompt replace the downloads; the picture is a text."""
    transformers = pytest.importorskip("transformers")
    import vlms

    model = vlms.make("llava", side=24)
    prompt = vlms.prompts("llava", [5, vlms.picture("llava", 1, side=24), 7])

    class Processor:
        def __call__(self, images, text, return_tensors):
            assert (images, return_tensors) == ("a picture", "pt")
            assert text.count("<image>") == 1
            return transformers.BatchFeature(prompt)

        def batch_decode(self, tokens, skip_special_tokens):
            return [" ".join(map(str, row.tolist())) for row in tokens]

    for cls, made in (
        (transformers.LlavaForConditionalGeneration, model),
        (transformers.AutoProcessor, Processor()),
    ):
        monkeypatch.setattr(cls, "from_pretrained", lambda *args, made=made, **kwargs: made)
    names = {"picture": "a picture"}
    code = blocks(page(ROOT / "docs" / "transformers.md"), "python")
    for block in code:
        exec(compile(block, "docs/transformers.md", "exec"), names)
    assert len(code) == 4
    assert names["answer"].shape == (1, 20)
    assert names["logits"].shape[1] == 1 + 5 + 64 + 7
    assert "generate" not in vars(model)
    printed = capsys.readouterr().out
    counts = re.findall(r"^\w+\(keep=.* (\d+)$", printed, re.MULTILINE)
    assert counts == ["64", "144", "144", "64", "144", "96"]


def test_counts_of_the_transformers_page_are_those_of_the_benchmark():
    pytest.importorskip("transformers")
    from benchmarks import llava

    text = page(ROOT / "docs" / "transformers.md")
    rows = re.findall(r"^\| (\S+-7B) \| (\d+) -> (\d+) \| (.*) \|$", text, re.MULTILINE)
    assert [row[0].lower() for row in rows] == [*llava.CASES]
    for name, before, after, cells in rows:
        case = llava.CASES[name.lower()]
        keep = int(after) - (case.grids if case.model.startswith("video") else 0)
        line = llava.counted(case, keep)
        assert f"{before} -> {after} visual tokens" in line
        tera, less, model, cache = (cell.strip() for cell in cells.split("|"))
        assert f"{tera} TFLOP, {less.replace(' ', '')} less" in line
        assert model.replace(" ", "") in line
        assert cache in line


def test_variables_that_the_pages_name_are_read():
    sources = [*ROOT.glob("vispruner_kernels/**/*.py"), ROOT / "setup.py"]
    sources += ROOT.glob("tests/support/*.py")
    code = "".join(page(path) for path in sources)
    for path in PAGES:
        for name in re.findall(r"VISPRUNER_[A-Z0-9_]*[A-Z0-9]", page(path)):
            assert f'"{name}"' in code, name


def test_page_of_the_environment_has_every_variable():
    """Those that the package, setup.py, the Makefile and `make test-gpu` read."""
    text = page(ROOT / "docs" / "environment.md")
    sources = [*ROOT.glob("vispruner_kernels/**/*.py"), ROOT / "setup.py"]
    sources += ROOT.glob("tests/support/gpu*.py")
    code = "".join(page(path) for path in sources)
    read = set(re.findall(r'environ(?:\.get\(|\[)"([A-Z0-9_]+)"', code))
    read |= set(re.findall(r'"(VISPRUNER_[A-Z0-9_]*[A-Z0-9])"', code))
    assert {"VISPRUNER_KERNELS_CHECK", "CUDA_HOME", "TRITON_INTERPRET"} <= read
    defaults = dict(re.findall(r"^([A-Z_]+) \?= ?(.*)$", page(ROOT / "Makefile"), re.MULTILINE))
    for name in (read | set(defaults)) - {"PATH", "PYTHONPATH"}:
        assert re.search(rf"^\|[^|]*`{name}`", text, re.MULTILINE), name
    pinned = {value for value in defaults.values() if "==" in value}
    assert len(pinned) == 4
    for value in pinned:
        assert f"`{value}`" in text, value


@pytest.mark.parametrize("name", vispruner_kernels.__all__)
def test_docstring_has_every_section(name):
    function = getattr(vispruner_kernels, name)
    text = inspect.getdoc(function)
    places = [text.find(f"\n{section}:\n") for section in SECTIONS]
    assert -1 not in places, dict(zip(SECTIONS, places, strict=True))
    assert places == sorted(places)
    described = text[places[0] : places[1]]
    for parameter in inspect.signature(function).parameters:
        assert f"\n    {parameter}:" in described, parameter


@pytest.mark.parametrize("name", ["prune_inputs", "attach"])
def test_docstring_of_the_integration_has_every_section(name, monkeypatch):
    integration = pytest.importorskip("vispruner_kernels.integrations.transformers")
    monkeypatch.setattr(vispruner_kernels, name, getattr(integration, name), raising=False)
    test_docstring_has_every_section(name)


@pytest.mark.parametrize("name", vispruner_kernels.__all__)
def test_example_of_the_docstring_runs(name):
    finder = doctest.DocTestFinder(recurse=False)
    tests = finder.find(getattr(ops, name), name, globs={})
    assert sum(len(test.examples) for test in tests) >= 2
    for test in tests:
        result = doctest.DocTestRunner().run(test)
        assert result.failed == 0


def test_contract_has_every_schema():
    text = re.sub(r"\s+", " ", page(ROOT / "docs" / "contract.md"))
    for op, schema in _schemas.SCHEMAS.items():
        assert f"vispruner::{op}{schema.signature}" in text, op


@pytest.mark.skipif(
    _backends.REQUESTED != "auto" or not _native.INSTALLED,
    reason="the table needs the default backend and the C++ core",
)
def test_table_of_operators_is_true():
    """The owners in docs/architecture.md are those that `_backends` registers."""
    names = {"C++": "native", "SDPA and C++": "native", "reference": "reference"}
    names["Triton"] = "triton"
    rows = re.findall(
        r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$",
        page(ROOT / "docs" / "architecture.md"),
        re.MULTILINE,
    )
    table = {
        (op, device): names[owner]
        for op, cpu, cuda, hip in rows
        for device, owner in (("cpu", cpu), ("cuda", hip if torch.version.hip else cuda))
    }
    assert table == _backends.OWNERS
    assert {op for op, *_, hip in rows if hip == "Triton"} == set(_backends.HIP_TRITON)
    assert {hip for *_, hip in rows} == {"Triton", "reference"}
