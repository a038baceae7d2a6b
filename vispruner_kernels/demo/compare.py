"""Compare the tokens, quality, time and answers of the methods, and time the published loop."""

from __future__ import annotations

import math
import operator
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vispruner_kernels import cls_scores, select_topk
from vispruner_kernels.demo import tiny_vlm
from vispruner_kernels.demo.encoder import Encoded
from vispruner_kernels.methods import FasterVLM, FoPru, Random, VisPruner
from vispruner_kernels.published import select_published

RATIO = 0.5
ALL = "all tokens"
_RUNS = 11


@dataclass(frozen=True)
class Result:
    """The tokens that one method keeps, their quality, and the answers that they give.

    Attributes:
        name: the method, or `ALL`.
        kept: `[T]` int64, ascending.
        important: the tokens of `kept` that the method keeps for their score.
        attention: share of the CLS token's attention to patches that goes to kept ones.
        coverage: mean over all tokens of the largest cosine to a kept token; higher is better.
        redundancy: mean over kept tokens of the largest cosine to another kept one; lower is
            better. NaN for a single token.
        ms: median time of the selection in milliseconds, without the scores; NaN for `ALL`.
        answer: the tiny VLM's answer to the first question, if there is one.
        right: whether that answer is right; None if the right answer is not known.
        correct: the number of right answers to all questions.
    """

    name: str
    kept: Tensor
    important: Tensor
    attention: float
    coverage: float
    redundancy: float
    ms: float
    answer: str
    right: bool | None
    correct: int


def systems(keep: int, side: int) -> dict[str, Any]:
    """The methods at one budget; FoPru's row strategy keeps the whole rows that fit into it."""
    methods: dict[str, Any] = {
        "VisPruner": VisPruner(keep, important_ratio=RATIO),
        "FasterVLM": FasterVLM(keep),
        "FoPru rank": FoPru(keep, strategy="rank"),
    }
    if keep >= side:
        methods["FoPru row"] = FoPru(keep // side * side, strategy="row", width=side)
    return methods | {"Random": Random(keep, seed=0)}


def evaluate(
    encoded: Encoded, keep: int, questions: Sequence[tuple[dict[str, Tensor], str | None]] = ()
) -> list[Result]:
    """Keep all tokens of a picture, then those of every method, and ask the tiny VLM each time.

    A question is a pair: the result of `tiny_vlm.inputs`, and the right answer or None.
    """
    truths = [truth for _, truth in questions]
    cosine = _cosines(encoded)
    cls = cls_scores(encoded.q, encoded.k)[0]
    results = []
    for name, method in {ALL: None, **systems(keep, encoded.side)}.items():
        kept, important, ms = torch.arange(len(cls)), torch.arange(0), math.nan
        if method is not None:
            scores = method.attention_scores(encoded.q, encoded.k, num_prefix=1)
            select = partial(method.select, encoded.features, scores)
            kept, ms = select()[0], statistics.median(measure(select)[0])
            count = int(keep * RATIO) if name == "VisPruner" else len(kept)
            if count and scores is not None:
                important = kept if count == len(kept) else select_topk(scores, count)[0]
        answers = [tiny_vlm.answer(inputs, method) or "(nothing)" for inputs, _ in questions]
        results.append(
            Result(
                name=name,
                kept=kept,
                important=important,
                attention=float(cls[kept].sum() / cls.sum()),
                coverage=coverage(cosine, kept),
                redundancy=redundancy(cosine, kept),
                ms=ms,
                answer=answers[0] if answers else "",
                right=answers[0] == truths[0] if truths and truths[0] is not None else None,
                correct=sum(map(operator.eq, answers, truths)),
            )
        )
    return results


def compare_with_loop(encoded: Encoded, keep: int) -> list[str]:
    """Compare VisPruner with the published loop on the same float32 features; lines to print."""
    features, scores = encoded.features, cls_scores(encoded.q, encoded.k)
    ours = partial(VisPruner(keep, important_ratio=RATIO).select, features, scores)
    loop = partial(select_published, features, scores, keep, RATIO)
    kept, failure = ours()[0], ""
    try:
        published = loop()[0]
        exact = select_published(features.double(), scores.double(), keep, RATIO)[0]
        if len(published) != keep:
            failure = f"keeps {len(published)} tokens"
    except (RuntimeError, IndexError) as error:
        failure = f"raises {type(error).__name__}"
    if failure:
        first = f"published loop {failure} at a budget of {keep} tokens"
        return [f"{first}, ours keeps exactly {len(kept)}"]
    loop_ms, ours_ms = measure(loop, ours)
    medians = statistics.median(loop_ms), statistics.median(ours_ms)
    equal, equal_float32 = (int(torch.isin(tokens, exact).sum()) for tokens in (kept, published))
    lines = [
        f"published loop {medians[0]:.2f} ms, ours {medians[1]:.2f} ms, ratio "
        f"{medians[0] / medians[1]:.1f}, {equal} of {keep} tokens equal to the float64 loop "
        f"(the loop in float32: {equal_float32})",
        f"  float32 features {list(features.shape)} on the CPU, 1 thread, median of {_RUNS} runs "
        f"after warm-up (published {min(loop_ms):.2f} to {max(loop_ms):.2f} ms, "
        f"ours {min(ours_ms):.2f} to {max(ours_ms):.2f} ms)",
    ]
    if equal < keep:
        covered = [coverage(_cosines(encoded), tokens) for tokens in (kept, exact)]
        lines.append(
            "  ours rounds features to fixed point, so it decides near-ties differently; "
            f"coverage {covered[0]:.3f} (ours), {covered[1]:.3f} (float64)"
        )
    return lines


def measure(*functions: Callable[[], Any]) -> list[list[float]]:
    """Call the functions in turn; the times of each one in milliseconds, after warm-up."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(_RUNS + 1):
        for function, samples in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            samples.append(1e3 * (time.perf_counter() - start))
    return [samples[1:] for samples in times]


def _cosines(encoded: Encoded) -> Tensor:
    unit = F.normalize(encoded.features[0].double(), dim=-1)
    return unit @ unit.T


def coverage(cosine: Tensor, kept: Tensor) -> float:
    """Mean over all tokens of the largest cosine to a kept token, of `cosine` `[N, N]`."""
    return float(cosine[:, kept].amax(1).mean())


def redundancy(cosine: Tensor, kept: Tensor) -> float:
    """Mean over kept tokens of the largest cosine to another kept token; NaN for one token."""
    if len(kept) < 2:
        return math.nan
    # The largest cosine of a token is that to itself.
    return float(cosine[kept][:, kept].topk(2).values[:, 1].mean())
