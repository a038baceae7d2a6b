"""Valid calls at both ends of every range, on every backend."""

from __future__ import annotations

import pytest
import torch
from calls import (
    ATTENTION,
    BACKENDS,
    CALLS,
    DENSE,
    SCORES,
    SELECT,
    SELECT_ALL,
    arguments,
    assert_same_answer,
    every_second,
    leaves,
    offsets,
    run_backend,
    tensors,
)
from torch import Tensor

from vispruner_kernels.testing import (
    OUT_TOLERANCE,
    assert_close,
    assert_same_bits,
    sample_qkv,
)


@pytest.fixture(params=BACKENDS)
def valid_call(request):
    run = run_backend(request.param)
    return lambda op, **changes: run(op, arguments(op) | changes)


def test_keep_everything_and_keep_one(valid_call):
    best = arguments("select")["scores"].argmax(-1, keepdim=True)
    everything = torch.arange(12).expand(2, 12)
    for op in ("select", "select_topk"):
        assert torch.equal(valid_call(op, keep=12), everything)
    assert torch.equal(valid_call("select_topk", keep=1), best)
    assert torch.equal(valid_call("select", keep=1, important_ratio=1.0), best)
    assert valid_call("select", keep=1, important_ratio=0.0).shape == (2, 1)
    kept, indices = valid_call("prune", keep=12)
    assert torch.equal(indices, everything)
    assert_same_bits(kept, arguments("prune")["features"])
    assert torch.equal(valid_call("select_rows", width=12, rows=1), everything)
    assert torch.equal(valid_call("select_rows", width=1, rows=12), everything)
    assert torch.equal(valid_call("select_rows", width=1, rows=1), best)


@pytest.mark.parametrize("matching", ["bipartite", "pairwise"])
def test_ratios_and_steps_at_the_ends(valid_call, matching):
    for ratio in (0.0, -0.0, 1.0, 5e-324):
        for step in (1, 12, 2**63 - 1):
            indices = valid_call("select", important_ratio=ratio, step=step, matching=matching)
            assert indices.shape == (2, 5)
            assert (indices.diff() > 0).all()


def test_the_largest_number_of_tokens(valid_call):
    scores = torch.arange(16384.0)[None]
    expected = torch.arange(16377, 16384)[None]
    assert torch.equal(valid_call("select_topk", scores=scores, keep=7), expected)
    assert torch.equal(valid_call("select_rows", scores=scores, width=1, rows=7), expected)
    case = {"features": torch.zeros(1, 16384, 1), "scores": scores, "keep": 7}
    assert torch.equal(valid_call("select", **case, important_ratio=1.0), expected)
    assert torch.equal(valid_call("prune", **case, important_ratio=1.0)[1], expected)
    packed = {"cu_seqlens": offsets(0, 16384), "cu_keep": offsets(0, 7), "max_seqlen": 16384}
    case = {"features": case["features"][0], "scores": scores[0], "total_keep": 7, **packed}
    assert torch.equal(valid_call("select_varlen", **case, important_ratio=1.0), expected[0])
    q = torch.zeros(1, 16385, 1, 1)
    assert torch.allclose(valid_call("cls_scores", q=q, k=q), torch.full((1, 16384), 1 / 16385))


def test_channels_and_head_dimensions_at_the_ends(valid_call):
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    for channels in (1, 65536):
        # Tokens 0 and 1 point the same way, token 2 the other way.
        features = torch.tensor([1.0, 1.0, -1.0])[None, :, None].repeat(1, 1, channels)
        case = {"features": features, "scores": scores, "keep": 2, "important_ratio": 0.0}
        assert valid_call("select", **case, matching="pairwise").tolist() == [[0, 2]]
        assert valid_call("select", **case, matching="bipartite").tolist() == [[1, 2]]
    for head_dim in (1, 256):
        q, k, v = sample_qkv(1, 4, 2, head_dim, torch.float32, seed=3)
        assert valid_call("cls_scores", q=q, k=k).shape == (1, 3)
        assert valid_call("received_scores", q=q, k=k, lse=None).sum().item() == pytest.approx(1.0)
        assert valid_call("cls_attention", q=q, k=k, v=v)[0].shape == (1, 4, 2, head_dim)


def test_sequences_of_the_smallest_length(valid_call):
    q, k, v = sample_qkv(2, 3, 2, 8, torch.float32, seed=4)
    assert valid_call("cls_scores", q=q, k=k, num_prefix=2).shape == (2, 1)
    assert valid_call("cls_attention", q=q, k=k, v=v, num_prefix=2)[1].shape == (2, 1)
    assert valid_call("received_scores", q=q, k=k, num_prefix=2, lse=None).shape == (2, 1)
    q, k = q[:, :1], k[:, :1]
    assert torch.equal(valid_call("received_scores", q=q, k=k, lse=None), torch.ones(2, 1))


