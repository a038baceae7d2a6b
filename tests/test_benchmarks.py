"""The benchmarks run, check what they time, and write what they print."""

from __future__ import annotations

import json

import pytest

from benchmarks import harness, select, stability


def test_select(tmp_path, capsys):
    file = tmp_path / "select.json"
    assert select.main(["--device", "cpu", "--quick", "--rounds", "1", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(file.read_text())
    assert [row["matching"] for row in result["rows"]] == ["bipartite", "pairwise"]
    for row in result["rows"]:
        assert row["published / ours"] > 0
        assert f"{row['matching']:<10} {row['published / ours']:.1f}" in printed
    for name in ("machine", "commit", "torch", "threads", "command"):
        assert result[name]
        assert str(result[name]) in printed


def test_a_wrong_answer_gets_no_time(monkeypatch, capsys):
    right = select.select
    monkeypatch.setattr(select, "select", lambda *args: right(*args).roll(1))
    assert select.main(["--quick", "--rounds", "1"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_stability_is_as_the_readme_says(tmp_path):
    file = tmp_path / "stability.json"
    assert stability.main(["--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 16
    for bipartite, pairwise in zip(rows[::2], rows[1::2], strict=True):
        assert 17 <= round(bipartite["changed %"]) <= 43
        assert pairwise["changed %"] <= 1
        worse = bipartite["coverage"] - pairwise["coverage"]
        assert worse <= (0.03 if bipartite["features"] == "clustered" else 0.1)


def test_interleaved_takes_turns():
    turns = []
    times = harness.interleaved({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 3)
    assert turns == ["a", "b"] * 4
    assert times["a"].rounds == 3
    assert times["a"].p10 <= times["a"].p50 <= times["a"].p90


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--threads", "0"], "--threads is 0"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--json", "no/such/folder/x.json"], "--json"),
        (["--device", "tpu"], "--device"),
    ],
)
def test_bad_options(argv, names, capsys):
    with pytest.raises(SystemExit) as error:
        select.main(argv)
    assert error.value.code == 2
    assert names in capsys.readouterr().err
