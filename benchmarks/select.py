"""Times of `select` and the published loop, and of the other selections and plain PyTorch.

Every answer is checked before it is timed: ours must equal the reference bit for bit, the loop's
must have the right number of distinct tokens. A wrong answer prints WRONG instead of a time, and an
error prints its type.

"GMAC/s" counts the multiply-adds of the similarities that are needed (half of a symmetric matrix).
On a CPU, "of matmul" is that rate divided by the rate of PyTorch's float32 matrix product of the
same features (the whole matrix), in the same run. On a GPU, "of limit" is the time that the int8
products of those similarities and one read of the features would take at the measured limits,
divided by the measured time.

The published loop waits for the device in every pass, because it makes an index on the host.
"graphed" is its device time in a CUDA graph: there it runs with the GPU as PyTorch's default
device, so that it makes the index on the GPU. The ratios of the published and the compiled loop are
between wall times, those of "graphed" between device times.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, limits, shapes
from benchmarks.harness import Competitor
from vispruner_kernels import (
    prune,
    reference,
    select,
    select_rows,
    select_topk,
    select_varlen,
)
from vispruner_kernels.published import select_published
from vispruner_kernels.testing import (
    assert_same_bits,
    sample_features,
    sample_offsets,
    sample_scores,
)

RATIO = 0.5
MATCHINGS = ("bipartite", "pairwise")
# int8 products for one product of 15-bit fixed-point numbers.
INT8_PRODUCTS = 4
# Shares of padding of the crops that select_varlen packs, repeated for more crops.
PADDING = (0.0, 0.25, 0.5, 0.125, 0.0)
OPS = ("select", "prune", "select_varlen", "select_topk", "select_rows")


def published_state(shape: shapes.Shape, answer: Tensor) -> str:
    """Return "" if the loop's answer has the right number of distinct tokens, else WRONG."""
    distinct = all(len(row.unique()) == shape.keep for row in answer)
    return "" if answer.shape == (shape.batch, shape.keep) and distinct else "WRONG count"


