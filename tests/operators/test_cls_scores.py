"""cls_scores: the row and the columns; test_attention_scores.py has what it shares with others."""

from __future__ import annotations

import pytest
import torch

from vispruner_kernels.testing import (
    DTYPES,
    assert_close,
    assert_same_bits,
    sample_qkv,
    scores_bound,
)


def test_only_row_0_of_q_is_read(backend):
    q, k, _ = (x.contiguous() for x in sample_qkv(2, 17, 3, 8, torch.float32, 4))
    expected = backend.cls_scores(q, k)
    q[:, 1:] = torch.nan
    assert_same_bits(backend.cls_scores(q, k), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefix_columns_are_dropped_without_renormalising(backend, dtype):
    q, k, _ = sample_qkv(2, 21, 3, 64, dtype, 9)
    patches = backend.cls_scores(q, k, None, 1)
    logits = torch.einsum("bhd,bshd->bhs", q[:, 0].double(), k.double()) / 8
    cls_column = logits.softmax(-1)[:, :, :1].mean(1)
    assert (cls_column > 1e-3).all()
    for num_prefix in range(1, 21):
        scores = backend.cls_scores(q, k, None, num_prefix)
        assert_same_bits(scores, patches[:, num_prefix - 1 :].contiguous())
    row_sums = cls_column + patches.double().sum(1, keepdim=True)
    assert_close(row_sums, torch.ones(2, 1), 20 * scores_bound(q, k, None))
