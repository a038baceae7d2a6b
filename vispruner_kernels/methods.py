"""VisPruner, FasterVLM, FoPru and a random control: their scores and the tokens that they keep.

    method = VisPruner(keep=64)
    scores = method.attention_scores(q, k)         # q, k of the layer whose output is `features`
    indices = method.select(features, scores)      # int64 [B, 64]

A budget is a count of tokens (an int) or a fraction of N (a float in (0, 1]): 1 is one token, 1.0
is all. VisPruner and FasterVLM rank by the attention of the [CLS] token. For an encoder without
one, their authors advise the attention that tokens receive: `VisPruner(64, scores="received")`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, groupby
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vispruner_kernels import ops
from vispruner_kernels._checks import check_float, check_int, check_rule, shown

Needs = Literal["cls", "received"]
# important_ratio, step and matching of `ops.select`.
Rule = tuple[float, int, str]
_TOPK: Rule = (1.0, 8, "bipartite")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        expected = " or ".join(map(repr, choices))
        raise ValueError(f"{name} is {shown(value)}, expected {expected}")


def _offsets(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(device, non_blocking=True)


@dataclass(frozen=True)
class Method:
    """Base of all methods: a budget and the scores."""

    keep: int | float

    @property
    def needs(self) -> Needs | None:
        """Which attention scores `select` needs; None if it needs none."""
        return None

    def __post_init__(self) -> None:
        keep: Any = self.keep
        if isinstance(keep, Real) and not isinstance(keep, Integral):
            check_float("", "keep", keep)
            self._set(keep=float(keep))
            if not 0.0 < self.keep <= 1.0:
                raise ValueError(f"keep is {shown(keep)}, expected a fraction in (0, 1] or an int")
            return
        if isinstance(keep, bool) or not isinstance(keep, Integral):
            raise TypeError(f"keep is {shown(keep)}, expected an int or a float")
        self._set_int("keep", 1, "at least 1 and below 2**63")

    def _set(self, **values: Any) -> None:
        """Set fields of the frozen instance. Callers convert NumPy's numbers to Python's, so that
        instances compare equal and compilers can trace them."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _set_int(self, name: str, least: int, expected: str = "") -> None:
        value: Any = getattr(self, name)
        number = isinstance(value, Integral) and not isinstance(value, bool)
        if number and not least <= value < 2**63:
            expected = expected or f"{least} <= {name} < 2**63"
            raise ValueError(f"{name} is {shown(value)}, expected {expected}")
        check_int("", name, value)
        self._set(**{name: int(value)})

    def retained_tokens(self, n: int) -> int:
        """Tokens kept of an image of `n` tokens, known without data.

        A fraction is rounded to the nearest whole number, and to 1 instead of 0 (0.1 of 576 is 58).
        """
        keep = max(1, int(n * self.keep + 0.5)) if isinstance(self.keep, float) else int(self.keep)
        if not 1 <= keep <= n:
            raise ValueError(
                f"keep is {keep}, expected 1 <= keep <= {n}, the tokens of the image: use a "
                'fraction, for example keep=0.25, or small="keep" of the integrations'
            )
        return keep

    def attention_scores(
        self, q: Tensor, k: Tensor, scale: float | None = None, num_prefix: int = 1
    ) -> Tensor | None:
        """Scores [B, N] from q, k [B, S, H, D] of the encoder layer that outputs the features.

        `num_prefix` counts the leading tokens that are not patches: 0 for an encoder without CLS.
        """
        if self.needs == "cls":
            return ops.cls_scores(q, k, scale, num_prefix)
        if self.needs == "received":
            return ops.received_scores(q, k, scale, num_prefix)
        return None

    def select(self, features: Tensor, scores: Tensor | None) -> Tensor:
        """Indices int64 [B, retained_tokens(N)], ascending, from features [B, N, C]."""
        raise NotImplementedError

    def select_varlen(
        self,
        features: Tensor,
        scores: Tensor | None,
        lengths: Sequence[int],
        widths: Sequence[int | None] | None = None,
    ) -> Tensor:
        """Positions of the kept tokens in packed features [total, C] with scores [total]: int64,
        ascending.

        Image i is the next `lengths[i]` tokens and keeps the tokens that `select` keeps of it.
        `widths[i]`, if given, is the width of its grid. A `width` of the method takes precedence.
        """
        shapes = [*zip(lengths, widths or [None] * len(lengths), strict=True)]
        rule = self._rule()
        if rule and len(set(lengths)) > 1:
            counts = [self.retained_tokens(n) for n in lengths]
            return ops.select_varlen(
                features,
                self._checked_scores(features[None], None if scores is None else scores[None])[0],
                _offsets(lengths, features.device),
                _offsets(counts, features.device),
                max(lengths),
                sum(counts),
                *rule,
            )
        kept, start = [], 0
        # Consecutive images of one shape are one batch.
        for (n, width), images in groupby(shapes):
            batch = sum(1 for _ in images)
            stop = start + batch * n
            indices = self.on_grid(width).select(
                features[start:stop].unflatten(0, (batch, n)),
                None if scores is None else scores[start:stop].unflatten(0, (batch, n)),
            )
            firsts = torch.arange(start, stop, n, device=indices.device)
            kept.append((indices + firsts[:, None]).flatten())
            start = stop
        return torch.cat(kept)

    def _rule(self) -> Rule | None:
        """The settings of `ops.select` that give this method; None if none do."""
        return None

    def on_grid(self, width: int | None) -> Method:
        """This method for a grid of `width` tokens a row."""
        return self

    def _checked_scores(self, features: Tensor, scores: Tensor | None) -> Tensor:
        """The scores; a ValueError if they are missing or do not match the features."""
        name = type(self).__name__
        if scores is None:
            raise ValueError(
                f"{name}: scores is None, expected [B, N] {self.needs} scores; "
                f"see {name}.attention_scores"
            )
        if scores.shape != features.shape[:2]:
            raise ValueError(
                f"{name}: scores has shape {list(scores.shape)}, expected [B, N] = "
                f"{list(features.shape[:2])} of features; see num_prefix of {name}.attention_scores"
            )
        return scores


