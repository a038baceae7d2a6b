"""`python -m benchmarks.backends`, on the CPU and on a stand-in for a GPU."""

from __future__ import annotations

import json

import fake_cuda
import pytest
import torch

from benchmarks import backends, select, shapes
from vispruner_kernels import _backends, _native, reference
from vispruner_kernels._triton import operators

SELECT_ON_CUDA = _backends.IMPLEMENTATIONS["select", "cuda"]


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    fake_cuda.small_limits(monkeypatch)


@pytest.fixture
def gpu(monkeypatch):
    yield from fake_cuda.install(monkeypatch)


def run_backends(tmp_path, *argv, device="cuda"):
    file = tmp_path / "result.json"
    status = backends.main(["--device", device, "--rounds", "2", "--json", str(file), *argv])
    return status, json.loads(file.read_text())


def test_native_and_reference_on_a_cpu(tmp_path, capsys):
    status, result = run_backends(
        tmp_path, "--quick", "--tokens", "576", "--keep", "64", device="cpu"
    )
    printed = capsys.readouterr().out
    assert status == 0
    assert [(row["N"], row["matching"]) for row in result["rows"]] == [
        (576, "bipartite"),
        (576, "pairwise"),
    ]
    for row, counts in zip(result["rows"], result["summary"], strict=True):
        assert row["reference bits"] == "same"
        assert row["reference wall ms"]["rounds"] == row["published ms"]["rounds"] == 2
        assert (counts["N"], counts["matching"]) == (row["N"], row["matching"])
        assert (counts["cases"], counts["reference right"]) == (1, 1)
        if _native.INSTALLED:
            assert row["native bits"] == "same"
            assert row["native wall ms"]["p50"] > 0
            assert row["reference / native"] > 0
            assert row["published / native"] > 0
            assert counts["native right"] == 1
            assert counts["native faster"] == (row["reference / native"] > 1)
    assert "in every case" in printed


def stand_in(gpu, seconds, turn=0):
    """A backend whose kernel takes `seconds`, and whose answer is rolled by `turn`."""

    def select(*args):
        gpu.launch(seconds)
        return reference.select(*args).roll(turn)

    return select


@pytest.fixture
def two_backends(gpu, monkeypatch):
    """Two backends on the stand-in for a GPU; the first is twice as fast."""
    cases = [shapes.Shape("tiny", batch, 40, 16, 16, torch.float16) for batch in (1, 6)]
    monkeypatch.setitem(shapes.BACKENDS, "cuda", cases)
    for backend, seconds in (("native", 1e-3), ("triton", 2e-3)):
        monkeypatch.setitem(_backends.SERVES, (backend, "cuda"), True)
        monkeypatch.setitem(SELECT_ON_CUDA, backend, stand_in(gpu, seconds))
    monkeypatch.setattr(operators, "INSTALLED", True)
    return gpu


def test_ratios_on_a_gpu_are_between_device_times(two_backends, monkeypatch, tmp_path):
    loop = select.select_published

    def published(*args):
        two_backends.launch(5e-3)
        return loop(*args)

    monkeypatch.setattr(select, "select_published", published)
    # `make bench-gpu` gives all races the same options.
    status, result = run_backends(tmp_path, "--compile", "all")
    assert status == 0
    assert [row["B"] for row in result["rows"]] == [1, 1, 6, 6]
    for row in result["rows"]:
        assert row["clock"] == "device"
        assert row["native bits"] == row["triton bits"] == "same"
        assert row["native device us"]["p50"] == pytest.approx(1e3)
        assert row["triton device us"]["p50"] == pytest.approx(2e3)
        assert row["native host us"]["p50"] > 0
        assert row["triton / native"] == pytest.approx(2)
        ratio = pytest.approx(5) if row["B"] in backends.PUBLISHED else None
        assert row["published / native"] == ratio
    for counts in result["summary"]:
        assert counts["cases"] == counts["native right"] == counts["native faster"] == 2
        assert counts["least triton / native"] == pytest.approx(2)
        assert counts["in every case"] == "yes"


def test_large_batches_have_only_a_wall_time(two_backends, monkeypatch, tmp_path):
    monkeypatch.setattr(backends, "PAIRS", 40**2)
    status, result = run_backends(tmp_path)
    assert status == 0
    assert [row["clock"] for row in result["rows"]] == ["device", "device", "wall", "wall"]
    for row in result["rows"][2:]:
        assert row["native wall us"]["p50"] > 0
        assert row["native device us"] is row["native host us"] is None
        assert row["triton / native"] > 0


@pytest.mark.parametrize("wrong", ["native", "triton"])
def test_a_wrong_backend_is_a_failure(wrong, two_backends, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SELECT_ON_CUDA, wrong, stand_in(two_backends, 1e-4, turn=1))
    status, result = run_backends(tmp_path, "--batch", "6")
    assert status == 1
    assert "WRONG" in capsys.readouterr().out
    for row in result["rows"]:
        assert row[f"{wrong} bits"] == row[f"{wrong} device us"] == "WRONG"
        assert row["triton / native"] is None
    for counts in result["summary"]:
        assert (counts["cases"], counts[f"{wrong} right"]) == (1, 0)
        assert counts["in every case"] == "no"


@pytest.mark.parametrize("missing", ["native", "triton"])
def test_a_missing_backend_is_no_failure(missing, two_backends, monkeypatch, tmp_path):
    monkeypatch.setitem(_backends.SERVES, (missing, "cuda"), False)
    status, result = run_backends(tmp_path, "--quick")
    assert status == 0
    for row in result["rows"]:
        assert row[f"{missing} bits"] == row[f"{missing} device us"] == "not installed"
        assert row["triton / native"] is None
    assert [counts["in every case"] for counts in result["summary"]] == ["no", "no"]


def test_options_that_leave_no_case_are_an_error(capsys):
    with pytest.raises(SystemExit) as error:
        backends.main(["--device", "cpu", "--batch", "3", "--keep", "64"])
    assert error.value.code == 2
    assert "no case on this device has all of {'batch': [3]" in capsys.readouterr().err
