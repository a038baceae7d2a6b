"""select_varlen: the bits of select for every image."""

from __future__ import annotations

import oracle
import pytest
import torch
from calls import few

from vispruner_kernels import reference
from vispruner_kernels.testing import assert_same_bits, random_packed_case


@pytest.mark.parametrize(
    "seeds", [range(few(300)), pytest.param(range(300, 2000), marks=pytest.mark.slow)]
)
def test_backend_is_select_image_by_image(backend, seeds):
    for seed in seeds:
        args = random_packed_case(seed)
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
        features, scores, cu_seqlens, cu_keep, *rest = random_packed_case(seed)
        expected = oracle.select_varlen(
            features.float().numpy(),
            scores.float().numpy(),
            cu_seqlens.numpy(),
            cu_keep.numpy(),
            *rest,
        )
        got = reference.select_varlen(features, scores, cu_seqlens, cu_keep, *rest)
        assert torch.equal(got, torch.from_numpy(expected)), f"seed {seed}"


def test_arguments_may_have_any_strides(backend):
    many = map(random_packed_case, range(100))
    args = next(case for case in many if len(case.cu_seqlens) > 3 and case.total_keep > 10)
    features, scores, cu_seqlens, cu_keep, *rest = args
    wide = torch.cat([features, features], 1)[:, : features.shape[1]]
    apart = [x.repeat_interleave(3)[::3] for x in (scores, cu_seqlens, cu_keep)]
    assert_same_bits(backend.select_varlen(wide, *apart, *rest), reference.select_varlen(*args))
