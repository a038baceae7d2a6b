"""`cls_scores` and `received_scores` against PyTorch, flash-colsum and flash-colreduce.

Scores are checked against float64 before they are timed. "given lse" gets each row's log-sum-exp,
which an attention kernel computes anyway. "of K read" is the time that one read of K would take at
the measured copy rate, divided by the measured time; on a GPU that is the cold time, for which L2
holds no part of K. "/ flash" is the time divided by that of the whole attention by SDPA's flash
backend, which gives no scores. "eager / this" is how many times longer PyTorch's eager operators
take for the same scores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import attention, harness, limits, shapes
from benchmarks.harness import Competitor
from vispruner_kernels import cls_scores, received_scores, received_scores_varlen
from vispruner_kernels.testing import OUT_TOLERANCE, assert_close, sample_offsets, sample_qkv

try:
    from flash_colsum import flash_colsum
except ImportError:
    flash_colsum = None
try:
    from flash_colreduce import flash_colreduce
except ImportError:
    flash_colreduce = None

OPS = ("cls_scores", "received_scores", "received_scores_varlen")


def weights(q: Tensor, k: Tensor) -> Tensor:
    """Attention weights [..., H, rows of q, S], in float32 after a product in the dtype of q."""
    logits = q.movedim(-2, -3) @ k.movedim(-2, -3).mT * q.shape[-1] ** -0.5
    return logits.softmax(-1, dtype=torch.float32)


def eager_cls(q: Tensor, k: Tensor, *rest: Tensor) -> Tensor:
    """`cls_scores` in eager PyTorch: one row of the weights."""
    return weights(q[:, :1], k)[:, :, 0, 1:].mean(1)


def eager_received(q: Tensor, k: Tensor, *rest: Tensor) -> Tensor:
    """`received_scores` in eager PyTorch, which stores all weights."""
    return weights(q, k).mean((1, 2))


def close(expected: Tensor, bound: float) -> Callable[[Tensor], None]:
    """A check that scores are within `bound` of these."""
    return lambda answer: assert_close(answer, expected, bound)


def case(
    shape: shapes.Sequence, options: argparse.Namespace, compiled: bool = False
) -> harness.Rows:
    """The rows of one shape, one per competitor and operator."""
    device = options.device
    q, k, v = (limits.place(x, device) for x in sample_qkv(*shape[1:], seed=shape.batch))
    right = attention.exact(q, k, v)
    lse = right.lse.float()
    wanted = {"cls_scores": right.cls[:, 1:], "received_scores": right.received}

    ways: dict[tuple[str, str], Callable[..., Any]] = {
        ("cls_scores", "ours"): lambda q, k, v, lse: cls_scores(q, k),
        ("cls_scores", "eager"): eager_cls,
        ("received_scores", "ours"): lambda q, k, v, lse: received_scores(q, k),
        ("received_scores", "ours, given lse"): lambda q, k, v, lse: received_scores(q, k, lse=lse),
        ("received_scores", "eager"): eager_received,
    }
    if compiled:
        ways["cls_scores", "compiled"] = torch.compile(eager_cls, dynamic=False)
        ways["received_scores", "compiled"] = torch.compile(eager_received, dynamic=False)
    if flash_colsum is not None and device == "cuda":
        ways["cls_scores", "flash-colsum"] = lambda q, k, v, lse: flash_colsum(
            q.transpose(1, 2), k.transpose(1, 2), cls_len=1
        )[:, 1:]
        ways["received_scores", "flash-colsum"] = lambda q, k, v, lse: flash_colsum(
            q.transpose(1, 2), k.transpose(1, 2)
        )
    if flash_colreduce is not None and device == "cuda":
        ways["received_scores", "flash-colreduce"] = lambda q, k, v, lse: flash_colreduce(
            q.transpose(1, 2), k.transpose(1, 2), reduction="mean"
        ).mean(1)
    competitors = {}
    for (op, by), run in ways.items():
        expected = wanted[op]
        loose = attention.ROUNDED * OUT_TOLERANCE[q.dtype] * float(expected.max())
        bound = right.bound if by.startswith("ours") else loose
        competitors[op, by] = Competitor(run, close(expected, bound))
    competitors["attention", "SDPA flash"] = Competitor(
        lambda q, k, v, lse: attention.flash(q, k, v),
        attention.check_of(right, v, 0.0),
        attention.backend("FLASH_ATTENTION"),
    )
    results = harness.race(competitors, (q, k, v, lse), options, cold=k)
    sizes = {"shape": shape.name, "B": shape.batch, "S": shape.tokens}
    return rows_of(sizes, shape, results, k, options)


def rows_of(
    sizes: dict[str, Any],
    shape: shapes.Sequence | shapes.Packed,
    results: dict[tuple[str, str], harness.Result],
    k: Tensor,
    options: argparse.Namespace,
) -> harness.Rows:
    """One row per competitor."""
    device, main = options.device, harness.MAIN[options.device]
    read = harness.share(k.numel() * k.element_size() / 1e9, options.limits["copy GB/s"])
    whole = results.get(("attention", "SDPA flash"))
    flash_seconds = whole.seconds(main) if whole else None
    rows = []
    for (op, by), result in results.items():
        reading = result.seconds("wall" if device == "cpu" else "cold")
        rows.append(
            {
                **sizes,
                "H": shape.heads,
                "D": shape.head_dim,
                "dtype": str(shape.dtype).removeprefix("torch."),
                "operator": op,
                "by": by,
                **harness.times(result, device, cold=True),
                "of K read": harness.share(read, reading),
                "/ flash": harness.share(result.seconds(main), flash_seconds),
                "eager / this": harness.ratio(results.get((op, "eager")), result, main),
                "compiled / this": harness.ratio(results.get((op, "compiled")), result, main),
            }
        )
    return rows


def packed_case(shape: shapes.Packed, options: argparse.Namespace) -> harness.Rows:
    """The rows of one packed sequence; "eager" computes one image after another."""
    device, op = options.device, "received_scores_varlen"
    total, longest = sum(shape.lengths), max(shape.lengths)
    sample = sample_qkv(1, total, shape.heads, shape.head_dim, shape.dtype, seed=0)
    q, k, v = (limits.place(x, device)[0] for x in sample)
    cu_seqlens = sample_offsets(list(shape.lengths)).to(q.device)
    split = zip(*(x[None].split(shape.lengths, 1) for x in (q, k, v)), strict=True)
    images = [attention.exact(*parts) for parts in split]
    expected = torch.cat([image.received[0] for image in images])
    lse = torch.cat([image.lse[0] for image in images], 1).float()
    bound = max(image.bound for image in images)

    def eager(q: Tensor, k: Tensor, *rest: Tensor) -> Tensor:
        parts = zip(q.split(shape.lengths), k.split(shape.lengths), strict=True)
        return torch.cat([weights(q, k).mean((0, 1)) for q, k in parts])

    loose = attention.ROUNDED * OUT_TOLERANCE[q.dtype] * float(expected.max())

    def ours(q: Tensor, k: Tensor, cu_seqlens: Tensor, lse: Tensor | None) -> Tensor:
        return received_scores_varlen(q, k, cu_seqlens, longest, lse=lse)

    competitors = {
        (op, "ours"): Competitor(
            lambda q, k, cu, lse: ours(q, k, cu, None), close(expected, bound)
        ),
        (op, "ours, given lse"): Competitor(ours, close(expected, bound)),
        (op, "eager"): Competitor(eager, close(expected, loose)),
    }
    results = harness.race(competitors, (q, k, cu_seqlens, lse), options, cold=k)
    sizes = {"shape": shape.name, "B": len(shape.lengths), "S": total}
    return rows_of(sizes, shape, results, k, options)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    usage = harness.race_parser(__doc__.splitlines()[0])
    options = usage.parse_args(argv)
    harness.check(options, usage)
    torch.set_num_threads(options.threads)
    device = options.device
    head = harness.header(options.threads, device, OPS, options.commit)
    tables: harness.Tables = {
        "rows": (shapes.SCORES[device], case),
        "varlen": (shapes.PACKED[device], packed_case),
    }
    return harness.status(harness.run(head, tables, options))


if __name__ == "__main__":
    sys.exit(main())
