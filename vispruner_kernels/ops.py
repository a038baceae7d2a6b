"""The public operators: a docstring and one call into ``torch.ops.vispruner``.

Axis letters: B images, N patch tokens of an image, C channels, T tokens kept, S sequence length of
the vision encoder (prefix and patches), H heads, D head dimension. The exact rules are in
docs/contract.md; sections are cited as "contract 2".
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vispruner_kernels._schemas import ARGUMENTS, check_types

_ops = torch.ops.vispruner

# Whether PyTorch's compiler can trace the checks of types; 2.8 cannot, 2.13 can. Where it cannot, a
# compiled call gets PyTorch's words for a wrong type, or none for one that PyTorch converts.
TRACES_CHECKS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)

_TYPES: dict[str, tuple[type, ...]] = {
    "Tensor": (Tensor,),
    "int": (int,),
    "float": (float,),
    "str": (str,),
    "Optional[float]": (float, type(None)),
    "Optional[Tensor]": (Tensor, type(None)),
}
# The types of the arguments of nearly every call, which need no look at each of them.
_USUAL = frozenset(
    types
    for arguments in ARGUMENTS.values()
    for types in itertools.product(*(_TYPES[kind] for _, kind in arguments))
)


def _call(operator: Any, *args: Any) -> Any:
    if not TRACES_CHECKS and torch.compiler.is_compiling():
        return operator(*args)
    if tuple(map(type, args)) not in _USUAL:
        check_types(operator._opname, args)
    try:
        return operator(*args)
    except (RuntimeError, ValueError):
        # PyTorch's words for an argument that it does not convert, an int of 65 bits for example,
        # or Python's for one too long to be printed there.
        check_types(operator._opname, args)
        raise


def select(
    features: Tensor,
    scores: Tensor,
    keep: int,
    important_ratio: float = 0.5,
    step: int = 8,
    matching: str = "bipartite",
) -> Tensor:
    """Token selection of VisPruner: the most important tokens, and the rest without duplicates.

    Args:
        features: [B, N, C] float32, float16 or bfloat16; 1 <= N <= 16384, 1 <= C <= 65536; last
            stride 1, other strides free (``hidden[:, 1:]`` is read in place).
        scores: [B, N], any of these dtypes, any strides; higher is more important.
        keep: T, tokens kept per image, 1 <= keep <= N.
        important_ratio: share of ``keep`` taken by score, in [0, 1]; ``int(keep * ratio)`` tokens.
            1 is FasterVLM and does not read ``features``; 0 is duplicate removal alone.
        step: tokens dropped per pass, >= 1; "bipartite" only.
        matching: "bipartite" (as published) or "pairwise" (changes less under rounding noise).

    Returns:
        int64 [B, T], contiguous, each row ascending.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, stride, range or device.

    Contract:
        Bit-identical on every backend, device, batch size and thread count. Equal scores: smaller
        index first; NaN last; -0.0 == 0.0. Similarity is an exact fixed-point cosine; a token that
        is not finite or smaller than 1e-30 is similar to nothing. No synchronisation, safe in a
        CUDA graph, no gradient. Contract 2.

    Cost:
        Reads the features once and makes about N*N*C/2 integer multiply-adds per image. Scratch per
        image in flight: 4*N*N + 2*N*C bytes in C++, some 20*N*N + 16*N*C on the reference. On a
        CUDA device one launch, which reads the features some N / 16 times, all but once from its
        cache; scratch 4*N*N + 288*N bytes per image of the batch, so 1 GiB at N=16384. There one
        block walks an image's passes: some (N - keep) / step dependent ones with "bipartite", a few
        dozen rounds with "pairwise".

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
    return _call(_ops.select.default, features, scores, keep, important_ratio, step, matching)


