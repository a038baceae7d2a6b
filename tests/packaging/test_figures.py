"""The figures of README.md and docs/performance.md are those of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pages import ROOT, page

RESULTS = ROOT / "benchmarks" / "results"
CPU, H200 = RESULTS / "cpu-amd-epyc-avx512", RESULTS / "nvidia-h200"
PERFORMANCE = page(ROOT / "docs" / "performance.md")


def results(path: Path) -> dict:
    return json.loads(page(path))


def rows(text: str, pattern: str) -> list[tuple[str, ...]]:
    """The groups of each row of a table that matches a pattern."""
    return re.findall(f"^{pattern}$", text, re.MULTILINE)


def median(row: dict, key: str, unit: float = 1.0) -> float:
    return row[key]["p50"] / unit


def digits(value: float) -> str:
    """Three significant digits, as the tables of the H200 have them."""
    return f"{float(f'{value:.3g}'):#.3g}".rstrip(".")


def of_select(file: Path, sizes: str, dtype: str, matching: str, channels: int = 1024) -> dict:
    """The row of a result for sizes such as "1 x 576 -> 64"."""
    batch, n, keep = map(int, re.split(" x | -> ", sizes))
    wanted = {"B": batch, "N": n, "C": channels, "keep": keep, "dtype": dtype}
    wanted["matching"] = matching
    (row,) = [row for row in results(file)["rows"] if wanted.items() <= row.items()]
    return row


def test_figures_of_select_on_a_cpu_are_the_committed_ones():
    assert results(CPU / "select.json")["command"] in PERFORMANCE
    found = rows(
        PERFORMANCE,
        r"\| `(\S+)` \| (\d+) x (\d+) x (\d+) -> (\d+) \| (\w+) \| ([^|]+) \| ([\d.]+) ms "
        r"\| ([^|]*)\|",
    )
    assert len(found) == 8
    for matching, batch, n, c, keep, dtype, loop, ours, ratio in found:
        sizes = f"{batch} x {n} -> {keep}"
        row = of_select(CPU / "select.json", sizes, dtype, matching, int(c))
        assert f"{median(row, 'ours ms [p10, p90]'):.2f}" == ours
        if row["published / ours"] is None:
            assert row["published ms"].startswith(loop)
            assert ratio == ""
        else:
            assert f"{median(row, 'published ms'):.1f} ms" == loop
            assert f"**{row['published / ours']:.0f}** " == ratio


def test_figures_of_select_on_an_h200_are_the_committed_ones():
    assert results(H200 / "select.json")["command"] in PERFORMANCE
    found = rows(PERFORMANCE, r"\| `(\S+)` \| (\d+ x \d+ -> \d+) \| (.*) \|")
    assert len(found) == 8
    for matching, sizes, cells in found:
        row = of_select(H200 / "select.json", sizes, "float16", matching)
        loop, ours, graph, device = (
            median(row, key, 1000)
            for key in ("published us", "wall us", "graphed us", "ours us [p10, p90]")
        )
        faster = row["graphed / ours"]
        expected = [digits(loop), digits(ours), f"**{loop / ours:.0f}**", digits(graph)]
        expected += [digits(device), f"**{faster:.1f}**" if faster > 1 else f"{faster:.1f}"]
        assert cells.split(" | ") == expected


def test_times_to_the_first_token_are_the_committed_ones():
    times = results(H200 / "llava.json")["times"]
    found = rows(PERFORMANCE, r"\| (LLaVA\S+-7B) \| (\d+) -> (\d+) \| (.*) \|")
    assert len(found) == len(times) // 3 == 7
    groups = [times[i : i + 3] for i in range(0, len(times), 3)]
    for (model, _, keep, cells), group in zip(found, groups, strict=True):
        assert [row["by"] for row in group] == ["no pruning", "published", "ours"]
        assert {row["model"] for row in group} == {model.lower()}
        assert group[2]["keep"] == int(keep)
        whole, published, ours = (median(row, "ms [p10, p90]") for row in group)
        change = 100 * (ours / whole - 1)
        verdict = f"{abs(change):.0f} % {'more' if change > 0 else 'less'}"
        expected = [f"{whole:.1f} ms", f"{published:.1f} ms", f"{ours:.1f} ms", verdict]
        assert cells.split(" | ") == expected


def test_figures_of_the_readme_are_the_committed_ones():
    cpu = of_select(CPU / "select.json", "1 x 576 -> 64", "float32", "bipartite")
    gpu = of_select(H200 / "select.json", "1 x 576 -> 64", "float16", "bipartite")
    long = [
        of_select(H200 / "select.json", "1 x 2880 -> 160", "float16", matching)
        for matching in ("bipartite", "pairwise")
    ]

    def score(file: str, key: str, by: str, **wanted: Any) -> float:
        wanted |= {"B": 1, "dtype": "float16", "by": by}
        (row,) = [x for x in results(H200 / file)["rows"] if wanted.items() <= x.items()]
        return median(row, key)

    def first_token(model: str, keep: int) -> list[float]:
        found = [row for row in results(H200 / "llava.json")["times"] if row["model"] == model]
        (ours,) = [i for i, row in enumerate(found) if (row["keep"], row["by"]) == (keep, "ours")]
        return [median(found[i], "ms [p10, p90]") for i in (ours - 2, ours)]

    graph, device = "graphed us", "ours us [p10, p90]"
    attention = {"shape": "clip-l/336", "file": "attention.json"}
    pairs = [
        (median(cpu, "published ms"), median(cpu, "ours ms [p10, p90]")),
        *((median(x, graph, 1000), median(x, device, 1000)) for x in (gpu, *long)),
        *(
            tuple(score(key=key, by=by, **attention) for by in ("SDPA flash", "ours"))
            for key in ("us [p10, p90]", "wall us")
        ),
        first_token("llava-next-7b", 160),
        first_token("llava-1.5-7b", 64),
    ]
    text = page(ROOT / "README.md")
    found = rows(
        text, r"\| .* \| (?:one CPU core|H200, [^|]*) \| [^|]* \| (\S+) .s \| (\S+) .s \| (.*) \|"
    )
    assert len(found) == len(pairs)
    for cells, (theirs, ours) in zip(found, pairs, strict=True):
        ratio = theirs / ours
        shown = f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"
        verdict = f"**{shown}x**" if ratio > 1 else f"{shown}x, slower"
        assert cells == (digits(theirs), digits(ours), verdict)


def test_ratios_of_attention_are_the_committed_ones():
    def shown(values: list[float], places: int) -> str:
        return f"{min(values):.{places}f} to {max(values):.{places}f}"

    attention = results(H200 / "attention.json")["rows"]
    scores = results(H200 / "scores.json")["rows"]
    ours = [row for row in attention if row["by"] == "ours"]
    received = [row for row in scores if row["operator"] == "received_scores"]
    given = [row for row in received if row["by"] == "ours, given lse"]
    alone = [row for row in received if row["by"] == "ours"]
    cls = [row for row in scores if (row["operator"], row["by"]) == ("cls_scores", "ours")]
    eager = [1 / row["eager / this"] for row in (*given, *alone)]
    several, one = ([1 / row["eager / this"] for row in cls if (row["B"] > 1) == x] for x in (1, 0))
    assert {row["D"] for row in ours} == {64, 72, 80}
    assert {row["B"] for row in cls} == {1, 5, 8, 32, 128}
    assert rows(
        PERFORMANCE, r"\| `\w+`[^|]* \| (?:SDPA flash|eager PyTorch) \| (\S+ to \S+) \|"
    ) == [
        shown([row["/ flash"] for row in ours if row["D"] == 64], 2),
        shown([row["/ flash"] for row in ours if row["D"] > 64], 2),
        shown([row["/ flash"] for row in given], 2),
        shown([row["/ flash"] for row in alone], 2),
        shown(eager, 2),
        shown(several, 2),
        shown(one, 1),
    ]


def test_effect_of_rounding_is_the_committed_one():
    def changed(matching: str) -> list[float]:
        found = results(CPU / "stability.json")["rows"]
        return [row["changed %"] for row in found if row["matching"] == matching]

    def of_tower(variant: str, matching: str) -> str:
        name = f"VisPruner 0.5 {matching}"
        found = results(CPU / "accuracy.json")["stability"]
        (row,) = [row for row in found if (row["features"], row["system"]) == (variant, name)]
        return f"{row['other tokens']['%']:.1f} %"

    # Rounded as in the first row of the table.
    lowest, highest = min(changed("bipartite")), max(changed("bipartite"))
    assert max(changed("pairwise")) <= 1
    table = [(f"{lowest:.0f}-{highest:.0f} %", "at most 1 %")]
    for variant in ("bfloat16", "eager attention"):
        table.append(tuple(of_tower(variant, x) for x in ("bipartite", "pairwise")))
    assert rows(PERFORMANCE, r"\| (?:features|tower|another) [^|]* \| (.* %) \| (.* %) \|") == table