def inputs_of(shape: shapes.Shape) -> tuple[Tensor, Tensor]:
    """Features and scores, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    sizes = shape.batch, shape.tokens, shape.channels
    features = sample_features("clustered", *sizes, generator).to(shape.dtype)
    return features, sample_scores("softmax", *sizes[:2], generator)


def same_bits(expected: Any) -> Any:
    """A check that an answer equals `expected`, which is on the CPU, bit for bit."""

    def check(answer: Any) -> None:
        if isinstance(expected, Tensor):
            assert_same_bits(answer.cpu(), expected)
        else:
            for one, other in zip(answer, expected, strict=True):
                assert_same_bits(one.cpu(), other)

    return check


def loops_of(shape: shapes.Shape, device: str, compiled: bool) -> dict[str, Competitor]:
    """The published loop as a competitor: eager, compiled, in a CUDA graph."""

    def check(answer: Tensor) -> str:
        return published_state(shape, answer)

    def run(loop: Any) -> Any:
        return lambda features, scores: loop(features, scores, shape.keep, RATIO)

    loops = {"published": Competitor(run(select_published), check)}
    if compiled:
        loops["compiled"] = Competitor(run(torch.compile(select_published, dynamic=False)), check)
    if device == "cuda":
        loops["graphed"] = Competitor(
            run(select_published), check, lambda: limits.target(device), "device"
        )
    return loops


def limit(shape: shapes.Shape, options: argparse.Namespace) -> float | None:
    """Seconds of the int8 products and of one read of the features, at the measured limits."""
    work = 2e-12 * INT8_PRODUCTS * products(shape)
    size = 1e-9 * shape.batch * shape.tokens * shape.channels * shape.dtype.itemsize
    compute = harness.share(work, options.limits["int8 TOP/s"])
    read = harness.share(size, options.limits["copy GB/s"])
    return compute + read if compute and read else None


def products(shape: shapes.Shape) -> float:
    """Multiply-adds of the similarities."""
    residual = shape.tokens - int(shape.keep * RATIO)
    return shape.batch * residual**2 / 2 * shape.channels


def case(shape: shapes.Shape, options: argparse.Namespace, compiled: bool = False) -> harness.Rows:
    """The rows of one shape, one per matching."""
    device, on_cpu = options.device, options.device == "cpu"
    unit, main = harness.UNITS[device][0], harness.MAIN[device]
    features, scores = inputs_of(shape)
    loops = loops_of(shape, device, compiled)
    competitors = dict(loops)
    for matching in MATCHINGS:
        rule = (shape.keep, RATIO, 8, matching)
        competitors[matching] = Competitor(
            lambda features, scores, rule=rule: select(features, scores, *rule),
            same_bits(reference.select(features, scores, *rule)),
        )
    if on_cpu:
        x = features.float()
        competitors["matmul"] = Competitor(lambda features, scores: x @ x.mT, lambda answer: "")
    inputs = tuple(limits.place(x, device) for x in (features, scores))
    results = harness.race(competitors, inputs, options)

    rows = []
    for matching in MATCHINGS:
        ours = results[matching]
        seconds = ours.seconds(main)
        row: dict[str, Any] = {
            **shape.columns(),
            "matching": matching,
            **harness.times(ours, device, "ours "),
            "GMAC/s": harness.share(products(shape) / 1e9, seconds),
        }
        if on_cpu:
            whole = shape.batch * shape.tokens**2 * shape.channels / 1e9
            matmul = harness.share(whole, results["matmul"].seconds(main))
            row["of matmul"] = harness.share(row["GMAC/s"], matmul)
        else:
            row["of limit"] = harness.share(limit(shape, options), seconds)
        for name in ("published", "compiled", "graphed"):
            clock = "device" if name == "graphed" else "wall"
            loop = results.get(name)
            row[f"{name} {unit}"] = loop and loop[clock]
            row[f"{name} / ours"] = harness.ratio(loop, ours, clock)
            if not on_cpu and name != "graphed":
                row[f"{name} device {unit}"] = loop and loop["device"]
        rows.append(row)
    return rows


def topk(scores: Tensor, keep: int) -> Tensor:
    """`select_topk` in plain PyTorch."""
    return scores.topk(keep, sorted=False).indices.sort(-1).values


def top_rows(scores: Tensor, width: int, rows: int) -> Tensor:
    """`select_rows` in plain PyTorch."""
    kept = topk(scores.float().unflatten(1, (-1, width)).sum(-1), rows)
    return (kept[:, :, None] * width + torch.arange(width, device=scores.device)).flatten(1)


def other_case(shape: shapes.Shape, options: argparse.Namespace) -> harness.Rows:
    """The rows of one shape for the operators beside `select`, each against plain PyTorch or
    `select` with plain PyTorch."""
    features, scores = inputs_of(shape)
    keep, width = shape.keep, int(shape.tokens**0.5)
    lengths = [int(shape.tokens * (1 - PADDING[i % len(PADDING)])) for i in range(shape.batch)]
    cu_seqlens, cu_keep = sample_offsets(lengths), sample_offsets([keep] * shape.batch)
    starts, total = cu_seqlens.tolist(), keep * shape.batch
    rule = (RATIO, 8, "bipartite")

    def packed(features: Tensor, scores: Tensor, cu_seqlens: Tensor, cu_keep: Tensor) -> Tensor:
        return select_varlen(features, scores, cu_seqlens, cu_keep, shape.tokens, total, *rule)

    def one_by_one(features: Tensor, scores: Tensor, *offsets: Tensor) -> Tensor:
        kept = []
        for start, length in zip(starts, lengths, strict=False):
            image = slice(start, start + length)
            kept.append(select(features[None, image], scores[None, image], keep, *rule)[0] + start)
        return torch.cat(kept)

    def gathered(features: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        indices = select(features, scores, keep, *rule)
        return features.gather(1, indices[:, :, None].expand(-1, -1, shape.channels)), indices

    flat = features.flatten(0, 1), scores.flatten(), cu_seqlens, cu_keep
    grid_rows = keep // width or 1
    races: dict[str, tuple[tuple[Tensor, ...], Any, dict[str, Any]]] = {
        "prune": (
            (features, scores),
            reference.prune(features, scores, keep, *rule),
            {"ours": lambda f, s: prune(f, s, keep, *rule), "select, gather": gathered},
        ),
        "select_varlen": (
            flat,
            reference.select_varlen(*flat, shape.tokens, total, *rule),
            {"ours": packed, "select, one by one": one_by_one},
        ),
        "select_topk": (
            (scores,),
            reference.select_topk(scores, keep),
            {"ours": lambda s: select_topk(s, keep), "topk, sort": lambda s: topk(s, keep)},
        ),
        "select_rows": (
            (scores,),
            reference.select_rows(scores, width, grid_rows),
            {
                "ours": lambda s: select_rows(s, width, grid_rows),
                "sum, topk, sort": lambda s: top_rows(s, width, grid_rows),
            },
        ),
    }
    rows = []
    for op, (inputs, expected, ways) in races.items():
        placed = tuple(limits.place(x, options.device) for x in inputs)
        competitors = {name: Competitor(run, same_bits(expected)) for name, run in ways.items()}
        results = harness.race(competitors, placed, options)
        for name, result in results.items():
            rows.append(
                {
                    "operator": op,
                    "B": shape.batch,
                    "N": shape.tokens,
                    "C": shape.channels if features is inputs[0] or op == "select_varlen" else None,
                    "keep": grid_rows * width if op == "select_rows" else keep,
                    "dtype": str(inputs[0].dtype).removeprefix("torch."),
                    "by": name,
                    **harness.times(result, options.device),
                    "/ ours": harness.ratio(result, results["ours"], harness.MAIN[options.device]),
                }
            )
    return rows


def main(argv: list[str] | None = None) -> int:
    """The command."""
    usage = harness.race_parser(__doc__.splitlines()[0])
    options = usage.parse_args(argv)
    harness.check(options, usage)
    torch.set_num_threads(options.threads)
    device = options.device
    head = harness.header(options.threads, device, OPS, options.commit)
    tables = {"rows": (shapes.SELECT[device], case), "others": (shapes.OTHERS[device], other_case)}
    done = harness.run(head, tables, options)

    print("\nratio of the published loop's wall time to ours, first shape:")
    for row in done["rows"][:2]:
        ratio = row["published / ours"]
        loop = row[f"published {harness.UNITS[device][0]}"]
        print(f"  {row['matching']:<10} {ratio:.1f}" if ratio else f"  {loop}")
    return harness.status(done)


if __name__ == "__main__":
    sys.exit(main())
