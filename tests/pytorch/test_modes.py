"""Gradients, and modes of PyTorch that must not change a result."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import (
    CASES,
    NO_BACKWARD,
    OPERATORS,
    assert_same_answer,
    compiled,
    leaves,
    overload,
    samples,
    with_gradients,
)
from torch import Tensor

import vispruner_kernels
from vispruner_kernels.testing import (
    DTYPES,
    assert_same_bits,
)


@pytest.mark.parametrize("op", sorted(NO_BACKWARD))
def test_backward_through_an_output_raises(op):
    args = with_gradients(samples(op)[0])
    first, second = overload(op)(*args)
    assert first.requires_grad
    assert not second.requires_grad
    message = rf"vispruner::{op} has no gradient \(inference only\); .*"
    with pytest.raises(RuntimeError, match=message + NO_BACKWARD[op]):
        first.sum().backward()
    first, _ = overload(op)(*args)
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(first.sum(), args[0])
    assert args[0].grad is None


@pytest.mark.parametrize(("op", "number"), CASES)
def test_indices_and_scores_carry_no_gradient(op, number, kernel):
    args = with_gradients(samples(op)[number])
    results = leaves(kernel(op)(*args))
    for result in results[1:] if op in NO_BACKWARD else results:
        assert not result.requires_grad
        assert result.grad_fn is None
    expected = kernel(op)(*samples(op)[number])
    assert_same_answer(tuple(x.detach() for x in results), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [0, 1])
def test_the_function_prune_is_differentiable(number, dtype):
    features, *rest = samples("prune", dtype)[number]
    weights = torch.randn(
        features.shape[0], rest[1], features.shape[2], generator=torch.Generator().manual_seed(7)
    ).to(dtype)

    def gradient(prune: Callable[..., Any]) -> tuple[Any, Tensor]:
        x = features.clone().requires_grad_()
        kept, indices = prune(x, *rest)
        assert kept.requires_grad
        assert not indices.requires_grad
        (kept * weights).sum().backward()
        return (kept.detach(), indices), x.grad

    def indexed(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        indices = vispruner_kernels.select(x, *rest)
        return x[torch.arange(len(x))[:, None], indices], indices

    got, expected = gradient(vispruner_kernels.prune), gradient(indexed)
    assert_same_answer(got[0], expected[0])
    assert_same_bits(got[1], expected[1])
    assert_same_answer(got[0], vispruner_kernels.prune(features, *rest))
    again = compiled(vispruner_kernels.prune, dynamic=False)
    assert_same_bits(gradient(again)[1], expected[1])


def test_the_function_prune_has_forward_mode_gradients():
    features, scores, keep = samples("prune")[0]
    tangent = torch.randn(features.shape, generator=torch.Generator().manual_seed(8))
    kept, kept_tangent = torch.func.jvp(
        lambda x: vispruner_kernels.prune(x, scores, keep)[0], (features,), (tangent,)
    )
    indices = vispruner_kernels.select(features, scores, keep)
    rows = torch.arange(len(features))[:, None]
    assert_same_bits(kept, features[rows, indices])
    assert_same_bits(kept_tangent, tangent[rows, indices])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("op", "number"), CASES)
def test_results_are_the_same_without_gradients(op, number, mode):
    expected = overload(op)(*samples(op)[number])
    for args in (samples(op)[number], with_gradients(samples(op)[number])):
        for function in (getattr(vispruner_kernels, op), overload(op)):
            with mode():
                results = leaves(function(*args))
            assert not any(x.requires_grad for x in results)
            assert_same_answer(results, expected)


@pytest.mark.parametrize("op", OPERATORS)
def test_autocast_changes_nothing(op, kernel):
    for dtype, lower in itertools.product(DTYPES, (torch.bfloat16, torch.float16)):
        for args in samples(op, dtype):
            expected = kernel(op)(*args)
            with torch.autocast("cpu", dtype=lower):
                assert_same_answer(kernel(op)(*args), expected)


@pytest.mark.parametrize("op", OPERATORS)
def test_global_settings_change_nothing(op, kernel):
    args = samples(op)[0]
    expected = kernel(op)(*args)
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert_same_answer(kernel(op)(*args), expected)
        torch.set_default_dtype(dtype)
        # Fills empty tensors with NaN.
        torch.use_deterministic_algorithms(True)
        assert_same_answer(kernel(op)(*args), expected)
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("op", OPERATORS)
def test_a_default_device_changes_nothing(op):
    args = samples(op)[0]
    expected = overload(op)(*args)
    with torch.device("meta"):
        assert_same_answer(overload(op)(*args), expected)
        assert_same_answer(getattr(vispruner_kernels, op)(*args), expected)


def test_views_with_a_negative_bit_are_resolved():
    # The dispatcher resolves them; a kernel that read their memory would get the other sign.
    (scores, keep) = samples("select_topk")[0]
    assert_same_bits(
        vispruner_kernels.select_topk(torch._neg_view(scores), keep),
        vispruner_kernels.select_topk(-scores, keep),
    )
