"""Time every variant of the GPU kernels of `select`, and write the table of the fastest ones.

This command builds nothing. A variant is one of csrc/cuda/variants.h, or for Triton the tokens
along one side of a tile. "own" is the launcher's choice without a table. All variants of a shape
run in turns. Before a variant is timed, its answer must equal the CPU's bit for bit: that of the
C++ core where it is built, else of the reference. A wrong answer prints WRONG instead of a time,
and the exit status is 1. "does not fit" is no failure: the GPU has too little shared memory for
that variant. "simulated" is the time of a whole launch in a simulator of sm_90 (docs/cuda.md), not
a measurement.

--write replaces the rows of this GPU's compute capability in the table that the launchers read
(vispruner_kernels/_tuned.py). A row has a variant only if it beats the launcher's choice by more
than 2 % for every measured number of kept tokens. Otherwise it has null: the launcher chooses.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import backends, harness, limits, shapes
from benchmarks.harness import Competitor
from benchmarks.select import MATCHINGS, RATIO, same_bits
from vispruner_kernels import _backends, _tuned

# Backend -> the module of its launcher.
LAUNCHERS = {
    "native": "vispruner_kernels._native.cuda",
    "triton": "vispruner_kernels._triton.select",
}
BATCHES, KEEP = (1, 5, 16, 64), 64
# A variant must be this many times faster than the launcher's choice.
GAIN = 1.02
TIME = "us [p10, p90]"
UNFIT = "does not fit"
# Simulated times of whole launches of the native backend, in us, for float16 and 1024 channels.
_FEW = {"threads": 512, "tile": 48, "fit": 0, "at_once": 16, "compact": 128}
_LONG = {"threads": 512, "tile": 64, "fit": 1, "at_once": 8, "compact": 128}
SIMULATED: harness.Rows = [
    {"variant": _FEW, "B": 1, "N": 576, "keep": 64, "matching": "bipartite", "us": 94.8},
    {"variant": _FEW, "B": 1, "N": 576, "keep": 64, "matching": "pairwise", "us": 49.4},
    {"variant": _LONG, "B": 1, "N": 2880, "keep": 160, "matching": "bipartite", "us": 968.8},
]


def cases(device: str) -> list[shapes.Shape]:
    """The shapes of `benchmarks.select`, and batches of images of the lengths of
    `benchmarks.backends`: a row of the table serves smaller shapes too, so rows must be near."""
    found = [
        shape._replace(batch=batch)
        for shape in shapes.BACKENDS[device]
        for batch in BATCHES
        if (shape.batch, shape.keep) == (1, KEEP) and batch * shape.tokens**2 <= backends.PAIRS
    ]
    return [*dict.fromkeys([*shapes.SELECT[device], *found])]


def launcher(backend: str) -> ModuleType:
    return importlib.import_module(LAUNCHERS[backend])


@contextlib.contextmanager
def chosen(backend: str, number: int) -> Iterator[None]:
    """Let all calls use this variant; 0: the launcher's own choice."""
    module: Any = launcher(backend)
    before, module.VARIANT = module.VARIANT, number
    try:
        yield
    finally:
        module.VARIANT = before


def fits(run: Callable[[], Any]) -> bool:
    try:
        run()
    except Exception as error:  # any other error is shown in the variant's row
        if type(error).__name__ == "OutOfResources" or "do not fit" in str(error):
            return False
    return True


def simulated(shape: shapes.Shape, matching: str, backend: str, variant: Any) -> float | None:
    """The simulated time of a launch in us, if there is one for this GPU."""
    row = {"variant": variant, "B": shape.batch, "N": shape.tokens, "keep": shape.keep}
    row["matching"] = matching
    comparable = backend == "native" and (shape.channels, shape.dtype) == (1024, torch.float16)
    times = [known["us"] for known in SIMULATED if row.items() <= known.items()]
    return times[0] if comparable and times and _tuned.capability(0) == "9.0" else None


