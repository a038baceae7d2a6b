"""select: the reference against an oracle and the published loop, backends against the
reference."""

from __future__ import annotations

import functools
import itertools

import oracle
import pytest
import torch
from calls import few
from installed import needs_native

from vispruner_kernels import _native, reference, select, select_topk
from vispruner_kernels.published import select_published
from vispruner_kernels.testing import (
    FEATURE_KINDS,
    SCORE_KINDS,
    Case,
    assert_same_bits,
    hub_cases,
    hubs,
    random_case,
    sample_features,
    sample_scores,
)

QUICK = few(400)
# Seeds for each backend and matching; the default run takes the first QUICK.
THOROUGH = 2500


def by_oracle(case: Case) -> torch.Tensor:
    features, scores = case.features.float().numpy(), case.scores.float().numpy()
    return torch.from_numpy(oracle.select(features, scores, *case[2:]))


def clip_sized(seed: int, kind: str = "clustered", tokens: int = 576) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    features = sample_features(kind, 1, tokens, 1024, generator)
    return features, sample_scores("softmax", 1, tokens, generator)


@pytest.mark.parametrize("matching", ["bipartite", "pairwise"])
@pytest.mark.parametrize(
    "seeds", [range(QUICK), pytest.param(range(QUICK, THOROUGH), marks=pytest.mark.slow)]
)
def test_reference_is_the_oracle(seeds, matching):
    for seed in seeds:
        case = random_case(seed, matching=matching)
        assert torch.equal(reference.select(*case), by_oracle(case)), f"seed {seed}"


@pytest.mark.parametrize("matching", ["bipartite", "pairwise"])
@pytest.mark.parametrize(
    "seeds", [range(QUICK), pytest.param(range(QUICK, THOROUGH), marks=pytest.mark.slow)]
)
def test_backend_is_the_reference(backend, seeds, matching):
    for seed in seeds:
        case = random_case(seed, matching=matching)
        copies = case.features.clone(), case.scores.clone()
        try:
            assert_same_bits(backend.select(*case), reference.select(*case))
            assert_same_bits(case.features.contiguous(), copies[0].contiguous())
            assert_same_bits(case.scores.contiguous(), copies[1].contiguous())
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


@functools.cache
def clip_sized_by_oracle(kind: str, matching: str) -> list[tuple[Case, torch.Tensor]]:
    rules = [(64, 0.5, 8, matching), (191, 0.3, 8, matching)]
    cases = [Case(*clip_sized(1, kind), *rule) for rule in rules]
    return [(case, by_oracle(case)) for case in cases]


@pytest.mark.parametrize("matching", ["bipartite", "pairwise"])
@pytest.mark.parametrize("kind", FEATURE_KINDS)
def test_576_tokens_agree_with_the_oracle(backend, kind, matching):
    for case, expected in clip_sized_by_oracle(kind, matching):
        assert torch.equal(backend.select(*case), expected)


def test_every_small_setting_agrees_with_the_oracle(backend):
    for n in range(1, 10):
        generator = torch.Generator().manual_seed(n)
        features = sample_features("duplicates", 2, n, 5, generator)
        scores = sample_scores("ties", 2, n, generator)
        for keep, ratio, step, matching in itertools.product(
            range(1, n + 1), (0.0, 0.4, 1.0), (1, 2, 8), ("bipartite", "pairwise")
        ):
            case = Case(features, scores, keep, ratio, step, matching)
            assert torch.equal(backend.select(*case), by_oracle(case)), case[2:]