@dataclass(frozen=True)
class VisPruner(Method):
    """Keep important tokens by score, then diverse ones by removing duplicates.

    arXiv 2412.01818v2. `important_ratio` is the share of the budget that goes to important tokens.
    `step` is the number of tokens that a pass of the bipartite rule removes. `matching` is the rule
    of duplicate removal: "bipartite" as published, or "pairwise", ours. `scores` is "cls" or
    "received" attention. docs/contract.md, section 2, defines all of it.
    """

    important_ratio: float = 0.5
    step: int = 8
    matching: str = "bipartite"
    scores: Needs = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_float("", "important_ratio", self.important_ratio)
        self._set(important_ratio=float(self.important_ratio))
        self._set_int("step", 1)
        check_rule("VisPruner", self.important_ratio, self.step, self.matching)
        _check_choice("scores", self.scores, get_args(Needs))

    @property
    def needs(self) -> Needs:
        return self.scores

    def _rule(self) -> Rule:
        return self.important_ratio, self.step, self.matching

    def select(self, features: Tensor, scores: Tensor | None) -> Tensor:
        """`ops.select` with this method's budget and rule."""
        keep = self.retained_tokens(features.shape[1])
        return ops.select(features, self._checked_scores(features, scores), keep, *self._rule())


@dataclass(frozen=True)
class FasterVLM(Method):
    """Keep the tokens of the highest scores (arXiv 2412.01818v1)."""

    scores: Needs = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("scores", self.scores, get_args(Needs))

    @property
    def needs(self) -> Needs:
        return self.scores

    def _rule(self) -> Rule:
        return _TOPK

    def select(self, features: Tensor, scores: Tensor | None) -> Tensor:
        """`ops.select_topk` with this method's budget."""
        return ops.select_topk(
            self._checked_scores(features, scores), self.retained_tokens(features.shape[1])
        )