def prune(
    features: Tensor,
    scores: Tensor,
    keep: int,
    important_ratio: float = 0.5,
    step: int = 8,
    matching: str = "bipartite",
) -> tuple[Tensor, Tensor]:
    """`select`, and the kept rows of ``features``.

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
        ``indices`` are those of `select`; ``kept`` are the same bits as the rows they name. This
        function is differentiable with respect to ``features`` (index, then gather);
        ``torch.ops.vispruner.prune`` itself is not and says so in backward. Otherwise as `select`.
        Contract 3.

    Cost:
        `select`, and one read and write of B*T*C elements.

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
    if not (isinstance(features, Tensor) and isinstance(scores, Tensor)):
        rule = important_ratio, step, matching
        check_types("prune", (features, scores, keep, *rule))
    has_tangent = forward_ad.unpack_dual(features).tangent is not None
    if (features.requires_grad and torch.is_grad_enabled()) or has_tangent:
        indices = _call(
            _ops.select.default, features, scores, keep, important_ratio, step, matching
        )
        return features.gather(1, indices[:, :, None].expand(-1, -1, features.shape[2])), indices
    # Scores never carry a gradient, so they must not make `kept` ask for one.
    return _call(
        _ops.prune.default, features, scores.detach(), keep, important_ratio, step, matching
    )


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
    """`select` for packed images of different sizes, in FlashAttention's varlen convention.

    Args:
        features: [total, C] float32, float16 or bfloat16, last stride 1.
        scores: [total], any of these dtypes, any stride.
        cu_seqlens: int32 [B + 1] on the device of ``features``: image i is the tokens
            ``cu_seqlens[i]:cu_seqlens[i + 1]``. Tokens past the last offset belong to no image.
        cu_keep: int32 [B + 1], the same for the output: image i keeps
            ``cu_keep[i + 1] - cu_keep[i]`` tokens, from 0 to its length.
        max_seqlen: at least the longest image, <= 16384.
        total_keep: at least ``cu_keep[-1]``, <= total; the length of the output.
        important_ratio: as in `select`.
        step: as in `select`.
        matching: as in `select`.

    Returns:
        int64 [total_keep]: positions in the packed sequence, ascending; surplus elements past
        ``cu_keep[-1]`` are 0.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, stride, range or device; on a CPU also offsets that do not start
            at 0, fall or contradict ``max_seqlen``, ``total_keep`` or the lengths.

    Contract:
        Image for image the bits of `select`. Kernels on a GPU copy nothing to the host and clamp
        contradictory offsets; the reference copies the offsets to the host. No gradient.
        Contract 3.

    Cost:
        The sum of `select` over the images. On a CUDA device one launch that is made for B images
        of max_seqlen tokens, so a loose ``max_seqlen`` costs: B * max_seqlen**2 / 8192 programs, of
        which the superfluous end at once, and scratch of 4*total*max_seqlen + 288*total +
        B * max_seqlen / 8 bytes.

    Source:
        As `select`; the packing of flash-attn's ``flash_attn_varlen_func``.

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
    """The ``keep`` tokens of highest score (FasterVLM; the rank strategy of FoPru).

    Args:
        scores: [B, N] float32, float16 or bfloat16, any strides, 1 <= N <= 16384.
        keep: T, 1 <= keep <= N.

    Returns:
        int64 [B, T], contiguous, each row ascending.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, range or device.

    Contract:
        Ties, NaN and -0.0 as in `select`, so equal to ``select(..., important_ratio=1)``, unlike
        ``torch.topk``, which leaves ties open. No synchronisation, no gradient. Contract 3.

    Cost:
        One partial sort of N 64-bit keys per image; 8*N bytes of scratch. On a CUDA device one
        launch without scratch: 32 counts of the keys in registers find the last one kept.

    Source:
        FasterVLM, arXiv 2412.01818v1; FoPru, arXiv 2411.14164.

    Example:
        >>> import torch, vispruner_kernels as vk
        >>> vk.select_topk(torch.tensor([[0.1, 0.7, 0.2, 0.7]]), 3)
        tensor([[1, 2, 3]])
    """
    return _call(_ops.select_topk.default, scores, keep)


