"""The reference: every operator in plain PyTorch, step by step as in docs/contract.md.

It runs on any device and owns an operator on devices without kernels. It computes similarities and
scores one image at a time, so that the batch changes no bit of them and scratch stays small.
`attention` computes the whole batch in one call. `_backends` has checked the arguments. Only the
varlen operators synchronise on a GPU: they copy their offsets to the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from vispruner_kernels._checks import check_offsets

# A token has similarity 0 to all others if its largest magnitude is below this or not finite.
MIN_MAGNITUDE = 1e-30
# 127 * 128. Up to this magnitude both halves of a value, q >> 7 and q & 127, are at most 127 in
# magnitude.
FIXED_POINT_MAX = 16256.0
# Query rows per block of attention, so that no S x S matrix is stored.
BLOCK_ROWS = 64
# With fewer tokens PyTorch's fused CPU kernel returns zeros for a query row of NaN.
MIN_FUSED_TOKENS = 16


def order(scores: Tensor) -> Tensor:
    """Token indices by score [N] descending; ties by index; NaN last; -0.0 equals 0.0."""
    bits = scores.float().view(torch.int32)
    # Negative floats have descending bits: flip them. 0x80000000 is -0.0.
    keys = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    keys = torch.where(bits == -(2**31), 0, keys)
    keys = torch.where((bits & 0x7FFFFFFF) > 0x7F800000, -(2**31), keys)
    return torch.sort(keys, descending=True, stable=True).indices


def fixed_point(features: Tensor) -> Tensor:
    """Features [N, C] scaled per token to integers in [-16256, 16256], as int64."""
    x = features.float()
    magnitude = x.abs().amax(-1, keepdim=True)
    usable = torch.isfinite(magnitude) & (magnitude >= MIN_MAGNITUDE)
    # Divide tensor by tensor: PyTorch computes `scalar / tensor` as a reciprocal and a product.
    scale = torch.full_like(magnitude, FIXED_POINT_MAX) / torch.where(usable, magnitude, 1.0)
    return torch.where(usable, torch.trunc(x * scale), 0.0).long()


def similarity(features: Tensor) -> Tensor:
    """Fixed-point cosine similarity [N, N] float32 of features [N, C], exact to the bit."""
    q = fixed_point(features).double()
    # All sums are integers below 2**53, so the product is exact in any order of summation.
    gram = q @ q.T
    g = gram.diagonal().float()
    # torch.sqrt of float32 is not correctly rounded on a CPU; through float64 it is.
    root = g.double().sqrt().float()
    r = torch.where(g > 0, torch.ones_like(g) / torch.where(g > 0, root, 1.0), 0.0)
    return gram.float() * (r[:, None] * r[None, :])


def bipartite(sim: Tensor, residual: Tensor, keep: int, step: int) -> Tensor:
    """Drop up to `step` tokens at even positions per pass until `keep` of `residual` remain."""
    while len(residual) > keep:
        a, b = residual[0::2], residual[1::2]
        n_drop = min(step, len(residual) - keep, len(a))
        nearest = sim[a][:, b].amax(-1)
        by_similarity = torch.sort(nearest, descending=True, stable=True).indices
        residual = torch.cat([a[by_similarity[n_drop:]], b])
    return residual


def pairwise(sim: Tensor, residual: Tensor, keep: int) -> Tensor:
    """Drop the less important token of the most similar remaining pair until `keep` remain.

    In rounds: a round takes every pair that is the best pair of both its tokens, and removes the
    less important token of each.
    """
    tokens, rank = torch.sort(residual)  # rank: a token's position in the order by score
    n = len(tokens)
    own = torch.arange(n, device=sim.device)
    sim = sim[tokens][:, tokens].clone()
    sim.fill_diagonal_(-torch.inf)
    remains = torch.ones(n, dtype=torch.bool, device=sim.device)
    # The pair that removed a token: similarity, smaller index, larger index.
    pair_sim = torch.full_like(sim[0], -torch.inf)
    pair_low, pair_high = own.clone(), own.clone()
    # Every round removes at least one token. Leaving early reads the data: no cost on a CPU, a
    # synchronisation elsewhere.
    for _ in range(n - 1):
        if sim.device.type == "cpu" and remains.sum() == 1:
            break
        remaining_sim = torch.where(remains[:, None] & remains[None, :], sim, -torch.inf)
        # argmax gives the first maximum: of equally similar pairs, that with the smaller partner.
        best_sim, best = remaining_sim.amax(-1), remaining_sim.argmax(-1)
        mutual = (best[best] == own) & (best_sim > -torch.inf)
        removed = mutual & (rank > rank[best])
        pair_sim = torch.where(removed, best_sim, pair_sim)
        pair_low = torch.where(removed, torch.minimum(own, best), pair_low)
        pair_high = torch.where(removed, torch.maximum(own, best), pair_high)
        remains = remains & ~removed
    removals = torch.sort(pair_high, stable=True).indices
    removals = removals[torch.sort(pair_low[removals], stable=True).indices]
    removals = removals[torch.sort(pair_sim[removals], descending=True, stable=True).indices]
    return tokens[removals[n - keep :]]


def _select(
    features: Tensor, scores: Tensor, keep: int, important_ratio: float, step: int, matching: str
) -> Tensor:
    """`select` of one image: features [N, C], scores [N] -> [keep]."""
    by_score = order(scores)
    important, residual = by_score.tensor_split([int(keep * important_ratio)])
    diverse = keep - len(important)
    if diverse == 0:
        residual = residual[:0]
    elif len(residual) > diverse:
        sim = similarity(features)
        if matching == "bipartite":
            residual = bipartite(sim, residual, diverse, step)
        else:
            residual = pairwise(sim, residual, diverse)
    return torch.sort(torch.cat([important, residual])).values


def _stack(rows: Iterable[Tensor], like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    rows = list(rows)
    return torch.stack(rows) if rows else like.new_empty((0, width), dtype=dtype)


def select(
    features: Tensor,
    scores: Tensor,
    keep: int,
    important_ratio: float = 0.5,
    step: int = 8,
    matching: str = "bipartite",
) -> Tensor:
    rows = (
        _select(x, s, keep, important_ratio, step, matching)
        for x, s in zip(features, scores, strict=True)
    )
    return _stack(rows, scores, keep, torch.int64)


def prune(
    features: Tensor,
    scores: Tensor,
    keep: int,
    important_ratio: float = 0.5,
    step: int = 8,
    matching: str = "bipartite",
) -> tuple[Tensor, Tensor]:
    indices = select(features, scores, keep, important_ratio, step, matching)
    kept = features.gather(1, indices[:, :, None].expand(-1, -1, features.shape[2]))
    return kept, indices


def select_varlen(
    features: Tensor,
    scores: Tensor,
    cu_seqlens: Tensor,
    cu_keep: Tensor,
    max_seqlen: int,
    total_keep: int,
    important_ratio: float = 0.5,
    step: int = 8,
    matching: str = "bipartite",
) -> Tensor:
    seq, keeps = check_offsets(
        "select_varlen", features.shape[0], cu_seqlens, max_seqlen, cu_keep, total_keep
    )
    out = torch.zeros(total_keep, dtype=torch.int64, device=features.device)
    for i in range(len(seq) - 1):
        image, place = slice(seq[i], seq[i + 1]), slice(keeps[i], keeps[i + 1])
        keep = place.stop - place.start
        if keep > 0:
            out[place] = image.start + _select(
                features[image], scores[image], keep, important_ratio, step, matching
            )
    return out


def select_topk(scores: Tensor, keep: int) -> Tensor:
    rows = (torch.sort(order(s)[:keep]).values for s in scores)
    return _stack(rows, scores, keep, torch.int64)


def select_rows(scores: Tensor, width: int, rows: int) -> Tensor:
    grid = scores.float().unflatten(1, (-1, width))
    total = grid[:, :, 0]
    for column in range(1, width):  # left to right; `sum` adds in another order
        total = total + grid[:, :, column]
    columns = torch.arange(width, device=scores.device)
    kept = select_topk(total, rows)
    return (kept[:, :, None] * width + columns).flatten(1)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def cls_scores(q: Tensor, k: Tensor, scale: float | None = None, num_prefix: int = 1) -> Tensor:
    def image(q: Tensor, k: Tensor) -> Tensor:  # [S, H, D] -> [N]
        logits = (q[0].double() * k.double()).sum(-1) * _scale(q, scale)  # [S, H]
        return logits.softmax(0).mean(-1)[num_prefix:].float()

    rows = (image(*qk) for qk in zip(q, k, strict=True))
    return _stack(rows, q, q.shape[1] - num_prefix, torch.float32)


def cls_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, num_prefix: int = 1
) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, scale), cls_scores(q, k, scale, num_prefix)


def _float32_is_reduced() -> bool:
    """Whether PyTorch may multiply float32 matrices on a CPU in bfloat16 or TF32."""
    # PyTorch refuses to read the older setting if the newer one differs from it.
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    setting = matmul.fp32_precision if matmul else torch.get_float32_matmul_precision()
    return setting not in ("none", "ieee", "highest")


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Attention output [B, S, H, D] by PyTorch's own kernels."""
    if q.numel() == 0:
        return q.new_empty(q.shape)
    if q.shape[-1] == 1:
        # With D = 1 the last stride may be anything, but PyTorch's fused kernels need 1.
        q, k, v = (x.flatten().view(x.shape) for x in (q, k, v))
    q_t, k_t, v_t = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    # An operator computes in the dtype of its arguments, also under autocast.
    with torch.autocast(q.device.type, enabled=False):
        if q.shape[1] < MIN_FUSED_TOKENS:
            # Contiguous, because a product may round differently with other strides.
            q_t, k_t, v_t = (x.double().contiguous() for x in (q_t, k_t, v_t))
            weights = (q_t @ k_t.mT * _scale(q, scale)).softmax(-1)
            out = (weights @ v_t).to(q.dtype)
        else:
            if q.device.type == "cpu" and q.dtype is torch.float32 and _float32_is_reduced():
                q_t, k_t, v_t = q_t.double(), k_t.double(), v_t.double()
            out = torch.nn.functional.scaled_dot_product_attention(
                q_t, k_t, v_t, scale=_scale(q, scale)
            ).to(q.dtype)
    # Through a flat tensor, so that dimensions of size 1 get the strides of a contiguous tensor.
    return out.transpose(1, 2).flatten().view(q.shape)


