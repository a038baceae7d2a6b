"""Bad calls: every rule of docs/contract.md, the same error from every way to call an operator."""

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
def test_every_way_to_call_raises_the_same_error(op, bad):
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
def test_a_valid_call_passes(op, call):
    # So the cases above fail only because of their mistake.
    kwargs = arguments(op)
    before = snapshot(kwargs)
    {**CALLS, **FAKES}[call](op, kwargs)
    assert_unchanged(kwargs, before)


@pytest.mark.parametrize("op", [*SELECT_ALL, *ATTENTION])
def test_fakes_on_two_devices_raise_an_error_that_names_both(op):
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
def test_an_unsupported_device_is_a_value_error(op, device):
    # Fakes, because this PyTorch cannot allocate tensors on these devices.
    mode = FakeTensorMode()
    kwargs = tensors(arguments(op), lambda x: FakeTensor(mode, meta(x), torch.device(device)))
    first = next(iter(kwargs))
    message = f"{op}: {first} is on {device}, expected a cpu, cuda or hip device"
    for call in CALLS.values():
        error = error_of(call, op, kwargs)
        assert (type(error), str(error)) == (ValueError, message)
    # The dispatcher has a kernel for them too, with the same check; sparse tensors below run it.
    key = device[:3].upper()
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"vispruner::{op}", key)


@pytest.mark.parametrize("op", OPERATORS)
def test_sparse_tensors_are_refused(op):
    for name, value in arguments(op).items():
        if isinstance(value, Tensor):
            kwargs = arguments(op) | {name: value.to_sparse()}
            with pytest.raises(ValueError, match=f"^{op}: {name} "):
                getattr(vispruner_kernels, op)(**kwargs)


# Types that PyTorch silently converts, or refuses with an error of its own, before the operator
# runs. The public functions raise our errors.


class Fields:
    """An object with the attributes of a tensor."""

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
def test_wrong_types_raise_a_type_error(op, name, kind):
    wanted, values = WRONG_TYPES[kind]
    for value in values:
        error = errors_of_the_function(op, arguments(op) | {name: value})
        assert type(error) is TypeError, value
        assert str(error).startswith(f"{op}: {name} is "), value
        assert f", expected {wanted}" in str(error), value
        assert len(str(error)) < 200


@pytest.mark.parametrize(("op", "name", "kind"), named("int", "float", "Optional[float]"))
def test_numbers_beyond_64_bits_raise_a_value_error(op, name, kind):
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
def test_numbers_of_numpy_are_accepted(op, name, kind):
    kwargs = arguments(op)
    expected = CALLS["function"](op, kwargs)
    if kind == "int":
        others = [np.int64(kwargs[name]), np.int8(kwargs[name]), np.uint16(kwargs[name])]
    else:
        others = [np.float64(0.5), np.float32(0.5), np.float16(0.5), Fraction(1, 2)]
    for other in others:
        assert_same_answer(CALLS["function"](op, kwargs | {name: other}), expected)


@pytest.mark.skipif(not TRACES_CHECKS, reason="this PyTorch cannot trace the checks")
@pytest.mark.parametrize("value", [True, torch.tensor(5), 2.0, None, 2**63])
def test_wrong_types_in_a_compiled_function_name_the_argument(value):
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


def test_bad_offsets_in_a_compiled_function_raise_when_it_runs():
    # The fake cannot check the values of offsets; the kernel does.
    torch._dynamo.reset()
    kwargs = bad_arguments("select_varlen", find("select_varlen", "cu_seqlens", "from 5 to 4"))
    function = torch.compile(
        vispruner_kernels.select_varlen, fullgraph=True, dynamic=False, backend="aot_eager"
    )
    with pytest.raises(ValueError, match="cu_seqlens falls from 5 to 4 at position 2"):
        function(**kwargs)
