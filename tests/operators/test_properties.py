"""Properties of the selection that hold for every input, checked by hypothesis."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vispruner_kernels import select, select_rows, select_topk

SPECIAL = [0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e-45, -1e-45, 3e38, 65504.0]
values = st.one_of(st.sampled_from(SPECIAL), st.floats(-2.0, 2.0, width=16))
ratios = st.floats(0.0, 1.0)
matchings = st.sampled_from(["bipartite", "pairwise"])
steps = st.integers(1, 10)
quick = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def images(draw):
    """features [1, N, C], scores [1, N], keep."""
    n, c = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    rows = draw(st.lists(st.lists(values, min_size=c, max_size=c), min_size=1, max_size=n))
    pick = draw(st.lists(st.integers(0, len(rows) - 1), min_size=n, max_size=n))
    scores = draw(st.lists(values, min_size=n, max_size=n))
    features = torch.tensor(rows)[torch.tensor(pick)][None]
    return features, torch.tensor(scores)[None], draw(st.integers(1, n))


def key(score: float) -> tuple[bool, float]:
    """Sort key of the contract: NaN below everything, -0.0 as 0.0."""
    return (not math.isnan(score), 0.0 if math.isnan(score) else score)


@quick
@given(images(), ratios, steps, matchings)
def test_rows_ascend_and_are_distinct(image, ratio, step, matching):
    features, scores, keep = image
    kept = select(features, scores, keep, ratio, step, matching)[0].tolist()
    assert len(kept) == keep
    assert kept == sorted(set(kept))
    assert set(kept) <= set(range(scores.shape[1]))


@quick
@given(images(), ratios, steps, matchings)
def test_important_tokens_are_kept(image, ratio, step, matching):
    features, scores, keep = image
    important = int(keep * ratio)
    if important:
        kept = set(select(features, scores, keep, ratio, step, matching)[0].tolist())
        assert set(select_topk(scores, important)[0].tolist()) <= kept


@quick
@given(images())
def test_topk_keeps_no_token_below_one_that_it_drops(image):
    _, scores, keep = image
    kept = set(select_topk(scores, keep)[0].tolist())
    values = scores[0].tolist()
    for i in kept:
        for j in set(range(len(values))) - kept:
            assert (key(values[i]), -i) > (key(values[j]), -j)


@quick
@given(images(), ratios, steps, matchings, st.sampled_from([2.0**-3, 2.0, 2.0**10]))
def test_scaling_by_a_power_of_two_changes_nothing(image, ratio, step, matching, factor):
    """Such a factor does not change the fixed-point values of a token."""
    features, scores, keep = image
    features = features.clamp(-(2.0**100), 2.0**100)
    tiny = features.abs().amax(-1, keepdim=True) < 1e-20
    features = torch.where(tiny, 0.0, features)
    one = select(features, scores, keep, ratio, step, matching)
    assert torch.equal(one, select(features * factor, scores, keep, ratio, step, matching))


@quick
@given(images(), ratios, steps, matchings, st.randoms(use_true_random=False))
def test_permuting_tokens_with_distinct_scores_permutes_the_answer(
    image, ratio, step, matching, random
):
    """The bipartite rule depends on the order by score, not on indices.

    The pairwise rule breaks ties of similarity by index, so its similarities must be distinct here.
    """
    features, _, keep = image
    n = features.shape[1]
    if matching == "pairwise":
        features = torch.randn(1, n, 16, generator=torch.Generator().manual_seed(n * 31 + keep))
    scores = torch.tensor(random.sample(range(100), n)).float()[None]
    rename = torch.tensor(random.sample(range(n), n))
    one = select(features, scores, keep, ratio, step, matching)
    two = select(features[:, rename], scores[:, rename], keep, ratio, step, matching)
    assert rename[two[0]].sort().values.tolist() == one[0].tolist()


@quick
@given(images(), matchings)
def test_keep_all_and_keep_one_give_that_many(image, matching):
    features, scores, _ = image
    n = scores.shape[1]
    assert select(features, scores, n, 0.5, 8, matching)[0].tolist() == list(range(n))
    assert select(features, scores, 1, 0.5, 8, matching).shape == (1, 1)


@quick
@given(images(), ratios, steps, matchings, st.integers(1, 4))
def test_a_batch_gives_the_same_as_its_images_alone(image, ratio, step, matching, copies):
    features, scores, keep = image
    one = select(features, scores, keep, ratio, step, matching)
    many = select(
        features.expand(copies, -1, -1), scores.expand(copies, -1), keep, ratio, step, matching
    )
    assert torch.equal(many, one.expand(copies, -1))


@quick
@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_select_rows_keeps_whole_rows(width, height, data):
    n = width * height
    scores = torch.tensor([data.draw(st.lists(values, min_size=n, max_size=n))])
    rows = data.draw(st.integers(1, height))
    kept = select_rows(scores, width, rows)[0].view(rows, width)
    assert torch.equal(kept, kept[:, :1] // width * width + torch.arange(width))
