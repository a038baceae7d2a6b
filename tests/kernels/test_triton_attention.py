"""The attention kernels in Triton's interpreter: properties that not all backends have."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from attention import sample_cancelling
from calls import operators_of

pytest.importorskip("triton")

from vispruner_kernels import reference
from vispruner_kernels._triton import operators
from vispruner_kernels.testing import (
    DTYPES,
    assert_close,
    assert_matches,
    assert_same_bits,
    sample_offsets,
    sample_qkv,
)

pytestmark = pytest.mark.skipif(
    not operators.INTERPRETED, reason="Triton compiles here: make test-gpu"
)
if operators.INTERPRETED:
    from vispruner_kernels._triton import received_scores

triton_ops = operators_of("triton")


@pytest.mark.parametrize(("sequence", "logit", "lse"), [(512, 10.0, False), (1024, 8.1, True)])
def test_rounding_does_not_add_up_over_many_rows(sequence, logit, lse):
    """All query rows are equal and one key has most of the attention.

    The sums have hundreds of equal terms, so rounding errors do not cancel.
    """
    q, k = torch.zeros(1, sequence, 1, 128), torch.zeros(1, sequence, 1, 128)
    q[..., 0] = 1.0
    k[0, 7, 0, 0] = logit
    logit = float(k[0, 7, 0, 0])
    rows = math.log(math.exp(logit) + sequence - 1)
    exact = math.exp(logit - rows)
    if lse:
        given = torch.full((1, 1, sequence), rows)
        exact = math.exp(logit - float(given[0, 0, 0]))
    scores = triton_ops.received_scores(q, k, 1.0, 0, given if lse else None)
    assert abs(scores[0, 7].double() - exact) < 4e-7


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_that_cancel_match_the_reference(dtype):
    q, k = sample_cancelling(1, 17, 2, 32, dtype, 6)
    v = sample_qkv(1, 17, 2, 32, dtype, 6)[2]
    logits = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * 32**-0.5
    lse = logits.logsumexp(-1).float()
    packed = (q[0], k[0], sample_offsets([17]), 17, None)
    for op, args in (
        ("cls_attention", (q, k, v)),
        ("cls_scores", (q, k)),
        ("received_scores", (q, k)),
        ("received_scores", (q, k, None, 0, lse)),
        ("received_scores_varlen", packed),
        ("received_scores_varlen", (*packed, lse[0])),
    ):
        assert_matches(op, getattr(triton_ops, op)(*args), getattr(reference, op)(*args), args, {})


@pytest.mark.parametrize("lse", [True, False])
def test_an_image_in_parts_has_the_same_bits_alone_and_in_batches(lse, monkeypatch):
    """Images have more queries than one program adds; batches are dense or packed."""
    monkeypatch.setattr(received_scores, "ADDED", 1)
    received_scores._plan.cache_clear()
    q, k, _ = sample_qkv(2, 150, 2, 16, torch.float32, 5)
    given = 4.0 + torch.rand(2, 2, 150, generator=torch.Generator().manual_seed(1)) if lse else None
    got = triton_ops.received_scores(q, k, None, 0, given)
    assert_close(got, reference.received_scores(q, k, None, 0, given).double(), 1e-6)
    packed = None if given is None else torch.cat([given[0, :, :70], given[1]], 1)
    images = [torch.cat([x[0, :70], x[1]]) for x in (q, k)]
    several = triton_ops.received_scores_varlen(
        *images, sample_offsets([70, 150]), 400, None, packed
    )
    assert_same_bits(several[70:], got[1])
    first = None if given is None else given[:1, :, :70]
    alone = triton_ops.received_scores(q[:1, :70], k[:1, :70], None, 0, first)
    assert_same_bits(several[:70], alone[0])
    received_scores._plan.cache_clear()


def test_received_scores_have_the_same_bits_for_any_alignment():
    q, k = torch.randn(2, 1, 100, 3, 64, generator=torch.Generator().manual_seed(0)).half()
    expected = triton_ops.received_scores(q, k)
    memory = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape).copy_(q)
    # The stride of a dimension of size 1 does not matter.
    for same in (memory, q.as_strided(q.shape, (1, *q.stride()[1:]))):
        assert_same_bits(triton_ops.received_scores(same, k), expected)


def test_the_largest_scale_does_not_overflow_in_float16():
    q, k = torch.zeros(2, 1, 20, 1, 8, dtype=torch.float16)
    q[..., 0], k[0, 3, 0, 0] = 40000.0, 6e-8
    for scale in (2e38, -2e38):
        expected = reference.received_scores(q, k, scale).double()
        assert_close(triton_ops.received_scores(q, k, scale), expected, 1e-6)
        out, scores = triton_ops.cls_attention(q, k, q, scale)
        assert out.isfinite().all()
        assert scores.isfinite().all()


@pytest.mark.parametrize("scale", [1e-50, -1e-50, 1e-40, 0.0])
def test_a_scale_that_is_zero_in_float32_gives_the_mean(scale):
    q, k, v = 100 * torch.randn(3, 1, 20, 2, 8, generator=torch.Generator().manual_seed(0))
    out, scores = triton_ops.cls_attention(q, k, v, scale)
    assert_close(out, v.double().mean(1, keepdim=True).expand(v.shape), 1e-4)
    assert_close(scores, torch.full((1, 19), 1 / 20, dtype=torch.float64), 1e-6)
    received = triton_ops.received_scores(q, k, scale)
    assert_close(received, torch.full((1, 20), 1 / 20, dtype=torch.float64), 1e-6)


def test_contradictory_offsets_of_packed_attention_stay_in_bounds(monkeypatch):
    """An offset below an earlier one counts as the largest earlier one.

    An image ends after max_seqlen tokens, and scores of tokens without an image are 0. There is NaN
    around the inputs and sentinels around the output.
    """
    monkeypatch.setattr(received_scores, "check_offsets", lambda *args: None)
    for seed in range(40):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        total, longest = rng.randint(1, 60), rng.choice([0, 1, 5, 60, 16384])
        wild = [rng.randint(-(2**31), 2**31 - 1), 0]
        offsets = [rng.choice([rng.randint(0, total)] * 3 + wild) for _ in range(rng.randint(2, 5))]
        around = torch.full((total + 20, 2, 2, 8), torch.nan)
        around[10 : total + 10] = torch.randn(total, 2, 2, 8, generator=generator)
        q, k = around[10 : total + 10].unbind(1)
        memory, empty = torch.full((total + 64,), -7.0), torch.empty

        def sentinels(*shape, memory=memory, total=total, empty=empty, **kwargs):
            if kwargs.get("dtype") is torch.float32:
                return memory[32 : 32 + total]
            return empty(*shape, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", sentinels)
            cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
            got = triton_ops.received_scores_varlen(q, k, cu_seqlens, longest)
        expected = torch.zeros(total)
        ends = [min(x, total) for x in itertools.accumulate(offsets, max, initial=0)][1:]
        for first, last in itertools.pairwise(ends):
            image = slice(first, first + min(last - first, longest))
            if image.start < image.stop:
                expected[image] = triton_ops.received_scores(q[None, image], k[None, image])[0]
        assert_same_bits(got.clone(), expected)
        assert (memory[:32] == -7).all()
        assert (memory[32 + total :] == -7).all()
