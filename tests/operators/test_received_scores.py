"""received_scores: its lse and its sum; test_attention_scores.py has what it shares with others."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from attention import assert_scores, exact_lse, float64, sample_cancelling
from installed import needs_native

from vispruner_kernels import _native, reference
from vispruner_kernels.testing import (
    DTYPES,
    assert_close,
    assert_same_bits,
    assert_scores_match,
    sample_qkv,
    scores_bound,
)


def test_one_token_gets_all_attention(backend):
    q, k, _ = sample_qkv(3, 1, 2, 8, torch.float32, 6)
    assert_same_bits(backend.received_scores(q, k, 5.0), torch.ones(3, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_sum_to_1(backend, dtype):
    for sequence, heads, scale in ((17, 3, None), (50, 1, 5.0), (130, 2, -0.3)):
        q, k, _ = sample_qkv(2, sequence, heads, 64, dtype, 9)
        everything = backend.received_scores(q, k, scale)
        assert_close(everything.double().sum(1), torch.ones(2), 1e-6)
        for num_prefix in (1, 5, sequence - 1):
            scores = backend.received_scores(q, k, scale, num_prefix)
            assert_same_bits(scores, everything[:, num_prefix:].contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, -0.2, 2.0])
def test_a_given_lse_replaces_the_computed_one(backend, dtype, scale):
    for sequence, heads, head_dim in ((1, 2, 8), (17, 3, 64), (50, 2, 72), (130, 1, 88)):
        q, k, _ = sample_qkv(2, sequence, heads, head_dim, dtype, 10)
        lse = exact_lse(q, k, scale)
        num_prefix = min(5, sequence - 1)
        got = backend.received_scores(q, k, scale, num_prefix, lse)
        exact = oracle.received_scores(*float64(q, k), scale, num_prefix, lse.numpy())
        assert_scores(got, exact, q, k, scale)
        without = backend.received_scores(q, k, scale, num_prefix)
        assert_close(got, without, 2 * scores_bound(q, k, scale))
        # An lse that is off changes each row by a factor of its own.
        noise = torch.randn(lse.shape, generator=torch.Generator().manual_seed(11))
        other = backend.received_scores(q, k, scale, num_prefix, lse + noise)
        exact = oracle.received_scores(*float64(q, k), scale, num_prefix, (lse + noise).numpy())
        bound = float(noise.neg().exp().max()) * scores_bound(q, k, scale)
        assert_close(other, torch.from_numpy(exact), bound)


def test_lse_and_products_that_cancel_are_as_accurate_as_eager(backend):
    """In eager PyTorch the rows sum to 1 even with wrong logits; with a given lse they need not."""
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        q, k = 100.0 + 0.1 * torch.randn(2, 1, 2, 2, 128, generator=generator)
        k *= torch.tensor([1.0, -1.0]).repeat(64)
        lse = exact_lse(q, k)
        exact = torch.from_numpy(oracle.received_scores(*float64(q, k), None, 0, lse.numpy()))
        logits = torch.einsum("bihd,bjhd->bhij", q, k) * 128**-0.5
        eager = float((logits.softmax(-1).mean((1, 2)) - exact).abs().max())
        got = backend.received_scores(q, k, None, 0, lse)
        assert_close(got, exact, max(2 * eager, scores_bound(q, k, None)))


@needs_native
def test_the_summation_of_one_head_changes_no_other_head():
    """One head has products that cancel and a row without keys, the other has neither."""
    q, k, _ = (x.contiguous() for x in sample_qkv(1, 21, 1, 64, torch.float32, 18))
    others = sample_cancelling(1, 21, 1, 64, torch.float32, 18)
    lse, other_lse = exact_lse(q, k), exact_lse(*others)
    other_lse[0, 0, 3] = torch.inf
    exact = oracle.received_scores(*float64(*others), None, 0, other_lse.numpy())
    alone = [
        _native.cpu.received_scores(q, k, None, 0, lse).double(),
        _native.cpu.received_scores(*others, None, 0, other_lse).double(),
    ]
    assert_scores(alone[1].float(), exact, *others, None)
    both = [torch.cat(pair, 2) for pair in zip((q, k), others, strict=True)]
    got = _native.cpu.received_scores(*both, None, 0, torch.cat([lse, other_lse], 1))
    assert_close(got, (alone[0] + alone[1]) / 2, 1e-7)


def test_bound_of_products_that_cancel_finds_tf32():
    q, k = sample_cancelling(1, 17, 2, 64, torch.float32, 19)
    exact = reference.received_scores(q, k)
    assert_scores_match(reference.received_scores(q, k), exact, q, k, None)
    # TF32 keeps 10 bits of each factor.
    rounded = [(x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32) for x in (q, k)]
    with pytest.raises(AssertionError, match="expected at most"):
        assert_scores_match(reference.received_scores(*rounded), exact, q, k, None)


def test_lse_may_have_any_strides(backend):
    q, k, _ = sample_qkv(3, 21, 2, 8, torch.float32, 12)
    lse = exact_lse(q, k) + torch.rand(3, 2, 21, generator=torch.Generator().manual_seed(12))
    expected = backend.received_scores(q, k, None, 1, lse)
    wide, tokens_first, images_last = (
        torch.full(shape, torch.nan) for shape in ((3, 4, 50), (3, 21, 2), (21, 2, 3))
    )
    for memory, view in (
        (wide, wide[:, 1:3, 3:45:2]),
        (tokens_first, tokens_first.transpose(1, 2)),
        (images_last, images_last.permute(2, 1, 0)),
    ):
        view.copy_(lse)
        before = memory.clone()
        assert_same_bits(backend.received_scores(q, k, None, 1, view), expected)
        assert_same_bits(memory, before)
    same_rows = lse[:1, :1, :1].expand(3, 2, 21)
    assert_same_bits(
        backend.received_scores(q, k, None, 1, same_rows),
        backend.received_scores(q, k, None, 1, same_rows.contiguous()),
    )


def test_an_lse_that_is_off_by_delta_scales_the_scores_by_exp_minus_delta(backend):
    q, k, _ = sample_qkv(2, 50, 2, 64, torch.float32, 13)
    lse = exact_lse(q, k)
    right = backend.received_scores(q, k, None, 0, lse).double()
    for delta in (-60.0, -5.0, 0.5, 10.0, 60.0):
        shifted = lse + delta
        # float32 rounds the sum.
        exact = float(np.exp(-delta))
        got = backend.received_scores(q, k, None, 0, shifted).double() / exact
        assert_close(got, right, 1e-4 * float(right.max()))
    # Remove one head, and one query row of the other head.
    shifted = lse.clone()
    shifted[:, 1] += 300.0
    shifted[:, 0, 7] += 300.0
    weights = oracle.received_scores(*float64(q, k), None, 0, shifted.numpy())
    assert 0.45 < weights.sum(1).min() < weights.sum(1).max() < 0.5
    got = backend.received_scores(q, k, None, 0, shifted)
    assert_scores(got, weights, q, k, None)


def test_the_exponential_is_within_2_units_in_the_last_place(backend):
    """With one token of logit 0 per image, its score is exp(-lse)."""
    lse = torch.arange(-80.0, 80.0, 0.21).reshape(-1, 1, 1)
    q = torch.zeros(len(lse), 1, 1, 8)
    scores = backend.received_scores(q, q, None, 0, lse)[:, 0]
    torch.testing.assert_close(
        scores.double(), lse.flatten().double().neg().exp(), rtol=2**-22, atol=0
    )


def test_a_row_with_an_lse_of_infinity_adds_nothing(backend):
    """flash-attn gives +inf for a row that attends to no key."""
    q, k, _ = sample_qkv(1, 21, 2, 8, torch.float32, 14)
    lse = exact_lse(q, k)
    lse[0, :, 5] = torch.inf
    exact = oracle.received_scores(*float64(q, k), None, 0, lse.numpy())
    assert 0.9 < exact.sum() < 0.96
    assert_scores(backend.received_scores(q, k, None, 0, lse), exact, q, k, None)


def test_reference_is_eager_softmax():
    """Without the oracle and without a bound: the definition, in float64."""
    q, k, _ = sample_qkv(2, 21, 3, 64, torch.float32, 17)
    weights = (torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / 8).softmax(-1)
    expected = weights.mean((1, 2))[:, 2:].float()
    torch.testing.assert_close(reference.received_scores(q, k, None, 2), expected, rtol=0, atol=0)
