"""`python -m benchmarks.accuracy`: its committed figures, its comparison, its page."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("numpy")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from benchmarks import accuracy
from benchmarks.tiny_vlm import answers, scenes
from vispruner_kernels.demo import tiny_vlm
from vispruner_kernels.methods import FasterVLM, Random, VisPruner

PAGE = accuracy.PLOT.parent / "accuracy.md"


@pytest.fixture(scope="module")
def model():
    return tiny_vlm.load()


@pytest.fixture(scope="module")
def batch(model):
    return answers.encode(model, [scenes.scene("test", i) for i in range(6)])


def test_random_tokens_differ_between_pictures_and_runs(batch):
    kept = accuracy.chance(batch, 64, 0, 0)
    assert kept.shape == (6, 64)
    assert len({tuple(row.tolist()) for row in kept}) == 6
    assert torch.equal(accuracy.chance(batch, 64, 0, 0), kept)
    later = batch._replace(features=batch.features[2:])
    assert torch.equal(accuracy.chance(later, 64, 2, 0), kept[2:])
    assert not torch.equal(accuracy.chance(batch, 64, 0, 1), kept)


@pytest.fixture(scope="module")
def committed():
    return json.loads(accuracy.COMMITTED.read_text())


def figure(committed, system, budget):
    rows = committed["accuracy"]
    (row,) = (row for row in rows if (row["system"], row["budget"]) == (system, budget))
    return row["all"]["%"]


def test_nine_of_ten_answers_are_right_with_all_tokens(committed):
    assert {row["pictures"] for row in committed["accuracy"]} == {accuracy.PICTURES}
    assert figure(committed, "all tokens", 576) >= 90


# Percent: two to three standard errors for 75 pictures.
MARGIN = 4.0


def test_right_answers_at_64_tokens_are_near_the_committed_figures(model, committed):
    methods = {
        "all tokens": None,
        "VisPruner 0.5 bipartite": VisPruner(64),
        "VisPruner 0.5 pairwise": VisPruner(64, matching="pairwise"),
        "FasterVLM": FasterVLM(64),
        "random": Random(64),
    }
    hits = {name: [] for name in methods}
    for start in range(0, 75, 25):
        numbers = range(start, start + 25)
        part = answers.encode(model, [scenes.scene("test", i, accuracy.SET) for i in numbers])
        for name, method in methods.items():
            kept = None if method is None else answers.select(method, part)
            if name == "random":
                kept = accuracy.chance(part, 64, start, 0)
            hits[name].append(answers.right(model, part, kept).float().mean().item())
    for name, parts in hits.items():
        budget = 64 if methods[name] else 576
        share = 100 * sum(parts) / len(parts)
        assert abs(share - figure(committed, name, budget)) <= MARGIN, name


def test_figures_of_quick_have_the_same_cases_as_all_figures(committed):
    def cases(name):
        return [(row["system"], row["budget"], row["tokens"]) for row in committed[name]]

    assert cases("quick") == cases("accuracy")
    assert {row["pictures"] for row in committed["quick"]} == {accuracy.QUICK}


def compared(**changes):
    """Committed and new rows of three systems with 80 +- 2 % each, the first one with `changes`."""
    names = ("all", *scenes.TYPES)
    cases = [
        {"system": system, "budget": 64, "pictures": 150}
        for system in ("FastV", "FoPru row", "random")
    ]
    old = [{**case, **{name: {"%": 80.0, "error": 2.0} for name in names}} for case in cases]
    new = [{**case, **{name: accuracy.Figure(80.0, 2.0) for name in names}} for case in cases]
    new[0] |= {name: accuracy.Figure(80 + change, 2.0) for name, change in changes.items()}
    return old, new


@pytest.mark.parametrize(
    ("changes", "said", "agree"),
    [
        ({}, "21 as committed, 100.0% within", True),
        ({"all": 3.9, "count": -3.9}, "19 as committed, 100.0% within", True),
        ({"all": 4.1}, "20 as committed, 95.2% within", True),
        ({"all": 4.1, "count": -4.1}, "19 as committed, 90.5% within", False),
        ({"all": 6.5}, "95.2% within the 95 % intervals, 0 beyond", True),
        ({"all": -6.7}, "95.2% within the 95 % intervals, 1 beyond", False),
    ],
)
def test_comparison_counts_the_figures_within_their_intervals(changes, said, agree):
    old, new = compared(**changes)
    lines, right = accuracy.compare(new, old)
    assert lines[0].startswith("21 figures of the first 150 pictures: ")
    assert said in lines[0]
    assert right == agree
    assert len(lines) == 1 + (" 1 beyond" in said)


def test_comparison_fails_if_a_figure_is_missing():
    old, new = compared()
    lines, right = accuracy.compare(new[1:], old)
    assert lines[1:] == ["  not computed: FastV, 64 tokens"]
    assert not right
    with pytest.raises(KeyError):
        accuracy.compare(new, old[1:])


def test_a_figure_without_spread_may_differ_by_one_picture():
    old, new = compared()
    old[0]["all"] = {"%": 100.0, "error": 0.0}
    for wrong, agree in ((1, True), (2, False)):
        new[0]["all"] = accuracy.Figure(100 - 100 * wrong / 150, 0.5)
        assert accuracy.compare(new, old)[1] == agree


def test_first_takes_the_hits_of_the_first_pictures():
    hits = {("FastV", 64): (64, torch.eye(8))}
    assert torch.equal(accuracy.first(hits, 3)["FastV", 64][1], torch.eye(8)[:3])


def test_figures_are_means_and_standard_errors_over_pictures():
    hits = {
        ("random", 64): (64, torch.tensor([[1.0, 0, 0, 0, 1, 0, 1, 1], [0.0] * 8])),
        ("FoPru row", 64): (48, torch.tensor([[1.0] * 8, [0.0] * 8])),
    }
    rows = {row["system"]: row for row in accuracy.rows_of(hits)}
    assert rows["FoPru row"]["tokens"] == 48
    assert rows["FoPru row"]["all"].mean == 50
    assert rows["FoPru row"]["all"].error == pytest.approx(50)
    assert rows["random"]["all"].mean == 25
    assert rows["random"]["count"].mean == 50
    assert rows["random"]["relation"].mean == 25
    assert rows["FoPru row"]["minus random"].mean == 25


def cells(text, first, columns):
    """The rows of the table whose head begins with these cells, without their names."""
    lines = text.splitlines()
    start = lines.index(next(line for line in lines if line.startswith(f"| {first} |")))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *values = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(values) == columns
        rows[name] = values
    return rows


def test_first_table_of_the_page_is_the_committed_figures(committed):
    systems = [f"VisPruner {variant}" for variant in ("0.5 bipartite", "0.5 pairwise")]
    systems += ["VisPruner 0.0 bipartite", "FasterVLM", "FoPru rank", "FastV", "random"]
    rows = cells(PAGE.read_text(), "tokens kept", len(systems))
    assert len(rows) == 2
    for budget, values in rows.items():
        figures = [figure(committed, system, int(budget)) for system in systems]
        assert values == [f"{value:.1f}" for value in figures]


def test_other_tables_of_the_page_are_the_committed_figures(committed):
    text = PAGE.read_text()
    known = {(row["system"], row["budget"]): row for row in committed["accuracy"]}

    def shown(value):
        return f"{value['%']:.1f} ± {accuracy.INTERVAL * value['error']:.1f}"

    for name, values in cells(text, "system | 192", 5).items():
        for budget, value in zip(accuracy.BUDGETS, values, strict=True):
            row = known.get((name, budget))
            assert value == (shown(row["all"]) if row else "")
    for name, (tokens, *values) in cells(text, "system | tokens", 1 + len(scenes.TYPES)).items():
        row = known.get((name, 64)) or known[name, 576]
        assert int(tokens) == row["tokens"]
        assert values == [f"{row[each]['%']:.1f}" for each in scenes.TYPES]
    stable = {(row["features"], row["system"]): row for row in committed["stability"]}
    table = cells(text, "features", 3)
    assert len(table) == 2
    lines = [line for line in text.splitlines() if line.startswith(("| bfloat16", "| eager"))]
    assert len(lines) == len(stable)
    for line in lines:
        features, system, tokens, words = (cell.strip() for cell in line.strip("|").split("|"))
        row = stable[features, system]
        assert tokens == (shown(row["other tokens"]) if row["tokens"] else "")
        assert words == shown(row["other answers"])
