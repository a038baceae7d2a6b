"""Selections on a GPU: the bits of the CPU, each time, under any load of the device."""

from __future__ import annotations

import functools
import importlib
import itertools
import random
from typing import Any, NamedTuple

import gpu
import pytest
import torch
from gpu import (
    DEVICE,
    SIMULATED,
    answers,
    assert_answers,
    expected,
    needs_cuda,
    placed,
    poison,
    run,
    some,
    streams,
    synchronize,
    uploaded,
)
from torch import Tensor

from vispruner_kernels import _native
from vispruner_kernels._checks import MATCHINGS
from vispruner_kernels.testing import (
    DTYPES,
    FEATURE_KINDS,
    SCORE_KINDS,
    Case,
    hub_cases,
    random_case,
    sample_features,
    sample_offsets,
    sample_scores,
)

pytestmark = gpu.marks
watch = gpu.watch

# The number of cases of each variant and rule, and the most tokens of a case.
CASES, MOST = some(500, 2), some(200, 24)
# Streams that calls are spread over.
WIDTH = 4


# Triton compiles a kernel for each combination of dtypes, sizes equal to 1, and sizes that are
# multiples of 16. A compilation takes seconds, so these properties are fixed; all else is random.


class Variant(NamedTuple):
    """The properties of tensors for which a kernel is compiled."""

    features: torch.dtype
    scores: torch.dtype
    channels: tuple[int, ...]
    # Whether addresses and strides are multiples of 16, and whether N is.
    aligned: bool
    whole: bool

    def __str__(self) -> str:
        dtypes = (str(x).removeprefix("torch.") for x in (self.features, self.scores))
        flags = "-aligned" * self.aligned + "-whole" * self.whole
        return "-".join([*dtypes, "x".join(map(str, self.channels))]) + flags


F32, F16, B16 = DTYPES
VARIANTS = (
    Variant(F32, F32, (16, 64, 208), True, False),
    Variant(F32, F16, (3, 31, 101), False, True),
    Variant(F16, F16, (16, 64, 208), True, True),
    Variant(F16, F32, (31, 101), False, False),
    Variant(B16, F32, (31, 100), True, False),
    Variant(B16, B16, (16, 80), False, False),
    Variant(F32, B16, (1,), False, False),
)
variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)
matchings = pytest.mark.parametrize("matching", MATCHINGS)