def select_rows(scores: Tensor, width: int, rows: int) -> Tensor:
    """Whole rows of the patch grid with the highest summed score (the row strategy of FoPru).

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
        A row's score is its tokens' scores added left to right in float32; equal rows: the upper
        one first; NaN last. No synchronisation, no gradient. Contract 3.

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
    """Full attention, and beside its output the [CLS] row averaged over heads.

    Args:
        q: [B, S, H, D] float32, float16 or bfloat16, 1 <= D <= 256, last stride 1 (slices of a
            packed qkv are read in place).
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
        Query row 0 is the CLS row; softmax over all S keys, prefix columns dropped without
        renormalising, mean over heads. ``scores`` have the same bits from run to run and for any
        batch size. Where the products of a logit cancel, the error grows with
        ``scale * sum(|q * k|)``, as that of any float32 logit. Asking for a gradient of ``out``
        raises; ``scores`` carry none. Contract 4.

    Cost:
        The attention by PyTorch's ``scaled_dot_product_attention``, and one more read of K. On a
        CUDA device one launch of a FlashAttention forward, with programs for the CLS row among its
        own; scratch some 4*B*H*S bytes.

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


def cls_scores(q: Tensor, k: Tensor, scale: float | None = None, num_prefix: int = 1) -> Tensor:
    """The [CLS] row of an attention averaged over heads, beside any attention kernel.

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
        gradient. Contract 4.

    Cost:
        One read of K. On a CUDA device one launch, scratch some 4*B*H*S bytes.

    Source:
        VisPruner, arXiv 2412.01818v2, section 3.2; FasterVLM, arXiv 2412.01818v1.

    Example:
        >>> import torch, vispruner_kernels as vk
        >>> generator = torch.Generator().manual_seed(0)
        >>> q, k = torch.randn(2, 1, 17, 2, 8, generator=generator)
        >>> vk.cls_scores(q, k).shape
        torch.Size([1, 16])
    """
    return _call(_ops.cls_scores.default, q, k, scale, num_prefix)


def received_scores(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    num_prefix: int = 0,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention received by each token, averaged over heads and all query rows.

    Args:
        q: [B, S, H, D] float32, float16 or bfloat16, 1 <= D <= 256, last stride 1.
        k: as ``q``, same shape and dtype.
        scale: factor of the logits, finite; ``D ** -0.5`` by default.
        num_prefix: leading tokens whose columns are dropped, 0 <= num_prefix < S; their query rows
            count.
        lse: float32 [B, H, S], the natural log-sum-exp of each row's scaled logits as flash-attn's
            ``softmax_lse``; computed where it is not given.

    Returns:
        float32 [B, S - num_prefix], contiguous.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, stride, range or device.

    Contract:
        Same bits from run to run and for any batch size; no S x S matrix is stored. Where the
        products of a logit cancel, the error grows with ``scale * sum(|q * k|)``, as that of any
        float32 logit. No synchronisation, no gradient. Contract 4.

    Cost:
        The Q @ K half of the attention, twice without ``lse``. With ``lse`` the C++ core on a CPU
        adds the logits of a head in float64 if their products cancel, which takes some 3 times as
        long. On a CUDA device one launch and scratch some 8*B*H*S bytes with ``lse``, two and
        16*B*H*S without; 8*B*H*S more for every further 2048 rows (1024 or 512 in float32 and with
        D > 128).

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
    """`received_scores` for packed images, attention within each image only.

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
        ValueError: a wrong shape, stride, range or device; on a CPU also offsets that do not start
            at 0, fall, or contradict ``max_seqlen`` or the length of ``q``.

    Contract:
        Image for image the bits of `received_scores` with ``num_prefix=0``. Contract 4.

    Cost:
        The sum of `received_scores` over the images.

    Source:
        As `received_scores`; windowed attention as in Qwen2.5-VL's vision tower.

    Example:
        >>> import torch, vispruner_kernels as vk
        >>> generator = torch.Generator().manual_seed(0)
        >>> q, k = torch.randn(2, 10, 2, 8, generator=generator)
        >>> cu_seqlens = torch.tensor([0, 6, 10], dtype=torch.int32)
        >>> vk.received_scores_varlen(q, k, cu_seqlens, 6).shape
        torch.Size([10])
    """
    return _call(_ops.received_scores_varlen.default, q, k, cu_seqlens, max_seqlen, scale, lse)
