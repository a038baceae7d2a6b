"""Right answers of the tiny VLM (benchmarks/tiny_vlm) by the number of visual tokens that it keeps.

An answer is right if all its words are. Intervals are 95 % intervals over pictures. The test
pictures share no digit, photograph or layout with the training pictures, and were not used before
the model was finished. "another picture" is the share of right answers when the model sees the next
picture instead.

FastV (text-visual attention, after layer 2 of the language model) needs a forward pass for each
question and keeps tokens for each question. The other systems choose the tokens of a picture before
any question. "budget" is the requested number of tokens: FoPru row keeps whole rows of 24, as many
as fit. "random" is the mean of 5 sets of tokens, which differ between pictures.

--quick evaluates only the first pictures. It compares their shares of right answers with the
committed ones of the same pictures, so that only arithmetic can make a difference. "stability", the
effect of arithmetic itself, is not compared.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.tiny_vlm import answers
from benchmarks.tiny_vlm.scenes import ASKED, SIDE, TYPES, scene
from vispruner_kernels.demo import tiny_vlm
from vispruner_kernels.methods import FasterVLM, FoPru, Method, Random, VisPruner

BUDGETS = (192, 128, 64, 32, 16)
PICTURES, QUICK, BATCH = 600, 150, 25
# The seed of the test pictures. Those of seeds 0 and 1 were used to develop the model.
SET = 2
# Fewer pictures show the effect of rounding well enough.
STABLE_PICTURES = 150
SEEDS = 5
RATIOS = (0.0, 0.25, 0.5, 0.75)
STABLE_BUDGET = 64
COMMITTED = harness.RESULTS / "cpu-amd-epyc-avx512" / "accuracy.json"
PLOT = Path(__file__).parent.parent / "docs" / "accuracy.png"
# Half-widths of the 95 % and the 99.9 % intervals, in standard errors. --quick fails if a figure is
# outside its 99.9 % interval, or if less than the share INSIDE of all are within their 95 %
# interval.
INTERVAL, LIMIT, INSIDE = 1.96, 3.29, 0.95


@dataclass(frozen=True)
class Figure:
    """A mean over pictures and its standard error, in per cent."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> Figure:
        """From values `[P]` between 0 and 1, one for each picture."""
        values = 100 * values.double()
        return cls(float(values.mean()), float(values.std() / math.sqrt(len(values))))

    def json(self) -> dict[str, float]:
        return {"%": round(self.mean, 3), "error": round(self.error, 3)}

    def __str__(self) -> str:
        return f"{self.mean:.1f} +-{INTERVAL * self.error:.1f}"


def systems(budget: int) -> dict[str, Method]:
    """The methods by name."""
    named: dict[str, Method] = {
        f"VisPruner {ratio} {matching}": VisPruner(budget, important_ratio=ratio, matching=matching)
        for matching in ("bipartite", "pairwise")
        for ratio in RATIOS
    }
    named["FasterVLM"] = FasterVLM(budget)
    named["FoPru rank"] = FoPru(budget)
    if budget >= SIDE:
        rows = budget // SIDE * SIDE
        named["FoPru row"] = FoPru(rows, strategy="row", width=SIDE)
    return named


def chance(batch: answers.Batch, budget: int, first: int, run: int) -> Tensor:
    """`[B, budget]`: random tokens, drawn for each picture; `first` is the number of the first
    picture of the batch."""
    one = [
        Random(budget, seed=SEEDS * (first + i) + run).select(batch.features[i : i + 1], None)
        for i in range(len(batch.features))
    ]
    return torch.cat(one)


# (system, budget) -> the number of tokens kept, and `[P, Q]`: 1 where an answer is right.
Hits = dict[tuple[str, int], tuple[int, Tensor]]


def evaluate(model: Any, pictures: int) -> Hits:
    """Ask all questions about the first test pictures."""
    parts: dict[tuple[str, int], tuple[int, list[Tensor]]] = {}

    def add(system: str, budget: int, tokens: int, *runs: Tensor) -> None:
        hits = torch.stack([run.double() for run in runs]).mean(0)
        parts.setdefault((system, budget), (tokens, []))[1].append(hits)

    starts = range(0, pictures, BATCH)
    for start in harness.progress(starts):
        # One picture more, so that the last one has a next picture.
        stop = min(start + BATCH, pictures)
        batch = answers.encode(model, [scene("test", i, SET) for i in range(start, stop + 1)])
        other = batch._replace(features=batch.features.roll(-1, 0))
        batch, other = (answers.Batch(*(x[:-1] for x in each)) for each in (batch, other))
        patches = batch.features.shape[1]
        add("all tokens", patches, patches, answers.right(model, batch, None))
        add("another picture", patches, patches, answers.right(model, other, None))
        for budget, hits in answers.fastv(model, batch, BUDGETS).items():
            add("FastV", budget, budget, hits)
        for budget in BUDGETS:
            for name, method in systems(budget).items():
                kept = answers.select(method, batch)
                add(name, budget, kept.shape[1], answers.right(model, batch, kept))
            sets = [chance(batch, budget, start, run) for run in range(SEEDS)]
            add("random", budget, budget, *(answers.right(model, batch, kept) for kept in sets))
    return {key: (tokens, torch.cat(hits)) for key, (tokens, hits) in parts.items()}


