"""Calls of the operators that have between them every class of kernel variant that they launch, for
aot.py. Only shapes, dtypes, strides and alignment count; what is in the tensors does not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vispruner_kernels import _checks

FLOAT32, FLOAT16, BFLOAT16 = (torch.float32,), (torch.float16,), (torch.bfloat16,)
ALL = FLOAT32 + FLOAT16 + BFLOAT16

# To Triton a size of 1 is a constant and a multiple of 16 is known as one, as is memory that begins
# at a multiple of 16 bytes: here a shape's last number, in elements. Where the rest of a class is
# the same, one dtype stands for the others.

# Images, patch tokens, channels, tokens kept.
SELECT = {
    # LLaVA-1.5, five crops of LLaVA-NeXT, all of its crops at once, Video-LLaVA.
    (1, 576, 1024, 64, 0): ALL,
    (5, 576, 1024, 32, 0): FLOAT16,
    (1, 2880, 1024, 160, 0): FLOAT16,
    (8, 256, 1024, 64, 0): FLOAT16,
    (2, 16384, 1024, 6400, 0): BFLOAT16,
    (2, 16, 64, 4, 0): FLOAT32,
    (3, 577, 1023, 59, 1): FLOAT32 + BFLOAT16,
    (2, 2, 1, 1, 0): FLOAT32,
    (1, 1, 1, 1, 0): FLOAT32,
}
# Images, tokens, heads, head dimension, tokens that are no patches.
ATTENTION = {
    # CLIP-L, five images of it, SigLIP-so400m, Qwen2.5-VL, EVA-g, InternViT-6B.
    (1, 577, 16, 64, 1, 0): ALL,
    (5, 577, 16, 64, 1, 0): FLOAT16,
    (1, 729, 16, 72, 0, 0): FLOAT16,
    (1, 1024, 16, 80, 0, 0): FLOAT16,
    (1, 257, 16, 88, 1, 0): FLOAT16,
    (1, 577, 16, 96, 1, 0): FLOAT32,
    (1, 1025, 25, 128, 1, 0): FLOAT32 + FLOAT16,
    (1, 577, 4, 256, 1, 0): FLOAT32 + FLOAT16,
    (2, 16385, 16, 64, 1, 0): BFLOAT16,
    (2, 17, 4, 16, 1, 0): FLOAT16,
    (3, 59, 3, 37, 5, 1): FLOAT32 + BFLOAT16,
    (1, 2, 1, 1, 1, 0): FLOAT32,
    (1, 1, 1, 1, 0, 0): FLOAT32,
}


class Case(NamedTuple):
    op: str
    label: str
    # Whether the quick run has it.
    quick: bool
    args: tuple[Any, ...]
    # Another call for which nothing may be compiled anew.
    other: tuple[Any, ...]
    # Whether it is about constants alone, before the target plays a part.
    frontend: bool = False


def cases() -> Iterator[Case]:
    for select, dtypes in SELECT.items():
        for dtype in dtypes:
            for case in _selections(dtype, *select):
                yield case._replace(frontend=select[1] <= 2)
    for attention, dtypes in ATTENTION.items():
        for dtype in dtypes:
            for case in _attentions(dtype, *attention):
                yield case._replace(frontend=attention[1] <= 2)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _selections(
    dtype: torch.dtype, b: int, n: int, c: int, keep: int, offset: int
) -> Iterator[Case]:
    label = f"{_name(dtype)} {b}x{n}x{c} to {keep}"
    features = _empty(offset, dtype, b, n, c)
    # Those of cls_attention and its like.
    scores = _empty(offset, torch.float32, b, n)
    dense = (features, scores, keep)
    packed = (features.flatten(0, 1), scores.flatten())
    packed = (*packed, _offsets([n] * b), _offsets([keep] * b), n, keep * b)
    # Each operator, rule and alignment, and the dtypes that differ most, once in the quick run.
    first = (b, dtype) == (1, torch.float32) and n > 1
    odd = (offset, dtype) == (1, torch.bfloat16)
    # More images, packed ones of another length, and another count to keep: what was a multiple of
    # 16 is none then, and the other way round.
    more, length = 16 * b if n < 4096 else b + 1, max(1, n - 1)
    many = (_empty(offset, dtype, more, n, c), _empty(offset, torch.float32, more, n))
    many = (*many, max(1, keep - 1))
    lengths, kept = [length] * more, [min(keep, length)] * more
    shorter = (
        _empty(offset, dtype, length * more, c),
        _empty(offset, torch.float32, length * more),
    )
    shorter = (*shorter, _offsets(lengths), _offsets(kept), length, sum(kept))
    for matching in _checks.MATCHINGS:
        rule, some = (0.5, 8, matching), f"{label} {matching}"
        # No important tokens, and one step: 0 and 1 are special to Triton.
        other = (0.0, 1, matching)
        if b == 1 or n == 2:
            # Elsewhere it is `prune` without the last lines.
            args = (*dense, *rule)
            yield Case("select", some, first, args, (*many, *other))
        yield Case("prune", some, odd, (*dense, *rule), (*many, *other))
        mixed = first if matching == "pairwise" else odd
        yield Case("select_varlen", some, mixed, (*packed, *rule), (*shorter, *other))
    if first:
        args = (features, scores.half(), keep, 0.5, 8, "bipartite")
        yield Case("select", f"{label} half scores", False, args, args)
    # Nothing but the score decides.
    rule = (1.0, 8, "bipartite")
    yield Case("prune", f"{label} ratio 1", first or odd, (*dense, *rule), (*many, *rule))
    scores = _empty(offset, dtype, b, n)
    label = f"{_name(dtype)} {b}x{n} to {keep}"
    yield Case("select_topk", label, first or odd, (scores, keep), (scores, many[2]))
    # 24 of 576 tokens.
    width = next(w for w in (24, 64, 4, 1) if n % w == 0)
    rows = max(1, keep // width)
    label = f"{_name(dtype)} {b}x{n} by {width}"
    args = (scores, width, rows)
    yield Case("select_rows", label, first or odd, args, (scores, width, min(16, n // width)))


def _attentions(
    dtype: torch.dtype, b: int, s: int, h: int, d: int, prefix: int, offset: int
) -> Iterator[Case]:
    label = f"{_name(dtype)} {b}x{s}x{h}x{d}"
    quick = (b, d) == (1, 64) or (offset, dtype) == (1, torch.bfloat16)
    quick = quick and dtype is not torch.float16
    # Slices of what one projection computes.
    q, k, v = _empty(offset, dtype, b, s, 3, h, d).unbind(2)
    # scale, num_prefix
    args, other = (None, prefix), (1.0, min(16, s - 1))
    if s > 1:
        cls = (None, max(1, prefix))
        yield Case("cls_attention", label, quick, (q, k, v, *cls), (q, k, v, *other))
        yield Case("cls_scores", label, quick, (q, k, *cls), (q, k, *other))
    lse = _empty(offset, torch.float32, b, h, s)
    yield Case("received_scores", label, quick, (q, k, *args), (q, k, *other))
    yield Case("received_scores", f"{label} lse", quick, (q, k, *args, lse), (q, k, *other, lse))
    if d in (64, 37, 1):
        sizes = (_offsets([s] * b), s)
        packed = (q.flatten(0, 1), k.flatten(0, 1), *sizes)
        yield Case("received_scores_varlen", label, quick, (*packed, None), (*packed, 1.0))
        lse = _empty(offset, torch.float32, h, b * s)
        args, other = (*packed, None, lse), (*packed, 1.0, lse)
        yield Case("received_scores_varlen", f"{label} lse", quick, args, other)


def _empty(offset: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(math.prod(shape) + offset, dtype=dtype)[offset:].view(shape)


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
