"""The methods: budgets known without data, the scores that they need, and their selections."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from vispruner_kernels import cls_scores, received_scores, select, select_rows, select_topk
from vispruner_kernels.methods import FasterVLM, FoPru, Random, VisPruner
from vispruner_kernels.testing import sample_qkv

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def layer():
    q, k, _ = sample_qkv(2, 145, 3, 16, torch.float32, 0)
    features = torch.randn(2, 144, 32, generator=torch.Generator().manual_seed(1))
    return q, k, features


def test_each_method_gets_the_scores_that_it_needs(layer):
    q, k, _ = layer
    cls, received = cls_scores(q, k), received_scores(q, k, num_prefix=1)
    for method in (VisPruner(8), FasterVLM(8)):
        assert method.needs == "cls"
        assert torch.equal(method.attention_scores(q, k), cls)
    for method in (FoPru(8), VisPruner(8, scores="received"), FasterVLM(8, scores="received")):
        assert method.needs == "received"
        assert torch.equal(method.attention_scores(q, k), received)
    assert Random(8).needs is None
    assert Random(8).attention_scores(q, k) is None


def test_methods_select_what_their_operators_select(layer):
    q, k, features = layer
    scores = cls_scores(q, k)
    cases = {
        VisPruner(32): select(features, scores, 32),
        VisPruner(32, 0.25, 4, "pairwise"): select(features, scores, 32, 0.25, 4, "pairwise"),
        FasterVLM(32): select_topk(scores, 32),
        FoPru(32): select_topk(scores, 32),
        FoPru(36, "row"): select_rows(scores, 12, 3),
        FoPru(36, "row", width=18): select_rows(scores, 18, 2),
    }
    for method, expected in cases.items():
        assert torch.equal(method.select(features, scores), expected), method
        assert method.retained_tokens(144) == expected.shape[1]


@pytest.mark.parametrize("lengths", [(48, 48, 48), (48, 30, 66), (144,), (1, 143), (72, 72, 1)])
def test_packed_images_keep_what_they_keep_alone(layer, lengths):
    q, k, batch = layer
    total = sum(lengths)
    features, scores = batch.flatten(0, 1)[:total], cls_scores(q, k).flatten()[:total]
    methods = [
        VisPruner(0.3),
        VisPruner(0.3, matching="pairwise"),
        VisPruner(1),
        FasterVLM(0.3),
        FoPru(0.3),
        Random(0.3, seed=5),
    ]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for method in methods:
        alone = [
            method.select(features[None, a : a + n], scores[None, a : a + n])[0] + a
            for a, n in zip(starts, lengths, strict=True)
        ]
        assert torch.equal(method.select_varlen(features, scores, lengths), torch.cat(alone))
    without_scores = Random(0.3, seed=5).select_varlen(features, None, lengths)
    assert torch.equal(without_scores, torch.cat(alone))


def test_each_packed_image_has_its_own_grid_width(layer):
    q, k, batch = layer
    features, scores = batch.flatten(0, 1)[:96], cls_scores(q, k).flatten()[:96]
    kept = FoPru(0.5, "row").select_varlen(features, scores, [48, 48], [8, 12])
    expected = [
        select_rows(scores[None, :48], 8, 3)[0],
        select_rows(scores[None, 48:], 12, 2)[0] + 48,
    ]
    assert torch.equal(kept, torch.cat(expected))
    # A width of the method itself takes precedence.
    kept = FoPru(0.5, "row", width=16).select_varlen(features, scores, [48, 48], [8, 12])
    expected = [select_rows(s[None], 16, 2)[0] + 48 * i for i, s in enumerate(scores.split(48))]
    assert torch.equal(kept, torch.cat(expected))
    with pytest.raises(ValueError, match="scores is None"):
        VisPruner(4).select_varlen(features, None, [40, 56])


def test_random_depends_on_its_seed_alone(layer):
    features = layer[2]
    kept = Random(40, seed=3).select(features, None)
    assert kept.shape == (2, 40)
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[0].unique())
    assert torch.equal(kept[:1], Random(40, seed=3).select(features[:1], None))
    assert not torch.equal(kept, Random(40, seed=4).select(features, None))


def test_budgets_round_to_the_nearest_number_of_tokens():
    assert VisPruner(64).retained_tokens(576) == 64
    assert FasterVLM(0.25).retained_tokens(576) == 144
    assert [FasterVLM(x).retained_tokens(576) for x in (0.75, 0.5, 0.1, 0.05)] == [432, 288, 58, 29]
    assert FasterVLM(0.001).retained_tokens(576) == 1
    assert FasterVLM(1.0).retained_tokens(7) == 7
    assert FoPru(0.25, "row").retained_tokens(576) == 144
    assert FoPru(0.2, "row").retained_tokens(576) == 5 * 24
    assert FoPru(0.01, "row").retained_tokens(576) == 24
    assert FoPru(60, "row", width=30).retained_tokens(900) == 60


@pytest.mark.parametrize(
    ("make", "error", "names"),
    [
        (lambda: VisPruner(0), ValueError, "keep is 0"),
        (lambda: VisPruner(-3), ValueError, "keep is -3"),
        (lambda: VisPruner(1.5), ValueError, "keep is 1.5"),
        (lambda: VisPruner(0.0), ValueError, "keep is 0.0"),
        (lambda: VisPruner(float("nan")), ValueError, "keep is nan"),
        (lambda: VisPruner(True), TypeError, "keep is True"),
        (lambda: VisPruner("64"), TypeError, "keep is '64'"),
        (lambda: VisPruner(64, scores="mean"), ValueError, "scores is 'mean', expected 'cls' or"),
        (lambda: FasterVLM(64, scores=None), ValueError, "scores is None, expected 'cls' or"),
        (lambda: VisPruner(577).retained_tokens(576), ValueError, "keep is 577"),
        (lambda: VisPruner(8, important_ratio=1.5), ValueError, "important_ratio is 1.5"),
        (lambda: VisPruner(8, important_ratio=float("nan")), ValueError, "important_ratio is nan"),
        (lambda: VisPruner(8, step=0), ValueError, "step is 0"),
        (lambda: VisPruner(8, matching="best"), ValueError, "matching is 'best'"),
        (lambda: FoPru(8, "column"), ValueError, "strategy is 'column'"),
        (lambda: FoPru(8, "row", width=0), ValueError, "width is 0"),
        (lambda: FoPru(25, "row").retained_tokens(576), ValueError, "keep is 25"),
        (lambda: FoPru(600, "row").retained_tokens(576), ValueError, "keep is 600"),
        (lambda: FoPru(8, "row").retained_tokens(575), ValueError, "width is None"),
        (lambda: FoPru(8, "row", width=7).retained_tokens(576), ValueError, "width is 7"),
        (lambda: FoPru(8, "row", width=2.5), TypeError, "width is 2.5"),
        (lambda: FasterVLM(3).select(torch.ones(1, 9, 2), None), ValueError, "scores is None"),
        (
            lambda: FasterVLM(3).select(torch.ones(1, 9, 2), torch.ones(1, 8)),
            ValueError,
            "num_prefix",
        ),
        (lambda: FoPru(3).select(torch.ones(1, 9, 2), torch.ones(2, 9)), ValueError, "num_prefix"),
        (
            lambda: FoPru(3, "row").select(torch.ones(1, 9, 2), torch.ones(9)),
            ValueError,
            "scores has",
        ),
    ],
)
def test_bad_arguments_raise_an_error_that_names_them(make, error, names):
    with pytest.raises(error, match=names):
        make()


NO_INT = [True, np.True_, 2.5, NAN, INF, "3", None, [3], torch.tensor(3), 1j, Fraction(5, 2)]
FIELDS = {
    (VisPruner, "keep"): [
        "64",
        None,
        True,
        np.True_,
        [64],
        torch.tensor(64),
        torch.tensor(0.5),
        1j,
    ],
    (VisPruner, "step"): NO_INT,
    (VisPruner, "important_ratio"): [True, np.True_, "0.5", None, [0.5], torch.tensor(0.5), 1j],
    (FoPru, "width"): [x for x in NO_INT if x is not None],
    (Random, "seed"): NO_INT,
}


@pytest.mark.parametrize(("method", "name"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_wrong_types_raise_a_type_error(method, name):
    for value in FIELDS[method, name]:
        with pytest.raises(TypeError, match=f"^{name} is .*, expected an? "):
            method(**{"keep": 8, name: value})


@pytest.mark.parametrize(
    ("method", "name", "values"),
    [
        (VisPruner, "keep", [2**63, 10**40, 10**5000, -(10**40), 0.0, 1.5, NAN, INF, -INF, 1e300]),
        (VisPruner, "keep", [np.int64(0), np.float32(2), np.float64("nan"), Fraction(3, 2)]),
        (VisPruner, "step", [2**63, 10**40, 10**5000, 0, -1, -(10**40), np.int64(0)]),
        (VisPruner, "important_ratio", [10**40, -(10**5000), NAN, INF, -0.1, np.float32(1.5)]),
        (FoPru, "width", [2**63, 10**40, 10**5000, 0, -1, np.int64(-1)]),
        (Random, "seed", [2**63, 10**40, 10**5000, -1, np.int64(-1)]),
        (VisPruner, "matching", [None, 3, "best", ["bipartite"], {"bipartite": 1}, np.ones(2)]),
        (VisPruner, "scores", [None, 3, "mean", ["cls"], np.ones(2), torch.ones(2)]),
        (FasterVLM, "scores", [None, 3, "mean", ["cls"], np.ones(2), torch.ones(2)]),
        (FoPru, "strategy", [None, 3, "column", ["row"], np.ones(2), torch.ones(2)]),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else x if isinstance(x, str) else "",
)
def test_wrong_values_raise_a_value_error(method, name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} is .*, expected ") as caught:
            method(**{"keep": 8, name: value})
        assert len(str(caught.value)) < 200


def test_numbers_of_numpy_become_those_of_python():
    kinds = {int: (np.int64, np.int8, np.uint16), float: (np.float64, np.float32, np.float16)}
    for kind in kinds[int]:
        method = VisPruner(kind(8), step=kind(4))
        assert method == VisPruner(8, step=4)
        assert {type(method.keep), type(method.step)} == {int}
        assert type(FoPru(8, "row", kind(4)).width) is int
        assert type(Random(8, kind(3)).seed) is int
    for kind in kinds[float]:
        method = VisPruner(kind(0.5), kind(0.25))
        assert method == VisPruner(0.5, 0.25)
        assert {type(method.keep), type(method.important_ratio)} == {float}
    assert VisPruner(8, 1) == VisPruner(8, 1.0)


def test_the_largest_step_and_seed():
    features, scores = torch.randn(1, 9, 4), torch.rand(1, 9)
    kept = VisPruner(4, step=2**63 - 1).select(features, scores)
    assert torch.equal(kept, VisPruner(4, step=9).select(features, scores))
    assert Random(4, seed=2**63 - 1).select(features).shape == (1, 4)
