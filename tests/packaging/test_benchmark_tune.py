"""`python -m benchmarks.tune` on a stand-in for a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_cuda
import pytest
import torch

from benchmarks import shapes, tune
from benchmarks.select import MATCHINGS
from vispruner_kernels import _backends, _tuned, reference
from vispruner_kernels._triton import operators

ROOT = Path(__file__).parents[2]
VARIANTS = [{"tile": 48, "fit": 0}, {"tile": 64, "fit": 1}, {"tile": 64, "fit": 2}]
# Seconds by number of a variant; 0 is the launcher's choice.
SECONDS = {0: 2e-3, 1: 3e-3, 2: 1e-3, 3: 2e-3}
SHAPES = [shapes.Shape("tiny", 2, 40, 16, keep, torch.float16) for keep in (16, 8)]


class Backend:
    """A launcher and its operator, whose kernel takes the seconds of the variant in use."""

    def __init__(self, gpu, variants):
        self.gpu, self.VARIANTS, self.VARIANT = gpu, variants, None
        self.seconds, self.wrong, self.unfit = dict(SECONDS), [], []

    def select(self, features, scores, keep, *rule):
        number = self.VARIANT
        if number in self.unfit:
            raise ValueError("its arrays for 40 tokens do not fit in the shared memory")
        seconds = self.seconds.get((number, keep), self.seconds[number])
        self.gpu.launch(seconds)
        return reference.select(features, scores, keep, *rule).roll(
            int((number, keep) in self.wrong)
        )


@pytest.fixture
def gpu(monkeypatch):
    yield from fake_cuda.install(monkeypatch)


@pytest.fixture
def backends(gpu, monkeypatch):
    found = SimpleNamespace(
        native=Backend(gpu, VARIANTS), triton=Backend(gpu, [{"block_n": 32}, {"block_n": 64}])
    )
    for name, backend in vars(found).items():
        monkeypatch.setitem(sys.modules, f"stand_in_{name}", backend)
        monkeypatch.setitem(tune.LAUNCHERS, name, f"stand_in_{name}")
        table = _backends.IMPLEMENTATIONS["select", "cuda"]
        monkeypatch.setitem(table, name, backend.select)
        monkeypatch.setitem(_backends.SERVES, (name, "cuda"), True)
    monkeypatch.setattr(operators, "INSTALLED", True)
    monkeypatch.setattr(tune, "cases", lambda device: SHAPES)
    monkeypatch.setattr(_tuned, "capability", lambda device: "9.0")
    return found


def run_tune(tmp_path, *argv):
    file = tmp_path / "result.json"
    status = tune.main(["--device", "cuda", "--rounds", "2", "--json", str(file), *argv])
    return status, json.loads(file.read_text())["rows"]


def written(variants, backend="native"):
    """The variants of a table by matching, which has one shape."""
    rows = variants[backend]
    assert {(row["images"], row["tokens"], row["capability"]) for row in rows} == {(2, 40, "9.0")}
    return {row["matching"]: row["variant"] for row in rows}


def test_every_variant_is_checked_and_timed(backends, tmp_path, capsys):
    backends.native.unfit = [3]
    status, rows = run_tune(tmp_path)
    assert status == 0
    assert [(row["keep"], row["matching"], row["backend"], row["number"]) for row in rows] == [
        (keep, matching, *each)
        for keep in (16, 8)
        for matching in MATCHINGS
        for each in (*(("native", n) for n in range(4)), *(("triton", n) for n in range(3)))
    ]
    for row in rows:
        if (row["backend"], row["number"]) == ("native", 3):
            assert row[tune.TIME] == "does not fit"
            continue
        expected = SECONDS[row["number"]]
        assert row[tune.TIME]["p50"] == pytest.approx(expected * 1e6)
        assert row["own / this"] == pytest.approx(2e-3 / expected)
        assert row["best"] == ("*" if row["number"] == 2 else None)
    assert "tile 64, fit 1  1000.000" in " ".join(capsys.readouterr().out.split("   "))
    # The launchers use the table again.
    assert backends.native.VARIANT is backends.triton.VARIANT is None


@pytest.mark.skipif(not operators.INSTALLED, reason="Triton is not installed")
def test_the_tiles_of_the_triton_kernel_are_tuned(backends, gpu, monkeypatch, tmp_path):
    """With Triton's own launcher: only the kernel is a stand-in."""
    from vispruner_kernels._triton import launch
    from vispruner_kernels._triton import select as kernel

    def select(*args):
        kernel.select(*args)
        return reference.select(*args)

    monkeypatch.setattr(launch, "run", lambda *args, **meta: gpu.launch(64e-3 / meta["BLOCK_N"]))
    monkeypatch.setitem(tune.LAUNCHERS, "triton", kernel.__name__)
    monkeypatch.setitem(_backends.IMPLEMENTATIONS["select", "cuda"], "triton", select)
    file = tmp_path / "tuned.json"
    status, rows = run_tune(tmp_path, "--write", str(file))
    assert status == 0
    times = [row[tune.TIME]["p50"] for row in rows if row["backend"] == "triton"]
    assert times == pytest.approx([2e3, 2e3, 1e3] * 4)
    expected = {name: {"block_n": 64} for name in MATCHINGS}
    assert written(json.loads(file.read_text()), "triton") == expected


