"""Bad calls: every rule of docs/contract.md, the same error from every way into an operator."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from bad_calls import (
    INF,
    NAN,
    TABLE,
    TENSORS,
    Bad,
    bad_arguments,
    error_of,
)
from calls import (
    ATTENTION,
    CALLS,
    FAKES,
    OPERATORS,
    SELECT_ALL,
    arguments,
    assert_same_answer,
    leaves,
    meta,
    tensors,
)
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

import vispruner_kernels
from vispruner_kernels import _schemas
from vispruner_kernels.ops import TRACES_CHECKS

BAD_CASES = [
    pytest.param(op, bad, id=f"{op}-{bad.argument}-{bad.got}") for bad in TABLE for op in bad.ops
]


def snapshot(kwargs: dict[str, Any]) -> dict[str, tuple[Tensor, int]]:
    on_cpu = {n: x for n, x in kwargs.items() if isinstance(x, Tensor) and x.device.type == "cpu"}
    return {n: (x.clone(), x._version) for n, x in on_cpu.items()}


def assert_unchanged(kwargs: dict[str, Any], before: dict[str, tuple[Tensor, int]]) -> None:
    for name, (values, version) in before.items():
        assert kwargs[name]._version == version, name
        assert torch.equal(kwargs[name], values), name


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