def rows_of(hits: Hits) -> harness.Rows:
    """A row for each system and budget: all questions, each type, the difference to random."""
    rows = []
    for (system, budget), (tokens, right) in hits.items():
        row: dict[str, Any] = {
            "pictures": len(right),
            "system": system,
            "budget": budget,
            "tokens": tokens,
        }
        row["all"] = Figure.of(right.mean(1))
        for name in TYPES:
            asked = [i for i, each in enumerate(ASKED) if each == name]
            row[name] = Figure.of(right[:, asked].mean(1))
        chance = hits.get(("random", budget))
        row["minus random"] = Figure.of((right - chance[1]).mean(1)) if chance else None
        rows.append(row)
    return sorted(rows, key=lambda row: -row["budget"])


def stability(model: Any, pictures: int) -> harness.Rows:
    """Shares of kept tokens and answers that change with the arithmetic of the vision tower."""
    variants = {
        "bfloat16": copy.deepcopy(model.model.vision_tower).bfloat16(),
        "eager attention": copy.deepcopy(model.model.vision_tower),
    }
    variants["eager attention"].set_attn_implementation("eager")
    methods: dict[str, Method | None] = {
        name: systems(STABLE_BUDGET)[name]
        for name in ("VisPruner 0.5 bipartite", "VisPruner 0.5 pairwise", "FasterVLM", "FoPru rank")
    }
    methods = {"all tokens": None, **methods}
    changed: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    tower = model.model.vision_tower

    def run(batch: answers.Batch, method: Method | None) -> tuple[Tensor, Tensor]:
        kept = None if method is None else answers.select(method, batch)
        mask = torch.zeros(batch.features.shape[:2])
        mask = mask + 1 if kept is None else mask.scatter(1, kept, 1.0)
        return mask, answers.answers(model, batch, kept)

    try:
        for start in harness.progress(range(0, pictures, BATCH)):
            scenes = [scene("test", i, SET) for i in range(start, min(start + BATCH, pictures))]
            model.model.vision_tower = tower
            batch = answers.encode(model, scenes)
            expected = {name: run(batch, method) for name, method in methods.items()}
            for variant, other in variants.items():
                model.model.vision_tower = other
                batch = answers.encode(model, scenes)
                for name, method in methods.items():
                    mask, words = run(batch, method)
                    lost = (expected[name][0] - mask).clamp_min(0)
                    other_tokens = (lost.sum(1) / mask.sum(1)).double()
                    other_answers = (expected[name][1] != words).any(-1).double().mean(1)
                    changed.setdefault((variant, name), []).append((other_tokens, other_answers))
    finally:
        model.model.vision_tower = tower
    return [
        {
            "features": variant,
            "system": name,
            "tokens": STABLE_BUDGET if methods[name] else None,
            "other tokens": Figure.of(torch.cat([tokens for tokens, _ in parts])),
            "other answers": Figure.of(torch.cat([other for _, other in parts])),
        }
        for (variant, name), parts in changed.items()
    ]


def first(hits: Hits, pictures: int) -> Hits:
    """The hits of the first pictures."""
    return {key: (tokens, right[:pictures]) for key, (tokens, right) in hits.items()}


def compare(rows: harness.Rows, committed: harness.Rows) -> tuple[list[str], bool]:
    """Compare figures with the committed ones of the same pictures. Return lines to print, and
    whether the figures agree."""
    known = {(row["system"], row["budget"]): row for row in committed}
    deviations = {}
    same = 0
    for row in rows:
        old = known.pop((row["system"], row["budget"]))
        for name in ("all", *TYPES):
            difference = row[name].mean - old[name]["%"]
            # The error is at least half a picture: a figure without spread has an error of 0.
            error = max(old[name]["error"], 50 / old["pictures"])
            key = f"{row['system']}, {row['budget']} tokens, {name}"
            deviations[key] = difference / error
            same += row[name].json() == old[name]
    share = sum(abs(z) <= INTERVAL for z in deviations.values()) / len(deviations)
    far = {key: z for key, z in deviations.items() if abs(z) > LIMIT}
    lines = [
        f"{len(deviations)} figures of the first {rows[0]['pictures']} pictures: {same} as "
        f"committed, {share:.1%} within the 95 % intervals, {len(far)} beyond those of 99.9 %"
    ]
    lines += [f"  {key}: {z:+.1f} standard errors" for key, z in far.items()]
    lines += [f"  not computed: {system}, {budget} tokens" for system, budget in known]
    return lines, share >= INSIDE and not far and not known