def some_tokens(rng: random.Random, variant: Variant) -> int:
    low, most = rng.choice([(2, 3), (2, min(64, MOST)), (2, MOST), (MOST // 2, MOST)])
    size = rng.randint(low, most)
    return -(-size // 16) * 16 if variant.whole else size + (size % 16 == 0)


def some_values(
    rng: random.Random, variant: Variant, batch: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """Features [B, N, C] and scores [B, N]; the scores are rows or columns of a larger tensor."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    channels = rng.choice(variant.channels)
    features = sample_features(rng.choice(FEATURE_KINDS), batch, tokens, channels, generator)
    features = placed(features.to(variant.features), variant.aligned, rng)
    scores = sample_scores(rng.choice(SCORE_KINDS), batch, tokens, generator).to(variant.scores)
    if variant.aligned:
        return features, placed(scores[:, None], True, rng)[:, 0]
    return features, placed(scores[:, :, None], False, rng)[:, :, 0]


def random_selection(seed: int, variant: Variant, matching: str) -> Case:
    """Arguments of `select`, like those of testing.random_case, for which similarities matter."""
    rng = random.Random(seed)
    # Odd, so that B * N is a multiple of 16 only where N is.
    batch, tokens = rng.choice([1, 1, 3, 5]), some_tokens(rng, variant)
    return Case(
        *some_values(rng, variant, batch, tokens),
        rng.choice([1, tokens - 1, rng.randint(1, tokens - 1), rng.randint(1, tokens - 1)]),
        rng.choice([0.0, 0.25, 0.3, 0.5, 0.5, 0.75, rng.random()]),
        rng.choice([1, 2, 3, 8, 8, 8, 2**40]),
        matching,
    )


def random_packed(seed: int, variant: Variant, matching: str) -> tuple[Any, ...]:
    """Arguments of `select_varlen`. Images may have no tokens, or keep all or none of them. There
    may be tokens of no image, and output slots that no image owns."""
    rng = random.Random(seed)
    images = rng.choice([1, 2, 3, 5, 9, some(150, 5) if rng.random() < 0.1 else 2])
    lengths = [rng.choice([0, 1, 2, rng.randint(1, MOST // 4)]) for _ in range(images)]
    lengths[rng.randrange(images)] = some_tokens(rng, variant)
    keeps = [rng.choice([0, n, rng.randint(0, n), rng.randint(0, n)]) for n in lengths]

    def at_least(size: int) -> int:
        return -(-size // 16) * 16 if variant.whole else size + (size % 16 == 0)

    total = at_least(sum(lengths) + rng.choice([0, 0, 30]))
    features, scores = some_values(rng, variant, 1, total)
    return (
        features[0],
        scores[0],
        sample_offsets(lengths),
        sample_offsets(keeps),
        at_least(max(lengths) + rng.choice([0, 0, 50])),
        min(total, sum(keeps) + rng.choice([0, 0, 1, 300])),
        # The bits of 0.0 are the integer 0, for which Triton compiles another kernel.
        rng.choice([0.0 if variant is VARIANTS[0] else 0.2, 0.3, 0.5, rng.random(), 1.0]),
        rng.choice([1, 3, 8, 8]),
        matching,
    )


def pruned(case: Case, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The answer of `prune` for the answer of `select`."""
    return case.features[torch.arange(len(indices))[:, None], indices], indices


@matchings
@variants
def test_random_cases_have_the_bits_of_the_cpu(variant, matching):
    cases = [random_selection(seed, variant, matching) for seed in range(CASES)]
    wanted = [expected(("select", case)) for case in cases]
    assert_answers(answers([("select", case) for case in cases], WIDTH), wanted)
    if variant in VARIANTS[:3]:
        kept = [pruned(case, *indices) for case, indices in zip(cases, wanted, strict=True)]
        assert_answers(answers([("prune", case) for case in cases], WIDTH), kept)


@matchings
@pytest.mark.parametrize("variant", VARIANTS[:4], ids=str)
def test_random_packed_cases_have_the_bits_of_the_cpu(variant, matching):
    calls = [("select_varlen", random_packed(seed, variant, matching)) for seed in range(CASES)]
    assert_answers(answers(calls, WIDTH), [expected(call) for call in calls])


def test_random_cases_of_the_package_have_the_bits_of_the_cpu():
    """Cases of testing.random_case. They are few, because each needs a compilation."""
    calls = [("select", random_case(seed, MOST)) for seed in range(some(6, 3))]
    assert_answers(answers(calls), [expected(call) for call in calls])


@gpu.needs_triton
@pytest.mark.parametrize("op", ["select_topk", "select_rows"])
@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[3], VARIANTS[5]], ids=str)
def test_random_scores_have_the_selection_of_the_cpu(variant, op):
    """Short and long rows, which use different kernels, and widths of 1 and more."""
    calls = []
    for seed in range(some(700, 8)):
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        width = rng.choice([1, 3, 24]) if op == "select_rows" else 1
        rows = rng.choice([1, 3, 61, *((577, 2880, 16384) if width == 1 else ())])
        rows = min(rows, some(16384, 61))
        batch = rng.choice([1, 3, 64 if rows < 600 else 2])
        kind = rng.choice(SCORE_KINDS)
        scores = sample_scores(kind, batch, rows * width, generator).to(variant.scores)
        scores = placed(scores[:, :, None], variant.aligned, rng)[:, :, 0]
        keep = rng.choice([1, rows, rng.randint(1, rows)])
        calls.append((op, (scores, *([width] * (op == "select_rows")), keep)))
    assert_answers(answers(calls, WIDTH), [expected(call) for call in calls])


def test_selections_by_score_alone_have_the_bits_of_the_cpu():
    """Ratio 1, every token kept, or one token: these use another kernel or branch."""
    calls = []
    tokens = some(61, 9)
    for seed, variant in itertools.product(range(some(20, 2)), (VARIANTS[3], VARIANTS[5])):
        rng = random.Random(seed)
        features, scores = some_values(rng, variant, 3, tokens)
        keep = rng.randint(1, tokens)
        for op, rule in itertools.product(("select", "prune"), ((keep, 1.0), (tokens, 0.5))):
            calls.append((op, (features, scores, *rule, 8, "bipartite")))
            calls.append((op, (features[:, :1], scores[:, :1], 1, rule[1], 8, "pairwise")))
        packed = features[0], scores[0], sample_offsets([keep, tokens - keep])
        for matching, first in itertools.product(MATCHINGS, (keep // 2, keep)):
            kept = sample_offsets([first, tokens - keep]), tokens, first + tokens - keep
            calls.append(("select_varlen", (*packed, *kept, 1.0, 8, matching)))
    assert_answers(answers(calls, WIDTH), [expected(call) for call in calls])


# Images, tokens, channels, tokens kept: LLaVA-1.5, LLaVA-NeXT by tile, SigLIP, Qwen2.5-VL,
# LLaVA-NeXT by image, a large batch.
MODELS = [
    (1, 576, 1024, 64, F16),
    (5, 576, 1024, 32, B16),
    (3, 729, 1152, 128, F32),
    (2, 1024, 1280, 205, B16),
    (1, 2880, 1024, 160, F16),
    (64, 576, 64, 64, F16),
]


@functools.cache
def model(
    batch: int, tokens: int, channels: int, keep: int, dtype: torch.dtype, matching: str
) -> tuple[Case, tuple[Tensor, ...]]:
    """Arguments of `select` in the shape of a model, and the answer of the CPU."""
    generator = torch.Generator().manual_seed(tokens)
    features = sample_features("clustered", batch, tokens, channels, generator).to(dtype)
    scores = sample_scores("softmax", batch, tokens, generator)
    case = Case(features, scores, keep, 0.5, 8, matching)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        return case, expected(("select", case))
    finally:
        torch.set_num_threads(before)


def model_sizes(batch: int, tokens: int, channels: int, keep: int) -> tuple[int, ...]:
    """The sizes, smaller ones in the interpreter."""
    if SIMULATED:
        return min(batch, 2), tokens % 50 + 30, 33, keep % 20 + 5
    return batch, tokens, channels, keep


@matchings
@pytest.mark.parametrize("case", MODELS, ids=lambda case: "x".join(map(str, case[:3])))
def test_shapes_of_models_have_the_bits_of_the_cpu(case, matching):
    *sizes, dtype = case
    case, wanted = model(*model_sizes(*sizes), dtype, matching)
    assert_answers(answers([("select", case)]), [wanted])
    if len(case.scores) == 5:
        assert_answers(answers([("prune", case)]), [pruned(case, *wanted)])


@matchings
@pytest.mark.parametrize("others", ["nobody", "itself", "products"])
@pytest.mark.parametrize("number", [0, 1, 5])
def test_calls_give_the_same_bits_every_time(number, others, matching):
    """The last-arriving program continues alone; the answer must not depend on which one that is.
    The call runs alone, beside the same call on other streams, or beside matrix products."""
    *sizes, dtype = MODELS[number]
    case, (wanted,) = model(*model_sizes(*sizes), dtype, matching)
    call, wanted = uploaded(("select", case)), gpu.upload(wanted)
    turns = streams(WIDTH if others == "itself" else 1)
    (beside,) = streams(1)
    matrix = torch.ones(some(2048, 1), some(2048, 1), device=DEVICE)
    synchronize()
    wrong = []
    for i in range(some(200, 2)):
        with torch.cuda.stream(turns[i % len(turns)]):
            if i % 20 < len(turns):
                poison()
            wrong.append((run(call)[0] != wanted).sum())
        if others == "products":
            with torch.cuda.stream(beside):
                matrix @ matrix
    synchronize()
    assert torch.stack(wrong).count_nonzero() == 0


@needs_cuda
@pytest.mark.skipif(not gpu.NATIVE, reason="for the CUDA kernels only")
@matchings
@pytest.mark.parametrize("case", MODELS, ids=lambda case: "x".join(map(str, case[:3])))
def test_every_variant_has_the_bits_of_the_cpu(case, matching):
    *sizes, dtype = case
    case, wanted = model(*sizes, dtype, matching)
    answers = list(gpu.run_variants(uploaded(("select", case))))
    got = gpu.download([answer for _, answer in answers])
    assert_answers(got, [wanted] * len(got), [number for number, _ in answers])


@pytest.fixture
def constants(monkeypatch):
    """A function that sets constants of the kernel for one test."""
    kernel = importlib.import_module("vispruner_kernels._triton.select")

    def set_constants(**values: int) -> None:
        for name, value in values.items():
            monkeypatch.setattr(kernel, name, value)

    return set_constants


@gpu.needs_triton
@matchings
@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[3]], ids=str)
def test_every_branch_of_the_passes_gives_the_bits_of_the_cpu(constants, variant, matching):
    """With these constants, small images take the branches of large ones: lists of neighbours,
    lists that are too short, and the rule for the bad case of `pairwise` from the first round."""
    constants(SMALL=16, NEIGHBOURS=16, EAGER=1)
    cases = [random_selection(10_000 + seed, variant, matching) for seed in range(some(100, 3))]
    calls = [("select", case) for case in cases]
    assert_answers(answers(calls, WIDTH), [expected(call) for call in calls])


def test_pairwise_has_the_bits_of_the_cpu_if_one_token_is_the_partner_of_all():
    """After EAGER rounds most of the removals are still to come."""
    calls = [("select", tuple(case)) for case in hub_cases(some(701, 41))]
    assert_answers(answers(calls), [expected(call) for call in calls])


@needs_cuda
def test_the_largest_sizes_have_the_bits_of_the_cpu():
    generator = torch.Generator().manual_seed(7)
    features = sample_features("constant", 1, 20, 65536, generator)
    scores = sample_scores("ties", 1, 20, generator)
    calls = [("select", (features, scores, 6, 0.5, 2, matching)) for matching in MATCHINGS]
    features = sample_features("clustered", 1, 16384, 16, generator)
    scores = sample_scores("softmax", 1, 16384, generator)
    calls.append(("select", (features, scores, 16384 - 20, 0.5, 8, "bipartite")))
    if _native.INSTALLED:
        # Without the C++ core the reference would take minutes.
        calls.append(("select", (features, scores, 1638, 0.5, 8, "pairwise")))
    torch.set_num_threads(4)
    assert_answers(answers(calls), [expected(call) for call in calls])