@pytest.mark.parametrize("matching", ["bipartite", "pairwise"])
@pytest.mark.parametrize("tokens", [729, 1024, pytest.param(2880, marks=pytest.mark.slow)])
def test_more_tokens_agree_with_the_reference(backend, tokens, matching):
    if tokens > 729 and backend.name == "reference":
        pytest.skip("the reference would be compared with itself")
    features, scores = clip_sized(2, tokens=tokens)
    features = features[:, :, :64]
    args = (features, scores, 160, 0.5, 8, matching)
    assert_same_bits(backend.select(*args), reference.select(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_similarity_is_that_of_the_oracle(dtype):
    for kind in FEATURE_KINDS:
        x = sample_features(kind, 1, 50, 37, torch.Generator().manual_seed(3))[0].to(dtype)
        expected = torch.from_numpy(oracle.similarity(x.float().numpy()))
        assert_same_bits(reference.similarity(x), expected)
        assert torch.equal(
            reference.fixed_point(x), torch.from_numpy(oracle.fixed_point(x.float().numpy()))
        )


@pytest.mark.parametrize("kind", SCORE_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_order_is_that_of_the_oracle(kind, dtype):
    scores = sample_scores(kind, 1, 200, torch.Generator().manual_seed(4))[0].to(dtype)
    assert reference.order(scores).tolist() == list(oracle.order(scores.float().numpy()))


def test_order_of_special_values():
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor([nan, 0.0, 1e-45, -0.0, -1e-45, inf, -inf, 0.0, -nan, inf])
    assert reference.order(scores).tolist() == [5, 9, 2, 1, 3, 7, 4, 6, 0, 8]


@pytest.mark.parametrize(
    "budgets", [range(16, 577, 48), pytest.param(range(1, 577), marks=pytest.mark.slow)]
)
def test_the_rule_agrees_with_the_published_loop_on_equal_similarities(budgets):
    """Both with float64 similarities, for all settings in which the published loop runs."""
    features = clip_sized(0)[0][:, :, :32].double()
    # Distinct scores: the published loop does not specify the order of equal ones.
    scores = torch.randperm(576, generator=torch.Generator().manual_seed(0)).float()[None]
    unit = features[0] / features[0].norm(dim=-1, keepdim=True)
    similarity = unit @ unit.T
    order = reference.order(scores[0])
    failed = 0
    for keep, ratio in itertools.product(budgets, (0.5, 0.75)):
        important = int(keep * ratio)
        rest = reference.bipartite(similarity, order[important:], keep - important, 8)
        ours = torch.cat([order[:important], rest]).sort().values
        assert len(ours) == keep
        try:
            published = select_published(features, scores, keep, ratio)
        except (IndexError, RuntimeError):
            failed += 1
            continue
        if published.shape == (1, keep):
            assert torch.equal(ours, published[0]), (keep, ratio)
        else:
            failed += 1
    assert failed == (587 if len(budgets) == 576 else 1)


def test_the_operator_runs_for_budgets_at_which_the_published_loop_fails():
    features, scores = clip_sized(0)
    features = features[:, :, :64]
    wrong = 0
    for keep in range(1, 577, 25):
        assert select(features, scores, keep).shape == (1, keep)
        try:
            wrong += select_published(features, scores, keep).shape != (1, keep)
        except (IndexError, RuntimeError):
            wrong += 1
    assert wrong >= 8


def test_fastervlm_and_keep_all_do_not_read_features(backend):
    features = torch.full((2, 30, 8), torch.nan)
    scores = sample_scores("ties", 2, 30, torch.Generator().manual_seed(5))
    assert_same_bits(backend.select(features, scores, 7, 1.0), select_topk(scores, 7))
    assert torch.equal(backend.select(features, scores, 30), torch.arange(30).expand(2, 30))


@pytest.mark.parametrize("ratio", [0.0, 0.29, 0.57, 0.58, 0.999999999, 1.0])
def test_the_important_count_rounds_as_in_python(backend, ratio):
    # With equal features the diverse tokens are not the best ones by score.
    n = 100
    features = torch.ones(1, n, 4)
    scores = torch.arange(n, 0, -1).float()[None]
    for keep in (1, 7, 50, 99, 100):
        kept = backend.select(features, scores, keep, ratio, 8, "pairwise")[0].tolist()
        important = int(keep * ratio)
        # All similarities tie. Pairs (0, 1), (0, 2), ... come first, so the first token of the
        # residual stays, and the last ones.
        survivors = [important, *range(n - (keep - important) + 1, n)]
        expected = [*range(important), *survivors[: keep - important]]
        assert kept == sorted(expected), (keep, ratio)


@needs_native
@pytest.mark.parametrize(
    ("threads", "compact_to"), [(2, 0), (32, 16), (512, 0), (512, 144), (512, 192), (1, 1024)]
)
def test_passes_do_not_depend_on_the_block(monkeypatch, threads, compact_to):
    """`threads` is the number of threads of the thread block that a loop replaces (512 on a GPU).
    When `compact_to` tokens are left, the bipartite rule copies their similarities to a smaller
    matrix; 0 switches this off."""
    monkeypatch.setattr(_native.arguments, "BLOCK_THREADS", threads)
    monkeypatch.setattr(_native.arguments, "COMPACT_TO", compact_to)
    for seed in range(150):
        case = random_case(seed, max_tokens=150)
        assert_same_bits(_native.cpu.select(*case), reference.select(*case))
    for matching in ("bipartite", "pairwise"):
        args = (*clip_sized(6), 64, 0.5, 8, matching)
        assert_same_bits(_native.cpu.select(*args), reference.select(*args))


@needs_native
@pytest.mark.parametrize("rounds", [0, 1, 3])
@pytest.mark.parametrize(
    "seeds", [range(QUICK), pytest.param(range(QUICK, THOROUGH), marks=pytest.mark.slow)]
)
def test_pairwise_does_not_depend_on_the_eager_rounds(monkeypatch, seeds, rounds):
    monkeypatch.setattr(_native.arguments, "EAGER_ROUNDS", rounds)
    for seed in seeds:
        case = random_case(seed, max_tokens=90, matching="pairwise")
        assert torch.equal(_native.cpu.select(*case), by_oracle(case)), f"seed {seed}"


@needs_native
def test_pairwise_ties_without_eager_rounds_are_broken_by_index(monkeypatch):
    """Few different tokens, every budget: most pairs tie, and the last round decides by index."""
    monkeypatch.setattr(_native.arguments, "EAGER_ROUNDS", 0)
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        n, kinds = 4 + seed % 17, 1 + seed % 3
        kind = torch.randn(kinds, 3, generator=generator)
        features = kind[torch.randint(0, kinds, (n,), generator=generator)][None]
        scores = torch.randperm(n, generator=generator).float()[None]
        for keep in range(1, n):
            case = Case(features, scores, keep, 0.0, 8, "pairwise")
            assert torch.equal(_native.cpu.select(*case), by_oracle(case)), (seed, keep)


@needs_native
@pytest.mark.parametrize("threads", [1, 32])
def test_pairwise_with_tokens_that_are_alike(monkeypatch, threads):
    """Groups of equal tokens are resolved in one step: each token against the best one before it.
    Other tokens may be as similar to one of a group as the group is, which rules the step out."""
    monkeypatch.setattr(_native.arguments, "BLOCK_THREADS", threads)
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        n, kinds = 30 + seed, 1 + seed % 4
        kind = torch.randn(kinds, 8, generator=generator)
        if seed % 2:
            # Few similarities, so that tokens of different groups tie.
            kind = torch.randint(0, 2, (2 * kinds, 4), generator=generator).float()
        group = torch.randint(0, len(kind), (n,), generator=generator)
        # Multiples by powers of two are as similar as equal tokens.
        features = (kind[group] * 2.0 ** torch.randint(0, 3, (n, 1), generator=generator))[None]
        scores = torch.randint(0, n, (1, n), generator=generator).float()
        for keep in (1, kinds, n // 3, n - 2):
            case = Case(features, scores, keep, 0.0, 8, "pairwise")
            assert torch.equal(_native.cpu.select(*case), by_oracle(case)), (seed, keep)


@needs_native
def test_pairwise_with_one_token_as_the_best_partner_of_all():
    """After 64 rounds most of the removals are still to come."""
    sim = reference.similarity(hubs(400)[0]).fill_diagonal_(-1.0)
    for first in (0, 100, 300):
        nearest = sim[first:, first:].argmax(1)
        assert nearest.bincount().max() > 0.8 * len(nearest)
    for case in hub_cases(700):
        assert torch.equal(_native.cpu.select(*case), by_oracle(case))


@needs_native
def test_every_instruction_set_gives_the_same_bits(simd):
    for seed in range(200):
        case = random_case(seed)
        assert_same_bits(_native.cpu.select(*case), reference.select(*case))
    # Sums of products that fit an int32 only over 8, some or all channels.
    for kind, channels in itertools.product(("constant", "outliers", "normal"), (8, 33, 200, 1024)):
        generator = torch.Generator().manual_seed(channels)
        features = sample_features(kind, 1, 70, channels, generator)
        scores = sample_scores("softmax", 1, 70, generator)
        for matching in ("bipartite", "pairwise"):
            args = (features, scores, 20, 0.5, 8, matching)
            assert_same_bits(_native.cpu.select(*args), reference.select(*args))


@needs_native
def test_float16_is_read_exactly(simd):
    """Every float16 and bfloat16 value as a score, and every finite one as a feature."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = bits.view(dtype)
        for part in values.split(16384):
            assert_same_bits(
                _native.cpu.select_topk(part[None], 100), reference.select_topk(part[None], 100)
            )
        finite = values[values.float().isfinite()]
        finite = finite[torch.randperm(len(finite), generator=torch.Generator().manual_seed(0))]
        features = finite[: len(finite) // 32 * 32].reshape(1, -1, 32)[:, :500]
        scores = torch.zeros(1, features.shape[1])
        args = (features, scores, 100, 0.0, 8, "pairwise")
        assert_same_bits(_native.cpu.select(*args), reference.select(*args))


@needs_native
def test_subnormals_survive_flush_to_zero():
    """The core compares bits, so PyTorch's flush-to-zero mode changes nothing."""
    features = torch.tensor([1.0, 2.0, 3.0]) * 2.0**-24 * torch.tensor([[1.0], [2.0], [-3.0]])
    features = torch.cat([features, features.flip(1)])[None].half()
    scores = torch.tensor([[1e-40, 2e-40, 3e-40, -1e-40, 0.0, 1e-41]])
    args = (features, scores, 3, 0.4, 8, "bipartite")
    expected = reference.select(*args)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        got = _native.cpu.select(*args)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(got, expected)


def test_the_largest_sizes(backend):
    """65536 channels with the largest sums of products, and 16384 tokens."""
    if backend.name != "reference":
        generator = torch.Generator().manual_seed(7)
        features = sample_features("constant", 1, 20, 65536, generator)
        args = (features, sample_scores("ties", 1, 20, generator), 6, 0.5, 2, "pairwise")
        assert_same_bits(backend.select(*args), reference.select(*args))
    scores = sample_scores("ties", 1, 16384, torch.Generator().manual_seed(8))
    features = torch.zeros(1, 1, 1).expand(1, 16384, 1)
    assert_same_bits(backend.select(features, scores, 5000, 1.0), select_topk(scores, 5000))


@needs_native
@pytest.mark.parametrize("kind", ["clustered", "duplicates", "constant"])
def test_images_long_enough_for_neighbour_lists_agree_with_the_reference(monkeypatch, kind):
    """With many equal tokens, a list can run out of neighbours before it gives an answer."""
    for tokens, keep, threads in ((1600, 8, 1), (1800, 300, 64)):
        generator = torch.Generator().manual_seed(tokens)
        features = sample_features(kind, 1, tokens, 16, generator)
        scores = sample_scores("softmax", 1, tokens, generator)
        monkeypatch.setattr(_native.arguments, "BLOCK_THREADS", threads)
        args = (features, scores, keep, 0.0, 8, "bipartite")
        assert_same_bits(_native.cpu.select(*args), reference.select(*args))


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("matching", ["bipartite", "pairwise"])
def test_long_images_agree_with_the_reference(matching):
    generator = torch.Generator().manual_seed(9)
    features = sample_features("clustered", 1, 4001, 24, generator)
    scores = sample_scores("softmax", 1, 4001, generator)
    args = (features, scores, 333, 0.5, 8, matching)
    assert_same_bits(_native.cpu.select(*args), reference.select(*args))


def test_pairwise_keeps_the_more_important_of_duplicates(backend):
    # Tokens 0-4 are equal and so are 5-9; tokens 3 and 8 have the highest scores of the two groups.
    features = torch.eye(2).repeat_interleave(5, 0)[None]
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.9, 0.4, 0.1, 0.2, 0.3, 0.8, 0.4]])
    kept = backend.select(features, scores, 2, 0.0, 8, "pairwise")
    assert kept.tolist() == [[3, 8]]


def test_rounding_the_features_changes_fewer_tokens_with_pairwise_than_with_bipartite():
    changed = {}
    for matching in ("bipartite", "pairwise"):
        same = 0
        for seed in range(4):
            features, scores = clip_sized(seed)
            one = select(features, scores, 64, matching=matching)
            two = select(features.bfloat16(), scores, 64, matching=matching)
            same += len(set(one[0].tolist()) & set(two[0].tolist()))
        changed[matching] = 1 - same / (4 * 64)
    assert changed["pairwise"] < 0.1 < 0.2 < changed["bipartite"], changed


def test_a_batch_gives_the_same_as_its_images_alone(backend):
    generator = torch.Generator().manual_seed(10)
    features = sample_features("clustered", 5, 99, 48, generator)
    scores = sample_scores("softmax", 5, 99, generator)
    for matching in ("bipartite", "pairwise"):
        batch = backend.select(features, scores, 20, 0.5, 8, matching)
        for i in range(5):
            one = backend.select(features[i : i + 1], scores[i : i + 1], 20, 0.5, 8, matching)
            assert torch.equal(batch[i], one[0])