def draw(rows: harness.Rows, file: Path) -> None:
    """Accuracy against tokens, a panel for all questions and for each type."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    # Okabe and Ito's colours.
    styles = {
        "VisPruner 0.5 bipartite": ("#0072B2", "-", "o"),
        "VisPruner 0.0 bipartite": ("#56B4E9", "-", "o"),
        "VisPruner 0.5 pairwise": ("#0072B2", ":", "s"),
        "FasterVLM": ("#E69F00", "-", "^"),
        "FoPru rank": ("#009E73", "-", "v"),
        "FoPru row": ("#009E73", ":", "v"),
        "FastV": ("#CC79A7", "-", "D"),
        "random": ("#000000", "--", "x"),
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        picture = Picture(figsize=(13, 6.6), dpi=110, layout="constrained")
        FigureCanvasAgg(picture)
        panels = picture.subplots(2, 4, sharex=True, sharey=True).flatten()
        every = {row["system"]: row for row in rows if row["system"] not in styles}
        for panel, name in zip(panels, ("all", *TYPES), strict=False):
            panel.axhline(every["all tokens"][name].mean, color="#555555", linewidth=1)
            panel.axhline(every["another picture"][name].mean, color="#AAAAAA", linewidth=1)
            for system, (colour, line, marker) in styles.items():
                points = [row for row in rows if row["system"] == system]
                panel.errorbar(
                    [row["tokens"] for row in points],
                    [row[name].mean for row in points],
                    [INTERVAL * row[name].error for row in points],
                    color=colour,
                    linestyle=line,
                    marker=marker,
                    markersize=4,
                    linewidth=1.4,
                    elinewidth=0.8,
                    label=system,
                )
            panel.set_title("all questions" if name == "all" else name)
            panel.set_xscale("log", base=2)
            panel.set_xticks([16, 32, 64, 128, 192], ["16", "32", "64", "128", "192"])
            panel.minorticks_off()
            panel.set_ylim(0, 102)
            panel.grid(alpha=0.25)
        for panel in (panels[0], panels[4]):
            panel.set_ylabel("right answers, %")
        for panel in panels[3:7]:
            panel.set_xlabel("visual tokens kept of 576")
            panel.tick_params(labelbottom=True)
        handles, labels = panels[0].get_legend_handles_labels()
        lines = [panels[0].lines[0], panels[0].lines[1]]
        panels[7].legend(
            [*lines, *handles],
            ["all 576 tokens", "all of another picture", *labels],
            loc="center",
            frameon=False,
        )
        panels[7].set_axis_off()
        picture.savefig(file, format="png")


def main(argv: list[str] | None = None) -> int:
    """The command."""
    usage = harness.parser(__doc__.splitlines()[0])
    usage.set_defaults(threads=torch.get_num_threads())
    usage.epilog = "Here the default of --threads is not 1: it is the number of PyTorch's threads."
    usage.add_argument(
        "--quick",
        action="store_true",
        help=f"evaluate {QUICK} of {PICTURES} pictures and compare with the committed figures",
    )
    usage.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the figures")
    options: argparse.Namespace = usage.parse_args(argv)
    harness.check(options, usage)
    if options.plot and not options.plot.resolve().parent.is_dir():
        usage.error(f"--plot: the folder of {options.plot} does not exist")
    committed = json.loads(COMMITTED.read_text())["quick"] if options.quick else []
    if options.quick and options.json and options.json.resolve() == COMMITTED.resolve():
        usage.error("--quick --json: that file has the figures of all pictures; name another")
    torch.set_num_threads(options.threads)
    model = tiny_vlm.load()
    stable = stability(model, STABLE_PICTURES)
    hits = evaluate(model, QUICK if options.quick else PICTURES)
    rows = rows_of(hits)
    tables = {"accuracy": rows, "stability": stable}
    if not options.quick:
        tables["quick"] = rows_of(first(hits, QUICK))
    head = {**harness.header(options.threads), "questions": list(ASKED)}
    harness.report(head, tables, options.json)
    if options.plot:
        draw(rows, options.plot)
    if not options.quick:
        return 0
    lines, agree = compare(rows, committed)
    print("", *lines, sep="\n")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
