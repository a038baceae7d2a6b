"""A second, independent implementation of the operators, written from docs/contract.md alone.

It uses NumPy and plain Python loops and shares no code with the library, so a test that compares
the two bit for bit finds a misreading of the contract in either of them. It is slow on purpose:
each function follows the wording of the contract step by step and does not validate its arguments.
The selection functions take float32 arrays; the attention functions compute in float64.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

FIXED_POINT_MAX = 16256


# Selection: order, similarity, and the two ways of removing duplicates


def order_key(bits: int) -> int:
    """Map the 32 bits of a float32 to an integer: a larger score has a larger key.

    Integers, because a float comparison treats NaN as unordered and may flush denormals.
    """
    magnitude = bits & 0x7FFFFFFF
    if magnitude > 0x7F800000:
        return -0x80000000  # NaN of either sign: below -inf, whose key is -0x7F800000
    if bits & 0x80000000:
        return -magnitude  # -0.0 becomes 0, the key of +0.0
    return magnitude


def order(scores: Array) -> list[int]:
    """Token indices by score descending; ties by smaller index; NaN last."""
    scores = np.ascontiguousarray(scores, dtype=np.float32)
    keys = [order_key(bits) for bits in scores.view(np.uint32).tolist()]
    return sorted(range(len(keys)), key=lambda i: (-keys[i], i))


def fixed_point(features: Array) -> NDArray[np.int64]:
    """Quantise each row of float32 [N, C] to integers in [-16256, 16256]."""
    features = np.asarray(features, dtype=np.float32)
    q = np.zeros(features.shape, dtype=np.int64)
    for i in range(features.shape[0]):
        x = features[i]
        if not np.isfinite(x).all():
            continue
        m = np.abs(x).max()
        if m < np.float32(1e-30):
            continue
        s = np.float32(FIXED_POINT_MAX) / m
        product = x * s
        # A float64 here would be more exact than the contract, and so differ from it.
        assert m.dtype == s.dtype == product.dtype == np.float32
        q[i] = np.trunc(product).astype(np.int64)
    return q


def similarity(features: Array) -> NDArray[np.float32]:
    """Fixed-point cosine of every pair of rows of float32 [N, C], as float32 [N, N]."""
    q = fixed_point(features)
    gram = q @ q.T  # int64, so exact in any order of summation
    assert gram.dtype == np.int64
    n = q.shape[0]
    r = np.zeros(n, dtype=np.float32)
    for i in range(n):
        if gram[i, i] != 0:
            g = np.float32(gram[i, i])
            root = np.sqrt(g)
            assert root.dtype == np.float32
            r[i] = np.float32(1) / root
    scale = r[:, None] * r[None, :]
    sim = gram.astype(np.float32) * scale
    assert scale.dtype == sim.dtype == np.float32
    return sim


def remove_bipartite(residual: list[int], target: int, sim: Array, step: int) -> list[int]:
    """The published rule: split even/odd, drop the most similar of the even half, repeat."""
    while len(residual) > target:
        count = len(residual)
        r = min(step, count - target, (count + 1) // 2)
        a = residual[0::2]
        b = residual[1::2]
        d = sim[np.ix_(a, b)].max(axis=1).tolist()
        by_similarity = sorted(range(len(a)), key=lambda position: (-d[position], position))
        residual = [a[position] for position in by_similarity[r:]] + b
    return residual


def remove_pairwise(residual: list[int], target: int, sim: Array) -> list[int]:
    """Walk all pairs once, most similar first; drop the less important token of each pair that
    still has both tokens."""
    rank = {token: position for position, token in enumerate(residual)}
    tokens = sorted(residual)
    rows = sim.tolist()
    pairs = []
    for position, i in enumerate(tokens):
        row = rows[i]
        for j in tokens[position + 1 :]:
            pairs.append((-row[j], i, j))
    pairs.sort()
    remaining = set(residual)
    for _, i, j in pairs:
        if len(remaining) <= target:
            break
        if i in remaining and j in remaining:
            remaining.remove(i if rank[i] > rank[j] else j)
    return [token for token in residual if token in remaining]


def select_one(
    features: Array,
    scores: Array,
    keep: int,
    important_ratio: float,
    step: int,
    matching: str,
) -> list[int]:
    """The rule of `select` for one image: features [N, C], scores [N]."""
    if matching not in ("bipartite", "pairwise"):
        raise ValueError(f"unknown matching {matching!r}")
    t_imp = int(keep * important_ratio)
    t_div = keep - t_imp
    ordered = order(scores)
    important = ordered[:t_imp]
    residual = ordered[t_imp:]
    if t_div == 0:
        return sorted(important)  # features are not read, so they may hold any values
    if len(residual) > t_div:
        sim = similarity(features)
        if matching == "bipartite":
            residual = remove_bipartite(residual, t_div, sim, step)
        else:
            residual = remove_pairwise(residual, t_div, sim)
    kept = sorted(important + residual)
    assert len(kept) == keep
    return kept


def select(
    features: Array,
    scores: Array,
    keep: int,
    important_ratio: float = 0.5,
    step: int = 8,
    matching: str = "bipartite",
) -> NDArray[np.int64]:
    """Kept token indices [B, keep], each row ascending."""
    batch = features.shape[0]
    out = np.zeros((batch, keep), dtype=np.int64)
    for b in range(batch):
        out[b] = select_one(features[b], scores[b], keep, important_ratio, step, matching)
    return out


def prune(
    features: Array,
    scores: Array,
    keep: int,
    important_ratio: float = 0.5,
    step: int = 8,
    matching: str = "bipartite",
) -> tuple[Array, NDArray[np.int64]]:
    """The kept rows [B, keep, C] and their indices [B, keep]."""
    indices = select(features, scores, keep, important_ratio, step, matching)
    kept = np.zeros((features.shape[0], keep, features.shape[2]), dtype=features.dtype)
    for b in range(features.shape[0]):
        for t in range(keep):
            kept[b, t] = features[b, indices[b, t]]
    return kept, indices


def select_varlen(
    features: Array,
    scores: Array,
    cu_seqlens: Array,
    cu_keep: Array,
    max_seqlen: int,
    total_keep: int,
    important_ratio: float = 0.5,
    step: int = 8,
    matching: str = "bipartite",
) -> NDArray[np.int64]:
    """Kept positions [total_keep] in the packed sequence; elements past cu_keep[-1] are 0.

    The result does not depend on `max_seqlen`: a kernel uses it to size its scratch.
    """
    starts = [int(x) for x in cu_seqlens]
    outs = [int(x) for x in cu_keep]
    out = np.zeros(total_keep, dtype=np.int64)
    for i in range(len(starts) - 1):
        begin, end = starts[i], starts[i + 1]
        keep = outs[i + 1] - outs[i]
        chosen = select_one(
            features[begin:end], scores[begin:end], keep, important_ratio, step, matching
        )
        for t, token in enumerate(chosen):
            out[outs[i] + t] = begin + token
    return out


def select_topk(scores: Array, keep: int) -> NDArray[np.int64]:
    """The `keep` best tokens of each image [B, keep], ascending."""
    out = np.zeros((scores.shape[0], keep), dtype=np.int64)
    for b in range(scores.shape[0]):
        out[b] = sorted(order(scores[b])[:keep])
    return out


def select_rows(scores: Array, width: int, rows: int) -> NDArray[np.int64]:
    """All tokens of the `rows` best grid rows of each image [B, rows * width], ascending."""
    batch, n = scores.shape
    assert n % width == 0
    out = np.zeros((batch, rows * width), dtype=np.int64)
    for b in range(batch):
        sums = np.zeros(n // width, dtype=np.float32)
        for y in range(n // width):
            total = np.float32(scores[b, y * width])
            # inf - inf and an overflow to inf are valid sums; step 1 of `select` orders them.
            with np.errstate(invalid="ignore", over="ignore"):
                for x in range(1, width):
                    total = total + np.float32(scores[b, y * width + x])
            assert total.dtype == np.float32
            sums[y] = total
        best = sorted(order(sums)[:rows])
        out[b] = [y * width + x for y in best for x in range(width)]
    return out


# Scores from attention, in float64


def probabilities(q: Array, k: Array, scale: float | None, lse: Array | None = None) -> Array:
    """Softmax over all keys of one head: q [Sq, D], k [S, D] -> float64 [Sq, S].

    A given `lse` [Sq] replaces the computed log-sum-exp.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    with np.errstate(all="ignore"):
        logits = (q.astype(np.float64) @ k.astype(np.float64).T) * scale
        if lse is not None:
            return np.exp(logits - lse.astype(np.float64)[:, None])
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        p: Array = weights / weights.sum(axis=1, keepdims=True)
        return p


