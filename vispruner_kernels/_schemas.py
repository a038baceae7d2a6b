"""Every operator's schema, argument check and fake, defined once for all backends.

A check raises ``TypeError`` for a wrong type or dtype and ``ValueError`` for a shape, range, stride
or device. `_backends` runs it in front of every implementation and every fake, so a bad call gets
the same exception whoever serves it. `check_types` runs before PyTorch converts the arguments,
`check_memory` where a tensor has memory.
"""

from __future__ import annotations

import functools
import itertools
import reprlib
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_TOKENS = 16384
# The int32 sum of the two mixed products of 7-bit halves reaches C * 2 * 127**2 < 2**31.
MAX_CHANNELS = 65536
MAX_HEAD_DIM = 256
MAX_SCALE = torch.finfo(torch.float32).max
MATCHINGS = ("bipartite", "pairwise")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# "meta" is served by the fakes.
DEVICES = ("cpu", "cuda", "meta")
_NUMBERS = frozenset((int, float, str, type(None)))


class Schema(NamedTuple):
    """One operator: `signature` is its schema without the namespace."""

    signature: str
    check: Callable[..., None]
    fake: Callable[..., Any]
    # False: the outputs carry no gradient. True: a gradient is a clear error.
    raises_on_backward: bool = False


def _holds(condition: Any) -> bool:
    """The truth of a condition; one that a compiler cannot decide while tracing does not hold."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def _value(x: Any) -> Any:
    """A size for a message: a symbol that a compiler traces with has the value it was seen with."""
    if isinstance(x, torch.SymInt) and x.node.has_hint():
        return x.node.hint
    return x


def _values(sizes: Any) -> list[Any]:
    return [_value(size) for size in sizes]


def _outside(value: Any, low: Any, high: Any) -> bool:
    below, above = value < low, value > high
    # Most calls end here, without a function call.
    return not (below is False and above is False) and (_holds(below) or _holds(above))


def shown(value: object) -> str:
    """A value for a message, on one short line; only the type of what may lie on a device."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an int of {value.bit_length()} bits"
    try:
        if isinstance(value, list | tuple | dict):
            return reprlib.repr(value)
        if value is None or isinstance(value, Integral | Real | complex | str | bytes):
            text = repr(value)
            return text if len(text) <= 80 else f"{text[:77]}..."
    except ValueError:
        # Python does not print ints of more than 4300 digits, in whatever they are.
        pass
    return f"of type {type(value).__name__}"


def _wrong_type(where: str, name: str, value: object, expected: str) -> TypeError:
    hint = "; call .item() on it" if isinstance(value, Tensor) and expected != "a str" else ""
    return TypeError(f"{where}{name} is {shown(value)}, expected {expected}{hint}")


def check_int(where: str, name: str, value: Any) -> None:
    """An int of 64 bits, also NumPy's; no bool, and no tensor, which would have to be copied."""
    if isinstance(value, bool) or not isinstance(value, Integral | torch.SymInt):
        raise _wrong_type(where, name, value, "an int")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{where}{name} is {shown(value)}, expected an int of 64 bits")


def check_float(where: str, name: str, value: Any) -> None:
    """A number that a double can hold, also NumPy's; NaN is left to the check of a range."""
    if isinstance(value, bool) or not isinstance(value, Real | torch.SymFloat | torch.SymInt):
        raise _wrong_type(where, name, value, "a number")
    if isinstance(value, Real):
        try:
            float(value)
        except OverflowError:
            text = f"{where}{name} is {shown(value)}, expected a number of 64 bits"
            raise ValueError(text) from None


def check_types(op: str, args: tuple[Any, ...]) -> None:
    """What PyTorch would convert unseen (a bool, a fraction, a tensor with one element) or refuse
    with words of its own."""
    where = f"{op}: "
    for (name, kind), value in zip(ARGUMENTS[op], args, strict=True):
        if value is None and kind.startswith("Optional"):
            continue
        if "Tensor" in kind:
            _is_tensor(op, name, value)
        elif kind == "int":
            check_int(where, name, value)
        elif "float" in kind:
            check_float(where, name, value)
        elif not isinstance(value, str):
            raise _wrong_type(where, name, value, "a str")


