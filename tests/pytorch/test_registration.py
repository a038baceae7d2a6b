"""The registration of the operators in PyTorch: owners, schemas, opcheck, fakes."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import (
    CASES,
    INTERPRETED,
    NO_BACKWARD,
    OPERATORS,
    assert_same_answer,
    leaves,
    operators_of,
    overload,
    samples,
    with_gradients,
)
from installed import needs_native
from torch import Tensor
from torch._subclasses import FakeTensorMode

import vispruner_kernels
from vispruner_kernels import _backends, _checks, _schemas
from vispruner_kernels._triton import operators as triton_operators
from vispruner_kernels.testing import (
    DTYPES,
    sample_qkv,
)

# The schemas of docs/contract.md.
CONTRACT = """
vispruner::select(Tensor features, Tensor scores, SymInt keep, float important_ratio=0.5,
                  int step=8, str matching="bipartite") -> Tensor

vispruner::prune(Tensor features, Tensor scores, SymInt keep, float important_ratio=0.5,
                 int step=8, str matching="bipartite") -> (Tensor kept, Tensor indices)

vispruner::select_varlen(Tensor features, Tensor scores, Tensor cu_seqlens, Tensor cu_keep,
    SymInt max_seqlen, SymInt total_keep, float important_ratio=0.5, int step=8,
    str matching="bipartite") -> Tensor

vispruner::select_topk(Tensor scores, SymInt keep) -> Tensor

vispruner::select_rows(Tensor scores, SymInt width, SymInt rows) -> Tensor

vispruner::cls_attention(Tensor q, Tensor k, Tensor v, float? scale=None, int num_prefix=1)
    -> (Tensor out, Tensor scores)

vispruner::cls_scores(Tensor q, Tensor k, float? scale=None, int num_prefix=1)
    -> Tensor

vispruner::received_scores(Tensor q, Tensor k, float? scale=None, int num_prefix=0,
    Tensor? lse=None) -> Tensor

vispruner::received_scores_varlen(Tensor q, Tensor k, Tensor cu_seqlens, SymInt max_seqlen,
    float? scale=None, Tensor? lse=None) -> Tensor
