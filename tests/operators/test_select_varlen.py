"""select_varlen: image for image the bits of select."""

from __future__ import annotations

import random

import oracle
import pytest
import torch
from calls import few

from vispruner_kernels import reference
from vispruner_kernels.testing import (
    DTYPES,
    FEATURE_KINDS,
    SCORE_KINDS,
    assert_same_bits,
    sample_features,
    sample_offsets,
    sample_scores,
)


def packed(seed):
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    lengths = [rng.choice([0, 1, 2, rng.randint(1, 70)]) for _ in range(rng.randint(0, 6))]
    keeps = [rng.choice([0, n, rng.randint(0, n)]) for n in lengths]
    tail, surplus = rng.choice([0, 0, 5]), rng.choice([0, 0, 1])
    total = sum(lengths) + tail
    surplus = min(surplus, total - sum(keeps))
    features = sample_features(rng.choice(FEATURE_KINDS), 1, max(total, 1), 24, generator)[0]
    scores = sample_scores(rng.choice(SCORE_KINDS), 1, max(total, 1), generator)[0]
    return (
        features[:total].to(rng.choice(DTYPES)),
        scores[:total].to(rng.choice(DTYPES)),
        sample_offsets(lengths),
        sample_offsets(keeps),
        max([*lengths, rng.choice([0, 99])]),
        sum(keeps) + surplus,
        rng.choice([0.0, 0.3, 0.5, 1.0]),
        rng.choice([1, 3, 8]),
        rng.choice(["bipartite", "pairwise"]),
    )


@pytest.mark.parametrize(
    "seeds", [range(few(300)), pytest.param(range(300, 2000), marks=pytest.mark.slow)]
)
def test_backend_is_select_image_by_image(backend, seeds):
    for seed in seeds:
        args = packed(seed)
        features, scores, cu_seqlens, cu_keep, _, total_keep, *rule = args
        got = backend.select_varlen(*args)
        expected = torch.zeros(total_keep, dtype=torch.int64)
        for i in range(len(cu_seqlens) - 1):
            (start, stop), (first, last) = (
                cu_seqlens[i : i + 2].tolist(),
                cu_keep[i : i + 2].tolist(),
            )
            if last > first:
                image = features[None, start:stop], scores[None, start:stop]
                expected[first:last] = start + reference.select(*image, last - first, *rule)[0]
        assert_same_bits(got, expected)


def test_reference_is_the_oracle():
    for seed in range(150):
        features, scores, cu_seqlens, cu_keep, *rest = packed(seed)
        expected = oracle.select_varlen(
            features.float().numpy(),
            scores.float().numpy(),
            cu_seqlens.numpy(),
            cu_keep.numpy(),
            *rest,
        )
        got = reference.select_varlen(features, scores, cu_seqlens, cu_keep, *rest)
        assert torch.equal(got, torch.from_numpy(expected)), f"seed {seed}"


def test_strided_arguments(backend):
    args = next(a for a in map(packed, range(100)) if len(a[2]) > 3 and a[5] > 10)
    features, scores, cu_seqlens, cu_keep, *rest = args
    wide = torch.cat([features, features], 1)[:, : features.shape[1]]
    apart = [x.repeat_interleave(3)[::3] for x in (scores, cu_seqlens, cu_keep)]
    assert_same_bits(backend.select_varlen(wide, *apart, *rest), reference.select_varlen(*args))
