"""Calls of every operator and every way to call one, for the tests of all operators."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import vispruner_kernels
from vispruner_kernels import _backends, _schemas
from vispruner_kernels._triton import operators
from vispruner_kernels.testing import (
    assert_same_bits,
    sample_features,
    sample_offsets,
    sample_qkv,
    sample_scores,
)

SELECT = ("select", "prune")
SELECT_ALL = (*SELECT, "select_varlen")
SCORES = ("select_topk", "select_rows")
CLS = ("cls_attention", "cls_scores")
DENSE = (*CLS, "received_scores")
ATTENTION = (*DENSE, "received_scores_varlen")
OPERATORS = (*SELECT_ALL, *SCORES, *ATTENTION)

INTERPRETED = _backends.REQUESTED == "triton" and operators.INTERPRETED


def few(count: int) -> int:
    """The number of cases in a loop; an eighth of it in Triton's interpreter."""
    return count // 8 if INTERPRETED else count


# Triton's interpreter is slow: it is in the list only if VISPRUNER_KERNELS_BACKEND names it.
BACKENDS = [
    name
    for name in ("native", "triton", "reference")
    if _backends.SERVES[name, "cpu"] and name in ("native", "reference", _backends.REQUESTED)
]


def operators_of(backend: str) -> SimpleNamespace:
    """The operators of one backend by name; "registered" stands for their owner."""

    def operator(op: str) -> Callable[..., Any]:
        if backend == "registered":
            return overload(op)
        function = _backends._implementation(op, backend)
        return lambda *args, **kwargs: function(*_schemas.complete(op, args, kwargs))

    return SimpleNamespace(name=backend, **{op: operator(op) for op in OPERATORS})


def arguments(op: str) -> dict[str, Any]:
    """A valid call: 2 images of 12 tokens (7 with attention), or packed images of 5, 0 and 7."""
    generator = torch.Generator().manual_seed(1)
    features = sample_features("normal", 2, 12, 6, generator)
    scores = sample_scores("uniform", 2, 12, generator)
    q, k, v = sample_qkv(2, 7, 3, 8, torch.float32, seed=1)
    lengths = {"cu_seqlens": sample_offsets([5, 0, 7]), "max_seqlen": 7}
    rule = {"important_ratio": 0.5, "step": 8, "matching": "bipartite"}
    if op in SELECT:
        return {"features": features, "scores": scores, "keep": 5, **rule}
    if op == "select_varlen":
        return {
            "features": features[0],
            "scores": scores[0],
            "cu_seqlens": lengths["cu_seqlens"],
            "cu_keep": sample_offsets([2, 0, 3]),
            "max_seqlen": 7,
            "total_keep": 5,
            **rule,
        }
    if op == "select_topk":
        return {"scores": scores, "keep": 5}
    if op == "select_rows":
        return {"scores": scores, "width": 4, "rows": 2}
    if op == "cls_attention":
        return {"q": q, "k": k, "v": v, "scale": None, "num_prefix": 1}
    if op == "cls_scores":
        return {"q": q, "k": k, "scale": None, "num_prefix": 1}
    if op == "received_scores":
        lse = torch.zeros(2, 3, 7)
        return {"q": q, "k": k, "scale": None, "num_prefix": 0, "lse": lse}
    packed = {"q": q.flatten(0, 1)[:12], "k": k.flatten(0, 1)[:12]}
    return {**packed, **lengths, "scale": None, "lse": torch.zeros(3, 12)}


def leaves(got: Any) -> tuple[Tensor, ...]:
    return got if isinstance(got, tuple) else (got,)


def assert_same_answer(got: Any, expected: Any) -> None:
    for one, other in zip(leaves(got), leaves(expected), strict=True):
        assert_same_bits(one, other)