def test_rows_of_other_gpus_and_backends_stay(backends, monkeypatch, tmp_path):
    file = tmp_path / "tuned.json"
    old = {"capability": "9.0", "matching": "bipartite", "images": 9, "tokens": 9, "variant": None}
    others = [old | {"capability": "8.0"}, old | {"capability": "10.0"}]
    file.write_text(json.dumps({"native": [old, *others], "triton": [old, *others]}))
    monkeypatch.setitem(_backends.SERVES, ("triton", "cuda"), False)
    status, rows = run_tune(tmp_path, "--write", str(file))
    assert status == 0
    assert {row[tune.TIME] for row in rows if row["backend"] == "triton"} == {"not installed"}
    table = json.loads(file.read_text())
    assert table["native"][:2] == others
    assert [row["matching"] for row in table["native"][2:]] == [*MATCHINGS]
    assert table["triton"] == [old, *others]


def test_the_table_has_a_variant_only_if_it_is_faster_for_every_budget(backends, tmp_path):
    file = tmp_path / "tuned.json"
    backends.native.seconds[2, 8] = 1.97e-3
    backends.native.seconds[3] = 1.9e-3
    backends.triton.seconds[2] = 1.97e-3
    assert run_tune(tmp_path, "--write", str(file))[0] == 0
    table = json.loads(file.read_text())
    # Number 2 is the fastest for a budget of 16, and less than 2 % faster than the launcher's
    # choice for a budget of 8.
    assert written(table) == {name: VARIANTS[2] for name in MATCHINGS}
    # Null, so that the variant of a larger shape does not serve this one.
    assert written(table, "triton") == dict.fromkeys(MATCHINGS)


@pytest.mark.parametrize("budgets", [(8, 16), (8,)])
def test_a_wrong_variant_is_a_failure_and_not_in_the_table(budgets, backends, tmp_path, capsys):
    file = tmp_path / "tuned.json"
    backends.native.wrong = [(2, keep) for keep in budgets]
    status, rows = run_tune(tmp_path, "--write", str(file))
    assert status == 1
    assert "WRONG" in capsys.readouterr().out
    wrong = [row for row in rows if row[tune.TIME] == "WRONG"]
    assert {(row["backend"], row["number"]) for row in wrong} == {("native", 2)}
    assert len(wrong) == 2 * len(budgets)
    table = json.loads(file.read_text())
    assert written(table) == dict.fromkeys(MATCHINGS)
    assert written(table, "triton") == {name: {"block_n": 64} for name in MATCHINGS}


def test_nothing_is_written_where_the_launchers_choice_is_wrong(backends, tmp_path):
    file = tmp_path / "tuned.json"
    backends.native.wrong = [(0, 8)]
    assert run_tune(tmp_path, "--write", str(file))[0] == 1
    assert json.loads(file.read_text())["native"] == []


def test_the_committed_table_is_in_the_form_that_the_command_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(_tuned, "capability", lambda device: "none")
    file = shutil.copy(_tuned.PATH, tmp_path / "tuned.json")
    tune.write(file, {"native": [], "triton": []})
    assert file.read_text() == _tuned.PATH.read_text()


def test_simulated_times_are_beside_their_variant_only(monkeypatch):
    variant = tune.SIMULATED[0]["variant"]
    shape = tune.cases("cuda")[0]
    monkeypatch.setattr(_tuned, "capability", lambda device: "9.0")
    assert tune.simulated(shape, "bipartite", "native", variant) == 94.8
    assert tune.simulated(shape, "pairwise", "native", variant) == 49.4
    assert tune.simulated(shape, "pairwise", "native", variant | {"fit": 1}) is None
    assert tune.simulated(shape._replace(batch=2), "pairwise", "native", variant) is None
    monkeypatch.setattr(_tuned, "capability", lambda device: "8.0")
    assert tune.simulated(shape, "bipartite", "native", variant) is None


def test_cases_are_the_shapes_of_select_and_batches():
    cases = tune.cases("cuda")
    assert cases[: len(shapes.SELECT["cuda"])] == shapes.SELECT["cuda"]
    sizes = [(shape.batch, shape.tokens) for shape in cases]
    assert {(16, 576), (64, 576), (1, 729), (16, 2880)} <= {*sizes}
    assert len({*cases}) == len(cases)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "cpu"], "only the GPU kernels have variants"),
        (["--device", "cuda", "--quick", "--write"], "--quick measures one shape only"),
    ],
)
def test_options_that_cannot_tune_are_errors(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        tune.main(argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_tune_gpu_writes_the_table_with_the_python_given(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$*" > {tmp_path}/log\n')
    python.chmod(0o755)
    environment = {n: v for n, v in os.environ.items() if not n.startswith("MAKE")}
    command = ["make", "tune-gpu", f"PYTHON={python}", "BENCH_ARGS=--rounds 9"]
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    expected = "-m benchmarks.tune --device cuda --write --json --rounds 9\n"
    assert (tmp_path / "log").read_text() == expected
