"""cls_attention: its output; test_attention_scores.py has what it shares with other operators."""

from __future__ import annotations

import oracle
import pytest
import torch
from attention import (
    NONFINITE,
    assert_out,
    assert_scores,
    eager_attention,
    float64,
    sample_nonfinite,
)

from vispruner_kernels.testing import assert_close, assert_same_bits, sample_qkv, scores_bound


def test_outputs_own_their_memory(backend):
    q, k, v = (x.contiguous() for x in sample_qkv(1, 9, 2, 8, torch.float32, 5))
    copies = [x.clone() for x in (q, k, v)]
    out, scores = backend.cls_attention(q, k, v)
    out.fill_(torch.nan)
    scores.fill_(torch.nan)
    for x, copy in zip((q, k, v), copies, strict=True):
        assert_same_bits(x, copy)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_nan_and_infinity_in_v_reach_only_out(backend, value):
    q, k, v = (x.contiguous() for x in sample_qkv(2, 21, 2, 4, torch.float32, 13))
    expected = backend.cls_attention(q, k, v)[1]
    v[0, 7, 1, 2] = float(value)
    out, scores = backend.cls_attention(q, k, v)
    assert_same_bits(scores, expected)
    eager = eager_attention(q, k, v, None)
    assert torch.equal(out.isfinite(), eager.isfinite())
    assert torch.equal(out[0, :, 1, 2].isnan(), eager[0, :, 1, 2].isnan())
    assert_close(out[1], eager[1], 1e-6)


@pytest.mark.parametrize("sequence", [5, 15, 16, 21])
@pytest.mark.parametrize("where", NONFINITE)
def test_nan_and_infinity_in_q_and_k_act_as_in_eager_attention(backend, where, sequence):
    q, k = sample_nonfinite(where, sequence, torch.float32)
    v = sample_qkv(2, sequence, 2, 4, torch.float32, 14)[2].contiguous()
    out, scores = backend.cls_attention(q, k, v)
    # test_attention_scores.py tests where cls_scores has NaN.
    assert torch.equal(scores.isnan(), backend.cls_scores(q, k).isnan())
    eager = eager_attention(q, k, v, None)
    assert not eager[1].isnan().any()
    assert_close(out, eager, 1e-5)


def test_float32_keeps_its_precision_where_pytorch_may_reduce_it(backend):
    qkv = sample_qkv(2, 130, 3, 64, torch.float32, 15)
    exact = oracle.cls_attention(*float64(*qkv))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        out, scores = backend.cls_attention(*qkv)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_out(out, torch.from_numpy(exact[0]), *qkv, None)
    assert_scores(scores, exact[1], *qkv[:2], None)
    assert scores_bound(*qkv[:2], None) < 1e-5
