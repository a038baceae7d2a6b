"""`python -m tests.gpu` where no GPU is; the tests that it runs, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vispruner_kernels._triton import operators

ROOT = Path(__file__).parent.parent
COMMAND = ["-m", "tests.gpu"]

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make test-gpu")
needs_triton = pytest.mark.skipif(not operators.INSTALLED, reason=operators.REASON)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    drop = ("VISPRUNER_", "TRITON_INTERPRET", "PYTHONPATH", "PYTEST_")
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
def test_without_a_gpu():
    done = run(*COMMAND, "--maxfail=1")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"tests.gpu: PyTorch {torch.__version__}")
    assert "finds no NVIDIA GPU" in line


def test_without_pytorch():
    # No site-packages.
    done = run("-S", *COMMAND)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"tests.gpu: {sys.executable} has no ")


@no_gpu
def test_tests_are_skipped_or_fail():
    one = ("-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu_scores.py", "-k", "test_one_token")
    done = run(*one)
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout
    # Asked for a device that is not there.
    done = run(*one, VISPRUNER_TEST_DEVICE="cuda")
    assert done.returncode == 1
    assert "finds no NVIDIA GPU" in done.stdout


@pytest.mark.slow
@needs_triton
def test_in_the_interpreter():
    """All that needs no CUDA, but what takes longest."""
    long = "packed_images or batch or every_time or not_finite or random_scores or models"
    done = run(*COMMAND, "-k", f"not ({long})", VISPRUNER_TEST_DEVICE="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "tests.gpu: passed"
    done = run(*COMMAND, "-k", "nothing_has_this_name", VISPRUNER_TEST_DEVICE="cpu")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "tests.gpu: FAILED"


@pytest.mark.slow
@needs_triton
def test_what_the_sanitizer_watches():
    simulated = {"TRITON_INTERPRET": "1", "VISPRUNER_KERNELS_BACKEND": "triton"}
    path = {"PYTHONPATH": str(ROOT), "VISPRUNER_TEST_DEVICE": "cpu"}
    done = run("tests/sanitize.py", **simulated, **path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("tests.sanitize: 30 calls")