def _is_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise _wrong_type(f"{op}: ", name, value, "a Tensor")


@functools.lru_cache(maxsize=1024)
def _elements(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """From the first to the last, gaps among them."""
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def check_memory(op: str, *args: Any) -> None:
    """That tensors lie inside their storage, and at a multiple of an element's size.

    Before every kernel: reading past a storage that was resized (by FSDP or activation offloading,
    to nothing) ends the process, and so does an odd address on a GPU.
    """
    # It is in the way of every call, hence the order and the cheapest accessors.
    for x in args:
        if x.__class__ in _NUMBERS:
            continue
        size = x.itemsize
        if x.is_contiguous():
            end = x.storage_offset() * size + x.nbytes
        else:
            end = (x.storage_offset() + _elements(x.shape, x.stride())) * size
        if end > x.untyped_storage().nbytes() or x.data_ptr() % size:
            names = [name for name, _ in ARGUMENTS[op]]
            _refuse_memory(op, next(n for n, y in zip(names, args, strict=False) if y is x), x, end)


def _refuse_memory(op: str, name: str, x: Tensor, needed: int) -> None:
    if x.numel() == 0:
        return
    size = x.untyped_storage().nbytes()
    if needed > size:
        raise ValueError(
            f"{op}: {name} has a storage of {size} bytes, expected at least {needed}; "
            "it was freed or resized after the tensor was made"
        )
    raise ValueError(
        f"{op}: {name} has address {x.data_ptr():#x}, expected a multiple of {x.itemsize}, the "
        f"size of its elements; call .clone() on it"
    )


def _dtype(op: str, name: str, tensor: Tensor, wanted: tuple[torch.dtype, ...]) -> None:
    _is_tensor(op, name, tensor)
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
    # What is_cpu says is ten times as fast as the name.
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
        differs = differs or (unequal is not False and _holds(unequal))
    if differs:
        raise ValueError(
            f"{op}: {name} has shape {_values(tensor.shape)}, expected {layout} = {_values(wanted)}"
        )


def _last_stride(op: str, name: str, tensor: Tensor) -> None:
    # A dimension of size 1 has no stride rule, and neither has a tensor without elements.
    if (
        _holds(tensor.stride()[-1] != 1)
        and not _holds(tensor.shape[-1] == 1)
        and not _holds(tensor.numel() == 0)
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


def _tokens(op: str, name: str, tokens: Any) -> None:
    if _outside(tokens, 1, MAX_TOKENS):
        raise ValueError(
            f"{op}: {name} has {_value(tokens)} tokens per image, expected 1 <= N <= {MAX_TOKENS}"
        )


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


def _selection_check(op: str) -> Callable[..., None]:
    def check(
        features: Tensor,
        scores: Tensor,
        keep: Any,
        important_ratio: float = 0.5,
        step: int = 8,
        matching: str = "bipartite",
    ) -> None:
        images, tokens, _ = _features(op, features, "[B, N, C]")
        _dtype(op, "scores", scores, FLOATS)
        _shape(op, "scores", scores, "[B, N]", (images, tokens))
        _device(op, "scores", scores, "features", features)
        _tokens(op, "features", tokens)
        _range(op, "keep", keep, 1, tokens, " = N")
        check_rule(op, important_ratio, step, matching)

    return check


def _select_varlen_check(
    features: Tensor,
    scores: Tensor,
    cu_seqlens: Tensor,
    cu_keep: Tensor,
    max_seqlen: Any,
    total_keep: Any,
    important_ratio: float = 0.5,
    step: int = 8,
    matching: str = "bipartite",
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


def _offsets(op: str, name: str, offsets: Tensor, first: str, like: Tensor) -> None:
    _dtype(op, name, offsets, (torch.int32,))
    if offsets.dim() != 1 or _holds(offsets.shape[0] < 1):
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
    """Checks the values of offsets and returns them as lists; copies them to the host.

    Every CPU implementation of a varlen operator calls it, the fakes cannot.
    """
    seq = cu_seqlens.tolist()
    _rising(op, "cu_seqlens", seq)
    if seq[-1] > total:
        raise ValueError(f"{op}: cu_seqlens ends at {seq[-1]}, expected at most {total} = total")
    lengths = [b - a for a, b in itertools.pairwise(seq)]
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(
            f"{op}: max_seqlen is {max_seqlen}, expected at least {max(lengths)}, "
            f"the longest of cu_seqlens"
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


def _scores_check(op: str, scores: Tensor) -> None:
    _dtype(op, "scores", scores, FLOATS)
    _supported_device(op, "scores", scores)
    _dims(op, "scores", scores, "[B, N]")
    _tokens(op, "scores", scores.shape[1])


def _select_topk_check(scores: Tensor, keep: Any) -> None:
    _scores_check("select_topk", scores)
    _range("select_topk", "keep", keep, 1, scores.shape[1], " = N")


def _select_rows_check(scores: Tensor, width: Any, rows: Any) -> None:
    op = "select_rows"
    _scores_check(op, scores)
    tokens = scores.shape[1]
    _range(op, "width", width, 1, tokens, " = N")
    if _holds(tokens % width != 0):
        raise ValueError(
            f"{op}: width is {_value(width)}, expected a divisor of N = {_value(tokens)}"
        )
    _range(op, "rows", rows, 1, tokens // width, " = N // width")


def _attention(op: str, tensors: dict[str, Tensor], layout: str, scale: float | None) -> None:
    q = tensors["q"]
    _dtype(op, "q", q, FLOATS)
    _supported_device(op, "q", q)
    _dims(op, "q", q, layout)
    _last_stride(op, "q", q)
    *_, heads, head_dim = q.shape
    if _holds(heads < 1):
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
    if _holds(sequence < low + 1):
        raise ValueError(f"{op}: q has {_value(sequence)} tokens, expected at least {low + 1}")
    _range(op, "num_prefix", num_prefix, low, sequence - 1, " = S - 1")
    _tokens(op, "q", sequence - num_prefix)


def _lse(op: str, lse: Tensor | None, layout: str, wanted: tuple[Any, ...], q: Tensor) -> None:
    if lse is not None:
        _dtype(op, "lse", lse, (torch.float32,))
        _shape(op, "lse", lse, layout, wanted)
        _device(op, "lse", lse, "q", q)


def _cls_attention_check(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, num_prefix: int = 1
) -> None:
    _attention("cls_attention", {"q": q, "k": k, "v": v}, "[B, S, H, D]", scale)
    _prefix("cls_attention", q, num_prefix, 1)


def _cls_scores_check(
    q: Tensor, k: Tensor, scale: float | None = None, num_prefix: int = 1
) -> None:
    _attention("cls_scores", {"q": q, "k": k}, "[B, S, H, D]", scale)
    _prefix("cls_scores", q, num_prefix, 1)


def _received_scores_check(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    num_prefix: int = 0,
    lse: Tensor | None = None,
) -> None:
    op = "received_scores"
    _attention(op, {"q": q, "k": k}, "[B, S, H, D]", scale)
    _prefix(op, q, num_prefix, 0)
    images, sequence, heads, _ = q.shape
    _lse(op, lse, "[B, H, S]", (images, heads, sequence), q)


def _received_scores_varlen_check(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: Any,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> None:
    op = "received_scores_varlen"
    _attention(op, {"q": q, "k": k}, "[total, H, D]", scale)
    _offsets(op, "cu_seqlens", cu_seqlens, "q", q)
    _range(op, "max_seqlen", max_seqlen, 0, MAX_TOKENS)
    _lse(op, lse, "[H, total]", (q.shape[1], q.shape[0]), q)


def _indices(like: Tensor, *shape: Any) -> Tensor:
    return like.new_empty(shape, dtype=torch.int64)


def _cls_scores_fake(
    q: Tensor, k: Tensor, scale: float | None = None, num_prefix: int = 1
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1] - num_prefix), dtype=torch.float32)


def _received_scores_fake(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    num_prefix: int = 0,
    lse: Tensor | None = None,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1] - num_prefix), dtype=torch.float32)


_RULE = 'float important_ratio=0.5, int step=8, str matching="bipartite"'

SCHEMAS: dict[str, Schema] = {
    "select": Schema(
        f"(Tensor features, Tensor scores, SymInt keep, {_RULE}) -> Tensor",
        _selection_check("select"),
        lambda features, scores, keep, *rule, **kw: _indices(scores, scores.shape[0], keep),
    ),
    "prune": Schema(
        f"(Tensor features, Tensor scores, SymInt keep, {_RULE}) -> (Tensor kept, Tensor indices)",
        _selection_check("prune"),
        lambda features, scores, keep, *rule, **kw: (
            features.new_empty((features.shape[0], keep, features.shape[2])),
            _indices(scores, scores.shape[0], keep),
        ),
        raises_on_backward=True,
    ),
    "select_varlen": Schema(
        "(Tensor features, Tensor scores, Tensor cu_seqlens, Tensor cu_keep, SymInt max_seqlen, "
        f"SymInt total_keep, {_RULE}) -> Tensor",
        _select_varlen_check,
        lambda features, scores, cu_seqlens, cu_keep, max_seqlen, total_keep, *rule, **kw: _indices(
            scores, total_keep
        ),
    ),
    "select_topk": Schema(
        "(Tensor scores, SymInt keep) -> Tensor",
        _select_topk_check,
        lambda scores, keep: _indices(scores, scores.shape[0], keep),
    ),
    "select_rows": Schema(
        "(Tensor scores, SymInt width, SymInt rows) -> Tensor",
        _select_rows_check,
        lambda scores, width, rows: _indices(scores, scores.shape[0], rows * width),
    ),
    "cls_attention": Schema(
        "(Tensor q, Tensor k, Tensor v, float? scale=None, int num_prefix=1)"
        " -> (Tensor out, Tensor scores)",
        _cls_attention_check,
        lambda q, k, v, scale=None, num_prefix=1: (
            q.new_empty(q.shape),
            _cls_scores_fake(q, k, scale, num_prefix),
        ),
        raises_on_backward=True,
    ),
    "cls_scores": Schema(
        "(Tensor q, Tensor k, float? scale=None, int num_prefix=1) -> Tensor",
        _cls_scores_check,
        _cls_scores_fake,
    ),
    "received_scores": Schema(
        "(Tensor q, Tensor k, float? scale=None, int num_prefix=0, Tensor? lse=None) -> Tensor",
        _received_scores_check,
        _received_scores_fake,
    ),
    "received_scores_varlen": Schema(
        "(Tensor q, Tensor k, Tensor cu_seqlens, SymInt max_seqlen, float? scale=None, "
        "Tensor? lse=None) -> Tensor",
        _received_scores_varlen_check,
        lambda q, k, cu_seqlens, max_seqlen, scale=None, lse=None: q.new_empty(
            (q.shape[0],), dtype=torch.float32
        ),
    ),
}

# Name and type of every argument, as in "int" or "Optional[Tensor]".
ARGUMENTS: dict[str, tuple[tuple[str, str], ...]] = {
    op: tuple(
        (argument.name, str(argument.type))
        for argument in torch._C.parse_schema(op + schema.signature).arguments
    )
    for op, schema in SCHEMAS.items()
}
