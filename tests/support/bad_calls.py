"""Bad calls: one for every rule of docs/contract.md, with the error that each must give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from calls import (
    ATTENTION,
    CLS,
    DENSE,
    OPERATORS,
    SCORES,
    SELECT,
    SELECT_ALL,
    arguments,
    every_second,
    meta,
    offsets,
)
from torch import Tensor


class Bad(NamedTuple):
    """One mistake: `changes` holds wrong values of arguments, or functions of the valid ones."""

    ops: tuple[str, ...]
    # The argument that the message names, and what the message says about it.
    argument: str
    got: str
    error: type[Exception]
    changes: dict[str, Any]
    # The mistake is in the values of a tensor, and a fake has no values.
    hidden: bool = False


def double(x: Tensor) -> Tensor:
    return x.double()


def integer(x: Tensor) -> Tensor:
    return x.int()


def half(x: Tensor) -> Tensor:
    return x.half()


def one_dimension_more(x: Tensor) -> Tensor:
    return x[None]


def shape(*sizes: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.new_zeros(sizes)


def cut(dim: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.narrow(dim, 0, x.shape[dim] - 1)


def qkv(change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {"q": change, "k": change, "v": change}


NAN, INF = float("nan"), float("inf")
# The tensors of every operator.
TENSORS = [
    (op, name) for op in OPERATORS for name, x in arguments(op).items() if isinstance(x, Tensor)
]

# fmt: off
TABLE = [
    # No tensor at all.
    *(Bad((op,), name, "is None,", TypeError, {name: None}) for op, name in TENSORS
      if name != "lse"),
    # Dtypes.
    *(Bad(SELECT_ALL, name, f"dtype {dtype}", TypeError, {name: lambda x, d=dtype: x.to(d)})
      for name in ("features", "scores")
      for dtype in (torch.float64, torch.int64, torch.bool, torch.complex64)),
    Bad(SCORES, "scores", "dtype torch.float64", TypeError, {"scores": double}),
    Bad(SCORES, "scores", "dtype torch.int32", TypeError, {"scores": integer}),
    Bad(ATTENTION, "q", "dtype torch.float64", TypeError, {"q": double}),
    Bad(ATTENTION, "k", "dtype torch.float16", TypeError, {"k": half}),
    Bad(("cls_attention",), "v", "dtype torch.float16", TypeError, {"v": half}),
    Bad(ATTENTION, "q", "dtype torch.float64", TypeError, qkv(double)),
    Bad(ATTENTION, "q", "dtype torch.int32", TypeError, qkv(integer)),
    Bad(ATTENTION[2:], "lse", "dtype torch.float64", TypeError, {"lse": double}),
    Bad(ATTENTION[2:], "lse", "dtype torch.float16", TypeError, {"lse": half}),
    *(Bad(ops, name, "dtype torch.int64", TypeError, {name: lambda x: x.long()})
      for name, ops in [("cu_seqlens", ("select_varlen", "received_scores_varlen")),
                        ("cu_keep", ("select_varlen",))]),
    # Dimensions and shapes.
    Bad(SELECT, "features", "[1, 2, 12, 6]", ValueError, {"features": one_dimension_more}),
    Bad(SELECT, "features", "[12, 6]", ValueError, {"features": lambda x: x[0]}),
    Bad(SELECT, "features", "[]", ValueError, {"features": shape()}),
    Bad(("select_varlen",), "features", "[1, 12, 6]", ValueError, {"features": one_dimension_more}),
    Bad(("select_varlen",), "features", "[12]", ValueError, {"features": lambda x: x[:, 0]}),
    Bad(SELECT, "scores", "[2, 11]", ValueError, {"scores": cut(1)}),
    Bad(SELECT, "scores", "[1, 12]", ValueError, {"scores": cut(0)}),
    Bad(SELECT, "scores", "[1, 2, 12]", ValueError, {"scores": one_dimension_more}),
    Bad(SELECT, "scores", "[12]", ValueError, {"scores": lambda x: x[0]}),
    Bad(("select_varlen",), "scores", "[11]", ValueError, {"scores": cut(0)}),
    Bad(("select_varlen",), "scores", "[1, 12]", ValueError, {"scores": one_dimension_more}),
    Bad(SCORES, "scores", "[12]", ValueError, {"scores": lambda x: x[0]}),
    Bad(SCORES, "scores", "[1, 2, 12]", ValueError, {"scores": one_dimension_more}),
    Bad(DENSE, "q", "[7, 3, 8]", ValueError, qkv(lambda x: x[0])),
    Bad(ATTENTION[3:], "q", "[1, 12, 3, 8]", ValueError, qkv(one_dimension_more)),
    Bad(DENSE, "k", "[1, 7, 3, 8]", ValueError, {"k": cut(0)}),
    Bad(DENSE, "k", "[2, 6, 3, 8]", ValueError, {"k": cut(1)}),
    Bad(DENSE, "k", "[2, 7, 2, 8]", ValueError, {"k": cut(2)}),
    Bad(DENSE, "k", "[2, 7, 3, 7]", ValueError, {"k": cut(3)}),
    Bad(DENSE, "k", "[7, 3, 8]", ValueError, {"k": lambda x: x[0]}),
    Bad(ATTENTION[3:], "k", "[11, 3, 8]", ValueError, {"k": cut(0)}),
    Bad(("cls_attention",), "v", "[2, 6, 3, 8]", ValueError, {"v": cut(1)}),
    Bad(("received_scores",), "lse", "[2, 3, 6]", ValueError, {"lse": cut(2)}),
    Bad(("received_scores",), "lse", "[2, 7, 3]", ValueError, {"lse": shape(2, 7, 3)}),
    Bad(("received_scores",), "lse", "[3, 7]", ValueError, {"lse": shape(3, 7)}),
    Bad(ATTENTION[3:], "lse", "[3, 11]", ValueError, {"lse": cut(1)}),
    Bad(ATTENTION[3:], "lse", "[1, 3, 12]", ValueError, {"lse": one_dimension_more}),
    *(Bad(ops, name, got, ValueError, {name: change})
      for name, ops in [("cu_seqlens", ("select_varlen", "received_scores_varlen")),
                        ("cu_keep", ("select_varlen",))]
      for got, change in [("[1, 4]", one_dimension_more), ("[0]", shape(0)), ("[]", shape())]),
    Bad(("select_varlen",), "cu_keep", "[3]", ValueError, {"cu_keep": cut(0)}),
    # Devices.
    *(Bad(ops, name, "on meta", ValueError, {name: meta})
      for name, ops in [("scores", SELECT_ALL), ("k", ATTENTION), ("v", CLS[:1]),
                        ("cu_seqlens", ("select_varlen", "received_scores_varlen")),
                        ("cu_keep", ("select_varlen",)), ("lse", ATTENTION[2:])]),
    Bad(SELECT_ALL, "scores", "on cpu", ValueError, {"features": meta}),
    Bad(ATTENTION, "k", "on cpu", ValueError, {"q": meta}),
    # Strides.
    Bad(SELECT_ALL, "features", "stride 2", ValueError, {"features": every_second}),
    Bad(SELECT_ALL, "features", "stride 0", ValueError,
        {"features": lambda x: x[..., :1].expand(x.shape)}),
    Bad(SELECT, "features", "stride 12", ValueError, {"features": lambda x: x.mT.contiguous().mT}),
    *(Bad(ops, name, "stride 2", ValueError, {name: every_second})
      for name, ops in [("q", ATTENTION), ("k", ATTENTION), ("v", CLS[:1])]),
    # Sizes.
    *(Bad(SELECT, "features", f"{n} tokens", ValueError,
          {"features": shape(2, n, 6), "scores": shape(2, n)}) for n in (0, 16385)),
    *(Bad(SCORES, "scores", f"{n} tokens", ValueError, {"scores": shape(2, n)})
      for n in (0, 16385)),
    *(Bad(SELECT, "features", f"{c} channels", ValueError, {"features": shape(2, 12, c)})
      for c in (0, 65537)),
    *(Bad(("select_varlen",), "features", f"{c} channels", ValueError, {"features": shape(12, c)})
      for c in (0, 65537)),
    *(Bad(DENSE, "q", f"dimension {d}", ValueError, qkv(shape(2, 7, 3, d))) for d in (0, 257)),
    *(Bad(ATTENTION[3:], "q", f"dimension {d}", ValueError, qkv(shape(12, 3, d)))
      for d in (0, 257)),
    Bad(DENSE, "q", "[2, 7, 0, 8]", ValueError, qkv(shape(2, 7, 0, 8))),
    Bad(ATTENTION[3:], "q", "[12, 0, 8]", ValueError, qkv(shape(12, 0, 8))),
    Bad(CLS, "q", "0 tokens", ValueError, qkv(shape(2, 0, 3, 8))),
    Bad(CLS, "q", "1 tokens", ValueError, qkv(shape(2, 1, 3, 8))),
    Bad(DENSE[2:], "q", "0 tokens", ValueError, qkv(shape(2, 0, 3, 8)) | {"lse": None}),
    Bad(CLS, "q", "16385 tokens", ValueError, qkv(shape(1, 16386, 1, 1))),
    Bad(CLS, "q", "16385 tokens", ValueError, qkv(shape(1, 16387, 1, 1)) | {"num_prefix": 2}),
    Bad(DENSE[2:], "q", "16385 tokens", ValueError, qkv(shape(1, 16385, 1, 1)) | {"lse": None}),
    # Ranges.
    *(Bad((*SELECT, "select_topk"), "keep", f"is {keep},", ValueError, {"keep": keep})
      for keep in (0, -1, 13, 2**62, -(2**62))),
    *(Bad(SELECT_ALL, "important_ratio", f"is {ratio},", ValueError, {"important_ratio": ratio})
      for ratio in (-0.1, 1.5, NAN, INF, -INF, -5e-324, 1.0000000000000002)),
    *(Bad(SELECT_ALL, "step", f"is {step},", ValueError, {"step": step}) for step in (0, -1)),
    *(Bad(SELECT_ALL, "matching", f"is {matching!r},", ValueError, {"matching": matching})
      for matching in ("nearest", "", "Bipartite")),
    *(Bad(ATTENTION, "scale", f"is {scale},", ValueError, {"scale": scale})
      for scale in (NAN, INF, -INF)),
    *(Bad(CLS, "num_prefix", f"is {prefix},", ValueError, {"num_prefix": prefix})
      for prefix in (0, -1, 7, 8)),
    *(Bad(DENSE[2:], "num_prefix", f"is {prefix},", ValueError, {"num_prefix": prefix})
      for prefix in (-1, 7, 8)),
    *(Bad(("select_rows",), "width", f"is {width},", ValueError, {"width": width})
      for width in (0, -1, 5, 8, 13, 24)),
    *(Bad(("select_rows",), "rows", f"is {rows},", ValueError, {"rows": rows})
      for rows in (0, -1, 4)),
    *(Bad(("select_varlen", "received_scores_varlen"), "max_seqlen", f"is {longest},", ValueError,
          {"max_seqlen": longest}) for longest in (-1, 16385)),
    *(Bad(("select_varlen",), "total_keep", f"is {total},", ValueError, {"total_keep": total})
      for total in (-1, 13)),
    # Offsets.
    *(Bad(("select_varlen", "received_scores_varlen"), argument, got, ValueError, changes, True)
      for argument, got, changes in [
          ("cu_seqlens", "starts at 1", {"cu_seqlens": offsets(1, 5, 5, 12)}),
          ("cu_seqlens", "starts at -1", {"cu_seqlens": offsets(-1, 5, 5, 12)}),
          ("cu_seqlens", "from 5 to 4", {"cu_seqlens": offsets(0, 5, 4, 11)}),
          ("cu_seqlens", "from 0 to -3", {"cu_seqlens": offsets(0, -3, 4, 11)}),
          ("cu_seqlens", "ends at 13", {"cu_seqlens": offsets(0, 5, 6, 13)}),
          ("cu_seqlens", "ends at 2147483647", {"cu_seqlens": offsets(0, 5, 5, 2**31 - 1)}),
          ("max_seqlen", "is 6", {"max_seqlen": 6}),
          ("max_seqlen", "is 0", {"max_seqlen": 0}),
      ]),
    *(Bad(("select_varlen",), argument, got, ValueError, changes, True)
      for argument, got, changes in [
          ("cu_keep", "starts at 1", {"cu_keep": offsets(1, 2, 2, 5)}),
          ("cu_keep", "from 2 to 1", {"cu_keep": offsets(0, 2, 1, 5)}),
          ("total_keep", "is 4", {"total_keep": 4}),
          ("cu_keep", "6 tokens of image 0", {"cu_keep": offsets(0, 6, 6, 6), "total_keep": 6}),
          ("cu_keep", "1 tokens of image 1", {"cu_keep": offsets(0, 2, 3, 5)}),
          ("cu_keep", "8 tokens of image 2", {"cu_keep": offsets(0, 2, 2, 10), "total_keep": 10}),
      ]),
]
# fmt: on


def bad_arguments(op: str, bad: Bad) -> dict[str, Any]:
    kwargs = arguments(op)
    for name, change in bad.changes.items():
        if name in kwargs:
            kwargs[name] = change(kwargs[name]) if callable(change) else change
    return kwargs


def error_of(call: Callable[[str, dict[str, Any]], Any], op: str, kwargs: Any) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call(op, kwargs)
    return caught.value
