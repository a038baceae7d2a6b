"""The rules of docs/contract.md for arguments: one check per operator.

A check raises ``TypeError`` for a wrong type or dtype and ``ValueError`` for a wrong shape, range,
stride or device. `_backends` runs it before every implementation and every fake, so a bad call gets
the same exception from all of them. A check takes every argument of its operator by position.

While a compiler traces, sizes are symbols. A condition that it cannot decide counts as false; most
checks then pass.
"""

from __future__ import annotations

import functools
import itertools
import reprlib
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

MAX_TOKENS = 16384
# The int32 sum of the two mixed products of 7-bit halves reaches C * 2 * 127**2 < 2**31.
MAX_CHANNELS = 65536
MAX_HEAD_DIM = 256
MAX_SCALE = torch.finfo(torch.float32).max
MATCHINGS = ("bipartite", "pairwise")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Fakes serve "meta".
DEVICES = ("cpu", "cuda", "meta")


# Values and symbols in messages.


def _is_true(condition: Any) -> bool:
    """Whether the condition is true; False where a tracing compiler cannot decide it."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def _value(x: Any) -> Any:
    """A size for a message; for a symbol the value that the compiler traced with."""
    if isinstance(x, torch.SymInt) and x.node.has_hint():
        return x.node.hint
    return x


def _values(sizes: Any) -> list[Any]:
    return [_value(size) for size in sizes]


def _outside(value: Any, low: Any, high: Any) -> bool:
    below, above = value < low, value > high
    # Most calls end here, without a function call.
    return not (below is False and above is False) and (_is_true(below) or _is_true(above))


def shown(value: object) -> str:
    """A value for a message, on one short line. Of a tensor or another object only the type is
    shown, because its value may be on a device."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an int of {value.bit_length()} bits"
    try:
        if isinstance(value, list | tuple | dict):
            return reprlib.repr(value)
        if value is None or isinstance(value, Integral | Real | complex | str | bytes):
            text = repr(value)
            return text if len(text) <= 80 else f"{text[:77]}..."
    except ValueError:
        # Python does not print ints of more than 4300 digits, not even inside a container.
        pass
    return f"of type {type(value).__name__}"


# Types.


def wrong_type(where: str, name: str, value: object, expected: str) -> TypeError:
    hint = "; call .item() on it" if isinstance(value, Tensor) and expected != "a str" else ""
    return TypeError(f"{where}{name} is {shown(value)}, expected {expected}{hint}")


def check_int(where: str, name: str, value: Any) -> None:
    """An int of 64 bits, NumPy's included; no bool, and no tensor, which may be on a device."""
    if isinstance(value, bool) or not isinstance(value, Integral | torch.SymInt):
        raise wrong_type(where, name, value, "an int")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{where}{name} is {shown(value)}, expected an int of 64 bits")


def check_float(where: str, name: str, value: Any) -> None:
    """A number that a double can hold, NumPy's included; NaN is left to the check of the range."""
    if isinstance(value, bool) or not isinstance(value, Real | torch.SymFloat | torch.SymInt):
        raise wrong_type(where, name, value, "a number")
    if isinstance(value, Real):
        try:
            float(value)
        except OverflowError:
            text = f"{where}{name} is {shown(value)}, expected a number of 64 bits"
            raise ValueError(text) from None


def check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise wrong_type(f"{op}: ", name, value, "a Tensor")


# Properties of one tensor or number.


def _dtype(op: str, name: str, tensor: Tensor, wanted: tuple[torch.dtype, ...]) -> None:
    check_tensor(op, name, tensor)
    if tensor.layout is not torch.strided:
        raise ValueError(f"{op}: {name} has layout {tensor.layout}, expected torch.strided")
    if tensor.dtype not in wanted:
        names = " or ".join(str(dtype) for dtype in wanted)
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected {names}")


def _device(op: str, name: str, tensor: Tensor, first: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}, expected the device of {first}, {like.device}"
        )


def _supported_device(op: str, name: str, tensor: Tensor) -> None:
    # `is_cpu` takes a tenth of the time that the device's name takes.
    if not (tensor.is_cpu or tensor.is_cuda) and tensor.device.type not in DEVICES:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected a cpu, cuda or hip device")


def _dims(op: str, name: str, tensor: Tensor, layout: str) -> None:
    if tensor.dim() != layout.count(",") + 1:
        raise ValueError(f"{op}: {name} has shape {_values(tensor.shape)}, expected {layout}")


def _shape(op: str, name: str, tensor: Tensor, layout: str, wanted: tuple[Any, ...]) -> None:
    shape = tensor.shape
    differs: Any = len(shape) != len(wanted)
    for got, want in zip(shape, wanted):  # noqa: B905 (this is faster)
        unequal = got != want
        differs = differs or (unequal is not False and _is_true(unequal))
    if differs:
        raise ValueError(
            f"{op}: {name} has shape {_values(tensor.shape)}, expected {layout} = {_values(wanted)}"
        )


