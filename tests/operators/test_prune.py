"""prune: the indices of select, and the rows of the features at these indices."""

from __future__ import annotations

import pytest
import torch
from calls import few

from vispruner_kernels import prune, reference
from vispruner_kernels.testing import DTYPES, assert_same_bits, random_case


@pytest.mark.parametrize(
    "seeds", [range(few(200)), pytest.param(range(200, 1500), marks=pytest.mark.slow)]
)
def test_backend_is_the_reference(backend, seeds):
    for seed in seeds:
        case = random_case(seed)
        kept, indices = backend.prune(*case)
        assert_same_bits(indices, reference.select(*case))
        assert kept.is_contiguous()
        assert kept.dtype == case.features.dtype
        for image in range(len(indices)):
            assert_same_bits(kept[image], case.features[image][indices[image]].contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_is_that_of_indexing(dtype):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 40, 8, generator=generator).to(dtype).requires_grad_()
    scores = torch.rand(2, 40, generator=generator)
    kept, indices = prune(features, scores, 10)
    weight = torch.randn(kept.shape, generator=generator).to(dtype)
    (kept * weight).sum().backward()
    expected = torch.zeros_like(features)
    for image in range(2):
        expected[image, indices[image]] = weight[image]
    assert_same_bits(features.grad, expected)
    assert_same_bits(kept.detach(), torch.ops.vispruner.prune(features.detach(), scores, 10)[0])
