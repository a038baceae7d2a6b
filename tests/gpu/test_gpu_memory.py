"""Memory on a GPU: invalid offsets, addresses that are not aligned, strides beyond 31 bits."""

from __future__ import annotations

import contextlib
import importlib
import random
from collections.abc import Iterator

import gpu
import pytest
import torch
from gpu import (
    CALLS,
    DEVICE,
    SIMULATED,
    Call,
    answers,
    assert_agree,
    assert_answers,
    calls,
    download,
    expected,
    filled,
    needs_cuda,
    poison,
    random_offsets,
    run,
    some,
    upload,
    uploaded,
)
from torch import Tensor

from vispruner_kernels._checks import MATCHINGS
from vispruner_kernels.testing import sample_features, sample_offsets, sample_qkv, sample_scores

pytestmark = gpu.marks
watch = gpu.watch


# Invalid offsets: kernels cannot raise an error, so they must stay in bounds.


@pytest.fixture
def unchecked(monkeypatch):
    """Remove the check of offsets, which calls on a CPU have and calls on a GPU do not."""
    for name in ("select", "received_scores"):
        module = importlib.import_module(f"vispruner_kernels._triton.{name}")
        if SIMULATED:
            monkeypatch.setattr(module, "check_offsets", lambda *args: None)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    poison()
    yield


@pytest.mark.parametrize("garbage", [filled, poisoned])
@pytest.mark.parametrize("matching", MATCHINGS)
def test_selections_stay_in_bounds(unchecked, matching, garbage):
    """For invalid offsets there is no exception and no hang, and every index is in [0, total)."""
    total = some(151, 31)
    generator = torch.Generator().manual_seed(5)
    features = sample_features("clustered", 1, total, 16, generator)[0]
    scores = sample_scores("ties", 1, total, generator)[0]
    wrong: list[Call] = []
    for seed in range(some(300, 8)):
        rng = random.Random(seed)
        count = rng.choice([2, 3, 6, 41])
        offsets = random_offsets(rng, count, total), random_offsets(rng, count, total)
        sizes = rng.choice([3, 70, 157, 16383]), rng.randint(1, total)
        rule = rng.choice([0.2, 0.5, 1.0]), 8, matching
        wrong.append(("select_varlen", (features, scores, *offsets, *sizes, *rule)))
    there = [uploaded(call) for call in wrong]
    with garbage():
        got = [run(call) for call in there]
    for (indices,), call in zip(download(got), wrong, strict=True):
        assert ((indices >= 0) & (indices < total)).all(), call[1][2:]
    right = ("select_varlen", (features, scores, *[sample_offsets([total])] * 2, total, total))
    assert_answers(answers([right]), [expected(right)])


@gpu.needs_triton
@pytest.mark.parametrize("garbage", [filled, poisoned])
@pytest.mark.parametrize("given", [False, True])
def test_scores_stay_in_bounds(unchecked, given, garbage):
    """The same for scores: each is a mean of softmax weights or 0."""
    total = some(151, 31)
    q, k, _ = (x[0] for x in sample_qkv(1, total, 3, 32, torch.float16, 5))
    # With this lse no weight exceeds 1, for any assignment of keys to images.
    lse = torch.full((3, total), 30.0) if given else None
    wrong: list[Call] = []
    for seed in range(some(300, 8)):
        rng = random.Random(seed)
        offsets = random_offsets(rng, rng.choice([2, 3, 6, 41]), total)
        longest = rng.choice([3, 70, 157, 16383])
        wrong.append(("received_scores_varlen", (q, k, offsets, longest, None, lse)))
    there = [uploaded(call) for call in wrong]
    with garbage():
        got = [run(call) for call in there]
    for (scores,), call in zip(download(got), wrong, strict=True):
        assert ((scores >= 0.0) & (scores <= 1.0 + 1e-6)).all(), call[1][2:4]


# Addresses.


@pytest.mark.parametrize("name", CALLS)
def test_aligned_and_unaligned_tensors_give_the_same_answer(name):
    """A kernel that is compiled for addresses that are multiples of 16 must not get other ones."""
    call = calls(some(300, 30))[name]
    there = uploaded(call)
    shifted = []
    for x in there[1]:
        if isinstance(x, Tensor):
            memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)
            x = memory[1:].view(x.shape).copy_(x)
            assert SIMULATED or x.data_ptr() % 16
        shifted.append(x)
    for args in (there[1], tuple(shifted), there[1], tuple(shifted)):
        (got,) = download([run((call[0], args))])
        assert_agree(call, got, expected(call))


