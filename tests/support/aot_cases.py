"""Calls of the operators that together launch every class of kernel variant, for aot.py.

Only shapes, dtypes, strides and alignment matter; the values in the tensors do not.
"""

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

# Triton compiles different variants for sizes of 1, for multiples of 16, and for memory that begins
# at a multiple of 16 bytes. The last number of each shape below is the offset of its memory in
# elements. If the dtypes of a shape differ in no other way, one dtype is compiled.

# Images, patch tokens, channels, tokens kept, offset.
SELECT = {
    # LLaVA-1.5, five crops of LLaVA-NeXT, all of its crops at once, Video-LLaVA.
    (1, 576, 1024, 64, 0): ALL,
    (5, 576, 1024, 32, 0): FLOAT16,
    (1, 2880, 1024, 160, 0): FLOAT16,
    (8, 256, 1024, 64, 0): FLOAT16,
    (2, 16384, 1024, 6400, 0): BFLOAT16,
    # The larger tiles of many tokens.
    (64, 576, 1024, 64, 0): FLOAT32 + FLOAT16,
    (2, 16, 64, 4, 0): FLOAT32,
    (3, 577, 1023, 59, 1): FLOAT32 + BFLOAT16,
    (2, 2, 1, 1, 0): FLOAT32,
    (1, 1, 1, 1, 0): FLOAT32,
}
# Images, tokens, heads, head dimension, prefix tokens, offset.
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
    # Whether the quick run includes it.
    quick: bool
    args: tuple[Any, ...]
    # Arguments of another call, which must not need another compilation.
    other: tuple[Any, ...]
    # Whether it tests only very small sizes, which Triton's frontend treats as constants. These do
    # not depend on the target, so one target compiles the case.
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
    # Scores as cls_attention and similar operators return them.
    scores = _empty(offset, torch.float32, b, n)
    dense = (features, scores, keep)
    packed = (features.flatten(0, 1), scores.flatten())
    packed = (*packed, _offsets([n] * b), _offsets([keep] * b), n, keep * b)
    # The quick run has each operator, rule and alignment, and the most different dtypes, once.
    first = (b, dtype) == (1, torch.float32) and n > 1
    odd = (offset, dtype) == (1, torch.bfloat16)
    # Triton is imported only when a call is compiled.
    from vispruner_kernels._triton.select import MANY_TOKENS

    # The other call has more images, packed images of another length, and another number of tokens
    # to keep. So multiples of 16 become other numbers and vice versa.
    more, length = b + 1 if 16 * b * n >= MANY_TOKENS else 16 * b, max(1, n - 1)
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
        # No important tokens and a step of 1: Triton treats 0 and 1 specially.
        other = (0.0, 1, matching)
        if b == 1 or n == 2:
            # In other shapes, `select` is `prune` without the gather at the end.
            args = (*dense, *rule)
            yield Case("select", some, first, args, (*many, *other))
        yield Case("prune", some, odd, (*dense, *rule), (*many, *other))
        mixed = first if matching == "pairwise" else odd
        yield Case("select_varlen", some, mixed, (*packed, *rule), (*shorter, *other))
    if first:
        args = (features, scores.half(), keep, 0.5, 8, "bipartite")
        yield Case("select", f"{label} half scores", False, args, args)
    # The scores alone decide.
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
    # Slices of the output of one projection.
    q, k, v = _empty(offset, dtype, b, s, 3, h, d).unbind(2)
    # scale, num_prefix
    args, other = (None, prefix), (1.0, min(16, s - 1))
    if s > 1:
        cls = (None, max(1, prefix))
        yield Case("cls_attention", label, quick, (q, k, v, *cls), (q, k, v, *other))
        yield Case("cls_scores", label, quick, (q, k, *cls), (q, k, *other))
    lse = _empty(offset, torch.float32, b, h, s)
    yield Case("received_scores", label, quick, (q, k, *args, None), (q, k, *other, None))
    yield Case("received_scores", f"{label} lse", quick, (q, k, *args, lse), (q, k, *other, lse))
    if d in (64, 37, 1):
        sizes = (_offsets([s] * b), s)
        packed = (q.flatten(0, 1), k.flatten(0, 1), *sizes)
        args, other = (*packed, None, None), (*packed, 1.0, None)
        yield Case("received_scores_varlen", label, quick, args, other)
        lse = _empty(offset, torch.float32, h, b * s)
        args, other = (*packed, None, lse), (*packed, 1.0, lse)
        yield Case("received_scores_varlen", f"{label} lse", quick, args, other)


def _empty(offset: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(math.prod(shape) + offset, dtype=dtype)[offset:].view(shape)


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
