"""The demo: its report, its picture and its answers."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
pytest.importorskip("transformers")

import demo_runs  # noqa: E402
from demo_runs import pixels_of, run  # noqa: E402

from vispruner_kernels import cls_scores, select_topk  # noqa: E402
from vispruner_kernels.demo import compare, encoder, picture, tiny_vlm  # noqa: E402
from vispruner_kernels.integrations.transformers import prune_inputs  # noqa: E402
from vispruner_kernels.methods import VisPruner  # noqa: E402
from vispruner_kernels.published import select_published  # noqa: E402

COMMAND = [sys.executable, "-m", "vispruner_kernels.demo"]
# The package that this process tests, installed or not.
PYTHONPATH = [str(Path(picture.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(PYTHONPATH)}
NUMBER = r"\d+\.\d\d"
SYSTEMS = ["VisPruner", "FasterVLM", "FoPru rank", "FoPru row", "Random"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the demo does, for the same bits, and before the fixtures of the module."""
    with demo_runs.one_thread():
        yield


@pytest.fixture(scope="module")
def image():
    return picture.to_tensor(picture.load_photo(picture.SAMPLE), 192)


@pytest.fixture(scope="module")
def encoded(image):
    return encoder.encode(image)


@pytest.fixture(scope="module")
def results(image, encoded):
    """The results of the default run, computed in this process."""
    known = picture.sample_answers().items()
    questions = [(tiny_vlm.inputs(image, question), truth) for question, truth in known]
    return compare.evaluate(encoded, 64, questions)


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """The command of the README, in an empty folder and a process of its own."""
    folder = tmp_path_factory.mktemp("default")
    done = subprocess.run(
        COMMAND, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    return done, folder / "vispruner_demo.png"


def rows_of(report) -> dict[str, list[str]]:
    """The cells of the report's table, by system."""
    lines = [line for line in report.splitlines() if re.match(r"[\w ]{10} +\d+ +\d+\.\d%", line)]
    return {line[:10].strip(): re.split(" {2,}", line[12:].strip()) for line in lines}


# The report.


def test_report_begins_with_the_published_loop(default_run, encoded):
    done, _ = default_run
    assert done.returncode == 0
    # On a fresh machine Matplotlib may write there that it builds its font cache.
    assert [line for line in done.stderr.splitlines() if "font cache" not in line] == []
    first, second, *_ = done.stdout.splitlines()
    match = re.fullmatch(
        rf"published loop ({NUMBER}) ms, ours ({NUMBER}) ms, ratio (\d+\.\d), (\d+) of 64 tokens "
        r"equal to the float64 loop \(the loop in float32: (\d+)\)",
        first,
    )
    assert match, first
    published, ours, ratio = (float(match[i]) for i in (1, 2, 3))
    # All three are rounded.
    assert published / (ours + 0.005) - 0.1 <= ratio <= published / max(ours - 0.005, 1e-9) + 0.1
    scores = cls_scores(encoded.q, encoded.k)
    exact = set(select_published(encoded.features.double(), scores.double(), 64)[0].tolist())
    for group, select in ((4, VisPruner(64).select), (5, lambda f, s: select_published(f, s, 64))):
        assert int(match[group]) == len(exact & set(select(encoded.features, scores)[0].tolist()))
    assert "float32 features [1, 576, 128] on the CPU, 1 thread, median of 11 runs" in second
    assert "  sample.png, cropped to its central square, 24 x 24 patches, tiny VLM\n" in done.stdout


def test_report_names_the_error_of_the_published_loop(encoded):
    with pytest.raises(IndexError):
        select_published(encoded.features, cls_scores(encoded.q, encoded.k), 63)
    assert compare.compare_with_loop(encoded, 63) == [
        "published loop raises IndexError at a budget of 63 tokens, ours keeps exactly 63"
    ]


def test_report_has_a_row_per_system(default_run, results):
    rows = rows_of(default_run[0].stdout)
    assert list(rows) == [compare.ALL, *SYSTEMS]
    assert [row[0] for row in rows.values()] == ["576", "64", "64", "64", "48", "64"]
    for result in results:
        row = rows[result.name]
        assert row[2:5] == [
            f"{result.attention:.1%}", f"{result.coverage:.3f}", f"{result.redundancy:.3f}"
        ]  # fmt: skip
    # Duplicate removal covers more of the picture, with tokens that are less alike.
    coverage = {name: float(row[3]) for name, row in rows.items()}
    redundancy = {name: float(row[4]) for name, row in rows.items()}
    assert coverage["VisPruner"] > coverage["FasterVLM"] + 0.2
    assert redundancy["VisPruner"] == min(redundancy.values())


def test_closed_pipe_leaves_the_picture_and_no_traceback(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        COMMAND, cwd=tmp_path, env=ENVIRONMENT, stdout=writer, stderr=subprocess.PIPE, timeout=300
    )
    os.close(writer)
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if b"font cache" not in line] == []
    pixels_of(tmp_path / "vispruner_demo.png")


