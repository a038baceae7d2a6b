"""cls_scores: every backend against the float64 oracle, and to the bit against itself."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import oracle
import pytest
import torch
from attention import (
    HEAD_DIMS,
    NONFINITE,
    SCALES,
    SEQUENCES,
    assert_scores,
    float64,
    poisoned_empty,
    poisoned_views,
    sample_cancelling,
    sample_nonfinite,
    threads,
)
from installed import needs_native
from torch import Tensor

from vispruner_kernels import _native, reference
from vispruner_kernels.testing import (
    DTYPES,
    assert_close,
    assert_matches,
    assert_same_bits,
    assert_scores_match,
    sample_qkv,
    scores_bound,
)


@functools.cache
def exact_case(
    dtype: torch.dtype,
    batch: int,
    sequence: int,
    heads: int,
    head_dim: int,
    scale: float | None,
    num_prefix: int,
) -> tuple[Tensor, Tensor, np.ndarray]:
    q, k, _ = sample_qkv(batch, sequence, heads, head_dim, dtype, sequence + head_dim)
    return q, k, oracle.cls_scores(*float64(q, k), scale, num_prefix)


def cases(head_dim: int) -> Iterator[tuple[int, int, float | None, int]]:
    """(sequence, heads, scale, num_prefix): all lengths, the rest in turn, from another turn on
    for another head_dim."""
    for turn, sequence in enumerate(SEQUENCES, HEAD_DIMS.index(head_dim)):
        prefixes = (1, min(5, sequence - 1), sequence - 1)
        num_prefix = prefixes[turn % len(prefixes)]
        yield sequence, (1, 3, 16)[turn % 3], SCALES[turn % len(SCALES)], num_prefix


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_oracle(backend, head_dim, dtype):
    for sequence, heads, scale, num_prefix in cases(head_dim):
        q, k, exact = exact_case(dtype, 2, sequence, heads, head_dim, scale, num_prefix)
        assert_scores(backend.cls_scores(q, k, scale, num_prefix), exact, q, k, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sequence", "heads", "head_dim"), [(257, 16, 80), (577, 16, 64)])
def test_real_encoders(backend, sequence, heads, head_dim, dtype):
    q, k, exact = exact_case(dtype, 2, sequence, heads, head_dim, None, 1)
    assert_scores(backend.cls_scores(q, k), exact, q, k, None)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_oracle_everywhere(backends, head_dim, dtype):
    settings = itertools.product((*SEQUENCES, 257), (1, 3, 16), SCALES)
    for turn, (sequence, heads, scale) in enumerate(settings):
        num_prefix = (1, min(5, sequence - 1), sequence - 1)[turn % 3]
        q, k, _ = sample_qkv(2, sequence, heads, head_dim, dtype, turn)
        exact = oracle.cls_scores(*float64(q, k), scale, num_prefix)
        for backend in backends:
            assert_scores(backend.cls_scores(q, k, scale, num_prefix), exact, q, k, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_that_cancel(backend, dtype):
    for sequence, heads, head_dim in ((2, 2, 128), (5, 1, 16), (17, 3, 64), (50, 1, 80)):
        q, k = sample_cancelling(2, sequence, heads, head_dim, dtype, sequence)
        exact = torch.from_numpy(oracle.cls_scores(*float64(q, k)))
        got = backend.cls_scores(q, k)
        assert_scores_match(got, exact, q, k, None)
        assert_matches("cls_scores", got, reference.cls_scores(q, k), (q, k), {})


def test_arguments_by_name_and_default(backend):
    q, k, _ = sample_qkv(1, 9, 2, 8, torch.float32, 1)
    expected = backend.cls_scores(q, k, 8**-0.5, 1)
    assert_same_bits(backend.cls_scores(q, k), expected)
    assert_same_bits(backend.cls_scores(q=q, k=k, num_prefix=1, scale=None), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_and_what_lies_around_them(backend, dtype):
    for head_dim, sequence in ((64, 21), (63, 16), (1, 5)):
        q, k, _ = (x.contiguous() for x in sample_qkv(2, sequence, 3, head_dim, dtype, 2))
        expected = backend.cls_scores(q, k, None, 2)
        for (q_view, q_memory), (k_view, k_memory) in zip(
            poisoned_views(q), poisoned_views(k), strict=True
        ):
            before = q_memory.clone(), k_memory.clone()
            assert_same_bits(backend.cls_scores(q_view, k_view, None, 2), expected)
            assert_same_bits(backend.cls_scores(q, k_view, None, 2), expected)
            assert_same_bits(q_memory, before[0])
            assert_same_bits(k_memory, before[1])


def test_expanded_and_last_stride_of_one_channel(backend):
    q, k, _ = (x.contiguous() for x in sample_qkv(3, 17, 3, 8, torch.float32, 3))
    one_head, one_image = k[:, :, :1].expand_as(k), k[:1].expand_as(k)
    for view in (one_head, one_image):
        assert_same_bits(backend.cls_scores(q, view), backend.cls_scores(q, view.contiguous()))
    # A dimension of size 1 has no stride rule.
    column = k[:, :, :, 5:6]
    wide = torch.as_strided(column, column.shape, (*column.stride()[:3], 7), 5)
    expected = backend.cls_scores(q[..., :1].contiguous(), column.contiguous())
    assert_same_bits(backend.cls_scores(q[..., :1], wide), expected)


def test_only_row_0_of_q_is_read(backend):
    q, k, _ = (x.contiguous() for x in sample_qkv(2, 17, 3, 8, torch.float32, 4))
    expected = backend.cls_scores(q, k)
    q[:, 1:] = torch.nan
    assert_same_bits(backend.cls_scores(q, k), expected)


def test_every_element_is_written(backend):
    q, k, _ = sample_qkv(2, 33, 3, 8, torch.float32, 5)
    expected = backend.cls_scores(q, k)
    with poisoned_empty():
        assert_same_bits(backend.cls_scores(q, k), expected)


def test_no_images(backend):
    for dtype in DTYPES:
        q, k, _ = sample_qkv(0, 9, 2, 8, dtype, 6)
        scores = backend.cls_scores(q, k, None, 4)
        assert scores.shape == (0, 5)
        assert scores.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_again_and_for_any_batch(backend, dtype):
    for sequence, heads, head_dim in ((577, 16, 64), (50, 3, 80), (5, 1, 8)):
        q, k, _ = sample_qkv(3, sequence, heads, head_dim, dtype, 7)
        expected = backend.cls_scores(q, k)
        # Scratch memory with NaN in it.
        backend.cls_scores(torch.full_like(q, torch.nan), k)
        assert_same_bits(backend.cls_scores(q, k), expected)
        for i in range(3):
            alone = backend.cls_scores(q[i : i + 1], k[i : i + 1])
            assert_same_bits(alone, expected[i : i + 1])
        order = [2, 0, 1, 1, 0]
        assert_same_bits(backend.cls_scores(q[order], k[order]), expected[order])


def test_same_bits_for_any_number_of_threads(backend):
    # One image is split by head, three are split by image and head.
    for batch, heads in ((1, 32), (3, 16), (5, 16)):
        q, k, _ = sample_qkv(batch, 577, heads, 64, torch.float16, 8)
        with threads(1):
            expected = backend.cls_scores(q, k)
        for count in (2, 4, 7):
            with threads(count):
                assert_same_bits(backend.cls_scores(q, k), expected)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_with_every_instruction_set(simd, dtype):
    shapes = itertools.product((2, 16, 17, 50, 65), (1, 8, 63, 64, 88, 256), (None, 3.0))
    inputs = [
        (*sample_qkv(1, sequence, 2, head_dim, dtype, sequence)[:2], scale)
        for sequence, head_dim, scale in shapes
    ]
    assert _native._C.simd() == simd
    got = [_native.cpu.cls_scores(*case) for case in inputs]
    _native._C.use_simd("portable")
    for one, case in zip(got, inputs, strict=True):
        assert_same_bits(one, _native.cpu.cls_scores(*case))


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key_dominates(backend, dtype):
    """Logits up to 1e4: the softmax is 1 at its peak and 0 elsewhere, exactly."""
    q = torch.zeros(2, 50, 3, 64, dtype=dtype)
    k = torch.zeros(2, 50, 3, 64, dtype=dtype)
    q[:, 0, :, 5] = 100.0
    k[:, :, :, 5] = -100.0
    k[0, 7, :, 5] = 100.0
    k[1, 49, :, 5] = 100.0
    expected = torch.zeros(2, 49)
    expected[0, 6] = expected[1, 48] = 1.0
    for scale in (1.0, 0.1):
        assert_same_bits(backend.cls_scores(q, k, scale), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(backend, dtype):
    q, k, _ = sample_qkv(2, 50, 3, 64, dtype, 10)
    for scale in (30.0, -100.0, 300.0):
        exact = oracle.cls_scores(*float64(q, k), scale)
        assert_scores(backend.cls_scores(q, k, scale), exact, q, k, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_are_uniform(backend, dtype):
    q, k, _ = (x.contiguous() for x in sample_qkv(1, 50, 3, 72, dtype, 11))
    largest = min(65504.0, torch.finfo(dtype).max)
    same_keys = k[:, :1].expand_as(k)
    for case in (
        (q, k, 0.0),
        (torch.zeros_like(q), k, None),
        (q, torch.zeros_like(k), None),
        (q, same_keys, 5.0),
        (torch.full_like(q, largest), torch.full_like(k, -largest), None),
    ):
        assert_same_bits(backend.cls_scores(*case), torch.full((1, 49), 1 / 50))


def test_float16_at_the_ends_of_its_range(backend):
    """Products of 65504 overflow float16, not the float32 they are computed in."""
    q = torch.full((1, 9, 2, 64), 65504.0, dtype=torch.float16)
    k = q.clone()
    k[:, 4:] = -65504.0
    expected = torch.tensor([[0.25, 0.25, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert_same_bits(backend.cls_scores(q, k), expected)
    # Subnormal float16 numbers are numbers.
    subnormal = torch.arange(-1023, 1024, 33).float() * 2**-24
    k = subnormal.to(torch.float16)[None, :, None, None].expand(1, -1, 2, 1)
    q = torch.ones_like(k)
    scale = 2.0**14
    exact = oracle.cls_scores(*float64(q, k), scale)
    assert exact.max() > 1.05 * exact.min()
    assert_scores(backend.cls_scores(q, k, scale), exact, q, k, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sequence", [5, 21])
@pytest.mark.parametrize("where", NONFINITE)
def test_not_finite_as_eager_softmax(backend, where, sequence, dtype):
    q, k = sample_nonfinite(where, sequence, dtype)
    logits = torch.einsum("bhd,bshd->bhs", q[:, 0].double(), k.double()) / 2
    eager = logits.softmax(-1).mean(1)[:, 1:]
    assert not eager[1].isnan().any()
    assert_close(backend.cls_scores(q, k), eager, 1e-5)


def test_minus_infinity_is_no_attention(backend):
    """A key whose logits are -inf gets nothing, the others share the attention."""
    q, k = torch.ones(1, 21, 2, 1), torch.zeros(1, 21, 2, 1)
    k[:, [3, 20]] = -torch.inf
    expected = torch.full((1, 20), 1 / 19)
    expected[0, [2, 19]] = 0.0
    assert_same_bits(backend.cls_scores(q, k), expected)