def _received(q: Tensor, k: Tensor, scale: float | None, lse: Tensor | None) -> Tensor:
    """Attention that each key of one image receives: q, k [S, H, D], lse [H, S] -> [S] float64."""
    q, k = q.double().movedim(1, 0), k.double().movedim(1, 0)  # [H, S, D]
    total = torch.zeros(k.shape[1], dtype=torch.float64, device=k.device)
    for start in range(0, q.shape[1], BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        logits = q[:, rows] @ k.mT * _scale(q, scale)  # [H, BLOCK_ROWS, S]
        if lse is None:
            weights = logits.softmax(-1)
        else:
            weights = (logits - lse[:, rows, None].double()).exp()
        total += weights.sum((0, 1))
    return total / (q.shape[0] * q.shape[1])


def received_scores(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    num_prefix: int = 0,
    lse: Tensor | None = None,
) -> Tensor:
    rows = (
        _received(q[i], k[i], scale, None if lse is None else lse[i])[num_prefix:].float()
        for i in range(q.shape[0])
    )
    return _stack(rows, q, q.shape[1] - num_prefix, torch.float32)


def received_scores_varlen(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    seq, _ = check_offsets("received_scores_varlen", q.shape[0], cu_seqlens, max_seqlen)
    out = torch.zeros(q.shape[0], dtype=torch.float32, device=q.device)
    for start, stop in itertools.pairwise(seq):
        if stop > start:
            image = slice(start, stop)
            part = None if lse is None else lse[:, image]
            out[image] = _received(q[image], k[image], scale, part).float()
    return out