@dataclass(frozen=True)
class FoPru(Method):
    """Keep tokens ("rank") or whole rows of the patch grid ("row") by the attention they receive.

    arXiv 2411.14164; how attention is averaged is our reading of it. `width` is the number of
    tokens in a grid row, by default the side of a square grid. With "row" a count must be a
    multiple of it (48 or 72, not 64, on a grid of 24 x 24); a fraction is rounded to whole rows,
    and to 1 row instead of 0.
    """

    strategy: str = "rank"
    width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("strategy", self.strategy, ("rank", "row"))
        if self.width is not None:
            self._set_int("width", 1)

    @property
    def needs(self) -> Needs:
        return "received"

    def _rule(self) -> Rule | None:
        return _TOPK if self.strategy == "rank" else None

    def on_grid(self, width: int | None) -> Method:
        return self if self.width or self.strategy == "rank" else replace(self, width=width)

    def grid_width(self, n: int) -> int:
        """Tokens in a row of the grid of `n` tokens."""
        width = math.isqrt(n) if self.width is None else self.width
        if n % width or (self.width is None and width * width != n):
            raise ValueError(
                f"width is {self.width}, expected a divisor of the image's {n} tokens"
                + (", which are no square grid" if self.width is None else "")
            )
        return width

    def retained_tokens(self, n: int) -> int:
        """As `Method.retained_tokens`; whole rows with the row strategy."""
        if self.strategy == "rank":
            return super().retained_tokens(n)
        width = self.grid_width(n)
        if isinstance(self.keep, float):
            return max(1, int(n // width * self.keep + 0.5)) * width
        keep = super().retained_tokens(n)
        if keep % width:
            raise ValueError(f"keep is {keep}, expected a multiple of the grid width {width}")
        return keep

    def select(self, features: Tensor, scores: Tensor | None) -> Tensor:
        """`ops.select_topk` or `ops.select_rows` with this method's budget."""
        n = features.shape[1]
        keep = self.retained_tokens(n)
        if self.strategy == "rank":
            return ops.select_topk(self._checked_scores(features, scores), keep)
        width = self.grid_width(n)
        return ops.select_rows(self._checked_scores(features, scores), width, keep // width)


@dataclass(frozen=True)
class Random(Method):
    """A control: keep tokens drawn by a seed.

    All images with N tokens keep the same ones. For a fair control use another `seed` for each
    image, and average over several.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_int("seed", 0)

    def select(self, features: Tensor, scores: Tensor | None = None) -> Tensor:
        """The same indices for the same `seed` and N; features and scores are not read."""
        batch, n = features.shape[:2]
        generator = torch.Generator("cpu").manual_seed(self.seed)
        order = torch.randperm(n, generator=generator, device="cpu")
        kept = order[: self.retained_tokens(n)].sort().values
        return kept.to(features.device, non_blocking=True).expand(batch, -1).contiguous()


METHODS: dict[str, type[Method]] = {
    "vispruner": VisPruner,
    "fastervlm": FasterVLM,
    "fopru": FoPru,
    "random": Random,
}


def by_name(method: str, **options: Any) -> Method:
    """Make a method by its name and its fields: by_name("vispruner", keep=64)."""
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method is {shown(method)}, expected one of {', '.join(METHODS)}")
    names = [field.name for field in fields(METHODS[method])]
    for name in options:
        if name not in names:
            raise ValueError(f"{name} is no option of {method}, expected one of {', '.join(names)}")
    if "keep" not in options:
        raise ValueError("keep is missing: how many tokens of an image, or which fraction of them")
    return METHODS[method](**options)
