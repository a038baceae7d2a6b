"""The backends of `select` against each other and the published loop, to choose its owner (the one
that runs it).

A row is a shape and a matching. A backend is called as the dispatcher calls it, without the
dispatcher and the check of arguments. Before it is timed, its answer must equal the CPU's bit for
bit: that of the reference or, for a GPU, of the C++ core where it is built. A wrong answer
prints WRONG instead of times. A missing backend prints "not installed", which is no failure.

A batch holds copies of the same few (DISTINCT) images at different addresses, so that the CPU
computes its answers once for all batches. If the slowest image sets a batch's time, it is the
slowest of these.

"clock" is the clock of the ratios: on a GPU the device time. Batches of more than PAIRS pairs of
tokens have only a wall time, because samples of their host time would take minutes. There the wall
time is some tens of milliseconds. It exceeds the device time by only some tenths of a millisecond.
The published loop runs in a graph as in `benchmarks.select`, with the GPU as default device, and
only for the batch sizes PUBLISHED.

A case is timed for about SECONDS and at least three turns. The summary counts, by number of
tokens and matching, the cases in which the native backend is right, and those in which it is also
faster.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, limits, shapes
from benchmarks.harness import Competitor
from benchmarks.select import MATCHINGS, RATIO, inputs_of, loops_of, same_bits
from vispruner_kernels import _backends
from vispruner_kernels._triton import operators

# The first backend has to be faster than the second.
BACKENDS = {"cpu": ("native", "reference"), "cuda": ("native", "triton")}
CLOCKS = {"cpu": ("wall",), "cuda": ("device", "wall", "host")}
DISTINCT = 4
STEP = 8
PAIRS = 2e8
# Sizes of the batches for which the published loop is timed too.
PUBLISHED = (1, 5, 64)
# Less than for other benchmarks: there are many cases.
SECONDS = {"cpu": 5.0, "cuda": 0.5}
ABSENT = "not installed"
# Fields of a shape that are options of the command too.
SIZES = ("batch", "tokens", "keep")


def installed(backend: str, device: str) -> bool:
    """Whether the backend can run `select` there."""
    serves = backend in _backends.IMPLEMENTATIONS["select", device]
    serves = serves and _backends.SERVES[backend, device]
    return serves and (backend != "triton" or operators.INSTALLED)


@functools.cache
def images(tokens: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features and scores of the distinct images, on the CPU."""
    return inputs_of(shapes.Shape("", DISTINCT, tokens, channels, tokens, dtype))


@functools.cache
def answers(
    tokens: int, channels: int, dtype: torch.dtype, keep: int, matching: str, by: str
) -> Tensor:
    """The tokens of the distinct images that a backend selects on the CPU."""
    features, scores = images(tokens, channels, dtype)
    return _backends._implementation("select", by)(features, scores, keep, RATIO, STEP, matching)


def case(shape: shapes.Shape, options: argparse.Namespace) -> harness.Rows:
    """The rows of one shape, one per matching."""
    device, unit = options.device, harness.UNITS[options.device][0]
    sample = shape.tokens, shape.channels, shape.dtype
    turns = torch.arange(shape.batch) % DISTINCT
    long = shape.batch * shape.tokens**2 > PAIRS
    clock = "wall" if long else harness.MAIN[device]
    by = "native" if device == "cuda" and installed("native", "cpu") else "reference"
    first, second = BACKENDS[device]

    competitors: dict[Any, Competitor] = {}
    for matching in MATCHINGS:
        rule = (shape.keep, RATIO, STEP, matching)
        expected = answers(*sample, shape.keep, matching, by)[turns]
        for backend in filter(lambda name: installed(name, device), (first, second)):
            select = _backends._implementation("select", backend, device)
            competitors[matching, backend] = Competitor(
                lambda features, scores, select=select, rule=rule: select(features, scores, *rule),
                same_bits(expected),
                only=clock if long else "",
            )
    if shape.batch in PUBLISHED:
        loop = loops_of(shape, device, False)["published" if device == "cpu" else "graphed"]
        competitors["published"] = loop._replace(only=clock)
    inputs = tuple(limits.place(x, device)[turns] for x in images(*sample))
    results = harness.race(competitors, inputs, options, seconds=SECONDS[device])

    absent = harness.Result()
    absent.state = ABSENT
    rows = []
    for matching in MATCHINGS:
        row: dict[str, Any] = {
            **shape.columns(),
            "matching": matching,
            "clock": clock,
        }
        ours, other = (results.get((matching, name), absent) for name in (first, second))
        for backend, result in ((first, ours), (second, other)):
            row[f"{backend} bits"] = result.state or "same"
            for name in CLOCKS[device]:
                row[f"{backend} {name} {unit}"] = result[name]
        loop = results.get("published")
        row[f"published {unit}"] = loop and loop[clock]
        row[f"{second} / {first}"] = harness.ratio(other, ours, clock)
        row[f"published / {first}"] = harness.ratio(loop, ours, clock)
        rows.append(row)
    return rows


def summary(rows: harness.Rows, device: str) -> harness.Rows:
    """Count, for each number of tokens and matching, the cases in which the first backend is right
    and faster."""
    first, second = BACKENDS[device]
    name, result = f"{second} / {first}", []
    for tokens, matching in dict.fromkeys((row["N"], row["matching"]) for row in rows):
        group = [row for row in rows if (row["N"], row["matching"]) == (tokens, matching)]
        ratios = [row[name] for row in group if row[name]]
        right = {b: sum(row[f"{b} bits"] == "same" for row in group) for b in (first, second)}
        faster = sum(ratio > 1 for ratio in ratios)
        result.append(
            {
                "N": tokens,
                "matching": matching,
                "cases": len(group),
                **{f"{backend} right": count for backend, count in right.items()},
                f"{first} faster": faster,
                f"least {name}": min(ratios, default=None),
                f"median {name}": statistics.median(ratios) if ratios else None,
                "in every case": "yes" if right[first] == faster == len(group) else "no",
            }
        )
    return result


def main(argv: list[str] | None = None) -> int:
    """The command."""
    usage = harness.race_parser(__doc__.splitlines()[0])
    usage.epilog = (
        "--compile changes nothing here. For a run in parts, give each part its own --json FILE."
    )
    for name in SIZES:
        usage.add_argument(
            f"--{name}", type=int, nargs="+", help=f"only cases with one of these values of {name}"
        )
    options = usage.parse_args(argv)
    options.compile = "none"
    harness.check(options, usage)
    torch.set_num_threads(options.threads)
    device = options.device
    wanted = {name: getattr(options, name) for name in SIZES if getattr(options, name)}
    cases = [
        shape
        for shape in shapes.BACKENDS[device]
        if all(getattr(shape, name) in values for name, values in wanted.items())
    ]
    if not cases:
        usage.error(f"no case on this device has all of {wanted}")
    rows: harness.Rows = []

    def measured(shape: shapes.Shape, options: argparse.Namespace) -> harness.Rows:
        added = case(shape, options)
        rows.extend(added)
        return added

    head = harness.header(options.threads, device, ("select",), options.commit)
    last = (["summary"], lambda label, options: summary(rows, device))
    harness.run(head, {"rows": (cases, measured), "summary": last}, options)
    unit = harness.UNITS[device][0]
    times = [row[f"{b} {row['clock']} {unit}"] for row in rows for b in BACKENDS[device]]
    return harness.status({"rows": [{"[p10, p90]": time} for time in times if time != ABSENT]})


if __name__ == "__main__":
    sys.exit(main())