"""
SCHEMAS = {
    text.split("(")[0].strip().removeprefix("vispruner::"): " ".join(text.split())
    for text in CONTRACT.strip().split("\n\n")
}
DEFAULTS = {
    "select": [0.5, 8, "bipartite"],
    "prune": [0.5, 8, "bipartite"],
    "select_varlen": [0.5, 8, "bipartite"],
    "select_topk": [],
    "select_rows": [],
    "cls_attention": [None, 1],
    "cls_scores": [None, 1],
    "received_scores": [None, 0, None],
    "received_scores_varlen": [None, None],
}


def test_the_registered_operators_are_the_public_functions():
    names = {name.removeprefix("vispruner::").split(".")[0] for name in registered_names()}
    assert names == set(SCHEMAS) == set(_schemas.SCHEMAS) == set(vispruner_kernels.__all__)


def registered_names() -> list[str]:
    every = torch._C._dispatch_get_all_op_names()
    return [name for name in every if name.startswith("vispruner::")]


@pytest.mark.parametrize("op", OPERATORS)
def test_the_schema_is_that_of_the_contract(op):
    assert str(overload(op)._schema) == SCHEMAS[op]


@pytest.mark.parametrize("op", OPERATORS)
def test_there_is_one_kernel_per_dispatch_key(op):
    lines = torch._C._dispatch_dump(f"vispruner::{op}").splitlines()
    keys = [line.split(":")[0] for line in lines if "registered at" in line]
    own = {"CPU", "CUDA", "Meta", "Autograd[alias]", "CompositeExplicitAutograd[alias]", "debug"}
    assert sorted(keys) == sorted(own)


def runs_in(call: Callable[[], Any]) -> list[tuple[str, str]]:
    """Names and files of the operators of the package that ran, in order of their calls."""
    files = []
    package = str(Path(vispruner_kernels.__file__).parent)

    def profile(frame, event, argument):
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        # The check of an operator has its name too.
        ours = file.startswith(package) and file != _checks.__file__
        if event == "call" and name in SCHEMAS and ours:
            files.append((file, name))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return files


@pytest.mark.parametrize("device", _backends.KEYS)
@pytest.mark.parametrize("op", OPERATORS)
def test_the_owner_runs(op, device):
    # Calls the kernel of the dispatch key with CPU tensors; the reference accepts any device.
    key = getattr(torch._C.DispatchKey, _backends.KEYS[device])
    owner = _backends.OWNERS[op, device]
    module = sys.modules[_backends.IMPLEMENTATIONS[op, device][owner].__module__]
    assert getattr(module, "INSTALLED", True)
    if device != "cpu" and owner != "reference":
        pytest.skip(f"{owner} does not take CPU tensors")
    if (op, device) in _backends.FROM_CPP:
        assert runs_in(lambda: overload(op)._op_dk(key, *samples(op)[0])) == []
        return
    (file, name), *_ = runs_in(lambda: overload(op)._op_dk(key, *samples(op)[0]))
    assert name == op
    # operators.py imports the file that has the kernel, from the same folder.
    folder = owner == "triton" and Path(file).parent == Path(module.__file__).parent
    assert folder or file == module.__file__


def test_every_function_of_the_table_is_that_of_its_operator():
    for (op, _), functions in _backends.IMPLEMENTATIONS.items():
        for backend, function in functions.items():
            if backend == "triton":
                assert function is getattr(triton_operators, op)
            else:
                assert function.__name__ == op


def test_every_pair_has_an_owner():
    assert set(_backends.OWNERS) == set(itertools.product(SCHEMAS, ("cpu", "cuda")))


@needs_native
def test_native_owns_the_cpu():
    if _backends.REQUESTED == "reference" or INTERPRETED:
        pytest.skip(f"VISPRUNER_KERNELS_BACKEND={_backends.REQUESTED}")
    for op in OPERATORS:
        assert _backends.OWNERS[op, "cpu"] == "native"


def test_requested_reference_owns_everything():
    if _backends.REQUESTED != "reference":
        pytest.skip("another VISPRUNER_KERNELS_BACKEND")
    assert set(_backends.OWNERS.values()) == {"reference"}


@pytest.mark.parametrize("op", OPERATORS)
def test_defaults_are_those_of_the_schema(op):
    args = samples(op)[0]
    schema = overload(op)._schema
    values = [argument.default_value for argument in schema.arguments[len(args) :]]
    expected = DEFAULTS[op]
    assert values == expected
    function = getattr(vispruner_kernels, op)
    got = overload(op)(*args)
    for other in (
        overload(op)(*args, *expected),
        function(*args),
        function(*args, *expected),
        getattr(operators_of(_backends.OWNERS[op, "cpu"]), op)(*args),
    ):
        assert_same_answer(other, got)


@pytest.mark.parametrize(("op", "number"), CASES)
def test_keywords_give_the_same_answer_as_positions(op, number):
    args = samples(op)[number]
    kwargs = dict(zip((a.name for a in overload(op)._schema.arguments), args, strict=False))
    got = overload(op)(*args)
    some = dict(list(kwargs.items())[1:])
    for other in (
        getattr(torch.ops.vispruner, op)(**kwargs),
        getattr(vispruner_kernels, op)(**kwargs),
        overload(op)(args[0], **some),
        overload(op)(**dict(reversed(kwargs.items()))),
    ):
        assert_same_answer(other, got)


def test_scale_defaults_to_the_root_of_the_head_dimension():
    for op in ("cls_attention", "cls_scores", "received_scores", "received_scores_varlen"):
        args = samples(op)[0]
        kwargs = {"scale": 8**-0.5}
        assert_same_answer(overload(op)(*args), overload(op)(*args, **kwargs))


# opcheck and fakes.


@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES[1:])]
)
@pytest.mark.parametrize(("op", "number"), CASES)
def test_opcheck_passes(op, number, dtype):
    torch.library.opcheck(overload(op), samples(op, dtype)[number])


@pytest.mark.parametrize(("op", "number"), CASES)
def test_opcheck_passes_with_gradients(op, number):
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # The last test runs the backward, and for operators in NO_BACKWARD that is an error.
    if op not in NO_BACKWARD:
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(overload(op), with_gradients(samples(op)[number]), test_utils=tests)


@pytest.mark.parametrize("batch", [slice(0, 0), slice(0, 1), slice(None)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "number"), CASES)
def test_fakes_have_the_properties_of_results(op, number, dtype, batch):
    args = samples(op, dtype)[number]
    if not op.endswith("_varlen"):
        args = tuple(x[batch] if isinstance(x, Tensor) else x for x in args)
    assert_fake_is_like_real(op, args)


@pytest.mark.parametrize("op", ["cls_attention", "cls_scores", "received_scores"])
def test_fakes_of_one_head_or_one_channel_have_the_properties_of_results(op):
    for heads, head_dim in itertools.product((1, 2), (1, 4)):
        args = sample_qkv(2, 5, heads, head_dim, torch.float32, seed=1)
        assert_fake_is_like_real(op, args if op == "cls_attention" else args[:2])


@pytest.mark.parametrize(("op", "number"), CASES)
def test_fakes_of_permuted_tensors_have_the_properties_of_results(op, number):
    # Dense in another order of dimensions; empty_like would give that order to the output.
    args = samples(op)[number]
    permuted = tuple(
        x.transpose(-2, -3).contiguous().transpose(-2, -3)
        if isinstance(x, Tensor) and x.dim() > 2
        else x
        for x in args
    )
    assert_fake_is_like_real(op, permuted)
    assert_same_answer(overload(op)(*permuted), overload(op)(*args))


def on_meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def assert_fake_is_like_real(op: str, args: tuple[Any, ...]) -> None:
    mode = FakeTensorMode()
    fake = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args]
    meta = [on_meta(x) if isinstance(x, Tensor) else x for x in args]
    answers = {"fake": overload(op)(*fake), "meta": overload(op)(*meta)}
    real = leaves(overload(op)(*args))
    for device, answer in answers.items():
        for one, other in zip(leaves(answer), real, strict=True):
            assert one.shape == other.shape
            assert one.dtype == other.dtype
            assert one.device.type == ("cpu" if device == "fake" else "meta")
            assert one.stride() == other.stride()
    for result in real:
        assert result.device.type == "cpu"
        # is_contiguous ignores dimensions of size 1; the strides do not.
        assert result.stride() == torch.empty(result.shape).stride()


@pytest.mark.parametrize(("op", "number"), CASES)
def test_results_are_new_and_contiguous(op, number, kernel):
    args = samples(op)[number]
    mine = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
    for result in leaves(kernel(op)(*args)):
        assert result.stride() == torch.empty(result.shape).stride()
        assert result.untyped_storage().data_ptr() not in mine