def _last_stride(op: str, name: str, tensor: Tensor) -> None:
    # A dimension of size 1 may have any stride, and so may a tensor without elements.
    if (
        _is_true(tensor.stride()[-1] != 1)
        and not _is_true(tensor.shape[-1] == 1)
        and not _is_true(tensor.numel() == 0)
    ):
        raise ValueError(
            f"{op}: {name} has stride {_value(tensor.stride(-1))} in its last dimension, "
            f"expected 1; call .contiguous() on it"
        )


def _range(op: str, name: str, value: Any, low: Any, high: Any, meaning: str = "") -> None:
    if _outside(value, low, high):
        raise ValueError(
            f"{op}: {name} is {_value(value)}, expected {low} <= {name} <= {_value(high)}{meaning}"
        )


def _tokens(op: str, name: str, tokens: Any, which: str = "") -> None:
    if _outside(tokens, 1, MAX_TOKENS):
        raise ValueError(
            f"{op}: {name} has {_value(tokens)} tokens per image{which}, "
            f"expected 1 <= N <= {MAX_TOKENS}"
        )


# Selections.


def check_rule(op: str, important_ratio: float, step: int, matching: str) -> None:
    """The settings of `select` that need no tensor."""
    # Written so that NaN fails.
    if not 0.0 <= important_ratio <= 1.0:
        raise ValueError(
            f"{op}: important_ratio is {shown(important_ratio)}, expected 0 <= important_ratio <= 1"
        )
    if step < 1:
        raise ValueError(f"{op}: step is {shown(step)}, expected step >= 1")
    if not isinstance(matching, str) or matching not in MATCHINGS:
        raise ValueError(f"{op}: matching is {shown(matching)}, expected 'bipartite' or 'pairwise'")


def _features(op: str, features: Tensor, layout: str) -> tuple[Any, ...]:
    _dtype(op, "features", features, FLOATS)
    _supported_device(op, "features", features)
    _dims(op, "features", features, layout)
    shape = features.shape
    channels = shape[-1]
    if _outside(channels, 1, MAX_CHANNELS):
        raise ValueError(
            f"{op}: features has {_value(channels)} channels, expected 1 <= C <= {MAX_CHANNELS}"
        )
    _last_stride(op, "features", features)
    return shape


def _select(
    op: str,
    features: Tensor,
    scores: Tensor,
    keep: Any,
    important_ratio: float,
    step: int,
    matching: str,
) -> None:
    images, tokens, _ = _features(op, features, "[B, N, C]")
    _dtype(op, "scores", scores, FLOATS)
    _shape(op, "scores", scores, "[B, N]", (images, tokens))
    _device(op, "scores", scores, "features", features)
    _tokens(op, "features", tokens)
    _range(op, "keep", keep, 1, tokens, " = N")
    check_rule(op, important_ratio, step, matching)


select = functools.partial(_select, "select")
prune = functools.partial(_select, "prune")


def select_varlen(
    features: Tensor,
    scores: Tensor,
    cu_seqlens: Tensor,
    cu_keep: Tensor,
    max_seqlen: Any,
    total_keep: Any,
    important_ratio: float,
    step: int,
    matching: str,
) -> None:
    op = "select_varlen"
    total, _ = _features(op, features, "[total, C]")
    _dtype(op, "scores", scores, FLOATS)
    _shape(op, "scores", scores, "[total]", (total,))
    _device(op, "scores", scores, "features", features)
    _offsets(op, "cu_seqlens", cu_seqlens, "features", features)
    _offsets(op, "cu_keep", cu_keep, "features", features)
    _shape(op, "cu_keep", cu_keep, "the shape of cu_seqlens", cu_seqlens.shape)
    _range(op, "max_seqlen", max_seqlen, 0, MAX_TOKENS)
    _range(op, "total_keep", total_keep, 0, total, " = total")
    check_rule(op, important_ratio, step, matching)


def _scores(op: str, scores: Tensor) -> None:
    _dtype(op, "scores", scores, FLOATS)
    _supported_device(op, "scores", scores)
    _dims(op, "scores", scores, "[B, N]")
    _tokens(op, "scores", scores.shape[1])


def select_topk(scores: Tensor, keep: Any) -> None:
    _scores("select_topk", scores)
    _range("select_topk", "keep", keep, 1, scores.shape[1], " = N")


