"""received_scores: every backend against the float64 oracle, and to the bit against itself."""

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
    assert_close,
    assert_matches,
    assert_same_bits,
    assert_scores_match,
    max_logit,
    sample_qkv,
    scores_bound,
)

# Tails of 4 rows and of 16 and 64 lanes; one block of 64 rows and more.
SEQUENCES = (1, 2, 5, 16, 17, 50, 65)


def exact_lse(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """float32 [B, H, S]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * scale
    return logits.logsumexp(-1).float()


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
    return q, k, oracle.received_scores(*float64(q, k), scale, num_prefix)


def cases(head_dim: int) -> Iterator[tuple[int, int, float | None, int]]:
    """(sequence, heads, scale, num_prefix): all lengths, the rest in turn, from another turn on
    for another head_dim."""
    for turn, sequence in enumerate(SEQUENCES, HEAD_DIMS.index(head_dim)):
        prefixes = (0, min(1, sequence - 1), min(5, sequence - 1), sequence - 1)
        heads = (1, 3, 16 if sequence < 50 else 2)[turn % 3]
        yield sequence, heads, SCALES[turn % len(SCALES)], prefixes[turn % len(prefixes)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_oracle(backend, head_dim, dtype):
    for sequence, heads, scale, num_prefix in cases(head_dim):
        q, k, exact = exact_case(dtype, 2, sequence, heads, head_dim, scale, num_prefix)
        assert_scores(backend.received_scores(q, k, scale, num_prefix), exact, q, k, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sequence", "heads", "head_dim", "num_prefix"), [(257, 4, 80, 1), (577, 2, 64, 0)]
)
def test_real_encoders(backend, sequence, heads, head_dim, num_prefix, dtype):
    q, k, exact = exact_case(dtype, 1, sequence, heads, head_dim, None, num_prefix)
    assert_scores(backend.received_scores(q, k, None, num_prefix), exact, q, k, None)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_oracle_everywhere(backends, head_dim, dtype):
    settings = itertools.product((*SEQUENCES, 257), (1, 3, 16), SCALES)
    for turn, (sequence, heads, scale) in enumerate(settings):
        if sequence * heads > 1000:
            continue
        num_prefix = (0, min(1, sequence - 1), min(5, sequence - 1), sequence - 1)[turn % 4]
        q, k, _ = sample_qkv(1, sequence, heads, head_dim, dtype, turn)
        exact = oracle.received_scores(*float64(q, k), scale, num_prefix)
        for backend in backends:
            assert_scores(backend.received_scores(q, k, scale, num_prefix), exact, q, k, scale)


def test_arguments_by_name_and_default(backend):
    q, k, _ = sample_qkv(1, 9, 2, 8, torch.float32, 1)
    expected = backend.received_scores(q, k, 8**-0.5, 0, None)
    assert_same_bits(backend.received_scores(q, k), expected)
    assert_same_bits(backend.received_scores(q=q, k=k, lse=None, num_prefix=0), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_and_what_lies_around_them(backend, dtype):
    for head_dim, sequence in ((64, 21), (63, 16), (1, 5)):
        q, k, _ = (x.contiguous() for x in sample_qkv(2, sequence, 3, head_dim, dtype, 2))
        expected = backend.received_scores(q, k, None, 2)
        for (q_view, q_memory), (k_view, k_memory) in zip(
            poisoned_views(q), poisoned_views(k), strict=True
        ):
            before = q_memory.clone(), k_memory.clone()
            assert_same_bits(backend.received_scores(q_view, k_view, None, 2), expected)
            assert_same_bits(backend.received_scores(q_view, k, None, 2), expected)
            assert_same_bits(q_memory, before[0])
            assert_same_bits(k_memory, before[1])


def test_expanded_and_last_stride_of_one_channel(backend):
    q, k, _ = (x.contiguous() for x in sample_qkv(3, 17, 3, 8, torch.float32, 3))
    for view in (k[:, :, :1].expand_as(k), k[:1].expand_as(k)):
        expected = backend.received_scores(q, view.contiguous())
        assert_same_bits(backend.received_scores(q, view), expected)
    # A dimension of size 1 has no stride rule.
    column = k[:, :, :, 5:6]
    wide = torch.as_strided(column, column.shape, (*column.stride()[:3], 7), 5)
    expected = backend.received_scores(q[..., :1].contiguous(), column.contiguous())
    assert_same_bits(backend.received_scores(q[..., :1], wide), expected)


def test_every_element_is_written(backend):
    q, k, _ = sample_qkv(2, 33, 3, 8, torch.float32, 5)
    expected = backend.received_scores(q, k)
    with poisoned_empty():
        assert_same_bits(backend.received_scores(q, k), expected)


def test_no_images(backend):
    for dtype in DTYPES:
        q, k, _ = sample_qkv(0, 9, 2, 8, dtype, 6)
        for lse in (None, torch.zeros(0, 2, 9)):
            scores = backend.received_scores(q, k, None, 4, lse)
            assert scores.shape == (0, 5)
            assert scores.dtype == torch.float32


def test_one_token(backend):
    q, k, _ = sample_qkv(3, 1, 2, 8, torch.float32, 6)
    assert_same_bits(backend.received_scores(q, k, 5.0), torch.ones(3, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_again_and_for_any_batch(backend, dtype):
    for sequence, heads, head_dim in ((197, 3, 64), (50, 2, 80), (5, 1, 8)):
        q, k, _ = sample_qkv(3, sequence, heads, head_dim, dtype, 7)
        for lse in (None, exact_lse(q, k)):
            expected = backend.received_scores(q, k, None, 0, lse)
            # Scratch memory with NaN in it.
            backend.received_scores(torch.full_like(q, torch.nan), k, None, 0, lse)
            assert_same_bits(backend.received_scores(q, k, None, 0, lse), expected)
            for i in range(3):
                part = None if lse is None else lse[i : i + 1]
                alone = backend.received_scores(q[i : i + 1], k[i : i + 1], None, 0, part)
                assert_same_bits(alone, expected[i : i + 1])
            order = [2, 0, 1, 1, 0]
            part = None if lse is None else lse[order]
            got = backend.received_scores(q[order], k[order], None, 0, part)
            assert_same_bits(got, expected[order])


def test_same_bits_for_any_number_of_threads(backend):
    # One image is split by head, three are split by image and head.
    for batch, heads in ((1, 6), (3, 4), (5, 2)):
        q, k, _ = sample_qkv(batch, 197, heads, 64, torch.float16, 8)
        with threads(1):
            expected = backend.received_scores(q, k)
        for count in (2, 4, 7):
            with threads(count):
                assert_same_bits(backend.received_scores(q, k), expected)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_with_every_instruction_set(simd, dtype):
    inputs = []
    for sequence, head_dim, scale in itertools.product(
        (1, 3, 16, 17, 63, 64, 65, 130), (1, 8, 63, 64, 88, 256), (None, 3.0)
    ):
        q, k, _ = sample_qkv(1, sequence, 2, head_dim, dtype, sequence)
        inputs += [(q, k, scale, 0, None), (q, k, scale, 0, exact_lse(q, k, scale) + 0.1)]
    for sequence, head_dim in itertools.product((1, 3, 17, 65), (2, 62, 256)):
        q, k = sample_cancelling(1, sequence, 2, head_dim, dtype, sequence)
        inputs.append((q, k, None, 0, exact_lse(q, k)))
    assert _native._C.simd() == simd
    got = [_native.cpu.received_scores(*case) for case in inputs]
    _native._C.use_simd("portable")
    for one, case in zip(got, inputs, strict=True):
        assert_same_bits(one, _native.cpu.received_scores(*case))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_sum_to_1(backend, dtype):
    for sequence, heads, scale in ((17, 3, None), (50, 1, 5.0), (130, 2, -0.3)):
        q, k, _ = sample_qkv(2, sequence, heads, 64, dtype, 9)
        everything = backend.received_scores(q, k, scale)
        assert_close(everything.double().sum(1), torch.ones(2), 1e-6)
        for num_prefix in (1, 5, sequence - 1):
            scores = backend.received_scores(q, k, scale, num_prefix)
            assert_same_bits(scores, everything[:, num_prefix:].contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, -0.2, 2.0])
def test_given_lse(backend, dtype, scale):
    for sequence, heads, head_dim in ((1, 2, 8), (17, 3, 64), (50, 2, 72), (130, 1, 88)):
        q, k, _ = sample_qkv(2, sequence, heads, head_dim, dtype, 10)
        lse = exact_lse(q, k, scale)
        num_prefix = min(5, sequence - 1)
        got = backend.received_scores(q, k, scale, num_prefix, lse)
        exact = oracle.received_scores(*float64(q, k), scale, num_prefix, lse.numpy())
        assert_scores(got, exact, q, k, scale)
        without = backend.received_scores(q, k, scale, num_prefix)
        assert_close(got, without, 2 * scores_bound(q, k, scale))
        # Rows in which the others are off by a factor of their own.
        noise = torch.randn(lse.shape, generator=torch.Generator().manual_seed(11))
        other = backend.received_scores(q, k, scale, num_prefix, lse + noise)
        exact = oracle.received_scores(*float64(q, k), scale, num_prefix, (lse + noise).numpy())
        bound = float(noise.neg().exp().max()) * scores_bound(q, k, scale)
        assert_close(other, torch.from_numpy(exact), bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_that_cancel(backend, dtype):
    for sequence, heads, head_dim in ((2, 2, 128), (5, 1, 16), (17, 3, 64), (50, 1, 80)):
        q, k = sample_cancelling(2, sequence, heads, head_dim, dtype, sequence)
        assert max_logit(q.abs(), k.abs(), None) > 20 * max_logit(q, k, None)
        for lse in (None, exact_lse(q, k)):
            args = (q, k, None, 0, lse)
            got = backend.received_scores(*args)
            exact = oracle.received_scores(
                *float64(q, k), None, 0, None if lse is None else lse.numpy()
            )
            assert_scores_match(got, torch.from_numpy(exact), q, k, None)
            assert_matches("received_scores", got, reference.received_scores(*args), args, {})
            if lse is not None:
                # On a CPU they are added in float64.
                assert_scores(got, exact, q, k, None)


def test_lse_of_products_that_cancel_beside_eager(backend):
    """The rows sum to 1 in eager PyTorch whatever its logits are; those of a given lse need not."""
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        q, k = 100.0 + 0.1 * torch.randn(2, 1, 2, 2, 128, generator=generator)
        k *= torch.tensor([1.0, -1.0]).repeat(64)
        lse = exact_lse(q, k)
        exact = torch.from_numpy(oracle.received_scores(*float64(q, k), None, 0, lse.numpy()))
        logits = torch.einsum("bihd,bjhd->bhij", q, k) * 128**-0.5
        eager = float((logits.softmax(-1).mean((1, 2)) - exact).abs().max())
        got = backend.received_scores(q, k, None, 0, lse)
        assert_close(got, exact, max(2 * eager, scores_bound(q, k, None)))


@needs_native
def test_each_head_decides_for_itself_how_its_products_are_added():
    """A head beside one that cancels, and rows of no keys, change no bit of another."""
    q, k, _ = (x.contiguous() for x in sample_qkv(1, 21, 1, 64, torch.float32, 18))
    others = sample_cancelling(1, 21, 1, 64, torch.float32, 18)
    lse, other_lse = exact_lse(q, k), exact_lse(*others)
    other_lse[0, 0, 3] = torch.inf
    exact = oracle.received_scores(*float64(*others), None, 0, other_lse.numpy())
    alone = [
        _native.cpu.received_scores(q, k, None, 0, lse).double(),
        _native.cpu.received_scores(*others, None, 0, other_lse).double(),
    ]
    assert_scores(alone[1].float(), exact, *others, None)
    both = [torch.cat(pair, 2) for pair in zip((q, k), others, strict=True)]
    got = _native.cpu.received_scores(*both, None, 0, torch.cat([lse, other_lse], 1))
    assert_close(got, (alone[0] + alone[1]) / 2, 1e-7)


def test_bound_of_products_that_cancel_finds_tf32():
    q, k = sample_cancelling(1, 17, 2, 64, torch.float32, 19)
    exact = reference.received_scores(q, k)
    assert_scores_match(reference.received_scores(q, k), exact, q, k, None)
    # 10 bits of each factor, as tensor cores take them unless they are told not to.
    rounded = [(x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32) for x in (q, k)]
    with pytest.raises(AssertionError, match="expected at most"):
        assert_scores_match(reference.received_scores(*rounded), exact, q, k, None)


def test_lse_of_any_strides(backend):
    q, k, _ = sample_qkv(3, 21, 2, 8, torch.float32, 12)
    lse = exact_lse(q, k) + torch.rand(3, 2, 21, generator=torch.Generator().manual_seed(12))
    expected = backend.received_scores(q, k, None, 1, lse)
    wide, tokens_first, images_last = (
        torch.full(shape, torch.nan) for shape in ((3, 4, 50), (3, 21, 2), (21, 2, 3))
    )
    for memory, view in (
        (wide, wide[:, 1:3, 3:45:2]),
        (tokens_first, tokens_first.transpose(1, 2)),
        (images_last, images_last.permute(2, 1, 0)),
    ):
        view.copy_(lse)
        before = memory.clone()
        assert_same_bits(backend.received_scores(q, k, None, 1, view), expected)
        assert_same_bits(memory, before)
    same_rows = lse[:1, :1, :1].expand(3, 2, 21)
    assert_same_bits(
        backend.received_scores(q, k, None, 1, same_rows),
        backend.received_scores(q, k, None, 1, same_rows.contiguous()),
    )


def test_lse_off_by_delta_is_a_factor(backend):
    q, k, _ = sample_qkv(2, 50, 2, 64, torch.float32, 13)
    lse = exact_lse(q, k)
    right = backend.received_scores(q, k, None, 0, lse).double()
    for delta in (-60.0, -5.0, 0.5, 10.0, 60.0):
        shifted = lse + delta
        # float32 rounds the sum.
        exact = float(np.exp(-delta))
        got = backend.received_scores(q, k, None, 0, shifted).double() / exact
        assert_close(got, right, 1e-4 * float(right.max()))
    # One head is out of it, one query row of the other is.
    shifted = lse.clone()
    shifted[:, 1] += 300.0
    shifted[:, 0, 7] += 300.0
    weights = oracle.received_scores(*float64(q, k), None, 0, shifted.numpy())
    assert 0.45 < weights.sum(1).min() < weights.sum(1).max() < 0.5
    got = backend.received_scores(q, k, None, 0, shifted)
    assert_scores(got, weights, q, k, None)


def test_exponential(backend):
    """One token of logit 0 per image: its score is exp(-lse), within 2 units in the last place."""
    lse = torch.arange(-80.0, 80.0, 0.21).reshape(-1, 1, 1)
    q = torch.zeros(len(lse), 1, 1, 8)
    scores = backend.received_scores(q, q, None, 0, lse)[:, 0]
    torch.testing.assert_close(
        scores.double(), lse.flatten().double().neg().exp(), rtol=2**-22, atol=0
    )


def test_lse_of_no_keys(backend):
    """+inf, as flash-attn gives for a row that attends to nothing: the row adds nothing."""
    q, k, _ = sample_qkv(1, 21, 2, 8, torch.float32, 14)
    lse = exact_lse(q, k)
    lse[0, :, 5] = torch.inf
    exact = oracle.received_scores(*float64(q, k), None, 0, lse.numpy())
    assert 0.9 < exact.sum() < 0.96
    assert_scores(backend.received_scores(q, k, None, 0, lse), exact, q, k, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key_dominates(backend, dtype):
    """Logits up to 1e4: the softmax is 1 at its peak and 0 elsewhere, exactly."""
    q = torch.zeros(2, 50, 3, 64, dtype=dtype)
    k = torch.zeros(2, 50, 3, 64, dtype=dtype)
    q[:, :, :, 5] = 100.0
    k[:, :, :, 5] = -100.0
    k[0, 7, :, 5] = 100.0
    k[1, 49, :, 5] = 100.0
    expected = torch.zeros(2, 50)
    expected[0, 7] = expected[1, 49] = 1.0
    for scale in (1.0, 0.1):
        assert_same_bits(backend.received_scores(q, k, scale), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(backend, dtype):
    q, k, _ = sample_qkv(2, 50, 3, 64, dtype, 15)
    for scale in (30.0, -100.0, 300.0):
        exact = oracle.received_scores(*float64(q, k), scale)
        assert_scores(backend.received_scores(q, k, scale), exact, q, k, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_are_uniform(backend, dtype):
    q, k, _ = (x.contiguous() for x in sample_qkv(1, 50, 3, 72, dtype, 16))
    largest = min(65504.0, torch.finfo(dtype).max)
    for case in (
        (q, k, 0.0),
        (torch.zeros_like(q), k, None),
        (q, torch.zeros_like(k), None),
        (q, k[:, :1].expand_as(k), 5.0),
        (torch.full_like(q, largest), torch.full_like(k, -largest), None),
    ):
        assert_same_bits(backend.received_scores(*case), torch.full((1, 50), 1 / 50))


def test_float16_at_the_ends_of_its_range(backend):
    """Products of 65504 overflow float16, not the float32 they are computed in."""
    q = torch.full((1, 9, 2, 64), 65504.0, dtype=torch.float16)
    k = q.clone()
    k[:, 4:] = -65504.0
    expected = torch.tensor([[0.25] * 4 + [0.0] * 5])
    assert_same_bits(backend.received_scores(q, k), expected)
    # Subnormal float16 numbers are numbers.
    subnormal = torch.arange(-1023, 1024, 33).float() * 2**-24
    k = subnormal.to(torch.float16)[None, :, None, None].expand(1, -1, 2, 1)
    q = torch.ones_like(k)
    scale = 2.0**14
    exact = oracle.received_scores(*float64(q, k), scale)
    assert exact.max() > 1.05 * exact.min()
    assert_scores(backend.received_scores(q, k, scale), exact, q, k, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sequence", [5, 21])
@pytest.mark.parametrize("where", NONFINITE)
def test_not_finite_as_eager_softmax(backend, where, sequence, dtype):
    q, k = sample_nonfinite(where, sequence, dtype)
    logits = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / 2
    eager = logits.softmax(-1).mean((1, 2))
    assert not eager[1].isnan().any()
    assert_close(backend.received_scores(q, k), eager, 1e-5)


def test_minus_infinity_is_no_attention(backend):
    """A key whose logits are -inf gets nothing, the others share the attention."""
    q, k = torch.ones(1, 21, 2, 1), torch.zeros(1, 21, 2, 1)
    k[:, [3, 20]] = -torch.inf
    expected = torch.full((1, 21), 1 / 19)
    expected[0, [3, 20]] = 0.0
    assert_same_bits(backend.received_scores(q, k), expected)


def test_reference_is_eager_softmax():
    """No oracle and no bound: the definition, in float64."""
    q, k, _ = sample_qkv(2, 21, 3, 64, torch.float32, 17)
    weights = (torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / 8).softmax(-1)
    expected = weights.mean((1, 2))[:, 2:].float()
    torch.testing.assert_close(reference.received_scores(q, k, None, 2), expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reference", pytest.param("native", marks=needs_native)])
def test_no_matrix_of_tokens_by_tokens(name):
    # In half precision it would take this much.
    assert peak_memory("received_scores", name, 8192) < 8192 * 8192 * 2
