"""received_scores_varlen: the bits of received_scores for every image, on every backend.

test_attention_scores.py has the tests of images of one size.
"""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from attention import (
    HEAD_DIMS,
    assert_scores,
    float64,
    poisoned_empty,
    poisoned_views,
    sample_cancelling,
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
    sample_offsets,
    sample_qkv,
)

# Empty images at both ends and between others, images of one token, tails, more than 64 rows.
LENGTHS = [0, 5, 1, 0, 0, 17, 65, 1, 16, 2, 0]


def sample_packed(
    lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype, seed: int, tail: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [total, H, D] and cu_seqlens; the last `tail` tokens belong to no image."""
    q, k, _ = sample_qkv(1, sum(lengths) + tail, heads, head_dim, dtype, seed)
    return q[0], k[0], sample_offsets(lengths)


def exact_lse(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> Tensor:
    """float32 [H, total]; 0 for tokens that belong to no image."""
    lse = torch.zeros(q.shape[1], q.shape[0])
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        logits = torch.einsum("ihd,jhd->hij", q[start:stop].double(), k[start:stop].double())
        lse[:, start:stop] = (logits * q.shape[-1] ** -0.5).logsumexp(-1)
    return lse


def image_by_image(
    backend, q: Tensor, k: Tensor, cu_seqlens: Tensor, scale=None, lse: Tensor | None = None
) -> Tensor:
    scores = torch.zeros(q.shape[0])
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        if start < stop:
            part = None if lse is None else lse[None, :, start:stop]
            one = q[None, start:stop], k[None, start:stop]
            scores[start:stop] = backend.received_scores(*one, scale, 0, part)[0]
    return scores


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_agrees_with_the_oracle(backend, head_dim, dtype):
    turn = HEAD_DIMS.index(head_dim)
    heads, scale = (1, 3, 16)[turn % 3], (None, 0.3, -0.2, 0.0)[turn % 4]
    q, k, cu_seqlens = sample_packed([0, 5, 1, 0, 17, 50, 2], heads, head_dim, dtype, turn, 3)
    exact = oracle.received_scores_varlen(*float64(q, k), cu_seqlens.numpy(), 50, scale)
    got = backend.received_scores_varlen(q, k, cu_seqlens, 50, scale)
    assert_scores(got, exact, q, k, scale)
    assert got[-3:].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_agrees_with_the_oracle_in_every_setting(backends, head_dim, dtype):
    for lengths, heads, scale in itertools.product(
        (LENGTHS, [257], [1] * 40, [64, 64, 64, 48]), (1, 3, 16), (None, 0.3, -0.2, 0.0, 2.0)
    ):
        q, k, cu_seqlens = sample_packed(lengths, heads, head_dim, dtype, heads)
        exact = oracle.received_scores_varlen(*float64(q, k), cu_seqlens.numpy(), 257, scale)
        for backend in backends:
            got = backend.received_scores_varlen(q, k, cu_seqlens, 257, scale)
            assert_scores(got, exact, q, k, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, -0.2, 3.0])
def test_bits_are_those_of_received_scores(backend, dtype, scale):
    for head_dim, heads in ((64, 3), (80, 1), (1, 2)):
        q, k, cu_seqlens = sample_packed(LENGTHS, heads, head_dim, dtype, 1)
        lse = exact_lse(q, k, cu_seqlens)
        lse += torch.rand(lse.shape, generator=torch.Generator().manual_seed(1))
        for given in (None, lse):
            got = backend.received_scores_varlen(q, k, cu_seqlens, 65, scale, given)
            assert_same_bits(got, image_by_image(backend, q, k, cu_seqlens, scale, given))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_that_cancel_stay_within_the_bound_of_the_contract(backend, dtype):
    lengths = [2, 0, 17, 5]
    q, k = (x[0] for x in sample_cancelling(1, 24, 2, 64, dtype, 17))
    cu_seqlens = sample_offsets(lengths)
    lse = exact_lse(q, k, cu_seqlens)
    for given in (None, lse):
        args = (q, k, cu_seqlens, 17, None, given)
        got = backend.received_scores_varlen(*args)
        exact = oracle.received_scores_varlen(
            *float64(q, k), cu_seqlens.numpy(), 17, None, None if given is None else lse.numpy()
        )
        assert_scores_match(got, torch.from_numpy(exact), q, k, None)
        expected = reference.received_scores_varlen(*args)
        assert_matches("received_scores_varlen", got, expected, args, {})
        assert_same_bits(got, image_by_image(backend, q, k, cu_seqlens, None, given))
        if given is not None:
            # A CPU adds these logits in float64.
            assert_scores(got, exact, q, k, None)


def test_same_bits_at_any_place_of_the_batch(backend):
    image_q, image_k, _ = sample_packed([33], 2, 64, torch.float16, 2)
    other_q, other_k, _ = sample_packed([50], 2, 64, torch.float16, 3)
    alone = backend.received_scores_varlen(image_q, image_k, sample_offsets([33]), 33)
    for order in ("io", "oi", "iii", "oooioo"):
        q = torch.cat([image_q if x == "i" else other_q for x in order])
        k = torch.cat([image_k if x == "i" else other_k for x in order])
        cu_seqlens = sample_offsets([33 if x == "i" else 50 for x in order])
        got = backend.received_scores_varlen(q, k, cu_seqlens, 50)
        start = int(cu_seqlens[order.index("i")])
        assert_same_bits(got[start : start + 33], alone)


def test_one_image_has_the_bits_of_received_scores(backend):
    q, k, cu_seqlens = sample_packed([50], 3, 64, torch.float32, 4)
    got = backend.received_scores_varlen(q, k, cu_seqlens, 50)
    assert_same_bits(got, backend.received_scores(q[None], k[None])[0])
    assert_close(got.double().sum(), torch.ones(()), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_images_of_one_token_get_all_their_attention(backend, dtype):
    q, k, cu_seqlens = sample_packed([1] * 300, 3, 64, dtype, 5)
    got = backend.received_scores_varlen(q, k, cu_seqlens, 1)
    assert_same_bits(got, torch.ones(300))


def test_no_tokens_and_no_images_give_zeros(backend):
    q, k, _ = sample_packed([4], 2, 8, torch.float32, 6)
    zeros = torch.zeros(4)
    for lengths in ([], [0], [0, 0, 0]):
        cu_seqlens = sample_offsets(lengths)
        assert_same_bits(backend.received_scores_varlen(q, k, cu_seqlens, 0), zeros)
        nothing = backend.received_scores_varlen(q[:0], k[:0], cu_seqlens, 0)
        assert_same_bits(nothing, torch.zeros(0))


def test_tokens_past_the_last_offset_are_0(backend):
    q, k, cu_seqlens = (x.clone() for x in sample_packed([7, 9], 2, 8, torch.float32, 7, 5))
    expected = backend.received_scores_varlen(q[:16], k[:16], cu_seqlens, 9)
    q[16:] = k[16:] = torch.nan
    lse = exact_lse(q, k, cu_seqlens)
    for given in (None, lse):
        with poisoned_empty():
            got = backend.received_scores_varlen(q, k, cu_seqlens, 9, None, given)
        assert_same_bits(got[16:], torch.zeros(5))
        assert_close(got[:16], expected, 1e-6)
    assert_same_bits(backend.received_scores_varlen(q, k, cu_seqlens, 9)[:16], expected)


def test_a_larger_max_seqlen_changes_no_bit(backend):
    q, k, cu_seqlens = sample_packed(LENGTHS, 2, 8, torch.float32, 8)
    expected = backend.received_scores_varlen(q, k, cu_seqlens, 65)
    for max_seqlen in (66, 1000, 16384):
        assert_same_bits(backend.received_scores_varlen(q, k, cu_seqlens, max_seqlen), expected)


def test_nan_in_one_image_changes_no_other_image(backend):
    q, k, cu_seqlens = (x.clone() for x in sample_packed([21, 17, 21], 2, 8, torch.float32, 9))
    expected = backend.received_scores_varlen(q, k, cu_seqlens, 21)
    q[21:38] = k[21:38] = torch.nan
    got = backend.received_scores_varlen(q, k, cu_seqlens, 21)
    assert got[21:38].isnan().all()
    assert_same_bits(got[:21], expected[:21])
    assert_same_bits(got[38:], expected[38:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_are_read_and_the_memory_around_them_is_left_alone(backend, dtype):
    for head_dim in (64, 63, 1):
        q, k, cu_seqlens = sample_packed([16, 0, 5], 3, head_dim, dtype, 10)
        q, k = q.contiguous(), k.contiguous()
        expected = backend.received_scores_varlen(q, k, cu_seqlens, 16)
        for (q_view, q_memory), (k_view, k_memory) in zip(
            poisoned_views(q), poisoned_views(k), strict=True
        ):
            before = q_memory.clone(), k_memory.clone()
            for other in (q, q_view):
                got = backend.received_scores_varlen(other, k_view, cu_seqlens, 16)
                assert_same_bits(got, expected)
            assert_same_bits(q_memory, before[0])
            assert_same_bits(k_memory, before[1])


def test_offsets_and_lse_may_have_any_strides(backend):
    q, k, cu_seqlens = sample_packed([16, 0, 5], 3, 8, torch.float32, 11)
    lse = exact_lse(q, k, cu_seqlens)
    expected = backend.received_scores_varlen(q, k, cu_seqlens, 16, None, lse)
    every_third = torch.full((12,), -7, dtype=torch.int32)[1::3]
    every_third.copy_(cu_seqlens)
    assert_same_bits(backend.received_scores_varlen(q, k, every_third, 16, None, lse), expected)
    assert_same_bits(every_third.contiguous(), cu_seqlens)
    wide, tokens_first = torch.full((5, 50), torch.nan), torch.full((21, 3), torch.nan)
    for memory, view in ((wide, wide[1:4, 3:45:2]), (tokens_first, tokens_first.T)):
        view.copy_(lse)
        before = memory.clone()
        got = backend.received_scores_varlen(q, k, cu_seqlens, 16, None, view)
        assert_same_bits(got, expected)
        assert_same_bits(memory, before)


def test_an_lse_that_is_off_in_one_image_scales_only_that_image(backend):
    q, k, cu_seqlens = sample_packed([16, 33], 2, 8, torch.float32, 12)
    lse = exact_lse(q, k, cu_seqlens)
    right = backend.received_scores_varlen(q, k, cu_seqlens, 33, None, lse)
    lse[:, 16:] += 2.0
    got = backend.received_scores_varlen(q, k, cu_seqlens, 33, None, lse)
    assert_same_bits(got[:16], right[:16])
    factor = torch.tensor(-2.0).exp()
    torch.testing.assert_close(got[16:], right[16:] * factor, rtol=1e-5, atol=0)


def test_every_element_is_written(backend):
    q, k, cu_seqlens = sample_packed(LENGTHS, 3, 8, torch.float32, 13)
    expected = backend.received_scores_varlen(q, k, cu_seqlens, 65)
    with poisoned_empty():
        assert_same_bits(backend.received_scores_varlen(q, k, cu_seqlens, 65), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_again(backend, dtype):
    q, k, cu_seqlens = sample_packed(LENGTHS, 3, 64, dtype, 14)
    expected = backend.received_scores_varlen(q, k, cu_seqlens, 65)
    # This leaves NaN in scratch memory.
    backend.received_scores_varlen(torch.full_like(q, torch.nan), k, cu_seqlens, 65)
    assert_same_bits(backend.received_scores_varlen(q, k, cu_seqlens, 65), expected)


def test_same_bits_for_any_number_of_threads(backend):
    # One image is split by head, several are split by image and head.
    for lengths, heads in (([130], 6), ([130, 1, 65], 4), (LENGTHS, 2)):
        q, k, cu_seqlens = sample_packed(lengths, heads, 64, torch.bfloat16, 15)
        with threads(1):
            expected = backend.received_scores_varlen(q, k, cu_seqlens, 130)
        for count in (2, 4, 7):
            with threads(count):
                got = backend.received_scores_varlen(q, k, cu_seqlens, 130)
            assert_same_bits(got, expected)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_with_every_instruction_set(simd, dtype):
    inputs = []
    for head_dim in (1, 63, 64, 88, 256):
        q, k, cu_seqlens = sample_packed(LENGTHS, 2, head_dim, dtype, 16)
        lse = exact_lse(q, k, cu_seqlens)
        inputs += [(q, k, cu_seqlens, 65, None, None), (q, k, cu_seqlens, 65, None, lse)]
    assert _native._C.simd() == simd
    got = [_native.cpu.received_scores_varlen(*case) for case in inputs]
    _native._C.use_simd("portable")
    for one, case in zip(got, inputs, strict=True):
        assert_same_bits(one, _native.cpu.received_scores_varlen(*case))