def test_coverage_and_redundancy_by_hand():
    cosine = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.25], [0.0, 0.25, 1.0]])
    assert compare.coverage(cosine, torch.tensor([1])) == pytest.approx((0.5 + 1 + 0.25) / 3)
    assert compare.redundancy(cosine, torch.tensor([0, 1])) == pytest.approx(0.5)
    assert compare.redundancy(cosine, torch.arange(3)) == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert math.isnan(compare.redundancy(cosine, torch.tensor([2])))


@pytest.mark.parametrize("keep", [1, 23, 24, 575, 576])
def test_every_system_keeps_its_budget(encoded, keep):
    results = {result.name: result for result in compare.evaluate(encoded, keep)}
    assert len(results.pop(compare.ALL).kept) == 576
    row = results.pop("FoPru row", None)
    assert (row is None) == (keep < 24)
    assert row is None or len(row.kept) == keep // 24 * 24
    for result in results.values():
        assert len(result.kept) == keep
        assert torch.equal(result.kept, result.kept.unique())
    scores = cls_scores(encoded.q, encoded.k)
    important = select_topk(scores, keep // 2)[0] if keep > 1 else torch.arange(0)
    assert torch.equal(results["VisPruner"].important, important)
    assert torch.equal(results["FasterVLM"].important, results["FasterVLM"].kept)
    assert len(results["Random"].important) == 0
    if keep == 576:
        assert results["VisPruner"].attention == pytest.approx(1)
        assert results["VisPruner"].coverage == pytest.approx(1)


def test_budget_of_one_token(tmp_path, capsys):
    report = run(capsys, "--keep", 1, "--out", tmp_path / "one.PNG")
    assert "published loop raises RuntimeError at a budget of 1 tokens, ours keeps exactly 1\n" in (
        report
    )
    assert "FoPru row" not in rows_of(report)
    pixels_of(tmp_path / "one.PNG")


def test_picture_has_a_panel_per_system(default_run, results):
    pixels = pixels_of(default_run[1])
    cell = picture.PANEL // 24
    for index, result in enumerate(results):
        left, top = picture.panel_origin(index)
        answer = pixels[top - picture.CAPTION : top, left + 165 : left + picture.PANEL]
        red, green = answer[..., 0], answer[..., 1]
        assert (green > red + 60).any() == result.right
        assert (red > green + 60).any() != result.right
        colours = {"VisPruner": picture.DIVERSE, "Random": picture.CHANCE}
        for token in result.kept.tolist() if index else ():
            y, x = top + token // 24 * cell, left + token % 24 * cell
            important = token in result.important
            colour = picture.IMPORTANT if important else colours[result.name]
            want = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            assert np.abs(pixels[y : y + cell, x : x + 4] - want).sum(-1).min() < 60


# The answers.


def test_default_run_answers_the_first_question(default_run, results):
    report = default_run[0].stdout
    assert "\nquestion: what is the number ?   (true answer: 4 3)\n" in report
    rows = rows_of(report)
    for result in results:
        assert result.right == (result.answer == "4 3")
        mark = "right" if result.right else "wrong"
        assert rows[result.name][-3:] == [result.answer, mark, f"{result.correct} of 8"]


def test_answers_are_those_of_prune_inputs_and_greedy_decoding(image, encoded):
    model, words = tiny_vlm.load(), tiny_vlm.tokenizer()
    methods = compare.systems(64, 24)
    for question, truth in list(picture.sample_answers().items())[:3]:
        given = tiny_vlm.inputs(image, question)
        for result in compare.evaluate(encoded, 64, [(given, truth)]):
            if result.name == compare.ALL:
                assert result.answer == tiny_vlm.answer(given)
                continue
            pruned = prune_inputs(model, given, methods[result.name])
            assert torch.equal(pruned.kept[0], result.kept)
            # Every step of `generate`, without a cache.
            ids = []
            embeds = pruned["inputs_embeds"]
            while len(ids) < 4 and (not ids or ids[-1] != words.eos_token_id):
                with torch.no_grad():
                    logits = model(inputs_embeds=embeds).logits
                ids.append(int(logits[0, -1].argmax()))
                last = model.get_input_embeddings()(torch.tensor([ids[-1:]]))
                embeds = torch.cat([embeds, last], 1)
            want = words.decode(ids, skip_special_tokens=True) or "(nothing)"
            # test_answers_are_spelt_as_the_true_ones tests the spaces.
            assert result.answer.replace(" ", "") == want.replace(" ", "")
            assert (result.right, result.correct) == (result.answer == truth,) * 2


def test_answers_are_spelt_as_the_true_ones(monkeypatch):
    words = tiny_vlm.tokenizer()
    given = {"input_ids": torch.zeros(1, 0, dtype=torch.int64)}
    for truth in ("4 8", "3", *picture.sample_answers().values()):
        ids = words(truth, return_tensors="pt", add_special_tokens=False).input_ids
        model = SimpleNamespace(generate=lambda ids=ids, **_: ids)
        monkeypatch.setattr(tiny_vlm, "load", lambda model=model: model)
        assert tiny_vlm.answer(given) == truth


def test_bundled_questions_are_in_the_words_of_the_model(image):
    known = picture.sample_answers()
    assert len(known) == 8
    assert next(iter(known)) == "what is the number ?"
    for question, answer in known.items():
        tiny_vlm.inputs(image, f"{question} {answer}")


def test_unknown_answers_are_not_marked(capsys, tmp_path):
    question = "what is below the star ?"
    report = run(capsys, "--question", question, "--out", tmp_path / "x.png")
    assert f"\nquestion: {question}\n" in report
    # The bundled questions are counted all the same.
    for row in rows_of(report).values():
        assert row[-2] not in ("right", "wrong")
        assert re.fullmatch("[0-8] of 8", row[-1])


def test_known_question_of_the_caller_is_marked(capsys, tmp_path):
    question, truth = list(picture.sample_answers().items())[1]
    report = run(capsys, "--question", question, "--out", tmp_path / "x.png")
    assert f"\nquestion: {question}   (true answer: {truth})\n" in report
    assert all(row[-2] in ("right", "wrong") for row in rows_of(report).values())


def test_photograph_of_the_caller_has_no_known_answers(capsys, tmp_path):
    photograph = demo_runs.photograph()
    report = run(capsys, photograph, "--out", tmp_path / "x.png")
    assert "grace_hopper.jpg, cropped to its central square, 24 x 24 patches" in report
    assert "question" not in report
    pixels_of(tmp_path / "x.png")
    # The answer to this question is known for the bundled picture only.
    question = next(iter(picture.sample_answers()))
    report = run(capsys, photograph, "--question", question, "--out", tmp_path / "x.png")
    assert f"\nquestion: {question}\n" in report
    image = picture.to_tensor(picture.load_photo(photograph), 192)
    given = tiny_vlm.inputs(image, question)
    want = compare.evaluate(encoder.encode(image), 64, [(given, None)])
    assert {result.name: result.answer for result in want} == {
        name: row[-1] for name, row in rows_of(report).items()
    }