def tensors(kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {n: change(x) if isinstance(x, Tensor) else x for n, x in kwargs.items()}


def meta(x: Tensor) -> Tensor:
    # x.to("meta") would make the strides contiguous.
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def offsets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def run_fake(op: str, kwargs: dict[str, Any]) -> Any:
    mode = FakeTensorMode()
    return getattr(vispruner_kernels, op)(**tensors(kwargs, mode.from_tensor))


def run_meta(op: str, kwargs: dict[str, Any]) -> Any:
    return getattr(vispruner_kernels, op)(**tensors(kwargs, meta))


def run_positional(op: str, kwargs: dict[str, Any]) -> Any:
    return getattr(torch.ops.vispruner, op).default(*kwargs.values())


def run_backend(backend: str) -> Callable[[str, dict[str, Any]], Any]:
    """Call the implementation of `backend` with the argument checks of a registered operator."""

    def run(op: str, kwargs: dict[str, Any]) -> Any:
        return _backends._checked(op, _backends._implementation(op, backend))(**kwargs)

    return run


# Every way to call an operator with real tensors, and every way to call it with fakes.
CALLS: dict[str, Callable[[str, dict[str, Any]], Any]] = {
    "function": lambda op, kwargs: getattr(vispruner_kernels, op)(**kwargs),
    "torch.ops": lambda op, kwargs: getattr(torch.ops.vispruner, op)(**kwargs),
    "torch.ops by position": run_positional,
    **{backend: run_backend(backend) for backend in BACKENDS},
}
FAKES = {"fake": run_fake, "meta": run_meta}


def overload(op: str) -> Any:
    return getattr(torch.ops.vispruner, op).default


def samples(op: str, dtype: torch.dtype = torch.float32, size: int = 0) -> list[tuple[Any, ...]]:
    """Arguments by position: once without the optional ones, once with other values than defaults.

    Every size grows with `size`; no two sizes of one call are equal.
    """
    generator = torch.Generator().manual_seed(size)
    batch, tokens, channels = 2 + size, 19 + 2 * size, 5
    features = sample_features("clustered", batch, tokens, channels, generator).to(dtype)
    scores = sample_scores("ties", batch, tokens, generator)
    q, k, v = sample_qkv(batch, 11 + 2 * size, 4 + 6 * size, 8, dtype, seed=size)
    rule = (0.3, 3, "pairwise")
    if op in ("select", "prune"):
        return [(features, scores.to(dtype), 6 + size), (features, scores, 7, *rule)]
    if op == "select_varlen":
        lengths = [7 + size, 0, *[5] * (1 + size)]
        keep = [(n + 1) // 2 for n in lengths]
        total = sum(lengths)
        packed = (features.flatten(0, 1)[:total], scores.flatten()[:total])
        sizes = (sample_offsets(lengths), sample_offsets(keep), max(lengths), sum(keep))
        return [(*packed, *sizes), (*packed, *sizes, *rule)]
    if op == "select_topk":
        return [(scores.to(dtype), 6 + size)]
    if op == "select_rows":
        return [(scores.to(dtype)[:, : 3 * (5 + size)], 5 + size, 3 - size % 2)]
    if op == "cls_attention":
        return [(q, k, v), (q, k, v, 0.2, 3)]
    if op == "cls_scores":
        return [(q, k), (q, k, 0.2, 3)]
    if op == "received_scores":
        lse = 8.0 + torch.randn(batch, q.shape[2], q.shape[1], generator=generator)
        return [(q, k), (q, k, 0.2, 3, lse)]
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    lengths = [5, 0, 1, len(q) - 6]
    lse = 8.0 + torch.randn(q.shape[1], len(q), generator=generator)
    sizes = (sample_offsets(lengths), max(lengths))
    return [(q, k, *sizes), (q, k, *sizes, 0.2, lse)]


CASES = [
    pytest.param(op, number, id=f"{op}-{number}")
    for op in OPERATORS
    for number in range(len(samples(op)))
]


def with_gradients(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in args
    )


def every_second(x: Tensor) -> Tensor:
    """The same shape with a last stride of 2."""
    return x.repeat_interleave(2, -1)[..., ::2]


def compiled(function: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")


# The operators with an output whose backward raises, and the hint in the error.
NO_BACKWARD = {
    "prune": "call vispruner_kernels.prune, or index",
    "cls_attention": "use an attention kernel that has a backward",
}
