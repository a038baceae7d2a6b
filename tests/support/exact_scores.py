"""The operators that return scores of attention: their cases, and comparison with the oracle."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import oracle
import torch
from attention import HEAD_DIMS, Answer, assert_out, assert_scores, float64, run
from torch import Tensor

from vispruner_kernels.testing import assert_same_bits, sample_qkv

CLS = ("cls_attention", "cls_scores")
DENSE = (*CLS, "received_scores")
OPERATORS = (*DENSE, "received_scores_varlen")
# Tails of 16 and 64 lanes, one block of rows and more.
LENGTHS = (2, 5, 16, 17, 50)
# Also tails of 4 rows and a block of 64 rows.
SEQUENCES = {"cls_attention": LENGTHS, "cls_scores": LENGTHS, "received_scores": (1, *LENGTHS, 65)}
SCALES = (None, 0.3, -0.2, 0.0, 2.0)
Exact = tuple[Tensor | None, Tensor]


def least_prefix(op: str) -> int:
    return 1 if op in CLS else 0


def patches_of(op: str, scores: Tensor) -> Tensor:
    """Scores of all tokens without those of the smallest prefix that the operator allows."""
    return torch.stack([row[least_prefix(op) :] for row in scores])


def scales(op: str) -> tuple[float | None, ...]:
    # The root-mean-square bound of `out` holds at usual scales.
    return SCALES[:-1] if op == "cls_attention" else SCALES


def prefixes(op: str, sequence: int) -> tuple[int, ...]:
    some = (min(5, sequence - 1), sequence - 1)
    return (1, *some) if op in CLS else (0, min(1, sequence - 1), *some)


def exact_answer(
    op: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    scale: float | None = None,
    num_prefix: int | None = None,
    lse: Tensor | None = None,
) -> Exact:
    """`out`, or None, and the scores of the float64 oracle."""
    num_prefix = least_prefix(op) if num_prefix is None else num_prefix
    if op == "cls_attention":
        out, scores = oracle.cls_attention(*float64(*qkv), scale, num_prefix)
        return torch.from_numpy(out), torch.from_numpy(scores)
    if op == "cls_scores":
        return None, torch.from_numpy(oracle.cls_scores(*float64(*qkv[:2]), scale, num_prefix))
    given = None if lse is None else lse.numpy()
    scores = oracle.received_scores(*float64(*qkv[:2]), scale, num_prefix, given)
    return None, torch.from_numpy(scores)


def check(backend, op, qkv, exact: Exact, scale=None, num_prefix=None) -> Answer:
    """The answer, after a comparison with the exact one."""
    got = run(backend, op, qkv, scale, num_prefix)
    assert_scores(got.scores, exact[1].numpy(), *qkv[:2], scale)
    if got.out is not None:
        assert_out(got.out, exact[0], *qkv, scale)
        assert_same_bits(got.scores, run(backend, "cls_scores", qkv, scale, num_prefix).scores)
    return got


@functools.cache
def sample(op, dtype, batch, sequence, heads, head_dim, scale, num_prefix):
    """q, k, v and the exact answer."""
    qkv = sample_qkv(batch, sequence, heads, head_dim, dtype, sequence + head_dim)
    return qkv, exact_answer(op, qkv, scale, num_prefix)


def cases(op: str, head_dim: int) -> Iterator[tuple[int, int, float | None, int]]:
    """Yield (sequence, heads, scale, num_prefix) for every length. The other three rotate through
    their values; the start depends on head_dim."""
    for turn, sequence in enumerate(SEQUENCES[op], HEAD_DIMS.index(head_dim)):
        many = 2 if op == "received_scores" and sequence >= 50 else 16
        some = prefixes(op, sequence)
        scale = scales(op)[turn % len(scales(op))]
        yield sequence, (1, 3, many)[turn % 3], scale, some[turn % len(some)]