# Strides: BEYOND alone does not fit an int32; FAR does not after a product with a token's index.

FAR, BEYOND = 2**25, 2**31 + 16
# The distance between tensors that lie in each other's gaps.
APART = 2**13


def distant(x: Tensor, strides: tuple[int, ...], memory: Tensor, offset: int = 0) -> Tensor:
    """A copy of x in `memory` with these strides."""
    return memory.as_strided(x.shape, strides, offset).copy_(upload(x))


@pytest.fixture
def memory():
    """float16 memory for 80 strides of FAR, which is enough for one of BEYOND too."""
    size = 80 * FAR
    if torch.cuda.mem_get_info()[0] < 2 * size + 2**30:
        pytest.skip(f"needs {2 * size / 2**30:.0f} GiB of free memory")
    return torch.full((size,), torch.nan, dtype=torch.float16, device=DEVICE)


@needs_cuda
@pytest.mark.parametrize("far", ["tokens", "images"])
def test_selections_with_far_strides_are_those_of_near_tensors(memory, far):
    batch, tokens, channels = (1, 80, 32) if far == "tokens" else (2, 40, 32)
    image, token = (16, FAR) if far == "tokens" else (BEYOND, channels)
    generator = torch.Generator().manual_seed(9)
    features = sample_features("clustered", batch, tokens, channels, generator).half()
    scores = sample_scores("ties", batch, tokens, generator).half()
    distant_features = distant(features, (image, token, 1), memory)
    distant_scores = distant(scores, (image, token), memory, APART)
    for matching in MATCHINGS:
        rest = tokens // 5, 0.5, 8, matching
        wanted = expected(("prune", (features, scores, *rest)))
        for pair in ((distant_features, upload(scores)), (upload(features), distant_scores)):
            assert_answers(download([run(("prune", (*pair, *rest)))]), [wanted])
    for op, rest in (("select_topk", (11,)), ("select_rows", (4, 3))):
        got = download([run((op, (distant_scores, *rest)))])
        assert_answers(got, [expected((op, (scores, *rest)))])
    if far == "tokens":
        offsets = sample_offsets([30, 50]), sample_offsets([7, 9])
        there = distant_features[0], distant_scores[0], *map(upload, offsets), 50, 16
        wanted = expected(("select_varlen", (features[0], scores[0], *offsets, 50, 16)))
        assert_answers(download([run(("select_varlen", there))]), [wanted])


@gpu.needs_triton
@needs_cuda
@pytest.mark.parametrize("far", ["tokens", "heads", "images"])
def test_scores_with_far_strides_are_those_of_near_tensors(memory, far):
    heads, head_dim = 2, 32
    batch, tokens = 2 if far == "images" else 1, 80 if far == "tokens" else 40
    strides = {
        "tokens": (16, FAR, head_dim),
        "heads": (16, head_dim, BEYOND),
        "images": (BEYOND, heads * head_dim, head_dim),
    }[far]
    qkv = sample_qkv(batch, tokens, heads, head_dim, torch.float16, 9)
    lse = upload(torch.full((batch, heads, tokens), 5.0))
    offsets = upload(sample_offsets([tokens - 30, 30]))

    def each(q: Tensor, k: Tensor, v: Tensor) -> list[Call]:
        packed = ("received_scores_varlen", (q[0], k[0], offsets, 50))
        return [
            ("cls_attention", (q, k, v)),
            ("cls_scores", (q, k)),
            ("received_scores", (q, k)),
            ("received_scores", (q, k, None, 0, lse)),
            *([packed] if batch == 1 else []),
        ]

    there = each(*(distant(x, (*strides, 1), memory, i * APART) for i, x in enumerate(qkv)))
    near = each(*map(upload, qkv))
    results = (download([run(call) for call in group]) for group in (there, near))
    for call, got, wanted in zip(near, *results, strict=True):
        assert_agree(call, got, wanted)