@pytest.mark.parametrize("op", [*SELECT, *SCORES, *DENSE])
@pytest.mark.parametrize("name", CALLS)
def test_no_images_give_empty_results(op, name):
    kwargs = tensors(arguments(op), lambda x: x[:0])
    one = CALLS["function"](op, tensors(arguments(op), lambda x: x[:1]))
    for got, like in zip(leaves(CALLS[name](op, kwargs)), leaves(one), strict=True):
        assert_same_bits(got, like.new_empty((0, *like.shape[1:])))


@pytest.mark.parametrize("name", CALLS)
def test_no_packed_tokens_give_empty_results(name):
    for images in (0, 1, 3):
        none = torch.zeros(images + 1, dtype=torch.int32)
        kwargs = arguments("select_varlen") | {
            "features": torch.zeros(0, 6),
            "scores": torch.zeros(0),
            "cu_seqlens": none,
            "cu_keep": none,
            "max_seqlen": 0,
            "total_keep": 0,
        }
        got = CALLS[name]("select_varlen", kwargs)
        assert_same_bits(got, torch.empty(0, dtype=torch.int64))
        kwargs = arguments("received_scores_varlen") | {
            "q": torch.zeros(0, 3, 8),
            "k": torch.zeros(0, 3, 8),
            "cu_seqlens": none,
            "max_seqlen": 0,
            "lse": torch.zeros(3, 0),
        }
        assert_same_bits(CALLS[name]("received_scores_varlen", kwargs), torch.empty(0))


def test_packed_images_may_have_no_tokens_or_keep_none(valid_call):
    sizes = {"cu_seqlens": offsets(0, 0, 5, 5, 12, 12), "cu_keep": offsets(0, 0, 0, 0, 7, 7)}
    got = valid_call("select_varlen", **sizes, total_keep=7)
    assert torch.equal(got, torch.arange(5, 12))
    # A large max_seqlen and total_keep, and tokens that belong to no image.
    sizes = {"cu_seqlens": offsets(0, 5), "cu_keep": offsets(0, 5), "max_seqlen": 16384}
    got = valid_call("select_varlen", **sizes, total_keep=12)
    assert torch.equal(got[:5], torch.arange(5))
    assert ((got >= 0) & (got < 12)).all()
    received = valid_call("received_scores_varlen", cu_seqlens=offsets(0, 0, 5), max_seqlen=16384)
    assert torch.equal(received[5:], torch.zeros(7))
    assert (received[:5] != 0).all()


def test_offsets_and_lse_may_have_any_strides(valid_call):
    spread = {n: arguments("select_varlen")[n] for n in ("cu_seqlens", "cu_keep")}
    spread = {n: x.repeat_interleave(2)[::2] for n, x in spread.items()}
    assert_same_answer(valid_call("select_varlen", **spread), valid_call("select_varlen"))
    for op in ATTENTION[2:]:
        kwargs = tensors(arguments(op), lambda x: x)
        plain = torch.randn(kwargs["lse"].shape, generator=torch.Generator().manual_seed(6))
        expected = valid_call(op, lse=plain)
        assert_same_answer(valid_call(op, lse=plain.mT.contiguous().mT), expected)
        assert_same_answer(valid_call(op, lse=every_second(plain)), expected)


def with_last_stride(x: Tensor, stride: int) -> Tensor:
    return torch.as_strided(x.contiguous(), x.shape, (*x.contiguous().stride()[:-1], stride))


@pytest.mark.parametrize("stride", [0, 5, 1000])
def test_a_dimension_of_size_1_has_no_stride_rule(valid_call, stride):
    for op in (*SELECT_ALL, *ATTENTION):
        names = [n for n in ("features", "q", "k", "v") if n in arguments(op)]
        plain = {n: arguments(op)[n][..., :1].contiguous() for n in names}
        strange = {n: with_last_stride(x, stride) for n, x in plain.items()}
        assert [x.stride(-1) for x in strange.values()] == [stride] * len(names)
        got, expected = valid_call(op, **strange), valid_call(op, **plain)
        if op == "cls_attention":
            # PyTorch's attention takes another path for such strides.
            bound = OUT_TOLERANCE[torch.float32] * plain["v"].abs().max().item()
            assert_close(got[0], expected[0], bound)
            got, expected = got[1], expected[1]
        assert_same_answer(got, expected)


def test_a_tensor_without_elements_has_no_stride_rule(valid_call):
    for op in (*SELECT, *DENSE):
        kwargs = tensors(arguments(op), lambda x: every_second(x)[:0])
        assert all(len(x) == 0 for x in leaves(valid_call(op, **kwargs)))
