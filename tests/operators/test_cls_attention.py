"""cls_attention: `out` against float64 beside eager PyTorch, `scores` to the bit of cls_scores."""

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
    assert_scores,
    float64,
    peak_memory,
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
    OUT_TOLERANCE,
    assert_close,
    assert_matches,
    assert_same_bits,
    assert_scores_match,
    max_logit,
    rounding_bound,
    sample_qkv,
    scores_bound,
)

SCALES = (None, 0.3, -0.2, 0.0)
SEQUENCES = (2, 5, 16, 17, 50)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Every step in the dtype of the inputs."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT * scale).softmax(-1) @ v).transpose(1, 2)


def rms_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).square().mean().sqrt())


def assert_out(
    got: Tensor, exact: np.ndarray, q: Tensor, k: Tensor, v: Tensor, scale: float | None
) -> None:
    """At most twice the error of eager PyTorch in the same dtype.

    The root mean square, which does not hang on one element; eager has no error at all in some
    tiny cases, so half a unit in the last place of the largest output is always allowed.
    """
    assert got.dtype == q.dtype
    assert got.shape == q.shape
    assert got.is_contiguous()
    expected = torch.from_numpy(exact)
    rounding = torch.finfo(q.dtype).eps / 2 * float(expected.abs().max())
    bound = max(2.0 * rms_error(eager_attention(q, k, v, scale), expected), rounding)
    error = rms_error(got, expected)
    assert error <= bound, f"error {error:.3g}, expected at most {bound:.3g}"
    assert_close(got, expected, OUT_TOLERANCE[q.dtype] * float(v.abs().max()))


@functools.cache
def exact_case(
    dtype: torch.dtype,
    batch: int,
    sequence: int,
    heads: int,
    head_dim: int,
    scale: float | None,
    num_prefix: int,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[np.ndarray, np.ndarray]]:
    qkv = sample_qkv(batch, sequence, heads, head_dim, dtype, sequence + head_dim)
    return qkv, oracle.cls_attention(*float64(*qkv), scale, num_prefix)


def cases(head_dim: int) -> Iterator[tuple[int, int, float | None, int]]:
    """(sequence, heads, scale, num_prefix): all lengths, the rest in turn, from another turn on
    for another head_dim."""
    for turn, sequence in enumerate(SEQUENCES, HEAD_DIMS.index(head_dim)):
        num_prefix = (1, min(5, sequence - 1), sequence - 1)[turn % 3]
        yield sequence, (1, 3, 16)[turn % 3], SCALES[turn % len(SCALES)], num_prefix


def check(backend, qkv, exact, scale, num_prefix) -> None:
    out, scores = backend.cls_attention(*qkv, scale, num_prefix)
    assert_out(out, exact[0], *qkv, scale)
    assert_scores(scores, exact[1], *qkv[:2], scale)
    assert_same_bits(scores, backend.cls_scores(*qkv[:2], scale, num_prefix))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_oracle(backend, head_dim, dtype):
    for sequence, heads, scale, num_prefix in cases(head_dim):
        qkv, exact = exact_case(dtype, 2, sequence, heads, head_dim, scale, num_prefix)
        check(backend, qkv, exact, scale, num_prefix)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sequence", "heads", "head_dim"), [(257, 4, 80), (577, 2, 64)])
