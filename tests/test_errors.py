"""Bad calls: every rule of docs/contract.md, the same error from every way into an operator."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from calls import (
    ATTENTION,
    CALLS,
    CLS,
    DENSE,
    FAKES,
    OPERATORS,
    SCORES,
    SELECT,
    SELECT_ALL,
    arguments,
    assert_same_answer,
    every_second,
    leaves,
    meta,
    offsets,
    tensors,
)
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

import vispruner_kernels
from vispruner_kernels import _schemas
from vispruner_kernels.ops import TRACES_CHECKS


class Bad(NamedTuple):
    """One wrong thing: `changes` are values of arguments, or functions of the right ones."""

    ops: tuple[str, ...]
    argument: str  # the one the message names, and
    got: str  # what it says about it
    error: type[Exception]
    changes: dict[str, Any]
    # What only the values in a tensor show; a fake has none.
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

BAD_CASES = [
    pytest.param(op, bad, id=f"{op}-{bad.argument}-{bad.got}") for bad in TABLE for op in bad.ops
]


def bad_arguments(op: str, bad: Bad) -> dict[str, Any]:
    kwargs = arguments(op)
    for name, change in bad.changes.items():
        if name in kwargs:
            kwargs[name] = change(kwargs[name]) if callable(change) else change
    return kwargs


def snapshot(kwargs: dict[str, Any]) -> dict[str, tuple[Tensor, int]]:
    on_cpu = {n: x for n, x in kwargs.items() if isinstance(x, Tensor) and x.device.type == "cpu"}
    return {n: (x.clone(), x._version) for n, x in on_cpu.items()}


def assert_unchanged(kwargs: dict[str, Any], before: dict[str, tuple[Tensor, int]]) -> None:
    for name, (values, version) in before.items():
        assert kwargs[name]._version == version, name
        assert torch.equal(kwargs[name], values), name


def error_of(call: Callable[[str, dict[str, Any]], Any], op: str, kwargs: Any) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call(op, kwargs)
    return caught.value


@pytest.mark.parametrize(("op", "bad"), BAD_CASES)
def test_error(op, bad):
    kwargs = bad_arguments(op, bad)
    before = snapshot(kwargs)
    mixed = len({x.device for x in kwargs.values() if isinstance(x, Tensor)}) > 1
    calls = CALLS if bad.hidden or mixed else {**CALLS, **FAKES}
    errors = {name: error_of(call, op, kwargs) for name, call in calls.items()}
    message = str(errors["function"])
    assert message.startswith(f"{op}: {bad.argument} ")
    assert bad.got in message
    assert ", expected " in message
    assert {name: (type(e), str(e)) for name, e in errors.items()} == dict.fromkeys(
        errors, (bad.error, message)
    )
    assert_unchanged(kwargs, before)


def test_the_table_covers_every_argument():
    assert set(OPERATORS) == set(vispruner_kernels.__all__)
    covered = {(op, bad.argument) for bad in TABLE for op in bad.ops}
    assert {(op, name) for op in OPERATORS for name in arguments(op)} <= covered


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("call", [*CALLS, *FAKES])
def test_the_right_call_passes(op, call):
    # Else every case above could fail for another reason.
    kwargs = arguments(op)
    before = snapshot(kwargs)
    {**CALLS, **FAKES}[call](op, kwargs)
    assert_unchanged(kwargs, before)


@pytest.mark.parametrize("op", [*SELECT_ALL, *ATTENTION])
def test_fakes_on_two_devices(op):
    for name, value in arguments(op).items():
        if isinstance(value, Tensor):
            mode = FakeTensorMode()
            kwargs = tensors(arguments(op), mode.from_tensor)
            kwargs[name] = FakeTensor(mode, meta(value), torch.device("cuda:0"))
            error = error_of(CALLS["function"], op, kwargs)
            assert isinstance(error, ValueError)
            assert str(error).startswith(f"{op}: ")
            assert "expected the device of" in str(error)
            assert {"cpu", "cuda:0"} <= set(str(error).replace(",", "").split())


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("device", ["mps:0", "xpu:0"])
def test_unsupported_device(op, device):
    # Tensors of a device that this PyTorch cannot allocate on: fakes.
    mode = FakeTensorMode()
    kwargs = tensors(arguments(op), lambda x: FakeTensor(mode, meta(x), torch.device(device)))
    first = next(iter(kwargs))
    message = f"{op}: {first} is on {device}, expected a cpu, cuda or hip device"
    for call in CALLS.values():
        error = error_of(call, op, kwargs)
        assert (type(error), str(error)) == (ValueError, message)
    # The dispatcher has a kernel there too, the same check; sparse tensors below run it.
    key = device[:3].upper()
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"vispruner::{op}", key)


@pytest.mark.parametrize("op", OPERATORS)
def test_sparse_tensors(op):
    for name, value in arguments(op).items():
        if isinstance(value, Tensor):
            kwargs = arguments(op) | {name: value.to_sparse()}
            with pytest.raises(ValueError, match=f"^{op}: {name} "):
                getattr(vispruner_kernels, op)(**kwargs)


# What PyTorch converts unseen or refuses in its own words, before an operator can say a thing. The
# public functions say it.


class Fields:
    """Looks like a tensor from afar."""

    shape, dtype, device = (2, 12), torch.float32, torch.device("cpu")


NO_TENSOR = [3, 0.5, True, "x", [0.5], np.zeros((2, 12), np.float32), Fields(), Tensor]
NO_INT = [True, np.True_, 2.0, NAN, INF, np.float64(2), Fraction(5, 2), 1j, "3", b"3", [3], (3,)]
NO_INT += [[10**5000], Fraction(10**5000, 3), "long" * 99, [0.5] * 99]
NO_INT += [
    torch.tensor(3),
    torch.tensor([3]),
    torch.tensor(2.5),
    torch.tensor(True),
    int,
    np.array(3),
]
NO_FLOAT = [
    True,
    np.True_,
    1j,
    ".5",
    b"1",
    [0.5],
    Decimal("0.5"),
    torch.tensor(0.5),
    np.array([0.5]),
]
NO_STR = [3, b"bipartite", ["bipartite"], {"bipartite": 1}, {"bipartite"}, np.array("pairwise")]
NO_STR += [torch.tensor(1), True]
WRONG_TYPES = {
    "Tensor": ("a Tensor", [*NO_TENSOR, None]),
    "Optional[Tensor]": ("a Tensor", NO_TENSOR),
    "int": ("an int", [*NO_INT, None]),
    "float": ("a number", [*NO_FLOAT, None]),
    "Optional[float]": ("a number", NO_FLOAT),
    "str": ("a str", [*NO_STR, None]),
}


def named(*kinds: str) -> list[Any]:
    """Every argument of these types."""
    return [
        pytest.param(op, name, kind, id=f"{op}-{name}")
        for op in OPERATORS
        for name, kind in _schemas.ARGUMENTS[op]
        if kind in kinds
    ]


def errors_of_the_function(op: str, kwargs: dict[str, Any]) -> Exception:
    function = getattr(vispruner_kernels, op)
    with pytest.raises(Exception) as by_name:  # noqa: PT011
        function(**kwargs)
    with pytest.raises(Exception) as by_place:  # noqa: PT011
        function(*kwargs.values())
    assert (by_name.type, str(by_name.value)) == (by_place.type, str(by_place.value))
    return by_name.value


@pytest.mark.parametrize(("op", "name", "kind"), named(*WRONG_TYPES))
def test_wrong_types(op, name, kind):
    wanted, values = WRONG_TYPES[kind]
    for value in values:
        error = errors_of_the_function(op, arguments(op) | {name: value})
        assert type(error) is TypeError, value
        assert str(error).startswith(f"{op}: {name} is "), value
        assert f", expected {wanted}" in str(error), value
        assert len(str(error)) < 200


@pytest.mark.parametrize(("op", "name", "kind"), named("int", "float", "Optional[float]"))
def test_numbers_beyond_64_bits(op, name, kind):
    beyond_int = [2**63, -(2**63) - 1, 2**64] if kind == "int" else []
    for value in (*beyond_int, 10**40, -(10**400), 10**5000):
        error = errors_of_the_function(op, arguments(op) | {name: value})
        assert type(error) is ValueError, value
        assert str(error).startswith(f"{op}: {name} is "), value
        assert ", expected " in str(error)
        assert len(str(error)) < 200
    error = errors_of_the_function(op, arguments(op) | {name: 10**5000})
    assert "is an int of 16610 bits, expected a" in str(error)


@pytest.mark.parametrize(("op", "name", "kind"), named("int", "float"))
def test_numbers_of_numpy(op, name, kind):
    kwargs = arguments(op)
    right = CALLS["function"](op, kwargs)
    if kind == "int":
        others = [np.int64(kwargs[name]), np.int8(kwargs[name]), np.uint16(kwargs[name])]
    else:
        others = [np.float64(0.5), np.float32(0.5), np.float16(0.5), Fraction(1, 2)]
    for other in others:
        assert_same_answer(CALLS["function"](op, kwargs | {name: other}), right)


@pytest.mark.skipif(not TRACES_CHECKS, reason="this PyTorch cannot trace the checks")
@pytest.mark.parametrize("value", [True, torch.tensor(5), 2.0, None, 2**63])
def test_wrong_types_in_a_compiled_function(value):
    torch._dynamo.reset()
    kwargs = arguments("select_topk") | {"keep": value}
    function = torch.compile(
        lambda scores: vispruner_kernels.select_topk(scores, value),
        fullgraph=True,
        backend="aot_eager",
    )
    message = str(error_of(lambda op, kwargs: function(kwargs["scores"]), "select_topk", kwargs))
    assert "keep" in message
    if not isinstance(value, int) or value is True:
        assert "select_topk: keep is " in message
        assert "expected an int" in message


# Memory: a read past a storage or, on a GPU, at an odd address ends the process.


def freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def shrunk(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(8)
    return x


def one_byte_short(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(x.nbytes - 1)
    return x


def freed_view(x: Tensor) -> Tensor:
    # Its address is not 0.
    view = torch.cat([x, x])[len(x) :]
    view.untyped_storage().resize_(0)
    assert view.data_ptr() != 0
    return view


def cut_before_the_view(x: Tensor) -> Tensor:
    # Its size would fit, but not where it starts.
    view = torch.cat([x, x])[len(x) :]
    view.untyped_storage().resize_(x.nbytes)
    return view


def freed_with_gaps(x: Tensor) -> Tensor:
    wide = x.new_zeros((*x.shape[:-1], x.shape[-1] + 3))
    view = wide[..., 3:]
    view.untyped_storage().resize_(wide.nbytes - 4)
    return view


def odd(x: Tensor) -> Tensor:
    memory = torch.frombuffer(bytearray(x.nbytes + 1), dtype=x.dtype, offset=1).view(x.shape)
    assert memory.data_ptr() % x.itemsize
    return memory.copy_(x)


MEMORY = {
    freed: "has a storage of 0 bytes, expected at least ",
    shrunk: "has a storage of 8 bytes, expected at least ",
    one_byte_short: "bytes, expected at least ",
    freed_view: "has a storage of 0 bytes, expected at least ",
    cut_before_the_view: "bytes, expected at least ",
    freed_with_gaps: "bytes, expected at least ",
    odd: "has address 0x",
}


@pytest.mark.parametrize("change", MEMORY, ids=lambda change: change.__name__)
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_memory(op, name, change):
    words = MEMORY[change]
    kwargs = arguments(op)
    kwargs[name] = change(kwargs[name])
    for way, call in CALLS.items():
        error = error_of(call, op, kwargs)
        assert type(error) is ValueError, way
        assert str(error).startswith(f"{op}: {name} has "), way
        assert words in str(error), way


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_memory_of_halves(dtype):
    kwargs = tensors(arguments("select"), lambda x: x.to(dtype))
    for change in (freed, one_byte_short, odd):
        for name in ("features", "scores"):
            bad = kwargs | {name: change(kwargs[name])}
            for call in CALLS.values():
                with pytest.raises(ValueError, match=f"^select: {name} has "):
                    call("select", bad)


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("name", CALLS)
def test_memory_that_is_enough(op, name):
    """A storage that ends with its tensor, one that grew or lost what no tensor needs, strides of 0
    and no elements in a freed storage."""
    right = CALLS[name](op, arguments(op))

    def cut_to_size(x: Tensor) -> Tensor:
        storage = torch.cat([x.flatten(), x.flatten()])
        view = storage[: x.numel()].view(x.shape)
        storage.untyped_storage().resize_(x.nbytes)
        return view

    def grown(x: Tensor) -> Tensor:
        x = x.clone()
        x.untyped_storage().resize_(2 * x.nbytes)
        return x

    for change in (cut_to_size, grown):
        assert_same_answer(CALLS[name](op, tensors(arguments(op), change)), right)
    if not op.endswith("_varlen"):
        first = tensors(arguments(op), lambda x: x[:1])
        for got, like in zip(
            leaves(CALLS[name](op, tensors(first, lambda x: x.expand(3, *x.shape[1:])))),
            leaves(CALLS[name](op, first)),
            strict=True,
        ):
            assert_same_answer(got, like.expand(3, *like.shape[1:]).contiguous())

        def nothing_of_freed(x: Tensor) -> Tensor:
            view = x.clone()[1:1]
            view.untyped_storage().resize_(0)
            return view

        empty = CALLS[name](op, tensors(arguments(op), nothing_of_freed))
        assert all(len(x) == 0 for x in leaves(empty))


def test_freed_memory_in_a_compiled_function():
    torch._dynamo.reset()
    function = torch.compile(
        vispruner_kernels.select_topk, fullgraph=True, dynamic=False, backend="aot_eager"
    )
    scores = torch.rand(2, 9)
    assert_same_answer(function(scores, 4), vispruner_kernels.select_topk(scores, 4))
    with pytest.raises(ValueError, match="select_topk: scores has a storage of 0 bytes"):
        function(freed(scores), 4)


COMPILED = [
    ("select", "keep", "is 13"),
    ("select_varlen", "features", "dtype torch.float64"),
    ("select_rows", "width", "is 5"),
    ("cls_attention", "v", "[2, 6, 3, 8]"),
    ("received_scores_varlen", "max_seqlen", "is 16385"),
]


def find(op: str, argument: str, got: str) -> Bad:
    return next(
        bad for bad in TABLE if op in bad.ops and bad.argument == argument and got in bad.got
    )


@pytest.mark.parametrize(("op", "argument", "got"), COMPILED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_message_is_inside_what_dynamo_raises(
    op: str, argument: str, got: str, dynamic: bool
) -> None:
    torch._dynamo.reset()
    kwargs = bad_arguments(op, find(op, argument, got))
    message = str(error_of(CALLS["function"], op, kwargs))
    before = snapshot(kwargs)
    function = torch.compile(
        getattr(vispruner_kernels, op), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    assert message in str(error_of(lambda op, kwargs: function(**kwargs), op, kwargs))
    assert_unchanged(kwargs, before)


def test_bad_offsets_in_a_compiled_function():
    # The fake lets them pass; the kernel does not.
    torch._dynamo.reset()
    kwargs = bad_arguments("select_varlen", find("select_varlen", "cu_seqlens", "from 5 to 4"))
    function = torch.compile(
        vispruner_kernels.select_varlen, fullgraph=True, dynamic=False, backend="aot_eager"
    )
    with pytest.raises(ValueError, match="cu_seqlens falls from 5 to 4 at position 2"):
        function(**kwargs)
