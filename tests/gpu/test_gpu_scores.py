"""Scores and attention on a GPU: near float64 on the CPU, and the same bits each time."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import gpu
import pytest
import torch
from attention import NONFINITE, poisoned_views, sample_nonfinite
from gpu import (
    SIMULATED,
    Call,
    answers,
    assert_answers,
    download,
    filled,
    needs_cuda,
    poison,
    run,
    some,
    streams,
    synchronize,
    upload,
    uploaded,
)
from torch import Tensor

from vispruner_kernels.testing import (
    DTYPES,
    OUT_TOLERANCE,
    assert_close,
    assert_same_bits,
    max_logit,
    sample_offsets,
    sample_qkv,
    scores_bound,
)

pytestmark = gpu.marks
watch = gpu.watch

F32, F16, B16 = DTYPES


class Shape(NamedTuple):
    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    scale: float | None = None
    num_prefix: int = 1

    def __str__(self) -> str:
        sizes = "x".join(map(str, self[:4]))
        return f"{str(self.dtype).removeprefix('torch.')}-{sizes}-{self.scale}-{self.num_prefix}"


# CLIP-L, InternViT-6B, SigLIP-so400m, EVA-g, Qwen2.5-VL; then more head dimensions and the smallest
# and largest sizes.
SHAPES = [
    Shape(2, 577, 16, 64, F16),
    Shape(1, 577, 16, 64, B16, 0.3),
    Shape(1, 577, 4, 64, F32, None, 5),
    Shape(1, 1025, 25, 128, B16),
    Shape(1, 1025, 3, 128, F32, -0.2),
    Shape(1, 729, 16, 72, F16),
    Shape(3, 257, 16, 88, F16),
    Shape(1, 1024, 16, 80, B16, None, 16),
    Shape(2, 130, 3, 96, F32, None, 129),
    Shape(2, 65, 2, 256, F32),
    Shape(1, 197, 2, 256, F16, 2.0),
    Shape(2, 50, 3, 1, F32, 0.0),
    Shape(5, 17, 2, 8, F16, 30.0),
    Shape(3, 59, 3, 37, B16, -4.0, 5),
    Shape(1, 2, 1, 64, F16),
]
if SIMULATED:
    SHAPES = [
        s._replace(batch=min(s.batch, 2), tokens=min(s.tokens, 20 + s.tokens % 7))._replace(
            heads=min(s.heads, 3), num_prefix=min(s.num_prefix, 9)
        )
        for s in SHAPES
    ]


def logits(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """The logits in float64, [..., H, S, S]."""
    q, k = (x.double().movedim(-3, -2) for x in (q, k))
    return q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)


class Exact(NamedTuple):
    """Inputs on the CPU, and their attention and scores in float64."""

    qkv: tuple[Tensor, Tensor, Tensor]
    out: Tensor
    # Scores of all tokens, prefix tokens included.
    cls: Tensor
    received: Tensor
    # lse in float32, and the exact scores with this rounded lse.
    lse: Tensor
    received_lse: Tensor


@functools.lru_cache(maxsize=2)
def exact(shape: Shape) -> Exact:
    batch, tokens, heads, head_dim, dtype, scale, _ = shape
    q, k, v = sample_qkv(batch, tokens, heads, head_dim, dtype, seed=tokens + head_dim)
    before = torch.get_num_threads()
    torch.set_num_threads(some(8, 1))
    x = logits(q, k, scale)
    weights = x.softmax(-1)
    out = (weights @ v.double().transpose(1, 2)).transpose(1, 2)
    lse = x.logsumexp(-1).float()
    with_lse = (x - lse.double()[..., None]).exp().mean((1, 2))
    torch.set_num_threads(before)
    return Exact((q, k, v), out, weights[:, :, 0].mean(1), weights.mean((1, 2)), lse, with_lse)


def eager(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Attention with every step in the dtype of the inputs."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ((q @ k.mT * scale).softmax(-1) @ v).transpose(1, 2)


def assert_out(got: Tensor, wanted: Tensor, shape: Shape, qkv: tuple[Tensor, ...]) -> None:
    """Assert the bound of docs/contract.md, section 4, which depends on the error of eager PyTorch
    on the same device."""
    assert got.dtype == shape.dtype
    plain = eager(*(upload(x) for x in qkv), shape.scale).cpu()
    error, others = ((x.double() - wanted).abs() for x in (got, plain))
    largest = float(qkv[2].abs().max())
    if shape.scale is None or abs(shape.scale) <= 0.3:
        rounding = torch.finfo(shape.dtype).eps / 2 * float(wanted.abs().max())
        bound = max(2.0 * float(others.square().mean().sqrt()), rounding)
        assert float(error.square().mean().sqrt()) <= bound
        assert_close(got, wanted, OUT_TOLERANCE[shape.dtype] * largest)
    else:
        logit = max_logit(*qkv[:2], shape.scale)
        assert_close(got, wanted, max(2.0 * float(others.max()), 2**-22 * logit * largest))


def attention_calls(shape: Shape, prefix: int, qkv: tuple[Tensor, ...], lse: Tensor) -> list[Call]:
    q, k, _ = qkv
    return [
        ("cls_attention", (*qkv, shape.scale, max(1, prefix))),
        ("cls_scores", (q, k, shape.scale, max(1, prefix))),
        ("received_scores", (q, k, shape.scale, prefix)),
        ("received_scores", (q, k, shape.scale, prefix, lse)),
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_and_attention_are_within_their_bounds(shape):
    """Further calls, in memory full of other garbage, give the same bits."""
    truth = exact(shape)
    calls = attention_calls(shape, shape.num_prefix, truth.qkv, truth.lse)
    first = answers(calls)
    (out, cls), (alone,), (received,), (with_lse,) = first
    bound = scores_bound(*truth.qkv[:2], shape.scale)
    prefix = shape.num_prefix
    assert_out(out, truth.out, shape, truth.qkv)
    assert_same_bits(cls, alone)
    assert_close(cls, truth.cls[:, prefix:], bound)
    assert_close(received, truth.received[:, prefix:], bound)
    assert_close(with_lse, truth.received_lse[:, prefix:], bound)
    there = [uploaded(call) for call in calls]
    for _ in range(some(5, 1)):
        poison()
        assert_answers(download([run(call) for call in there]), first)
    with filled():
        again = [run(call) for call in there]
    assert_answers(download(again), first)


def test_scores_of_one_token():
    q, k, _ = sample_qkv(3, 1, 2, 8, F32, 6)
    lse = logits(q, k, 5.0).logsumexp(-1).float()
    calls: list[Call] = [("received_scores", (q, k, 5.0)), ("received_scores", (q, k, 5.0, 0, lse))]
    (without,), (given,) = answers(calls)
    assert_same_bits(without, torch.ones(3, 1))
    exactly = (logits(q, k, 5.0)[..., 0] - lse.double()).exp().mean(1)
    assert_close(given, exactly, scores_bound(q, k, 5.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_gives_the_scores_of_its_images(dtype):
    for tokens, heads, head_dim in ((577, 16, 64), (50, 3, 80)):
        shape = Shape(5, some(tokens, 21), some(heads, 2), head_dim, dtype)
        truth = exact(shape)
        order = [3, 1, 4, 1, 0]

        def part(images: Any, truth: Exact = truth, shape: Shape = shape) -> list[Call]:
            qkv = tuple(x[images] for x in truth.qkv)
            return attention_calls(shape, 1, qkv, truth.lse[images])

        whole = answers(part(slice(None)))
        for images in (order, *(slice(i, i + 1) for i in range(5)), slice(1, 4)):
            wanted = [tuple(x[images] for x in answer) for answer in whole]
            assert_answers(answers(part(images)), wanted)


@needs_cuda
def test_calls_give_the_same_bits_every_time():
    """The last-arriving program adds the heads; the sum must not depend on which one that is."""
    truth = exact(Shape(5, 577, 16, 64, F16))
    calls = attention_calls(Shape(5, 577, 16, 64, F16), 1, truth.qkv, truth.lse)
    wanted = [tuple(upload(x) for x in answer) for answer in answers(calls)]
    there = [uploaded(call) for call in calls]
    turns = streams(4)
    synchronize()
    wrong = []
    for i in range(400):
        with torch.cuda.stream(turns[i // 7 % 4]):
            if i % 100 < 28:
                poison()
            got = run(there[i % 4])
            wrong += [
                (x.view(-1) != y.view(-1)).sum() for x, y in zip(got, wanted[i % 4], strict=True)
            ]
    synchronize()
    assert torch.stack(wrong).count_nonzero() == 0


LENGTHS = [5, 0, 1, 130, 65, 577, 0]


@pytest.mark.parametrize("scale", [None, 2.0])
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"), [(16, 64, F16), (3, 80, B16), (3, 37, F32)]
)
def test_packed_images_have_the_scores_of_each_image_alone(heads, head_dim, dtype, scale):
    """Compared in float64; tokens of no image have the score 0."""
    lengths = [min(n, some(n, 20)) for n in LENGTHS]
    total = sum(lengths) + 9
    q, k, _ = (x[0] for x in sample_qkv(1, total, heads, head_dim, dtype, head_dim))
    lse = torch.full((heads, total), torch.nan)
    wanted = torch.zeros(2, total, dtype=torch.float64)
    offsets = sample_offsets(lengths)
    for start, stop in offsets.unfold(0, 2, 1).tolist():
        x = logits(q[start:stop], k[start:stop], scale)
        lse[:, start:stop] = x.logsumexp(-1)
        wanted[0, start:stop] = x.softmax(-1).mean((0, 1))
        weights = (x - lse[:, start:stop, None].double()).exp()
        wanted[1, start:stop] = weights.mean((0, 1)).nan_to_num(0.0)
    wanted = wanted.nan_to_num(0.0)
    for longest in (max(lengths), 16384):
        packed = (q, k, offsets, longest, scale)
        calls = [("received_scores_varlen", packed), ("received_scores_varlen", (*packed, lse))]
        bound = scores_bound(q, k, scale)
        for (got,), exactly in zip(answers(calls), wanted, strict=True):
            assert_close(got, exactly, bound)
            assert not got[sum(lengths) :].any()
    # All images are without tokens.
    none = ("received_scores_varlen", (q, k, sample_offsets([0, 0]), 7, scale))
    assert_answers(answers([none]), [(torch.zeros(total),)])


def test_views_are_read_and_the_memory_around_them_stays():
    shape = Shape(2, 21, 3, 64, F16)
    qkv = tuple(x.contiguous() for x in sample_qkv(*shape[:5], 2))
    x = logits(*qkv[:2], None)
    weights, lse = x.softmax(-1), x.logsumexp(-1).float()
    out = (weights @ qkv[2].double().transpose(1, 2)).transpose(1, 2)
    bound = scores_bound(*qkv[:2], None)
    # lse may have any strides.
    spread = lse.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for views in zip(*map(poisoned_views, qkv), strict=True):
        there = tuple(upload(view) for view, _ in views)
        before = [x.as_strided((x.untyped_storage().nbytes() // 2,), (1,), 0) for x in there]
        copies = [x.clone() for x in before]
        calls = attention_calls(shape, 2, there, upload(spread))
        (got, cls), (alone,), (received,), (with_lse,) = download([run(call) for call in calls])
        assert_out(got, out, shape, qkv)
        assert_same_bits(cls, alone)
        assert_close(cls, weights[:, :, 0, 2:].mean(1), bound)
        assert_close(received, weights[..., 2:].mean((1, 2)), bound)
        assert_close(with_lse, weights[..., 2:].mean((1, 2)), 2 * bound)
        for memory, copy in zip(before, copies, strict=True):
            assert_same_bits(memory, copy)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_not_finite_inputs_give_the_answer_of_eager_softmax(dtype):
    calls: list[Call] = []
    wanted = []
    for where in NONFINITE:
        for tokens in (5, 21):
            q, k = sample_nonfinite(where, tokens, dtype)
            v = sample_qkv(2, tokens, 2, 4, dtype, 14)[2].contiguous()
            weights = logits(q, k, None).softmax(-1)
            calls += [("cls_attention", (q, k, v)), ("cls_scores", (q, k))]
            calls.append(("received_scores", (q, k)))
            out = (weights @ v.double().transpose(1, 2)).transpose(1, 2)
            cls = weights[:, :, 0, 1:].mean(1)
            wanted += [(out, cls), (cls,), (weights.mean((1, 2)),)]
    for got, exactly in zip(answers(calls), wanted, strict=True):
        for x, y in zip(got, exactly, strict=True):
            assert_close(x, y, 2**-7 if x.dtype == F16 else 1e-5)


def test_lse_need_not_be_that_of_the_keys():
    """The lse of each row is off by a constant. One row has +inf: it attends to nothing."""
    shape = Shape(2, some(130, 21), 3, 64, F16)
    truth = exact(shape)
    q, k, _ = truth.qkv
    noise = torch.randn(truth.lse.shape, generator=torch.Generator().manual_seed(11))
    lse = truth.lse + noise
    lse[0, :, 5] = torch.inf
    weights = (logits(q, k, None) - lse.double()[..., None]).exp()
    ((got,),) = answers([("received_scores", (q, k, None, 0, lse))])
    bound = float(noise.neg().exp().max()) * scores_bound(q, k, None)
    assert_close(got, weights.mean((1, 2)), bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dominant_key_gets_all_attention_exactly(dtype):
    """Logits reach 1e4. The dominant key has score 1, the others 0; the output is its value."""
    q = torch.zeros(2, 50, 3, 64, dtype=dtype)
    k = torch.zeros(2, 50, 3, 64, dtype=dtype)
    v = sample_qkv(2, 50, 3, 64, dtype, 11)[2]
    q[:, :, :, 5] = 100.0
    k[:, :, :, 5] = -100.0
    k[0, 7, :, 5] = k[1, 49, :, 5] = 100.0
    scores = torch.zeros(2, 50)
    scores[0, 7] = scores[1, 49] = 1.0
    out = torch.stack([v[0, 7], v[1, 49]])[:, None].expand_as(v).contiguous()
    calls = [("cls_attention", (q, k, v, 1.0)), ("received_scores", (q, k, 1.0))]
    assert_answers(answers(calls), [(out, scores[:, 1:].contiguous()), (scores,)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_give_uniform_attention(dtype):
    q, k, v = sample_qkv(1, 50, 3, 72, dtype, 12)
    calls = [
        (op, (*x, scale))
        for a, b, scale in (
            (q, k, 0.0),
            (torch.zeros_like(q), k, None),
            (q, k[:, :1].expand_as(k), 5.0),
        )
        for op, x in (("cls_attention", (a, b, v)), ("received_scores", (a, b)))
    ]
    mean = v.double().mean(1, keepdim=True).expand_as(v)
    for got in answers(calls):
        assert_close(got[-1], torch.full(got[-1].shape, 1 / 50).double(), 1e-8)
        if len(got) == 2:
            assert_close(got[0], mean, OUT_TOLERANCE[dtype] * float(v.abs().max()))
