"""`make test-gpu` on a machine without a GPU, and its tests in Triton's interpreter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gpu_command
import pytest
import torch

from vispruner_kernels._triton import operators

ROOT = Path(__file__).parents[2]
COMMAND = ["tests/support/gpu_command.py"]

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make test-gpu")
needs_triton = pytest.mark.skipif(not operators.INSTALLED, reason=operators.REASON)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    drop = ("VISPRUNER_", "TRITON_INTERPRET", "PYTHONPATH", "PYTEST_", "MAKE")
    kept = {n: v for n, v in os.environ.items() if not n.startswith(drop)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


@no_gpu
def test_without_a_gpu_it_prints_the_reason(tmp_path):
    # Some packages install their tests as a package named `tests`.
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    done = run(*COMMAND, "--maxfail=1", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"test-gpu: PyTorch {torch.__version__}")
    assert "finds no NVIDIA GPU" in line


@no_gpu
@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_starts_the_command():
    make = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    done = run("-c", make, "make", "test-gpu", f"PYTHON={sys.executable}", "PYTEST_ARGS=-x")
    assert done.returncode == 2
    assert f"{sys.executable} tests/support/gpu_command.py -x\n" in done.stdout
    assert "finds no NVIDIA GPU" in done.stderr


def test_without_pytorch_it_names_the_missing_module():
    # -S: without site-packages.
    done = run("-S", *COMMAND)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"test-gpu: {sys.executable} has no ")


@no_gpu
def test_without_a_gpu_tests_are_skipped_unless_the_device_is_named():
    one = ("-m", "pytest", "-q", "-m", "gpu", "tests/gpu/test_gpu_scores.py")
    one += ("-k", "test_scores_of_one_token")
    done = run(*one)
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout
    done = run(*one, VISPRUNER_TEST_DEVICE="cuda")
    assert done.returncode == 1
    assert "finds no NVIDIA GPU" in done.stdout


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """A function that writes files of tests and runs the command on them, as if there were a GPU.
    It returns the status, the lines before the summary, and the summary."""
    monkeypatch.setattr(gpu_command, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_command, "SIMULATED", False)
    monkeypatch.setattr(gpu_command, "GRACE", 1.0)
    monkeypatch.setattr(gpu_command, "unavailable", lambda: "")
    monkeypatch.setattr(gpu_command, "_sanitizer", lambda: None)
    monkeypatch.setattr(gpu_command, "native", SimpleNamespace(REASON="not built"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\nmarkers = ["gpu"]\nfilterwarnings = ["error"]\n'
    )
    for folder in ("gpu", "support"):
        (tmp_path / "tests" / folder).mkdir(parents=True)

    def main(files: dict[str, str], *arguments: str) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr(
            gpu_command, "FILES", tuple(name for name in files if name[:5] == "test_")
        )
        for name, text in files.items():
            start = "import pytest\npytestmark = pytest.mark.gpu\n"
            folder = "gpu" if name.startswith("test_") else "support"
            (tmp_path / "tests" / folder / name).write_text(start + text)
        status = gpu_command.main(list(arguments))
        lines = capsys.readouterr().out.splitlines()
        first = lines.index("test-gpu: summary")
        return status, lines[:first], lines[first + 1 :]

    return main


GOOD = "def test_good(): pass\n"
SKIPPED = "def test_skipped(): pytest.skip('one GPU')\n"
BAD = "def test_bad(): assert 0\n"


def states(summary: list[str]) -> dict[str, str]:
    """The state of each file or tool in the summary."""
    found = [line for line in summary if line.startswith(("  passed ", "  FAILED ", "  NOT RUN "))]
    return {line[10:].split()[0]: line[2:9].strip() for line in found}


def test_the_summary_lists_every_file_and_tool(command):
    status, before, summary = command({"test_a.py": GOOD + SKIPPED, "test_b.py": GOOD + BAD})
    assert status == 1
    assert states(summary) == {
        "test_a.py": "passed",
        "test_b.py": "FAILED",
        "native": "NOT RUN",
        "memcheck": "NOT RUN",
        "racecheck": "NOT RUN",
    }
    text = "\n".join(summary)
    assert "1 passed, 1 skipped in " in text
    assert "SKIPPED [1] tests/gpu/test_a.py:4: one GPU" in text
    assert "1 failed, 1 passed in " in text
    assert "FAILED tests/gpu/test_b.py::test_bad" in text
    assert "compute-sanitizer is not installed" in text
    assert summary[-1] == "test-gpu: FAILED"
    # Files run at the same time, so each line begins with the name of its file.
    assert before[0].startswith("test-gpu: a GPU, PyTorch")
    assert {line.split(": ")[0] for line in before[1:]} == {"test_a", "test_b"}


def test_it_passes_if_a_step_passed_and_none_failed(command):
    status, _, summary = command({"test_a.py": GOOD}, "--only", "tests")
    assert status == 0
    others = dict.fromkeys(gpu_command.STEPS[1:], "NOT RUN")
    assert states(summary) == {"test_a.py": "passed", **others}
    assert summary[-1] == "test-gpu: passed"
    status, _, summary = command({"test_a.py": GOOD}, "--only", "racecheck")
    assert status == 1, "nothing was run"


def test_the_native_step_runs_its_files_with_the_cuda_kernels(command, monkeypatch):
    text = """import os
