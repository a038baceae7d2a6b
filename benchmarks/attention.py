"""`cls_attention` against attention without scores and the published way to scores, in one run.

PyTorch's fused attention (SDPA) is timed with every backend of the device, and once more with
`cls_scores` beside it. "published" is eager attention as published: it stores all weights and reads
the scores from them. Outputs and scores are checked against float64 before they are timed.

"TFLOP/s" counts the two matrix products of attention and no other work of a row. "of limit" is that
rate divided by the rate of a large matrix product in the same dtype. "/ flash" is the time divided
by that of SDPA's flash backend, which gives no scores.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import harness, limits, shapes
from benchmarks.harness import Competitor
from vispruner_kernels import cls_attention, cls_scores
from vispruner_kernels.testing import OUT_TOLERANCE, assert_close, max_logit, sample_qkv

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None

OPS = ("cls_attention", "cls_scores")
BACKENDS = {
    "cpu": ("FLASH_ATTENTION", "MATH"),
    "cuda": ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"),
}
# The bound of scores whose logits and weights are stored in the dtype of q, in units of
# OUT_TOLERANCE.
ROUNDED = 4.0


class Exact(NamedTuple):
    """Attention in float64, and `bound`: the largest error that our scores may have."""

    out: Tensor  # [B, S, H, D]
    cls: Tensor  # [B, S]
    received: Tensor  # [B, S]
    lse: Tensor  # [B, H, S]
    bound: float


def exact(q: Tensor, k: Tensor, v: Tensor) -> Exact:
    """Attention in float64, image by image to save memory."""
    parts, largest = [], 0.0
    for image in zip(q, k, v, strict=True):
        q_i, k_i, v_i = (x.double().movedim(1, 0) for x in image)  # [H, S, D]
        logits = q_i @ k_i.mT * q.shape[-1] ** -0.5
        weights = logits.softmax(-1)
        parts.append(
            (
                (weights @ v_i).movedim(0, 1),
                weights[:, 0].mean(0),
                weights.mean((0, 1)),
                logits.logsumexp(-1),
            )
        )
        largest = max(largest, max_logit(image[0], image[1], None))
    out, cls, received, lse = (torch.stack(images) for images in zip(*parts, strict=True))
    return Exact(out, cls, received, lse, max(1e-6, 2**-22 * largest))


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's fused attention, by the backend that the context allows."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)


def backend(name: str) -> Callable[[], Any]:
    """The context that allows only this backend of SDPA."""
    return functools.partial(sdpa_kernel, getattr(SDPBackend, name))


def eager(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with stored weights, and the scores from them, as published."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    weights = logits.softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2).contiguous(), weights[:, :, 0, 1:].mean(1)


def check_of(right: Exact, v: Tensor, bound: float) -> Callable[[Any], None]:
    """A check of the output, and of the scores if the answer has some."""
    out_bound = OUT_TOLERANCE[v.dtype] * float(v.abs().max())

    def check(answer: Any) -> None:
        out, scores = answer if isinstance(answer, tuple) else (answer, None)
        assert_close(out, right.out, out_bound)
        if scores is not None:
            assert_close(scores, right.cls[:, 1:], bound)

    return check


def case(
    shape: shapes.Sequence, options: argparse.Namespace, compiled: bool = False
) -> harness.Rows:
    """The rows of one shape, one per competitor."""
    device, main = options.device, harness.MAIN[options.device]
    inputs = q, k, v = tuple(
        limits.place(x, device) for x in sample_qkv(*shape[1:], seed=shape.batch)
    )
    right = exact(q, k, v)
    check = check_of(right, v, right.bound)
    loose = check_of(right, v, ROUNDED * OUT_TOLERANCE[q.dtype] * float(right.cls.max()))

    def with_scores(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return flash(q, k, v), cls_scores(q, k)

    competitors = {
        "ours": Competitor(lambda q, k, v: cls_attention(q, k, v), check),
        "SDPA flash, cls_scores": Competitor(with_scores, check, backend("FLASH_ATTENTION")),
    }
    for name in BACKENDS[device]:
        label = f"SDPA {name.removesuffix('_ATTENTION').lower()}"
        competitors[label] = Competitor(flash, check, backend(name))
    if flash_attn_func is not None and device == "cuda":
        competitors["flash-attn"] = Competitor(flash_attn_func, check)
    competitors["published"] = Competitor(eager, loose)
    if compiled:
        competitors["published, compiled"] = Competitor(torch.compile(eager, dynamic=False), loose)
    results = harness.race(competitors, inputs, options)

    dtype = str(shape.dtype).removeprefix("torch.")
    work = 4.0 * shape.batch * shape.heads * shape.tokens**2 * shape.head_dim / 1e12
    rows = []
    for name, result in results.items():
        seconds = result.seconds(main)
        rate = harness.share(work, seconds)
        flash_seconds = results["SDPA flash"].seconds(main)
        rows.append(
            {
                "shape": shape.name,
                "B": shape.batch,
                "S": shape.tokens,
                "H": shape.heads,
                "D": shape.head_dim,
                "dtype": dtype,
                "by": name,
                **harness.times(result, device),
                "TFLOP/s": rate,
                "of limit": harness.share(rate, options.limits[f"{dtype} TFLOP/s"]),
                "/ flash": harness.share(seconds, flash_seconds),
                "published / this": harness.ratio(results["published"], result, main),
                "compiled / this": harness.ratio(results.get("published, compiled"), result, main),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    """The command."""
    usage = harness.race_parser(__doc__.splitlines()[0])
    options = usage.parse_args(argv)
    harness.check(options, usage)
    torch.set_num_threads(options.threads)
    head = harness.header(options.threads, options.device, OPS, options.commit)
    tables = {"rows": (shapes.ATTENTION[options.device], case)}
    return harness.status(harness.run(head, tables, options))


if __name__ == "__main__":
    sys.exit(main())
