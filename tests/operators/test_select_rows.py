"""select_rows: whole grid rows by sums from left to right."""

from __future__ import annotations

import random

import oracle
import pytest
import torch

from vispruner_kernels import reference
from vispruner_kernels.testing import DTYPES, SCORE_KINDS, assert_same_bits, sample_scores


@pytest.mark.parametrize("kind", SCORE_KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backend_is_the_oracle(backend, kind, dtype):
    rng = random.Random(f"{kind}{dtype}")
    for seed in range(60):
        batch, width, height = rng.choice([0, 1, 3]), rng.randint(1, 26), rng.randint(1, 26)
        rows = rng.choice([1, height, rng.randint(1, height)])
        scores = sample_scores(kind, batch, width * height, torch.Generator().manual_seed(seed))
        scores = scores.to(dtype)
        for view in (scores, scores.T.contiguous().T, scores.repeat_interleave(2, 1)[:, ::2]):
            got = backend.select_rows(view, width, rows)
            assert_same_bits(got, reference.select_rows(scores, width, rows))
            expected = oracle.select_rows(scores.float().numpy(), width, rows)
            assert torch.equal(got, torch.from_numpy(expected))


def test_the_sum_is_from_left_to_right(backend):
    # Adding 1.0 to 1e8 changes nothing in float32, so only ones before 1e8 count.
    first = torch.tensor([1.0] * 8 + [1e8, -1e8])
    last = torch.tensor([1e8] + [1.0] * 8 + [-1e8])
    scores = torch.stack([last, first]).reshape(1, 20)
    assert backend.select_rows(scores, 10, 1)[0, 0] == 10
    assert backend.select_rows(scores.flip(1), 10, 1)[0, 0] == 0


def test_of_equal_rows_the_upper_comes_first_and_nan_last(backend):
    scores = torch.tensor([[torch.nan, 1.0, 0.5, 0.5, 0.25, 0.75, 0.0, 0.5]])
    assert backend.select_rows(scores, 2, 2).tolist() == [[2, 3, 4, 5]]
    assert backend.select_rows(scores, 2, 4).tolist() == [list(range(8))]