def test_backend():
    assert os.environ.get("VISPRUNER_KERNELS_BACKEND", "auto") == "native"
"""
    monkeypatch.setattr(gpu_command, "NATIVE_FILES", ("test_b.py",))
    status, _, summary = command({"test_a.py": GOOD, "test_b.py": text})
    assert (status, states(summary)["native"]) == (1, "NOT RUN")
    assert any("CUDA kernels: not built" in line for line in summary)
    monkeypatch.setattr(gpu_command, "native", SimpleNamespace(REASON=""))
    status, before, summary = command({"test_a.py": GOOD, "test_b.py": text})
    assert status == 1
    assert [line[:9] for line in summary if "test_b.py" in line[10:]][:1] == ["  FAILED "]
    assert any("passed  native test_b.py" in line for line in summary)
    assert any(line.startswith("native test_b: ") for line in before)
    status, _, summary = command({"test_a.py": GOOD, "test_b.py": text}, "--only", "native")
    assert status == 0
    assert sum("test_b.py" in line for line in summary) == 1


def test_a_file_without_tests_fails_unless_others_are_selected(command):
    files = {"test_a.py": GOOD, "test_b.py": ""}
    status, _, summary = command(files, "-x")
    assert (status, states(summary)["test_b.py"]) == (1, "FAILED")
    status, _, summary = command(files, "-k", "good")
    assert (status, states(summary)["test_b.py"]) == (0, "NOT RUN")
    status, _, summary = command(files, "-k", "nothing_has_this_name")
    assert status == 1


def test_warnings_and_plugins_of_pytest_are_ignored(command, monkeypatch):
    """Warnings differ by version; plugins and options of the machine are not part of the tests."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    text = """import os, warnings
warnings.warn("at import", DeprecationWarning)
def test_environment():
    assert os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] == os.environ["PYTHONUNBUFFERED"] == "1"
"""
    status, before, _ = command({"test_a.py": text})
    assert status == 0, before


@pytest.fixture
def late(monkeypatch):
    """A function that makes processes run out of time, on machines of any speed.

    It takes a dict from a command-line argument to a file and a count. If a process has this
    argument, each of its first `count` calls of `wait` times out as soon as the file exists. The
    function returns a list of the time limits of the first `wait` of each such process."""

    def set_late(files: dict[str, tuple[Path, int]]) -> list[float]:
        limits = []

        class Process(subprocess.Popen):
            waits = 0

            def wait(self, timeout: float | None = None) -> int:
                name = next((n for n in files if n in self.args), None)
                if name is None or self.waits == files[name][1]:
                    return super().wait(timeout)
                self.waits += 1
                if self.waits == 1:
                    limits.append(timeout)
                while not files[name][0].exists():
                    assert self.poll() is None, "it has ended"
                    time.sleep(0.05)
                raise subprocess.TimeoutExpired(self.args, timeout)

        names = ("PIPE", "STDOUT", "TimeoutExpired")
        other = SimpleNamespace(Popen=Process, **{n: getattr(subprocess, n) for n in names})
        monkeypatch.setattr(gpu_command, "subprocess", other)
        # Processes that are not late may be slow.
        monkeypatch.setattr(gpu_command, "GRACE", 60.0)
        return limits

    return set_late


def test_out_of_time_it_prints_the_failures_so_far(command, late, tmp_path):
    """Also for a process that ignores SIGINT and must be killed."""
    long = """def test_long():
    import signal, time
    from pathlib import Path
    {}
    Path(__file__).with_suffix(".late").touch()
    time.sleep(600)
