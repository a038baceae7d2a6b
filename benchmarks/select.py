"""`select` against the published loop in eager PyTorch, in one run.

Every answer is checked before it is timed: ours against the reference, to the bit; the loop's by
its count of distinct tokens. A wrong one prints WRONG instead of a time, a raising loop says so.
"GMAC/s" counts the multiply-adds of the similarities that are needed (half of a symmetric matrix);
"of matmul" is that rate over the one of a float32 matrix product of the same features, whole, by
PyTorch in the same run.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks import harness, shapes
from vispruner_kernels import reference, select
from vispruner_kernels.published import select_published
from vispruner_kernels.testing import sample_features, sample_scores

RATIO = 0.5
MATCHINGS = ("bipartite", "pairwise")


def published_state(shape: shapes.Shape, answer: torch.Tensor) -> str:
    """ "" if the loop's answer has the right number of distinct tokens."""
    distinct = all(len(row.unique()) == shape.keep for row in answer)
    return "" if answer.shape == (shape.batch, shape.keep) and distinct else "WRONG count"


def case(shape: shapes.Shape, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """The rows of one shape, one per matching."""
    generator = torch.Generator().manual_seed(0)
    sizes = shape.batch, shape.tokens, shape.channels
    features = sample_features("clustered", *sizes, generator).to(shape.dtype)
    scores = sample_scores("softmax", *sizes[:2], generator)

    competitors: dict[str, Any] = {}
    states: dict[str, str] = {}
    for matching in MATCHINGS:
        rule = (shape.keep, RATIO, 8, matching)
        right = torch.equal(
            select(features, scores, *rule), reference.select(features, scores, *rule)
        )
        states[matching] = "" if right else "WRONG"
        competitors[matching] = lambda rule=rule: select(features, scores, *rule)
    loops = {"published": select_published}
    if compiled:
        loops["compiled"] = torch.compile(select_published)
    for name, loop in loops.items():
        try:
            states[name] = published_state(shape, loop(features, scores, shape.keep, RATIO))
        except (IndexError, RuntimeError) as error:
            states[name] = f"raises {type(error).__name__}"
        competitors[name] = lambda loop=loop: loop(features, scores, shape.keep, RATIO)
    x = features.float()
    competitors["matmul"] = lambda: x @ x.mT

    good = {name: run for name, run in competitors.items() if not states.get(name)}
    times = harness.interleaved(good, rounds)
    residual = shape.tokens - int(shape.keep * RATIO)
    work = shape.batch * residual**2 / 2 * shape.channels / 1e6
    matmul = shape.batch * shape.tokens**2 * shape.channels / 1e6 / times["matmul"].p50

    rows = []
    for matching in MATCHINGS:
        ours = times.get(matching)
        row: dict[str, Any] = {
            "shape": shape.name,
            "B": shape.batch,
            "N": shape.tokens,
            "C": shape.channels,
            "keep": shape.keep,
            "dtype": str(shape.dtype).removeprefix("torch."),
            "matching": matching,
            "ours ms [p10, p90]": ours or states[matching],
            "GMAC/s": work / ours.p50 if ours else None,
            "of matmul": work / ours.p50 / matmul if ours else None,
        }
        for name in loops:
            loop_time = times.get(name)
            row[f"{name} ms"] = loop_time or states[name]
            row[f"{name} / ours"] = loop_time.p50 / ours.p50 if loop_time and ours else None
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    """The command."""
    usage = harness.parser(__doc__.splitlines()[0])
    usage.add_argument("--quick", action="store_true", help="the first shape only")
    usage.add_argument(
        "--compile", action="store_true", help="torch.compile of the loop as well (minutes)"
    )
    options = usage.parse_args(argv)
    harness.check(options, usage)
    torch.set_num_threads(options.threads)

    cases = shapes.SELECT[:1] if options.quick else shapes.SELECT
    rows = [
        row
        for shape in harness.progress(cases)
        for row in case(shape, options.rounds, options.compile)
    ]
    harness.report(harness.header(options.threads), rows, options.json)

    print("\nratio of the published loop's time to ours, first shape:")
    for row in rows[:2]:
        ratio = row["published / ours"]
        print(f"  {row['matching']:<10} {ratio:.1f}" if ratio else f"  {row['published ms']}")
    wrong = [row for row in rows if row["ours ms [p10, p90]"] == "WRONG"]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
