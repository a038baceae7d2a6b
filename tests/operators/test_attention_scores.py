"""Scores from attention: every operator against the float64 oracle, and to the bit against itself.

`cls_attention` returns `out` beside its scores; both are checked. The varlen operator gets the
images of a batch one after another. Tests of one operator are in the file of its name.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from attention import (
    HEAD_DIMS,
    NONFINITE,
    arguments,
    assert_out,
    assert_scores,
    eager_attention,
    exact_lse,
    peak_memory,
    poisoned_empty,
    poisoned_views,
    run,
    sample_cancelling,
    sample_nonfinite,
    threads,
)
from calls import assert_same_answer
from exact_scores import (
    CLS,
    DENSE,
    OPERATORS,
    SEQUENCES,
    cases,
    check,
    exact_answer,
    least_prefix,
    patches_of,
    prefixes,
    sample,
    scales,
)
from installed import needs_native

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
)

every_operator = pytest.mark.parametrize("op", OPERATORS)
every_dense_operator = pytest.mark.parametrize("op", DENSE)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@every_dtype
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@every_dense_operator
def test_agrees_with_the_oracle(backend, op, head_dim, dtype):
    for sequence, heads, scale, num_prefix in cases(op, head_dim):
        qkv, exact = sample(op, dtype, 2, sequence, heads, head_dim, scale, num_prefix)
        check(backend, op, qkv, exact, scale, num_prefix)


@every_dtype
@pytest.mark.parametrize(
    ("op", "batch", "sequence", "heads", "head_dim", "num_prefix"),
    [
        ("cls_attention", 1, 257, 4, 80, 1),
        ("cls_attention", 1, 577, 2, 64, 1),
        ("cls_scores", 2, 257, 16, 80, 1),
        ("cls_scores", 2, 577, 16, 64, 1),
        ("received_scores", 1, 257, 4, 80, 1),
        ("received_scores", 1, 577, 2, 64, 0),
    ],
)
def test_shapes_of_real_encoders(backend, op, batch, sequence, heads, head_dim, num_prefix, dtype):
    qkv, exact = sample(op, dtype, batch, sequence, heads, head_dim, None, num_prefix)
    check(backend, op, qkv, exact, None, num_prefix)


@pytest.mark.slow
@every_dtype
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@every_dense_operator
def test_agrees_with_the_oracle_in_many_settings(backends, op, head_dim, dtype):
    settings = itertools.product((*SEQUENCES[op], 257), (1, 3, 16), scales(op))
    for turn, (sequence, heads, scale) in enumerate(settings):
        if op != "cls_scores" and sequence * heads > 1000:
            continue
        some = prefixes(op, sequence)
        num_prefix = some[turn % len(some)]
        batch = 1 if op == "received_scores" else 2
        qkv = sample_qkv(batch, sequence, heads, head_dim, dtype, turn)
        exact = exact_answer(op, qkv, scale, num_prefix)
        for backend in backends:
            check(backend, op, qkv, exact, scale, num_prefix)


@every_dtype
@every_dense_operator
def test_products_that_cancel_stay_within_the_bound_of_the_contract(backend, op, dtype):
    for sequence, heads, head_dim in ((2, 2, 128), (5, 1, 16), (17, 3, 64), (50, 1, 80)):
        q, k = sample_cancelling(2, sequence, heads, head_dim, dtype, sequence)
        v = sample_qkv(2, sequence, heads, head_dim, dtype, sequence)[2]
        assert max_logit(q.abs(), k.abs(), None) > 20 * max_logit(q, k, None)
        for lse in (None, exact_lse(q, k)) if op == "received_scores" else (None,):
            out, scores = exact_answer(op, (q, k, v), lse=lse)
            got = run(backend, op, (q, k, v), lse=lse)
            assert_scores_match(got.scores, scores, q, k, None)
            args = arguments(op, (q, k, v), lse=lse)
            answer = got.scores if got.out is None else got
            assert_matches(op, answer, getattr(reference, op)(*args), args, {})
            if lse is not None:
                # A CPU adds these logits in float64.
                assert_scores(got.scores, scores.numpy(), q, k, None)
            if got.out is not None:
                tolerance = max(OUT_TOLERANCE[dtype], rounding_bound(q, k, None))
                assert_close(got.out, out, tolerance * float(v.abs().max()))


@every_dense_operator
def test_arguments_by_name_and_by_default(backend, op):
    operator = getattr(backend, op)
    qkv = sample_qkv(1, 9, 2, 8, torch.float32, 1)
    expected = operator(*arguments(op, qkv, 8**-0.5))
    tensors = dict(zip("qkv" if op == "cls_attention" else "qk", qkv, strict=False))
    rest = {"lse": None} if op == "received_scores" else {}
    for got in (
        operator(*tensors.values()),
        operator(**tensors, scale=None),
        operator(**tensors, **rest, num_prefix=least_prefix(op), scale=None),
    ):
        assert_same_answer(got, expected)


@every_dtype
@every_dense_operator
def test_views_are_read_and_the_memory_around_them_is_left_alone(backend, op, dtype):
    for head_dim, sequence in ((64, 21), (63, 16), (1, 5)):
        qkv = [x.contiguous() for x in sample_qkv(2, sequence, 3, head_dim, dtype, 2)]
        exact = exact_answer(op, qkv, None, 2)
        expected = check(backend, op, qkv, exact, None, 2).scores
        for pairs in zip(*map(poisoned_views, qkv), strict=True):
            views, before = [view for view, _ in pairs], [memory.clone() for _, memory in pairs]
            mixed = [[*qkv[:i], view, *qkv[i + 1 :]] for i, view in enumerate(views)]
            for case in (views, *mixed):
                assert_same_bits(check(backend, op, case, exact, None, 2).scores, expected)
            for (_, memory), copy in zip(pairs, before, strict=True):
                assert_same_bits(memory, copy)


@every_dense_operator
def test_expanded_keys_and_any_last_stride_of_one_channel(backend, op):
    q, k, v = (x.contiguous() for x in sample_qkv(3, 17, 3, 8, torch.float32, 3))
    one_head = q, k[:, :, :1].expand_as(k), v[:, :, :1].expand_as(v)
    one_image = q, k[:1].expand_as(k), v[:1].expand_as(v)
    # The last has the same memory three times.
    for qkv in (one_head, one_image, (q, q, q)):
        got = check(backend, op, qkv, exact_answer(op, qkv)).scores
        assert_same_bits(got, run(backend, op, [x.clone() for x in qkv]).scores)
    # A dimension of size 1 has no stride rule.
    column = k[:, :, :, 5:6]
    wide = torch.as_strided(column, column.shape, (*column.stride()[:3], 7), 5)
    first = q[..., :1]
    expected = run(backend, op, [x.contiguous() for x in (first, column, column)]).scores
    assert_same_bits(run(backend, op, (first, wide, wide)).scores, expected)


@every_operator
def test_every_element_is_written(backend, op):
    qkv = sample_qkv(2, 33, 3, 8, torch.float32, 5)
    exact, expected = exact_answer(op, qkv), run(backend, op, qkv).scores
    with poisoned_empty():
        assert_same_bits(check(backend, op, qkv, exact).scores, expected)


@every_dense_operator
def test_no_images_give_no_scores(backend, op):
    for dtype in DTYPES:
        for lse in (None, torch.zeros(0, 2, 9)):
            got = run(backend, op, sample_qkv(0, 9, 2, 8, dtype, 6), None, 4, lse)
            assert got.scores.shape == (0, 5)
            assert got.scores.dtype == torch.float32
            if got.out is not None:
                assert got.out.shape == (0, 9, 2, 8)
                assert got.out.dtype == dtype


@every_dtype
@every_operator
def test_same_bits_again_and_for_any_batch(backend, op, dtype):
    largest = {"cls_attention": (130, 3, 64), "cls_scores": (577, 16, 64)}.get(op, (197, 3, 64))
    for sequence, heads, head_dim in (largest, (50, 2, 80), (5, 1, 8)):
        qkv = sample_qkv(3, sequence, heads, head_dim, dtype, 7)

        def scores(images, lse, qkv=qkv):
            part = None if lse is None else lse[images]
            return run(backend, op, [x[images] for x in qkv], lse=part).scores

        for lse in (None,) if op in CLS else (None, exact_lse(*qkv[:2])):
            expected = scores(slice(None), lse)
            # This leaves NaN in scratch memory.
            run(backend, op, (torch.full_like(qkv[0], torch.nan), *qkv[1:]), lse=lse)
            assert_same_bits(scores(slice(None), lse), expected)
            for i in range(3):
                assert_same_bits(scores(slice(i, i + 1), lse), expected[i : i + 1])
            order = [2, 0, 1, 1, 0]
            assert_same_bits(scores(order, lse), expected[order])


@pytest.mark.parametrize(
    ("op", "sequence", "sizes", "dtype"),
    [
        ("cls_attention", 257, ((1, 16), (3, 8)), torch.bfloat16),
        ("cls_scores", 577, ((1, 32), (3, 16), (5, 16)), torch.float16),
        ("received_scores", 197, ((1, 6), (3, 4), (5, 2)), torch.float16),
    ],
)
def test_same_bits_for_any_number_of_threads(backend, op, sequence, sizes, dtype):
    # One image is split by head, several are split by image and head.
    for batch, heads in sizes:
        qkv = sample_qkv(batch, sequence, heads, 64, dtype, 8)
        exact = exact_answer(op, qkv) if op == "cls_attention" else None
        with threads(1):
            expected = run(backend, op, qkv).scores
        for count in (2, 4, 7):
            with threads(count):
                got = run(backend, op, qkv)
            assert_same_bits(got.scores, expected)
            if exact:
                assert_out(got.out, exact[0], *qkv, None)


@needs_native
@every_dtype
@every_dense_operator
def test_same_bits_with_every_instruction_set(simd, op, dtype):
    received = op == "received_scores"
    sequences = (1, 3, 16, 17, 63, 64, 65, 130) if received else (2, 16, 17, 50, 65)
    inputs = []
    for sequence, head_dim, scale in itertools.product(
        sequences, (1, 8, 63, 64, 88, 256), (None, 3.0)
    ):
        qkv = sample_qkv(1, sequence, 2, head_dim, dtype, sequence)
        inputs.append(arguments(op, qkv, scale))
        if received:
            lse = exact_lse(*qkv[:2], scale) + 0.1
            inputs.append(arguments(op, qkv, scale, lse=lse))
    for sequence, head_dim in itertools.product((1, 3, 17, 65), (2, 62, 256)) if received else ():
        q, k = sample_cancelling(1, sequence, 2, head_dim, dtype, sequence)
        inputs.append(arguments(op, (q, k, k), lse=exact_lse(q, k)))
    operator = getattr(_native.cpu, op)
    assert _native._C.simd() == simd
    got = [operator(*args) for args in inputs]
    _native._C.use_simd("portable")
    for answer, args in zip(got, inputs, strict=True):
        expected = operator(*args)
        if op == "cls_attention":
            answer, expected = answer[1], expected[1]
        assert_same_bits(answer, expected)


@every_dtype
@every_operator
def test_one_key_takes_all_attention(backend, op, dtype):
    """Logits up to 1e4: the softmax is exactly 1 at one key and 0 elsewhere."""
    q = torch.zeros(2, 50, 3, 64, dtype=dtype)
    k = torch.zeros(2, 50, 3, 64, dtype=dtype)
    v = sample_qkv(2, 50, 3, 64, dtype, 11)[2]
    q[:, :, :, 5] = 100.0
    k[:, :, :, 5] = -100.0
    k[0, 7, :, 5] = 100.0
    k[1, 49, :, 5] = 100.0
    expected = torch.zeros(2, 50)
    expected[0, 7] = expected[1, 49] = 1.0
    values = torch.stack([v[0, 7], v[1, 49]])[:, None].expand_as(v).contiguous()
    for scale in (1.0, 0.1):
        got = run(backend, op, (q, k, v), scale)
        assert_same_bits(got.scores, patches_of(op, expected))
        if got.out is not None:
            assert_same_bits(got.out, values)


@every_dtype
@every_operator
def test_large_logits_stay_within_the_bound(backend, op, dtype):
    """The rounding of the logits limits both. The error of `out` may be that of the scores times
    the largest |v|."""
    qkv = q, k, v = sample_qkv(2, 50, 3, 64, dtype, 10)
    for scale in (1.0, -4.0, 30.0, -100.0, 300.0):
        out, scores = exact_answer(op, qkv, scale)
        got = run(backend, op, qkv, scale)
        assert_scores(got.scores, scores.numpy(), q, k, scale)
        if got.out is not None:
            eager = float((eager_attention(q, k, v, scale).double() - out).abs().max())
            rounding = 2**-22 * max_logit(q, k, scale) * float(v.abs().max())
            assert_close(got.out, out, max(2.0 * eager, rounding))


@every_dtype
@every_operator
def test_equal_logits_give_equal_scores(backend, op, dtype):
    q, k, v = (x.contiguous() for x in sample_qkv(1, 50, 3, 72, dtype, 12))
    largest = min(65504.0, torch.finfo(dtype).max)
    expected = torch.full((1, 50 - least_prefix(op)), 1 / 50)
    mean = v.double().mean(1, keepdim=True).expand_as(v)
    for q_case, k_case, scale in (
        (q, k, 0.0),
        (torch.zeros_like(q), k, None),
        (q, torch.zeros_like(k), None),
        (q, k[:, :1].expand_as(k), 5.0),
        (torch.full_like(q, largest), torch.full_like(k, -largest), None),
    ):
        got = run(backend, op, (q_case, k_case, v), scale)
        assert_same_bits(got.scores, expected)
        if got.out is not None:
            assert_close(got.out, mean, OUT_TOLERANCE[dtype] * float(v.abs().max()))


@every_operator
def test_float16_at_the_ends_of_its_range(backend, op):
    """Products of 65504 overflow float16, but not the float32 that computes them."""
    q = torch.full((1, 9, 2, 64), 65504.0, dtype=torch.float16)
    k = q.clone()
    k[:, 4:] = -65504.0
    expected = torch.tensor([[0.25] * 4 + [0.0] * 5])
    got = run(backend, op, (q, k, torch.ones_like(q))).scores
    assert_same_bits(got, patches_of(op, expected))
    # Subnormal float16 numbers are numbers.
    subnormal = torch.arange(-1023, 1024, 33).float() * 2**-24
    k = subnormal.to(torch.float16)[None, :, None, None].expand(1, -1, 2, 1)
    q, scale = torch.ones_like(k), 2.0**14
    _, exact = exact_answer(op, (q, k, q), scale)
    assert exact.max() > 1.05 * exact.min()
    assert_scores(run(backend, op, (q, k, q), scale).scores, exact.numpy(), q, k, scale)


@every_dtype
@pytest.mark.parametrize("sequence", [5, 21])
@pytest.mark.parametrize("where", NONFINITE)
# test_cls_attention.py has these inputs for cls_attention.
@pytest.mark.parametrize("op", OPERATORS[1:])
def test_nan_and_infinity_act_as_in_an_eager_softmax(backend, op, where, sequence, dtype):
    q, k = sample_nonfinite(where, sequence, dtype)
    weights = (torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / 2).softmax(-1)
    eager = weights[:, :, 0].mean(1)[:, 1:] if op in CLS else weights.mean((1, 2))
    assert not eager[1].isnan().any()
    assert_close(run(backend, op, (q, k, q)).scores, eager, 1e-5)


@every_operator
def test_a_logit_of_minus_infinity_gets_no_attention(backend, op):
    q, k = torch.ones(1, 21, 2, 1), torch.zeros(1, 21, 2, 1)
    k[:, [3, 20]] = -torch.inf
    expected = torch.full((1, 21), 1 / 19)
    expected[0, [3, 20]] = 0.0
    assert_same_bits(run(backend, op, (q, k, q)).scores, patches_of(op, expected))


@pytest.mark.slow
@pytest.mark.parametrize("op", ["cls_attention", "received_scores"])
@pytest.mark.parametrize("name", ["reference", pytest.param("native", marks=needs_native)])
def test_no_matrix_of_tokens_by_tokens_is_stored(name, op):
    # The size of that matrix in half precision.
    assert peak_memory(op, name, 8192) < 8192 * 8192 * 2