def test_real_encoders(backend, sequence, heads, head_dim, dtype):
    qkv, exact = exact_case(dtype, 1, sequence, heads, head_dim, None, 1)
    check(backend, qkv, exact, None, 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_oracle_everywhere(backends, head_dim, dtype):
    settings = itertools.product((*SEQUENCES, 257), (1, 3, 16), SCALES)
    for turn, (sequence, heads, scale) in enumerate(settings):
        if sequence * heads > 1000:
            continue
        num_prefix = (1, min(5, sequence - 1), sequence - 1)[turn % 3]
        qkv = sample_qkv(2, sequence, heads, head_dim, dtype, turn)
        exact = oracle.cls_attention(*float64(*qkv), scale, num_prefix)
        for backend in backends:
            check(backend, qkv, exact, scale, num_prefix)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_that_cancel(backend, dtype):
    for sequence, heads, head_dim in ((2, 2, 128), (5, 1, 16), (17, 3, 64), (50, 1, 80)):
        q, k = sample_cancelling(2, sequence, heads, head_dim, dtype, sequence)
        v = sample_qkv(2, sequence, heads, head_dim, dtype, sequence)[2]
        exact = oracle.cls_attention(*float64(q, k, v))
        out, scores = backend.cls_attention(q, k, v)
        tolerance = max(OUT_TOLERANCE[dtype], rounding_bound(q, k, None))
        assert_close(out, torch.from_numpy(exact[0]), tolerance * float(v.abs().max()))
        assert_scores_match(scores, torch.from_numpy(exact[1]), q, k, None)
        expected = reference.cls_attention(q, k, v)
        assert_matches("cls_attention", (out, scores), expected, (q, k, v), {})


def test_arguments_by_name_and_default(backend):
    q, k, v = sample_qkv(1, 9, 2, 8, torch.float32, 1)
    expected = backend.cls_attention(q, k, v, 8**-0.5, 1)
    for got in (backend.cls_attention(q, k, v), backend.cls_attention(q=q, k=k, v=v, scale=None)):
        for one, other in zip(got, expected, strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_and_what_lies_around_them(backend, dtype):
    for head_dim, sequence in ((64, 21), (63, 16), (1, 5)):
        qkv = [x.contiguous() for x in sample_qkv(2, sequence, 3, head_dim, dtype, 2)]
        expected = oracle.cls_attention(*float64(*qkv), None, 2)
        scores = backend.cls_scores(*qkv[:2], None, 2)
        for views in zip(*map(poisoned_views, qkv), strict=True):
            before = [memory.clone() for _, memory in views]
            check(backend, [view for view, _ in views], expected, None, 2)
            for one in range(3):
                mixed = [view if i == one else qkv[i] for i, (view, _) in enumerate(views)]
                out, got = backend.cls_attention(*mixed, None, 2)
                assert_out(out, expected[0], *qkv, None)
                assert_same_bits(got, scores)
            for (_, memory), copy in zip(views, before, strict=True):
                assert_same_bits(memory, copy)


def test_shared_keys_and_values(backend):
    q, k, v = sample_qkv(3, 17, 4, 8, torch.float32, 3)
    shared = k[:, :, :1].expand_as(k), v[:, :, :1].expand_as(v)
    check(backend, (q, *shared), oracle.cls_attention(*float64(q, *shared)), None, 1)
    same = k[:1].expand_as(k), v[:1].expand_as(v)
    check(backend, (q, *same), oracle.cls_attention(*float64(q, *same)), None, 1)
    # The same memory three times.
    check(backend, (q, q, q), oracle.cls_attention(*float64(q, q, q)), None, 1)


def test_every_element_is_written(backend):
    qkv = sample_qkv(2, 33, 3, 8, torch.float32, 4)
    exact = oracle.cls_attention(*float64(*qkv))
    with poisoned_empty():
        check(backend, qkv, exact, None, 1)


def test_outputs_own_their_memory(backend):
    q, k, v = (x.contiguous() for x in sample_qkv(1, 9, 2, 8, torch.float32, 5))
    copies = [x.clone() for x in (q, k, v)]
    out, scores = backend.cls_attention(q, k, v)
    out.fill_(torch.nan)
    scores.fill_(torch.nan)
    for x, copy in zip((q, k, v), copies, strict=True):
        assert_same_bits(x, copy)


def test_no_images(backend):
    for dtype in DTYPES:
        q, k, v = sample_qkv(0, 9, 2, 8, dtype, 6)
        out, scores = backend.cls_attention(q, k, v, None, 4)
        assert out.shape == (0, 9, 2, 8)
        assert out.dtype == dtype
        assert scores.shape == (0, 5)
        assert scores.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_have_the_same_bits_for_any_batch(backend, dtype):
    for sequence, heads, head_dim in ((130, 3, 64), (50, 2, 80), (5, 1, 8)):
        qkv = sample_qkv(3, sequence, heads, head_dim, dtype, 7)
        expected = backend.cls_attention(*qkv)[1]
        assert_same_bits(backend.cls_attention(*qkv)[1], expected)
        for i in range(3):
            alone = backend.cls_attention(*(x[i : i + 1] for x in qkv))[1]
            assert_same_bits(alone, expected[i : i + 1])


def test_scores_have_the_same_bits_for_any_number_of_threads(backend):
    for batch, heads in ((1, 16), (3, 8)):
        qkv = sample_qkv(batch, 257, heads, 64, torch.bfloat16, 8)
        exact = oracle.cls_attention(*float64(*qkv))
        expected = backend.cls_scores(*qkv[:2])
        for count in (1, 2, 4):
            with threads(count):
                out, scores = backend.cls_attention(*qkv)
            assert_same_bits(scores, expected)
            assert_out(out, exact[0], *qkv, None)


@needs_native
def test_scores_have_the_same_bits_with_every_instruction_set(simd):
    qkv = sample_qkv(2, 50, 3, 72, torch.float16, 9)
    assert _native._C.simd() == simd
    scores = _native.cpu.cls_attention(*qkv)[1]
    _native._C.use_simd("portable")
    assert_same_bits(scores, _native.cpu.cls_attention(*qkv)[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(backend, dtype):
    """Where rounding the logits is what counts, `out` may be off like `scores`, per |v|."""
    qkv = sample_qkv(2, 50, 3, 64, dtype, 10)
    q, k, v = qkv
    for scale in (1.0, -4.0, 30.0, 300.0):
        exact = oracle.cls_attention(*float64(*qkv), scale)
        out, scores = backend.cls_attention(*qkv, scale)
        assert_scores(scores, exact[1], q, k, scale)
        expected = torch.from_numpy(exact[0])
        bound = max(
            2.0 * float((eager_attention(q, k, v, scale).double() - expected).abs().max()),
            2**-22 * max_logit(q, k, scale) * float(v.abs().max()),
        )
        assert_close(out, expected, bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key_dominates(backend, dtype):
    """Logits up to 1e4: every row of `out` is the value of its key."""
    q = torch.zeros(2, 50, 3, 64, dtype=dtype)
    k = torch.zeros(2, 50, 3, 64, dtype=dtype)
    v = sample_qkv(2, 50, 3, 64, dtype, 11)[2]
    q[:, :, :, 5] = 100.0
    k[:, :, :, 5] = -100.0
    k[0, 7, :, 5] = 100.0
    k[1, 49, :, 5] = 100.0
    expected = torch.stack([v[0, 7], v[1, 49]])[:, None].expand_as(v).contiguous()
    for scale in (1.0, 0.1):
        out, scores = backend.cls_attention(q, k, v, scale)
        assert_same_bits(out, expected)
        assert scores.count_nonzero() == 2
        assert scores[0, 6] == scores[1, 48] == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_give_the_mean_of_the_values(backend, dtype):
    q, k, v = sample_qkv(1, 50, 3, 72, dtype, 12)
    for case in ((q, k, v, 0.0), (torch.zeros_like(q), k, v), (q, torch.zeros_like(k), v)):
        out, scores = backend.cls_attention(*case)
        mean = v.double().mean(1, keepdim=True).expand_as(v)
        assert_close(out, mean, OUT_TOLERANCE[dtype] * float(v.abs().max()))
        assert_same_bits(scores, torch.full((1, 49), 1 / 50))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_values_that_are_not_finite(backend, value):
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
def test_not_finite_as_eager_softmax(backend, where, sequence):
    q, k = sample_nonfinite(where, sequence, torch.float32)
    v = sample_qkv(2, sequence, 2, 4, torch.float32, 14)[2].contiguous()
    out, scores = backend.cls_attention(q, k, v)
    # The same NaN as cls_scores, in whose tests their places are.
    assert torch.equal(scores.isnan(), backend.cls_scores(q, k).isnan())
    eager = eager_attention(q, k, v, None)
    assert not eager[1].isnan().any()
    assert_close(out, eager, 1e-5)


def test_float32_is_float32(backend):
    """Also where PyTorch may use less for its own matrix products."""
    qkv = sample_qkv(2, 130, 3, 64, torch.float32, 15)
    exact = oracle.cls_attention(*float64(*qkv))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        out, scores = backend.cls_attention(*qkv)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_out(out, exact[0], *qkv, None)
    assert_scores(scores, exact[1], *qkv[:2], None)
    assert scores_bound(*qkv[:2], None) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reference", pytest.param("native", marks=needs_native)])
def test_no_matrix_of_tokens_by_tokens(name):
    # In half precision it would take this much.
    assert peak_memory("cls_attention", name, 8192) < 8192 * 8192 * 2
