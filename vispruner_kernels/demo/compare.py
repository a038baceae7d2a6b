"""The comparison: the published loop against ours, the systems' tokens, and what a VLM answers."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vispruner_kernels import cls_scores, select_topk
from vispruner_kernels.demo import tiny_vlm
from vispruner_kernels.demo.encoder import Encoded, one_thread
from vispruner_kernels.demo.picture import InputError
from vispruner_kernels.methods import FasterVLM, FoPru, Random, VisPruner
from vispruner_kernels.published import select_published

RATIO = 0.5
ALL = "all tokens"
# Timed runs: this many, or as many as fit into so many seconds, but not fewer than the least.
_RUNS, _PATIENCE, _LEAST_RUNS = 11, 1.5, 3


@dataclass(frozen=True)
class Timing:
    """Median, smallest and largest of `runs` timed runs, in milliseconds."""

    median: float
    low: float
    high: float
    runs: int


@dataclass(frozen=True)
class Result:
    """What one system kept, and how good that is.

    Attributes:
        name: the system.
        kept: `[T]` int64, ascending.
        important: those of `kept` that were kept for their score.
        attention: share of the CLS token's attention to patches that went to kept ones.
        coverage: mean over all tokens of the largest cosine to a kept token; higher is better.
        redundancy: mean over kept tokens of the largest cosine to another kept one; lower is
            better. NaN for a single token.
        ms: milliseconds of the selection, scores given.
    """

    name: str
    kept: Tensor
    important: Tensor
    attention: float
    coverage: float
    redundancy: float
    ms: float


@dataclass(frozen=True)
class Poll:
    """What the tiny VLM answers to a question.

    Attributes:
        question: in its words.
        truth: the right answer, or None where nobody knows it.
        answers: with all tokens, under `ALL`, and with those that each system keeps, by its name.
    """

    question: str
    truth: str | None
    answers: dict[str, str]

    def right(self, name: str) -> bool | None:
        """Whether that answer is right; None where nobody knows."""
        return None if self.truth is None else self.answers[name] == self.truth


@dataclass(frozen=True)
class Duel:
    """The published loop and ours on the same float32 features, at a budget where both run.

    Attributes:
        keep: that budget, or None where the published loop runs at none.
        published, ours: milliseconds of a selection; None where the published loop runs nowhere.
        equal: tokens of ours that the published loop keeps too when it runs in float64.
        published_equal: the same of the published loop in float32: how much near-ties decide.
        broken_keep: the budget next to the one asked for at which the published loop fails.
        failure: how it fails there, as a verb phrase.
        exact: tokens ours keeps there.
        coverage, published_coverage: of our tokens and of those of the loop in float64.
    """

    keep: int | None
    published: Timing | None
    ours: Timing
    equal: int
    published_equal: int
    broken_keep: int | None
    failure: str
    exact: int
    coverage: float
    published_coverage: float


def systems(keep: int, side: int) -> list[tuple[str, Any]]:
    """The methods at one budget; FoPru's row strategy keeps the whole rows that fit into it."""
    named: list[tuple[str, Any]] = [
        ("VisPruner", VisPruner(keep, important_ratio=RATIO)),
        ("FasterVLM", FasterVLM(keep)),
        ("FoPru rank", FoPru(keep, strategy="rank")),
    ]
    if keep >= side:
        named.append(("FoPru row", FoPru(keep // side * side, strategy="row", width=side)))
    return [*named, ("Random", Random(keep, seed=0))]


@one_thread()
def evaluate(encoded: Encoded, keep: int) -> list[Result]:
    """Run every system on one encoded picture, on one thread."""
    cosine = _cosines(encoded.features[0])
    cls = cls_scores(encoded.q, encoded.k, num_prefix=1)[0]
    results = []
    for name, method in systems(keep, encoded.side):
        scores = method.attention_scores(encoded.q, encoded.k, num_prefix=1)

        def run(method: Any = method, scores: Tensor | None = scores) -> Tensor:
            return method.select(encoded.features, scores)

        kept = run()[0]
        important = kept
        if isinstance(method, VisPruner):
            count = int(keep * RATIO)
            important = select_topk(scores, count)[0] if count else kept[:0]
        elif isinstance(method, Random):
            important = kept[:0]
        results.append(
            Result(
                name=name,
                kept=kept,
                important=important,
                attention=float(cls[kept].sum() / cls.sum()),
                coverage=coverage(cosine, kept),
                redundancy=redundancy(cosine, kept),
                ms=measure([run])[0].median,
            )
        )
    return results


@one_thread()
def poll(image: Tensor, question: str, truth: str | None, keep: int) -> Poll:
    """Ask the tiny VLM about a picture `[3, 192, 192]`, RGB between 0 and 1, on one thread.

    Raises:
        InputError: a word that it does not know.
    """
    try:
        given = tiny_vlm.inputs(image, question)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    methods = {ALL: None} | dict(systems(keep, tiny_vlm.SIDE))
    answers = {
        name: tiny_vlm.answer(given, method) or "(nothing)" for name, method in methods.items()
    }
    return Poll(question, truth, answers)


@one_thread()
def duel(encoded: Encoded, keep: int) -> Duel:
    """Time the published loop and ours on one thread, compare their tokens, and find a budget at
    which the former fails."""
    features = encoded.features
    scores = cls_scores(encoded.q, encoded.k, num_prefix=1)
    runs_at, broken_at, failure = _budgets(features, scores, keep)
    budget = keep if runs_at is None else runs_at
    ours = VisPruner(budget, important_ratio=RATIO)

    def run_ours() -> Tensor:
        return ours.select(features, scores)

    def run_published() -> Tensor:
        return select_published(features, scores, budget, RATIO)

    cosine = _cosines(features[0])
    published, equal, published_equal, published_coverage = None, 0, 0, math.nan
    if runs_at is None:
        (timing,) = measure([run_ours])
    else:
        published, timing = measure([run_published, run_ours])
        exact = select_published(features.double(), scores.double(), budget, RATIO)
        equal = int(torch.isin(run_ours(), exact).sum())
        published_equal = int(torch.isin(run_published(), exact).sum())
        published_coverage = coverage(cosine, exact[0])
    kept = 0
    if broken_at is not None:
        kept = VisPruner(broken_at, important_ratio=RATIO).select(features, scores).shape[1]
    return Duel(
        keep=runs_at,
        published=published,
        ours=timing,
        equal=equal,
        published_equal=published_equal,
        broken_keep=broken_at,
        failure=failure,
        exact=kept,
        coverage=coverage(cosine, run_ours()[0]),
        published_coverage=published_coverage,
    )


def _budgets(features: Tensor, scores: Tensor, keep: int) -> tuple[int | None, int | None, str]:
    """The budgets nearest to `keep` at which the published loop runs, and raises; and how.

    Where it raises at none, one at which it keeps a wrong number of tokens stands in.
    """
    runs_at = raises_at = wrong_at = None
    raises = wrong = ""
    n = features.shape[1]
    for budget in sorted(range(1, n + 1), key=lambda budget: (abs(budget - keep), budget)):
        try:
            count = select_published(features, scores, budget, RATIO).shape[1]
        except (RuntimeError, IndexError) as error:
            if raises_at is None:
                raises_at, raises = budget, f"raises {type(error).__name__}"
        else:
            if count == budget:
                runs_at = budget if runs_at is None else runs_at
            elif wrong_at is None:
                wrong_at, wrong = budget, f"keeps {count} tokens"
        if runs_at is not None and raises_at is not None:
            break
    if raises_at is not None:
        return runs_at, raises_at, raises
    return runs_at, wrong_at, wrong


def measure(functions: list[Callable[[], Any]]) -> list[Timing]:
    """Time functions called in turn, after warm-up."""
    start = time.perf_counter()
    for function in functions:
        function()
    turn = time.perf_counter() - start
    turns = max(min(_LEAST_RUNS, _RUNS), min(_RUNS, int(_PATIENCE / max(turn, 1e-9))))
    samples: list[list[float]] = [[] for _ in functions]
    # The first turn is warm-up too.
    for _ in range(turns + 1):
        for function, times in zip(functions, samples, strict=True):
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
    return [
        Timing(statistics.median(times[1:]), min(times[1:]), max(times[1:]), turns)
        for times in samples
    ]


def _cosines(features: Tensor) -> Tensor:
    unit = F.normalize(features.double(), dim=-1)
    return unit @ unit.T


def coverage(cosine: Tensor, kept: Tensor) -> float:
    """Mean over all tokens of the largest cosine to a kept token, of `cosine` `[N, N]`."""
    return float(cosine[:, kept].amax(1).mean())


def redundancy(cosine: Tensor, kept: Tensor) -> float:
    """Mean over kept tokens of the largest cosine to another kept token; NaN for one token."""
    if len(kept) < 2:
        return math.nan
    among = cosine[kept][:, kept].clone()
    among.fill_diagonal_(-math.inf)
    return float(among.amax(1).mean())
