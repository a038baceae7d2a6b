"""Sample inputs, bounds and comparisons, shared by tests, benchmarks and VISPRUNER_KERNELS_CHECK=1.

All inputs are drawn on the CPU from a seed, so a case is the same on every machine.
"""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FEATURE_KINDS = ("normal", "clustered", "duplicates", "constant", "outliers", "broken")
SCORE_KINDS = ("softmax", "uniform", "ties", "constant", "broken")

# Largest error of an attention output relative to the largest |v|, on every backend.
OUT_TOLERANCE = {torch.float32: 4e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def sample_features(
    kind: str, batch: int, tokens: int, channels: int, generator: torch.Generator
) -> Tensor:
    """float32 [batch, tokens, channels].

    "clustered" resembles an encoder's output (a few centres and noise), "outliers" has channels
    with far larger values than the others, "constant" has the largest sums of products, "broken"
    has zero rows, NaN, inf and magnitudes at both ends of the range.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def some(share: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) < share

    shape = (batch, tokens, channels)
    if kind == "normal":
        return normal(*shape)
    if kind == "clustered":
        centres = normal(batch, max(1, tokens // 12), channels)
        pick = torch.randint(0, centres.shape[1], (batch, tokens), generator=generator)
        return centres.gather(1, pick[:, :, None].expand(shape)) + 0.4 * normal(*shape)
    if kind == "duplicates":
        few = normal(batch, max(1, tokens // 3), channels)
        pick = torch.randint(0, few.shape[1], (batch, tokens), generator=generator)
        return few.gather(1, pick[:, :, None].expand(shape))
    if kind == "constant":
        return torch.where(some(0.02, batch, tokens, 1), -1.0, 1.0).expand(shape).clone()
    if kind == "outliers":
        return normal(*shape) * (1.0 + 200.0 * some(0.02, channels))
    x = normal(*shape)
    x[some(0.1, batch, tokens)] = 0.0
    x[some(0.02, batch, tokens, channels)] = torch.nan
    x[some(0.02, batch, tokens, channels)] = torch.inf
    x[some(0.1, batch, tokens)] *= 1e-31
    x[some(0.1, batch, tokens)] *= 1e30
    return x


def sample_scores(kind: str, batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """float32 [batch, tokens]; "softmax" resembles a CLS row, "broken" has NaN, inf and -0.0."""
    if kind == "softmax":
        return (2.0 * torch.randn(batch, tokens, generator=generator)).softmax(-1)
    if kind == "constant":
        return torch.zeros(batch, tokens)
    x = torch.rand(batch, tokens, generator=generator) - 0.3
    if kind == "ties":
        return (x * 6.0).round() / 6.0
    if kind == "broken":
        for value in (torch.nan, torch.inf, -torch.inf, 0.0, -0.0):
            x[torch.rand(batch, tokens, generator=generator) < 0.15] = value
    return x


def strided(x: Tensor, rng: random.Random) -> Tensor:
    """The same values as a view with other strides; the last stride stays 1."""
    layout = rng.choice(["contiguous", "prefix", "packed", "swapped"])
    if layout == "prefix":  # hidden[:, 1:]
        return torch.cat([torch.full_like(x[:, :1], torch.nan), x], 1)[:, 1:]
    if layout == "packed":  # a slice of channels
        return torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]]
    if layout == "swapped":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return x


class Case(NamedTuple):
    """Arguments of `select`."""

    features: Tensor
    scores: Tensor
    keep: int
    important_ratio: float
    step: int
    matching: str


def random_case(seed: int, max_tokens: int = 64, matching: str | None = None) -> Case:
    """A random call of `select`: kinds, dtypes, layouts, odd sizes and every setting vary."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch = rng.choice([0, 1, 1, 2, 3])
    tokens = rng.choice([1, 2, 3, rng.randint(1, max_tokens), rng.randint(1, max_tokens)])
    channels = rng.choice([1, 2, 3, 16, 31, 64, 100])
    features = sample_features(rng.choice(FEATURE_KINDS), batch, tokens, channels, generator)
    scores = sample_scores(rng.choice(SCORE_KINDS), batch, tokens, generator)
    return Case(
        strided(features.to(rng.choice(DTYPES)), rng),
        strided(scores.to(rng.choice(DTYPES))[:, :, None], rng)[:, :, 0],
        rng.choice([1, tokens, rng.randint(1, tokens), rng.randint(1, tokens)]),
        rng.choice([0.0, 0.25, 0.3, 0.5, 0.5, 0.75, rng.random(), 1.0]),
        rng.choice([1, 2, 3, 8, 8, 8, 2**40]),
        matching or rng.choice(["bipartite", "pairwise"]),
    )


def hubs(tokens: int) -> Tensor:
    """float32 [1, tokens, tokens]: the first token is the nearest of most others; without it the
    second one is, and so on.

    So a round of the pairwise rule removes one or two tokens, and orphans most of the others.
    """
    # The similarity of a pair depends on its first token. A larger range is no Gram matrix.
    falling = 0.3 + torch.linspace(2 / tokens, 0.0, tokens, dtype=torch.float64)
    index = torch.arange(tokens)
    gram = falling[torch.minimum(index[:, None], index)].fill_diagonal_(1.0)
    return torch.linalg.cholesky(gram).float().contiguous()[None]


def hub_cases(tokens: int) -> list[Case]:
    """Calls with the pairwise rule that would take many rounds: equal tokens; groups of equal
    tokens, alone and among tokens as similar to each other as to some of them; hubs and an arc,
    each in order and shuffled."""
    generator = torch.Generator().manual_seed(11)
    shuffled = torch.randperm(tokens, generator=generator)
    angle = torch.linspace(0.1, 1.5, tokens)[None, :, None]
    star, arc = hubs(tokens), torch.cat([angle.cos(), angle.sin()], 2)
    directions = torch.randn(max(1, tokens // 20), 16, generator=generator)
    groups = directions[torch.randint(0, len(directions), (tokens,), generator=generator)][None]
    # Every similarity is one of a few values.
    corners = torch.randint(0, 2, (1, tokens, 5), generator=generator).float()
    kinds = (
        torch.ones(1, tokens, 4),
        groups,
        corners,
        star,
        star[:, shuffled],
        arc,
        arc[:, shuffled],
    )
    scores = torch.arange(tokens).float()[None], torch.rand(1, tokens, generator=generator)
    return [
        Case(features, score, tokens // 10, 0.0, 8, "pairwise")
        for features in kinds
        for score in scores
    ]


class PackedCase(NamedTuple):
    """Arguments of `select_varlen`."""

    features: Tensor
    scores: Tensor
    cu_seqlens: Tensor
    cu_keep: Tensor
    max_seqlen: int
    total_keep: int
    important_ratio: float
    step: int
    matching: str


def random_packed_case(seed: int, max_tokens: int = 70, max_images: int = 6) -> PackedCase:
    """Like `random_case`, for packed images of at most `max_tokens` tokens.

    Images may have no tokens, or keep all or none of them. Some tokens may belong to no image, and
    some output elements too.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    some = (rng.randint(1, max_tokens) for _ in range(2 * max_images))
    images = rng.randint(0, max_images)
    lengths = [rng.choice([0, 1, 2, next(some), next(some)]) for _ in range(images)]
    keeps = [rng.choice([0, min(n, 1), n, rng.randint(0, n), rng.randint(0, n)]) for n in lengths]
    total = sum(lengths) + rng.choice([0, 0, 5])
    channels = rng.choice([1, 3, 16, 24, 33, 70])
    features = sample_features(rng.choice(FEATURE_KINDS), 1, max(total, 1), channels, generator)
    scores = sample_scores(rng.choice(SCORE_KINDS), 1, max(total, 1), generator)
    return PackedCase(
        features[0, :total].to(rng.choice(DTYPES)),
        scores[0, :total].to(rng.choice(DTYPES)),
        sample_offsets(lengths),
        sample_offsets(keeps),
        max(lengths, default=0) + rng.choice([0, 0, 3, 99]),
        min(total, sum(keeps) + rng.choice([0, 0, 1, 2])),
        rng.choice([0.0, 0.3, 0.5, 0.9, rng.random(), 1.0]),
        rng.choice([1, 3, 8]),
        rng.choice(["bipartite", "pairwise"]),
    )


def sample_qkv(
    batch: int, sequence: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [batch, sequence, heads, head_dim]: slices of a packed qkv; the CLS query is doubled,
    so that its softmax has a peak."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, sequence, 3, heads, head_dim, generator=generator)
    qkv[:, 0, 0] *= 2.0
    q, k, v = qkv.to(dtype).unbind(2)
    return q, k, v


def sample_offsets(lengths: list[int]) -> Tensor:
    """int32 offsets of packed sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def max_logit(q: Tensor, k: Tensor, scale: float | None) -> float:
    """The largest |logit| of any query and key of the same image and head."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.numel() == 0:
        return 0.0
    logits = q.double().movedim(-3, -2) @ k.double().movedim(-3, -2).mT
    return float(logits.abs().max()) * abs(scale)


def scores_bound(q: Tensor, k: Tensor, scale: float | None) -> float:
    """Largest error of scores if the products of a logit do not cancel (docs/contract.md,
    section 4)."""
    return max(1e-6, 2**-22 * max_logit(q, k, scale))


def rounding_bound(q: Tensor, k: Tensor, scale: float | None) -> float:
    """`r` of docs/contract.md, section 4: the largest relative change of an attention weight by
    rounding; infinity if a weight may overflow float32."""
    logit_error = (q.shape[-1] + 8) * 2**-24 * max_logit(q.abs(), k.abs(), scale)
    return math.expm1(2 * logit_error) if logit_error < 44 else math.inf


def assert_scores_match(
    got: Tensor, exact: Tensor, q: Tensor, k: Tensor, scale: float | None
) -> None:
    """Assert the bound of docs/contract.md, section 4, that does not depend on eager PyTorch."""
    # Scores exceed 1 only if lse is not that of q and k.
    largest = float(exact.nan_to_num(0.0).abs().max()) if exact.numel() else 0.0
    rounding = exact.double().abs() * rounding_bound(q, k, scale)
    # 0 * infinity is NaN.
    rounding = rounding.nan_to_num(nan=torch.inf, posinf=torch.inf)
    assert_close(got, exact, rounding.clamp(min=scores_bound(q, k, scale) * max(1.0, largest)))


def _require(condition: bool, message: str) -> None:
    # No assert statement: VISPRUNER_KERNELS_CHECK=1 must also work under python -O.
    if not condition:
        raise AssertionError(message)


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    """Assert equal bits, NaN included, and equal shape, dtype, device and strides."""
    _require(got.dtype == expected.dtype, f"dtype {got.dtype}, expected {expected.dtype}")
    _require(got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}")
    _require(got.device == expected.device, f"device {got.device}, expected {expected.device}")
    _require(got.stride() == expected.stride(), f"{got.stride()}, expected {expected.stride()}")
    if got.is_floating_point():
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
        got, expected = got.view(integer), expected.view(integer)
    differ = (got != expected).nonzero()
    _require(len(differ) == 0, f"{len(differ)} elements differ, the first at {differ[:1].tolist()}")


def assert_close(got: Tensor, expected: Tensor, bound: float | Tensor) -> None:
    """Assert that every element is within its bound, and NaN exactly where `expected` is.

    `bound` is one number or one per element.
    """
    _require(got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}")
    _require(torch.equal(got.isnan(), expected.isnan()), "NaN in other places")
    error = (got.double() - expected.double()).abs().nan_to_num(0.0).flatten()
    if error.numel():
        bounds = torch.as_tensor(bound, dtype=torch.float64, device=error.device).nan_to_num(0.0)
        bounds = bounds.expand(got.shape).flatten()
        worst = int((error - bounds).argmax())
        _require(
            bool(error[worst] <= bounds[worst]),
            f"error {error[worst]:.3g}, expected at most {bounds[worst]:.3g}",
        )


def assert_matches(
    op: str, got: Any, expected: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Assert that an operator's answer matches the reference's: selections to the bit, scores and
    outputs within their bounds."""
    if op in ("select", "select_varlen", "select_topk", "select_rows"):
        assert_same_bits(got, expected)
    elif op == "prune":
        for one, other in zip(got, expected, strict=True):
            assert_same_bits(one, other)
    else:
        q, k = args[:2]
        place = {"cls_attention": 3, "received_scores_varlen": 4}.get(op, 2)
        scale = args[place] if len(args) > place else kwargs.get("scale")
        if op == "cls_attention":
            largest = float(args[2].abs().max()) if args[2].numel() else 0.0
            tolerance = max(OUT_TOLERANCE[q.dtype], rounding_bound(q, k, scale))
            assert_close(got[0], expected[0], tolerance * largest)
            got, expected = got[1], expected[1]
        assert_scores_match(got, expected, q, k, scale)