"""
    stops = BAD + long.format("")
    ignores = BAD + long.format("signal.signal(signal.SIGINT, signal.SIG_IGN)")
    tests = tmp_path / "tests" / "gpu"
    limits = late(
        {
            "tests/gpu/test_a.py": (tests / "test_a.late", 1),
            "tests/gpu/test_b.py": (tests / "test_b.late", 2),
        }
    )
    arguments = ("--only", "tests", "--limit", "400")
    status, before, summary = command({"test_a.py": stops, "test_b.py": ignores}, *arguments)
    assert len(limits) == 2
    assert all(0 < limit <= 400 for limit in limits)
    assert status == 1
    assert states(summary)["test_a.py"] == states(summary)["test_b.py"] == "FAILED"
    assert sum("out of time after" in line for line in summary) == 2
    failed = [line for line in before if "::test_bad FAILED" in line]
    assert sorted(line[:6] for line in failed) == ["test_a", "test_b"]
    assert any("FAILED tests/gpu/test_a.py::test_bad" in line for line in summary)


SANITIZER = """#!/bin/sh
case $2 in {tool}) {does};; esac
echo 2 calls agree
echo ERROR SUMMARY: 0 errors
"""


@pytest.mark.parametrize(
    ("tool", "does", "state", "why"),
    [
        ("neither", "", "passed", "checks shared memory only"),
        ("racecheck", "exec sleep 600", "FAILED", "out of time"),
        ("racecheck", "echo 'Timeout (0:00:01)!'; exit 1", "FAILED", "out of time"),
        ("racecheck", "exit 86", "FAILED", "status 86"),
        ("racecheck", "echo they agree; exit 0", "FAILED", "status 0"),
        ("racecheck", "echo RACECHECK SUMMARY: 0 hazards; exit 0", "FAILED", "status 0"),
        ("racecheck", "echo Device not supported; exit 1", "NOT RUN", "cannot check this device"),
    ],
)
def test_the_summary_has_the_result_of_each_tool(
    command, late, monkeypatch, tmp_path, tool, does, state, why
):
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER.format(tool=tool, does=does))
    program.chmod(0o755)
    monkeypatch.setattr(gpu_command, "_sanitizer", lambda: str(program))
    files = {"sanitize.py": "import sys; assert float(sys.argv[1]) > 0; print('agree')"}
    if "sleep" in does:
        late({"racecheck": (program, 1)})
    only = ("--only", "memcheck", "racecheck", "--limit", "600")
    status, _, summary = command(files, *only)
    assert status == (state == "FAILED")
    assert states(summary) == {
        "tests": "NOT RUN",
        "native": "NOT RUN",
        "alone": "passed",
        "memcheck": "passed",
        "racecheck": state,
    }
    (line,) = (line for line in summary if "racecheck" in line)
    assert why in line
    assert "shared memory" not in next(line for line in summary if "memcheck" in line)


def test_no_tool_runs_if_the_calls_fail_without_it(command, monkeypatch):
    monkeypatch.setattr(gpu_command, "_sanitizer", lambda: "compute-sanitizer")
    status, _, summary = command({"sanitize.py": "raise SystemExit(3)"}, "--only", "memcheck")
    assert status == 1
    others = dict.fromkeys(gpu_command.STEPS, "NOT RUN")
    assert states(summary) == {**others, "alone": "FAILED"}


@pytest.mark.kernels
@needs_triton
def test_the_tests_pass_in_the_interpreter():
    """All tests that need no CUDA, except those that take longest."""
    long = "packed_images or batch or every_time or not_finite or random_scores or models"
    done = run(*COMMAND, "-k", f"not ({long})", VISPRUNER_TEST_DEVICE="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "test-gpu: passed"
    done = run(*COMMAND, "-k", "nothing_has_this_name", VISPRUNER_TEST_DEVICE="cpu")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "test-gpu: FAILED"


@pytest.mark.kernels
@needs_triton
def test_the_calls_of_the_sanitizer_pass_in_the_interpreter():
    simulated = {"TRITON_INTERPRET": "1", "VISPRUNER_KERNELS_BACKEND": "triton"}
    path = {"PYTHONPATH": str(ROOT), "VISPRUNER_TEST_DEVICE": "cpu"}
    done = run("tests/support/sanitize.py", **simulated, **path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("sanitize: 30 calls")
