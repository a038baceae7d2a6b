"""select_topk: the order of the contract, section 2, step 1."""

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
        batch, n = rng.choice([0, 1, 3]), rng.choice([1, 2, 17, 100, 577])
        keep = rng.choice([1, n, rng.randint(1, n)])
        scores = sample_scores(kind, batch, n, torch.Generator().manual_seed(seed)).to(dtype)
        # Any strides: transposed, every second element, one element for all.
        for view in (scores, scores.T.contiguous().T, scores.repeat_interleave(2, 1)[:, ::2]):
            got = backend.select_topk(view, keep)
            assert_same_bits(got, reference.select_topk(scores, keep))
            assert torch.equal(
                got, torch.from_numpy(oracle.select_topk(scores.float().numpy(), keep))
            )
        expanded = scores[:1, :1].expand(batch, n) if batch else scores
        assert_same_bits(backend.select_topk(expanded, keep), torch.arange(keep).repeat(batch, 1))


def test_the_largest_image(backend):
    scores = sample_scores("ties", 2, 16384, torch.Generator().manual_seed(0))
    for keep in (1, 9999, 16384):
        assert_same_bits(backend.select_topk(scores, keep), reference.select_topk(scores, keep))
