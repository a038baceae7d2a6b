"""The public operators: a docstring and one call into ``torch.ops.vispruner``.

Axis letters: B images, N patch tokens of an image, C channels, T tokens kept, S sequence length of
the vision encoder (prefix and patches), H heads, D head dimension. docs/contract.md has the exact
rules. `IMPLEMENTATIONS` in _backends.py leads from an operator to its kernels.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vispruner_kernels._schemas import ARGUMENTS, check_types

_ops = torch.ops.vispruner

# Whether PyTorch's compiler can trace the checks of types: 2.8 cannot, 2.13 can. If it cannot, a
# compiled call raises PyTorch's own error for a wrong type, or none if PyTorch converts it.
TRACES_CHECKS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)

_TYPES: dict[str, tuple[type, ...]] = {
    "Tensor": (Tensor,),
    "int": (int,),
    "float": (float,),
    "str": (str,),
    "Optional[float]": (float, type(None)),
    "Optional[Tensor]": (Tensor, type(None)),
}
# The argument types of nearly every call. One lookup accepts them without a check of each argument.
_USUAL = frozenset(
    types
    for arguments in ARGUMENTS.values()
    for types in itertools.product(*(_TYPES[kind] for _, kind in arguments))
)


# Arguments that are these objects were left out, so their types are right.
_RATIO, _STEP, _MATCHING, _PREFIX = 0.5, 8, "bipartite", 1
# The usual calls, in which no argument has a wrong type, use these and not `_call`, which takes
# more than a microsecond.
_SELECT, _PRUNE = _ops.select.default, _ops.prune.default
_SELECT_TOPK, _CLS_SCORES = _ops.select_topk.default, _ops.cls_scores.default


def _call(operator: Any, *args: Any) -> Any:
    if not TRACES_CHECKS and torch.compiler.is_compiling():
        return operator(*args)
    if tuple(map(type, args)) not in _USUAL:
        check_types(operator._opname, args)
    try:
        return operator(*args)
    except (RuntimeError, ValueError):
        # PyTorch refused an argument, for example an int of 65 bits, or Python could not print it
        # (more than 4300 digits). Raise our error instead.
        check_types(operator._opname, args)
        raise


def select(
    features: Tensor,
    scores: Tensor,
    keep: int,
    important_ratio: float = _RATIO,
    step: int = _STEP,
    matching: str = _MATCHING,
) -> Tensor:
    """Select tokens as VisPruner does: the most important ones, then those that are no duplicates.

    Args:
        features: [B, N, C] float32, float16 or bfloat16; 1 <= N <= 16384, 1 <= C <= 65536; last
            stride 1, any other strides (``hidden[:, 1:]`` is read in place).
        scores: [B, N], any of these dtypes, any strides; higher is more important.
        keep: T, tokens kept per image, 1 <= keep <= N.
        important_ratio: share of ``keep`` that is taken by score, in [0, 1]:
            ``int(keep * important_ratio)`` tokens. 1 is FasterVLM and does not read ``features``;
            0 is duplicate removal alone.
        step: tokens dropped per pass, >= 1; "bipartite" only.
        matching: "bipartite" (as published) or "pairwise" (ours; the selection changes less under
            rounding noise).

    Returns:
        int64 [B, T], contiguous, each row ascending.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, stride, range or device.

    Contract:
        Bit-identical on every backend, device, batch size and thread count. Equal scores: smaller
        index first; NaN scores last; -0.0 == 0.0. Similarity is an exact fixed-point cosine. A
        token has similarity 0 to all others if one of its values is not finite or all are below
        1e-30 in magnitude. No synchronisation, safe in a CUDA graph, no gradient.
        See docs/contract.md, section 2.

    Cost:
        About N*N*C/2 integer multiply-adds per image. The passes of an image run one after another,
        on one thread or thread block: about (N - keep) / step with "bipartite", a few dozen with
        "pairwise", which is much faster for thousands of tokens (docs/performance.md).
        C++: one read of the features; scratch of 4*N*N + 2*N*C bytes per image in flight.
        CUDA: one launch (HIP: three); each feature is read about N / 16 times, from 8192 tokens in
        all images on N / 32 times, first from memory, then from L2; scratch of 4*N*N + 288*N bytes
        per image of the batch, so 1 GiB at N=16384.
        Reference: scratch of about 20*N*N + 16*N*C bytes per image in flight.

    Source:
        VisPruner, arXiv 2412.01818v2, section 3; Theia-4869/VisPruner at aefa01a,
        llava/model/llava_arch.py, lines 148-182. "pairwise" is ours.

    Example:
        >>> import torch, vispruner_kernels as vk
        >>> generator = torch.Generator().manual_seed(0)
        >>> features = torch.randn(2, 576, 1024, generator=generator)
        >>> scores = torch.rand(2, 576, generator=generator)
        >>> vk.select(features, scores, 64).shape
        torch.Size([2, 64])
    """
    if (
        type(features) is type(scores) is Tensor
        and type(keep) is int
        and important_ratio is _RATIO
        and step is _STEP
        and matching is _MATCHING
    ):
        try:
            return _SELECT(features, scores, keep)
        except (RuntimeError, ValueError):
            check_types("select", (features, scores, keep))
            raise
    return _call(_ops.select.default, features, scores, keep, important_ratio, step, matching)


def prune(
    features: Tensor,
    scores: Tensor,
    keep: int,
    important_ratio: float = _RATIO,
    step: int = _STEP,
    matching: str = _MATCHING,
) -> tuple[Tensor, Tensor]:
    """Select as `select` does, and return the kept rows of ``features`` too.

    Args:
        features: [B, N, C] as in `select`.
        scores: [B, N] as in `select`.
        keep: T, as in `select`.
        important_ratio: as in `select`.
        step: as in `select`.
        matching: as in `select`.

    Returns:
        ``kept`` [B, T, C] in the dtype of ``features``, and ``indices`` int64 [B, T]; both
        contiguous.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, stride, range or device.

    Contract:
        ``indices`` are those of `select`; ``kept`` has the bits of the rows at these indices. This
        function is differentiable with respect to ``features`` (index, then gather).
        ``torch.ops.vispruner.prune`` is not, and its backward raises. Otherwise as `select`.
        See docs/contract.md, section 3.

    Cost:
        That of `select`, and one read and write of B*T*C elements.

    Source:
        As `select`.

    Example:
        >>> import torch, vispruner_kernels as vk
        >>> generator = torch.Generator().manual_seed(0)
        >>> features = torch.randn(1, 256, 64, generator=generator)
        >>> kept, indices = vk.prune(features, torch.rand(1, 256, generator=generator), 32)
        >>> torch.equal(kept[0], features[0, indices[0]])
        True
    """
    if (
        type(features) is type(scores) is Tensor
        and type(keep) is int
        and important_ratio is _RATIO
        and step is _STEP
        and matching is _MATCHING
        and not torch.compiler.is_compiling()
        and torch.is_inference_mode_enabled()
    ):
        try:
            return _PRUNE(features, scores, keep)
        except (RuntimeError, ValueError):
            check_types("prune", (features, scores, keep))
            raise
    if not (isinstance(features, Tensor) and isinstance(scores, Tensor)):
        check_types("prune", (features, scores, keep, important_ratio, step, matching))
    has_tangent = forward_ad.unpack_dual(features).tangent is not None
    if (features.requires_grad and torch.is_grad_enabled()) or has_tangent:
        indices = _call(
            _ops.select.default, features, scores, keep, important_ratio, step, matching
        )
        return features.gather(1, indices[:, :, None].expand(-1, -1, features.shape[2])), indices
    rule = important_ratio, step, matching
    if torch.compiler.is_compiling():
        # Detached, because scores that require a gradient would make `kept` require one.
        return _call(_ops.prune.default, features, scores.detach(), keep, *rule)
    # Without autograd's kernel, which is a Python function and would double the time of a call.
    with torch._C._AutoDispatchBelowAutograd():
        return _call(_ops.prune.default, features, scores, keep, *rule)


def select_varlen(
    features: Tensor,
    scores: Tensor,
    cu_seqlens: Tensor,
    cu_keep: Tensor,
    max_seqlen: int,
    total_keep: int,
    important_ratio: float = _RATIO,
    step: int = _STEP,
    matching: str = _MATCHING,
) -> Tensor:
    """Select as `select` does from packed images, in FlashAttention's varlen convention.

    Args:
        features: [total, C] float32, float16 or bfloat16, last stride 1.
        scores: [total], any of these dtypes, any stride.
        cu_seqlens: int32 [B + 1] on the device of ``features``: image i is the tokens
            ``cu_seqlens[i]:cu_seqlens[i + 1]``. Tokens past the last offset belong to no image.
        cu_keep: int32 [B + 1], offsets of the output: image i keeps
            ``cu_keep[i + 1] - cu_keep[i]`` tokens, from 0 to its length.
        max_seqlen: at least the longest image, <= 16384.
        total_keep: at least ``cu_keep[-1]``, <= total; the length of the output.
        important_ratio: as in `select`.
        step: as in `select`.
        matching: as in `select`.

    Returns:
        int64 [total_keep]: positions in the packed sequence, ascending; elements past
        ``cu_keep[-1]`` are 0.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, stride, range or device. On a CPU also: offsets that start at
            another value than 0, offsets that fall, and offsets that contradict ``max_seqlen``,
            ``total_keep`` or the lengths.

    Contract:
        The bits of `select` for every image. Kernels on a GPU do not check offsets: wrong ones are
        clamped and give wrong tokens without an error. They copy nothing to the host; the reference
        copies the offsets. No gradient.
        See docs/contract.md, section 3.

    Cost:
        The sum of `select` over the images. On a CUDA device one launch (HIP: three), sized for B
        images of max_seqlen tokens: at most about B * max_seqlen**2 / 2048 programs, and scratch of
        4*total*max_seqlen + 288*total + B * max_seqlen / 4 bytes. So pass the length of the longest
        image: a larger ``max_seqlen`` costs time and memory, though programs beyond an image's
        length exit immediately.

    Source:
        As `select`; the packing is that of flash-attn's ``flash_attn_varlen_func``.

    Example:
        >>> import torch, vispruner_kernels as vk
        >>> generator = torch.Generator().manual_seed(0)
        >>> features = torch.randn(10, 16, generator=generator)
        >>> scores = torch.rand(10, generator=generator)
        >>> cu_seqlens = torch.tensor([0, 6, 10], dtype=torch.int32)
        >>> cu_keep = torch.tensor([0, 3, 5], dtype=torch.int32)
        >>> vk.select_varlen(features, scores, cu_seqlens, cu_keep, 6, 5).shape
        torch.Size([5])
    """
    return _call(
        _ops.select_varlen.default,
        features,
        scores,
        cu_seqlens,
        cu_keep,
        max_seqlen,
        total_keep,
        important_ratio,
        step,
        matching,
    )


def select_topk(scores: Tensor, keep: int) -> Tensor:
    """Select the ``keep`` tokens of highest score (FasterVLM; the rank strategy of FoPru).

    Args:
        scores: [B, N] float32, float16 or bfloat16, any strides, 1 <= N <= 16384.
        keep: T, 1 <= keep <= N.

    Returns:
        int64 [B, T], contiguous, each row ascending.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, range or device.

    Contract:
        Ties, NaN and -0.0 as in `select`, so the result equals ``select(..., important_ratio=1)``.
        ``torch.topk`` does not specify ties. No synchronisation, no gradient.
        See docs/contract.md, section 3.

    Cost:
        C++: one partial sort of N 64-bit keys per image; 8*N bytes of scratch. CUDA: one launch
        without scratch; it keeps 32-bit keys in registers and finds the last kept one by a binary
        search of 32 steps.

    Source:
        FasterVLM, arXiv 2412.01818v1; FoPru, arXiv 2411.14164.

    Example:
        >>> import torch, vispruner_kernels as vk
        >>> vk.select_topk(torch.tensor([[0.1, 0.7, 0.2, 0.7]]), 3)
        tensor([[1, 2, 3]])
    """
    if type(scores) is Tensor and type(keep) is int:
        try:
            return _SELECT_TOPK(scores, keep)
        except (RuntimeError, ValueError):
            check_types("select_topk", (scores, keep))
            raise
    return _call(_ops.select_topk.default, scores, keep)


def select_rows(scores: Tensor, width: int, rows: int) -> Tensor:
    """Select whole rows of the patch grid by their summed scores (the row strategy of FoPru).

    Args:
        scores: [B, N] float32, float16 or bfloat16, any strides, 1 <= N <= 16384; the grid in
            raster order.
        width: tokens of a grid row, a divisor of N.
        rows: grid rows kept, 1 <= rows <= N // width.

    Returns:
        int64 [B, rows * width], contiguous, each row ascending.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, range or device.

    Contract:
        A row's score is the sum of its tokens' scores, left to right in float32. Equal rows: upper
        row first; NaN last. No synchronisation, no gradient. See docs/contract.md, section 3.

    Cost:
        One read of ``scores``.

    Source:
        FoPru, arXiv 2411.14164.

    Example:
        >>> import torch, vispruner_kernels as vk
        >>> vk.select_rows(torch.tensor([[0.0, 1.0, 5.0, 0.0, 2.0, 2.0]]), width=2, rows=2)
        tensor([[2, 3, 4, 5]])
    """
    return _call(_ops.select_rows.default, scores, width, rows)


def cls_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, num_prefix: int = 1
) -> tuple[Tensor, Tensor]:
    """Compute full attention, and the weights of its [CLS] row averaged over heads.

    Args:
        q: [B, S, H, D] float32, float16 or bfloat16, 1 <= D <= 256, last stride 1 (slices of a
            packed qkv are read in place); query row 0 is the CLS row.
        k: as ``q``, same shape and dtype.
        v: as ``q``, same shape and dtype.
        scale: factor of the logits, finite; ``D ** -0.5`` by default.
        num_prefix: leading tokens that are not patches (CLS, registers), 1 <= num_prefix < S.

    Returns:
        ``out`` [B, S, H, D] in the dtype of ``q``, contiguous, and ``scores`` float32
        [B, S - num_prefix].

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, stride, range or device.

    Contract:
        ``scores``: softmax over all S keys, prefix columns dropped without renormalising, mean over
        heads; the same bits from run to run and for any batch size. If the products of a logit
        cancel, the error grows with ``scale * sum(|q * k|)``, as for every float32 logit. A
        backward through ``out`` raises; ``scores`` carry no gradient.
        See docs/contract.md, section 4.

    Cost:
        CPU: PyTorch's ``scaled_dot_product_attention`` and one more read of K. CUDA: one launch, a
        FlashAttention forward with additional programs for the CLS row; scratch of about 4*B*H*S
        bytes.

    Source:
        VisPruner, arXiv 2412.01818v2, section 3.2.

    Example:
        >>> import torch, vispruner_kernels as vk
        >>> generator = torch.Generator().manual_seed(0)
        >>> q, k, v = torch.randn(3, 1, 17, 2, 8, generator=generator)
        >>> out, scores = vk.cls_attention(q, k, v)
        >>> out.shape, scores.shape
        (torch.Size([1, 17, 2, 8]), torch.Size([1, 16]))
    """
    return _call(_ops.cls_attention.default, q, k, v, scale, num_prefix)


def cls_scores(
    q: Tensor, k: Tensor, scale: float | None = None, num_prefix: int = _PREFIX
) -> Tensor:
    """Compute the [CLS] row of an attention, averaged over heads, beside any attention kernel.

    Args:
        q: [B, S, H, D] float32, float16 or bfloat16, 1 <= D <= 256, last stride 1; only row 0 is
            read.
        k: as ``q``, same shape and dtype.
        scale: factor of the logits, finite; ``D ** -0.5`` by default.
        num_prefix: leading tokens that are not patches, 1 <= num_prefix < S.

    Returns:
        float32 [B, S - num_prefix], contiguous.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, stride, range or device.

    Contract:
        The ``scores`` of `cls_attention`, with its determinism and accuracy. No synchronisation, no
        gradient. See docs/contract.md, section 4.

    Cost:
        One read of K. On a CUDA device one launch and scratch of about 4*B*H*S bytes.

    Source:
        VisPruner, arXiv 2412.01818v2, section 3.2; FasterVLM, arXiv 2412.01818v1.

    Example:
        >>> import torch, vispruner_kernels as vk
        >>> generator = torch.Generator().manual_seed(0)
        >>> q, k = torch.randn(2, 1, 17, 2, 8, generator=generator)
        >>> vk.cls_scores(q, k).shape
        torch.Size([1, 16])
    """
    if type(q) is type(k) is Tensor and scale is None and num_prefix is _PREFIX:
        try:
            return _CLS_SCORES(q, k)
        except (RuntimeError, ValueError):
            check_types("cls_scores", (q, k))
            raise
    return _call(_ops.cls_scores.default, q, k, scale, num_prefix)


def received_scores(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    num_prefix: int = 0,
    lse: Tensor | None = None,
) -> Tensor:
    """Compute the attention that each token receives, averaged over heads and all query rows.

    Args:
        q: [B, S, H, D] float32, float16 or bfloat16, 1 <= D <= 256, last stride 1.
        k: as ``q``, same shape and dtype.
        scale: factor of the logits, finite; ``D ** -0.5`` by default.
        num_prefix: leading tokens that are not patches, 0 <= num_prefix < S; their columns are
            dropped, and their query rows stay in the mean. The default is for towers without a
            [CLS] token.
        lse: float32 [B, H, S], the natural log-sum-exp of each row's scaled logits, as flash-attn's
            ``softmax_lse``; computed if it is None.

    Returns:
        float32 [B, S - num_prefix], contiguous.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, stride, range or device.

    Contract:
        Same bits from run to run and for any batch size; no S x S matrix is stored. If the products
        of a logit cancel, the error grows with ``scale * sum(|q * k|)``, as for every float32
        logit. No synchronisation, no gradient. See docs/contract.md, section 4.

    Cost:
        The Q @ K half of the attention with ``lse``, twice that without.
        C++: with ``lse``, if the products of a head's logits cancel, the core adds that head in
        float64, which takes about 3 times as long.
        CUDA: with ``lse`` one launch and scratch of about 8*B*H*S bytes, without it two launches
        and 16*B*H*S bytes. 8*B*H*S bytes more for every further 2048 query rows. (2048 is
        for half types with D <= 128. In float32 with 64 < D <= 128 it is 512. Otherwise it is
        1024.)

    Source:
        FoPru, arXiv 2411.14164; the mean over query rows is our reading of its "significance".

    Example:
        >>> import torch, vispruner_kernels as vk
        >>> generator = torch.Generator().manual_seed(0)
        >>> q, k = torch.randn(2, 1, 16, 2, 8, generator=generator)
        >>> round(vk.received_scores(q, k).sum().item(), 5)
        1.0
    """
    return _call(_ops.received_scores.default, q, k, scale, num_prefix, lse)


def received_scores_varlen(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Compute `received_scores` of packed images; attention stays within each image.

    Args:
        q: [total, H, D] float32, float16 or bfloat16, 1 <= D <= 256, last stride 1.
        k: as ``q``, same shape and dtype.
        cu_seqlens: int32 [B + 1] on the device of ``q``: image i is the tokens
            ``cu_seqlens[i]:cu_seqlens[i + 1]``.
        max_seqlen: at least the longest image, <= 16384.
        scale: factor of the logits, finite; ``D ** -0.5`` by default.
        lse: float32 [H, total] as in `received_scores`.

    Returns:
        float32 [total]; 0 for tokens past the last offset.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, stride, range or device. On a CPU also: offsets that start at
            another value than 0, offsets that fall, and offsets that contradict ``max_seqlen`` or
            the length of ``q``.

    Contract:
        The bits of `received_scores` with ``num_prefix=0`` for every image.
        See docs/contract.md, section 4.

    Cost:
        The sum of `received_scores` over the images.

    Source:
        As `received_scores`; Qwen2.5-VL's vision tower has such windowed attention.

    Example:
        >>> import torch, vispruner_kernels as vk
        >>> generator = torch.Generator().manual_seed(0)
        >>> q, k = torch.randn(2, 10, 2, 8, generator=generator)
        >>> cu_seqlens = torch.tensor([0, 6, 10], dtype=torch.int32)
        >>> vk.received_scores_varlen(q, k, cu_seqlens, 6).shape
        torch.Size([10])
    """
    return _call(_ops.received_scores_varlen.default, q, k, cu_seqlens, max_seqlen, scale, lse)
