"""Every operator's schema, with its check and its fake; defined once for all backends.

The schema strings hold the default values. `complete` reads them from there, so checks, fakes and
the implementations in `_native` and `_triton` get every argument by position. `check_types` runs
before PyTorch converts arguments, `check_memory` where tensors have memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vispruner_kernels import _checks

_NUMBERS = frozenset((int, float, str, type(None)))


class Schema(NamedTuple):
    """One operator: `signature` is its schema without namespace and name."""

    signature: str
    check: Callable[..., None]
    fake: Callable[..., Any]
    # False: the outputs carry no gradient. True: a backward through the operator raises.
    raises_on_backward: bool = False


def _indices(like: Tensor, *shape: Any) -> Tensor:
    return like.new_empty(shape, dtype=torch.int64)


def _scores(q: Tensor, k: Tensor, scale: float | None, num_prefix: int, *lse: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1] - num_prefix), dtype=torch.float32)


_RULE = 'float important_ratio=0.5, int step=8, str matching="bipartite"'

SCHEMAS: dict[str, Schema] = {
    "select": Schema(
        f"(Tensor features, Tensor scores, SymInt keep, {_RULE}) -> Tensor",
        _checks.select,
        lambda features, scores, keep, *rule: _indices(scores, scores.shape[0], keep),
    ),
    "prune": Schema(
        f"(Tensor features, Tensor scores, SymInt keep, {_RULE}) -> (Tensor kept, Tensor indices)",
        _checks.prune,
        lambda features, scores, keep, *rule: (
            features.new_empty((features.shape[0], keep, features.shape[2])),
            _indices(scores, scores.shape[0], keep),
        ),
        raises_on_backward=True,
    ),
    "select_varlen": Schema(
        "(Tensor features, Tensor scores, Tensor cu_seqlens, Tensor cu_keep, SymInt max_seqlen, "
        f"SymInt total_keep, {_RULE}) -> Tensor",
        _checks.select_varlen,
        lambda features, scores, cu_seqlens, cu_keep, max_seqlen, total_keep, *rule: _indices(
            scores, total_keep
        ),
    ),
    "select_topk": Schema(
        "(Tensor scores, SymInt keep) -> Tensor",
        _checks.select_topk,
        lambda scores, keep: _indices(scores, scores.shape[0], keep),
    ),
    "select_rows": Schema(
        "(Tensor scores, SymInt width, SymInt rows) -> Tensor",
        _checks.select_rows,
        lambda scores, width, rows: _indices(scores, scores.shape[0], rows * width),
    ),
    "cls_attention": Schema(
        "(Tensor q, Tensor k, Tensor v, float? scale=None, int num_prefix=1)"
        " -> (Tensor out, Tensor scores)",
        _checks.cls_attention,
        lambda q, k, v, scale, num_prefix: (
            q.new_empty(q.shape),
            _scores(q, k, scale, num_prefix),
        ),
        raises_on_backward=True,
    ),
    "cls_scores": Schema(
        "(Tensor q, Tensor k, float? scale=None, int num_prefix=1) -> Tensor",
        _checks.cls_scores,
        _scores,
    ),
    "received_scores": Schema(
        "(Tensor q, Tensor k, float? scale=None, int num_prefix=0, Tensor? lse=None) -> Tensor",
        _checks.received_scores,
        _scores,
    ),
    "received_scores_varlen": Schema(
        "(Tensor q, Tensor k, Tensor cu_seqlens, SymInt max_seqlen, float? scale=None, "
        "Tensor? lse=None) -> Tensor",
        _checks.received_scores_varlen,
        lambda q, k, cu_seqlens, max_seqlen, scale, lse: q.new_empty(
            (q.shape[0],), dtype=torch.float32
        ),
    ),
}

_PARSED = {
    op: torch._C.parse_schema(op + schema.signature).arguments for op, schema in SCHEMAS.items()
}
# Name and type of every argument, as in "int" or "Optional[Tensor]".
ARGUMENTS: dict[str, tuple[tuple[str, str], ...]] = {
    op: tuple((argument.name, str(argument.type)) for argument in arguments)
    for op, arguments in _PARSED.items()
}
# The number of arguments up to the last tensor.
TENSORS: dict[str, int] = {
    op: max(i for i, (_, kind) in enumerate(arguments, 1) if "Tensor" in kind)
    for op, arguments in ARGUMENTS.items()
}
# The default of every argument; None also where there is none.
DEFAULTS: dict[str, tuple[Any, ...]] = {
    op: tuple(argument.default_value for argument in arguments) for op, arguments in _PARSED.items()
}


def complete(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Every argument by position, with the schema's default where none is given.

    PyTorch calls a Python kernel without trailing arguments that equal their defaults.
    """
    missing = DEFAULTS[op][len(args) :]
    if kwargs:
        names = [name for name, _ in ARGUMENTS[op][len(args) :]]
        missing = tuple(map(kwargs.get, names, missing))
    return args + missing


def check_types(op: str, args: tuple[Any, ...]) -> None:
    """Refuse a type that PyTorch would convert silently or refuse with an error of its own.

    It converts a bool, a `fractions.Fraction` or a tensor with one element to the type of the
    schema.
    """
    where = f"{op}: "
    # Arguments left out have no type to check.
    for (name, kind), value in zip(ARGUMENTS[op], args, strict=False):
        if value is None and kind.startswith("Optional"):
            continue
        if "Tensor" in kind:
            _checks.check_tensor(op, name, value)
        elif kind == "int":
            _checks.check_int(where, name, value)
        elif "float" in kind:
            _checks.check_float(where, name, value)
        elif not isinstance(value, str):
            raise _checks.wrong_type(where, name, value, "a str")


@functools.lru_cache(maxsize=1024)
def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements of memory from the first element to the last, gaps included."""
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def check_memory(op: str, args: tuple[Any, ...]) -> None:
    """Refuse tensors that leave their storage or are not aligned to the size of an element.

    FSDP and activation offloading resize storages to nothing. A kernel that reads past a storage
    ends the process, and so does a misaligned address on a GPU.
    """
    # Every call runs this: the common case comes first, with the cheapest accessors.
    for x in args:
        if x.__class__ in _NUMBERS:
            continue
        size = x.itemsize
        if x.is_contiguous():
            end = x.storage_offset() * size + x.nbytes
        else:
            end = (x.storage_offset() + _extent(x.shape, x.stride())) * size
        if end > x.untyped_storage().nbytes() or x.data_ptr() % size:
            names = [name for name, _ in ARGUMENTS[op]]
            name = next(name for name, y in zip(names, args, strict=False) if y is x)
            _refuse_memory(op, name, x, end)


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