def cls_attention(
    q: Array, k: Array, v: Array, scale: float | None = None, num_prefix: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Attention output [B, S, H, D] and the scores [B, N] of its CLS row."""
    batch, _, heads, _ = q.shape
    out = np.zeros(q.shape, dtype=np.float64)
    with np.errstate(all="ignore"):
        for b in range(batch):
            for h in range(heads):
                p = probabilities(q[b, :, h], k[b, :, h], scale)
                out[b, :, h] = p @ v[b, :, h].astype(np.float64)
    return out, cls_scores(q, k, scale, num_prefix)


def cls_scores(
    q: Array, k: Array, scale: float | None = None, num_prefix: int = 1
) -> NDArray[np.float64]:
    """The attention that query row 0 pays to each patch token, mean over heads: [B, N]."""
    batch, _, heads, _ = q.shape
    seq = k.shape[1]
    scores: Array = np.zeros((batch, seq - num_prefix), dtype=np.float64)
    for b in range(batch):
        for h in range(heads):
            p = probabilities(q[b, 0:1, h], k[b, :, h], scale)
            scores[b] += p[0, num_prefix:]  # not renormalised: a row may sum to less than 1
    scores /= heads
    return scores


def received_one(q: Array, k: Array, scale: float | None, lse: Array | None) -> Array:
    """Mean over heads and query rows of the attention that each key gets: [S, H, D] -> [S]."""
    seq, heads, _ = q.shape
    total = np.zeros(seq, dtype=np.float64)
    for h in range(heads):
        p = probabilities(q[:, h], k[:, h], scale, None if lse is None else lse[h])
        total += p.sum(axis=0)
    total /= heads * seq
    return total


def received_scores(
    q: Array,
    k: Array,
    scale: float | None = None,
    num_prefix: int = 0,
    lse: Array | None = None,
) -> NDArray[np.float64]:
    """Mean attention each patch token receives from all S query rows, prefix rows too: [B, N]."""
    batch, seq = q.shape[:2]
    scores = np.zeros((batch, seq - num_prefix), dtype=np.float64)
    for b in range(batch):
        one = received_one(q[b], k[b], scale, None if lse is None else lse[b])
        scores[b] = one[num_prefix:]
    return scores


def received_scores_varlen(
    q: Array,
    k: Array,
    cu_seqlens: Array,
    max_seqlen: int,
    scale: float | None = None,
    lse: Array | None = None,
) -> NDArray[np.float64]:
    """`received_scores` of packed images [total, H, D] -> [total]; lse is [H, total].

    Tokens that belong to no image get 0.
    """
    scores = np.zeros(q.shape[0], dtype=np.float64)
    starts = [int(x) for x in cu_seqlens]
    for begin, end in itertools.pairwise(starts):
        if begin == end:
            continue
        part = None if lse is None else lse[:, begin:end]
        scores[begin:end] = received_one(q[begin:end], k[begin:end], scale, part)
    return scores
