"""Tensors without their memory: a ValueError from every way to call an operator.

A read past a storage ends the process, and so does a misaligned address on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from bad_calls import TENSORS, error_of
from calls import CALLS, OPERATORS, arguments, assert_same_answer, leaves, tensors
from torch import Tensor

import vispruner_kernels


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
    # Unlike that of a freed tensor, its address is not 0.
    view = torch.cat([x, x])[len(x) :]
    view.untyped_storage().resize_(0)
    assert view.data_ptr() != 0
    return view


def cut_before_the_view(x: Tensor) -> Tensor:
    # The storage is large enough for its size, but not for its offset.
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
def test_a_tensor_that_leaves_its_storage_or_is_misaligned(op, name, change):
    kwargs = arguments(op)
    kwargs[name] = change(kwargs[name])
    for way, call in CALLS.items():
        error = error_of(call, op, kwargs)
        assert type(error) is ValueError, way
        assert str(error).startswith(f"{op}: {name} has "), way
        assert MEMORY[change] in str(error), way


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_memory_of_half_precision_tensors(dtype):
    kwargs = tensors(arguments("select"), lambda x: x.to(dtype))
    for change in (freed, one_byte_short, odd):
        for name in ("features", "scores"):
            bad = kwargs | {name: change(kwargs[name])}
            for call in CALLS.values():
                with pytest.raises(ValueError, match=f"^select: {name} has "):
                    call("select", bad)


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("name", CALLS)
def test_memory_that_suffices_is_no_error(op, name):
    """A storage that ends with its tensor, one that grew, strides of 0, and a tensor without
    elements in a freed storage."""
    expected = CALLS[name](op, arguments(op))

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
        assert_same_answer(CALLS[name](op, tensors(arguments(op), change)), expected)
    if not op.endswith("_varlen"):
        first = tensors(arguments(op), lambda x: x[:1])
        for got, like in zip(
            leaves(CALLS[name](op, tensors(first, lambda x: x.expand(3, *x.shape[1:])))),
            leaves(CALLS[name](op, first)),
            strict=True,
        ):
            assert_same_answer(got, like.expand(3, *like.shape[1:]).contiguous())

        def empty_and_freed(x: Tensor) -> Tensor:
            view = x.clone()[1:1]
            view.untyped_storage().resize_(0)
            return view

        empty = CALLS[name](op, tensors(arguments(op), empty_and_freed))
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