def case(shape: shapes.Shape, options: argparse.Namespace) -> harness.Rows:
    """The rows of one shape: one for each matching, backend and variant."""
    device, clock = options.device, harness.MAIN[options.device]
    sample = shape.tokens, shape.channels, shape.dtype
    turns = torch.arange(shape.batch) % backends.DISTINCT
    inputs: tuple[Tensor, ...]
    inputs = tuple(limits.place(x, device)[turns] for x in backends.images(*sample))
    by = "native" if backends.installed("native", "cpu") else "reference"

    competitors: dict[Any, Competitor] = {}
    # (matching, backend, number) -> "", or the reason why there is no time.
    states: dict[Any, str] = {}
    for matching in MATCHINGS:
        rule = (shape.keep, RATIO, backends.STEP, matching)
        right = same_bits(backends.answers(*sample, shape.keep, matching, by)[turns])
        for backend in LAUNCHERS:
            if not backends.installed(backend, device):
                states[matching, backend, 0] = backends.ABSENT
                continue
            select = _backends._implementation("select", backend, device)

            def run(
                features: Tensor, scores: Tensor, select: Any = select, rule: Any = rule
            ) -> Any:
                return select(features, scores, *rule)

            for number in range(len(launcher(backend).VARIANTS) + 1):
                name, choice = (matching, backend, number), partial(chosen, backend, number)
                with choice():
                    states[name] = "" if fits(partial(run, *inputs)) else UNFIT
                if not states[name]:
                    competitors[name] = Competitor(run, right, choice, clock)
    results = harness.race(competitors, inputs, options)

    rows = []
    for (matching, backend, number), state in states.items():
        own, this = (results.get((matching, backend, n), harness.Result()) for n in (0, number))
        group = [
            results[name].seconds(clock) for name in results if name[:2] == (matching, backend)
        ]
        seconds = this.seconds(clock)
        variant = launcher(backend).VARIANTS[number - 1] if number else {}
        rows.append(
            {
                **shape.columns(),
                "matching": matching,
                "backend": backend,
                "number": number,
                "variant": ", ".join(f"{name} {value}" for name, value in variant.items()) or "own",
                TIME: state or this[clock],
                "simulated us": simulated(shape, matching, backend, variant),
                "own / this": harness.ratio(own, this, clock),
                "best": "*" if seconds and seconds == min(filter(None, group)) else None,
            }
        )
    return rows


def table(rows: harness.Rows) -> dict[str, harness.Rows]:
    """The rows of tuned.json that follow from measured rows, by backend."""
    gains: dict[Any, dict[int, list[float | None]]] = {}
    for row in rows:
        key = row["backend"], row["matching"], row["B"], row["N"]
        gains.setdefault(key, {}).setdefault(row["number"], []).append(row["own / this"])
    found: dict[str, harness.Rows] = {}
    for (backend, matching, images, tokens), by_number in sorted(gains.items()):
        least = {n: min(x for x in values if x) for n, values in by_number.items() if all(values)}
        # Without a time of the launcher's choice there is nothing to compare with.
        if 0 not in least:
            continue
        best = max(least, key=lambda number: least[number])
        variant = launcher(backend).VARIANTS[best - 1] if least[best] > GAIN else None
        row = {"capability": _tuned.capability(0), "matching": matching, "images": images}
        found.setdefault(backend, []).append(row | {"tokens": tokens, "variant": variant})
    return found


def write(file: Path, new: dict[str, harness.Rows]) -> None:
    """Replace the rows of this compute capability, for the backends in `new`."""
    old = json.loads(file.read_text()) if file.exists() else {}
    text = []
    for backend in LAUNCHERS:
        rows = old.get(backend, [])
        if backend in new:
            rows = [row for row in rows if row["capability"] != _tuned.capability(0)]
            rows += new[backend]
        lines = ",".join(f"\n  {json.dumps(row)}" for row in rows)
        text.append(f' "{backend}": [{lines}' + ("\n ]" if rows else "]"))
    file.write_text("{\n" + ",\n".join(text) + "\n}\n")


def main(argv: list[str] | None = None) -> int:
    """The command."""
    usage = harness.race_parser(__doc__.splitlines()[0])
    usage.epilog = "--compile changes nothing here."
    usage.add_argument(
        "--write",
        type=Path,
        nargs="?",
        const=_tuned.PATH,
        metavar="FILE",
        help="write the table to FILE; without FILE, to the one that the launchers read",
    )
    options = usage.parse_args(argv)
    options.compile = "none"
    if options.device == "cpu":
        usage.error("only the GPU kernels have variants: call it with --device cuda, on a GPU")
    if options.quick and options.write:
        usage.error("--quick measures one shape only, so it cannot --write the table")
    harness.check(options, usage)
    torch.set_num_threads(options.threads)
    head = harness.header(options.threads, options.device, ("select",), options.commit)
    done = harness.run(head, {"rows": (cases(options.device), case)}, options)
    rows = done["rows"]
    if options.write:
        new = table(rows)
        write(options.write, new)
        counts = ", ".join(f"{len(found)} rows of {name}" for name, found in new.items())
        print(f"\nwrote {counts or 'no rows'} to {options.write}")
    timed = [row for row in rows if row[TIME] not in (backends.ABSENT, UNFIT)]
    return harness.status({"rows": timed})


if __name__ == "__main__":
    sys.exit(main())