def select_rows(scores: Tensor, width: Any, rows: Any) -> None:
    op = "select_rows"
    _scores(op, scores)
    tokens = scores.shape[1]
    _range(op, "width", width, 1, tokens, " = N")
    if _is_true(tokens % width != 0):
        raise ValueError(
            f"{op}: width is {_value(width)}, expected a divisor of N = {_value(tokens)}"
        )
    _range(op, "rows", rows, 1, tokens // width, " = N // width")


# Scores from attention.


def _attention(op: str, tensors: dict[str, Tensor], layout: str, scale: float | None) -> None:
    q = tensors["q"]
    _dtype(op, "q", q, FLOATS)
    _supported_device(op, "q", q)
    _dims(op, "q", q, layout)
    _last_stride(op, "q", q)
    *_, heads, head_dim = q.shape
    if _is_true(heads < 1):
        raise ValueError(f"{op}: q has shape {_values(q.shape)}, expected at least one head")
    if _outside(head_dim, 1, MAX_HEAD_DIM):
        raise ValueError(
            f"{op}: q has head dimension {_value(head_dim)}, expected 1 <= D <= {MAX_HEAD_DIM}"
        )
    for name, tensor in tensors.items():
        if name == "q":
            continue
        _dtype(op, name, tensor, (q.dtype,))
        _shape(op, name, tensor, "the shape of q", q.shape)
        _device(op, name, tensor, "q", q)
        _last_stride(op, name, tensor)
    # Written so that NaN fails.
    if scale is not None and not abs(scale) <= MAX_SCALE:
        raise ValueError(f"{op}: scale is {scale}, expected a finite float32 number")


def _prefix(op: str, q: Tensor, num_prefix: Any, low: int) -> None:
    sequence = q.shape[1]
    if _is_true(sequence < low + 1):
        raise ValueError(f"{op}: q has {_value(sequence)} tokens, expected at least {low + 1}")
    _range(op, "num_prefix", num_prefix, low, sequence - 1, " = S - 1")
    _tokens(op, "q", sequence - num_prefix, " after the prefix")


def _lse(op: str, lse: Tensor | None, layout: str, wanted: tuple[Any, ...], q: Tensor) -> None:
    if lse is not None:
        _dtype(op, "lse", lse, (torch.float32,))
        _shape(op, "lse", lse, layout, wanted)
        _device(op, "lse", lse, "q", q)


def cls_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, num_prefix: int) -> None:
    _attention("cls_attention", {"q": q, "k": k, "v": v}, "[B, S, H, D]", scale)
    _prefix("cls_attention", q, num_prefix, 1)


def cls_scores(q: Tensor, k: Tensor, scale: float | None, num_prefix: int) -> None:
    _attention("cls_scores", {"q": q, "k": k}, "[B, S, H, D]", scale)
    _prefix("cls_scores", q, num_prefix, 1)


def received_scores(
    q: Tensor, k: Tensor, scale: float | None, num_prefix: int, lse: Tensor | None
) -> None:
    op = "received_scores"
    _attention(op, {"q": q, "k": k}, "[B, S, H, D]", scale)
    _prefix(op, q, num_prefix, 0)
    images, sequence, heads, _ = q.shape
    _lse(op, lse, "[B, H, S]", (images, heads, sequence), q)


def received_scores_varlen(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: Any,
    scale: float | None,
    lse: Tensor | None,
) -> None:
    op = "received_scores_varlen"
    _attention(op, {"q": q, "k": k}, "[total, H, D]", scale)
    _offsets(op, "cu_seqlens", cu_seqlens, "q", q)
    _range(op, "max_seqlen", max_seqlen, 0, MAX_TOKENS)
    _lse(op, lse, "[H, total]", (q.shape[1], q.shape[0]), q)


# Offsets of packed images.


def _offsets(op: str, name: str, offsets: Tensor, first: str, like: Tensor) -> None:
    _dtype(op, name, offsets, (torch.int32,))
    if offsets.dim() != 1 or _is_true(offsets.shape[0] < 1):
        raise ValueError(f"{op}: {name} has shape {_values(offsets.shape)}, expected [B + 1]")
    _device(op, name, offsets, first, like)


def check_offsets(
    op: str,
    total: int,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_keep: Tensor | None = None,
    total_keep: int = 0,
) -> tuple[list[int], list[int]]:
    """Check the values of offsets and return them as lists; this copies them to the host.

    Every CPU implementation of a varlen operator calls it; a fake has no values to check.
    """
    seq = cu_seqlens.tolist()
    _rising(op, "cu_seqlens", seq)
    if seq[-1] > total:
        raise ValueError(f"{op}: cu_seqlens ends at {seq[-1]}, expected at most {total} = total")
    lengths = [b - a for a, b in itertools.pairwise(seq)]
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(
            f"{op}: max_seqlen is {max_seqlen}, expected at least {max(lengths)}, "
            "the length of the longest image"
        )
    if cu_keep is None:
        return seq, []
    keep = cu_keep.tolist()
    _rising(op, "cu_keep", keep)
    if keep[-1] > total_keep:
        raise ValueError(
            f"{op}: total_keep is {total_keep}, expected at least {keep[-1]}, the end of cu_keep"
        )
    for i, tokens in enumerate(lengths):
        if keep[i + 1] - keep[i] > tokens:
            raise ValueError(
                f"{op}: cu_keep keeps {keep[i + 1] - keep[i]} tokens of image {i}, expected at "
                f"most its {tokens}"
            )
    return seq, keep


def _rising(op: str, name: str, offsets: list[int]) -> None:
    if offsets[0] != 0:
        raise ValueError(f"{op}: {name} starts at {offsets[0]}, expected 0")
    for i, (a, b) in enumerate(itertools.pairwise(offsets)):
        if b < a:
            raise ValueError(
                f"{op}: {name} falls from {a} to {b} at position {i + 1}, expected offsets that "
                f"do not fall"
            )
