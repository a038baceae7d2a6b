"""The operators as PyTorch sees them: owners, schemas, fakes, compilation, gradients, modes."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import needs_native
from torch import Tensor
from torch._subclasses import FakeTensorMode

import vispruner_kernels
from vispruner_kernels import _backends, _schemas
from vispruner_kernels.testing import (
    DTYPES,
    assert_same_bits,
    sample_features,
    sample_offsets,
    sample_qkv,
    sample_scores,
)

# As docs/contract.md has them.
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
OPERATORS = sorted(SCHEMAS)
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
# The outputs through which a gradient is an error instead of absent.
NO_BACKWARD = {
    "prune": "call vispruner_kernels.prune, or index",
    "cls_attention": "use an attention kernel that has a backward",
}


def overload(op: str) -> Any:
    return getattr(torch.ops.vispruner, op).default


def samples(op: str, dtype: torch.dtype = torch.float32, size: int = 0) -> list[tuple[Any, ...]]:
    """Arguments by position, without defaults and with other values; every size grows with `size`,
    no two sizes of a call are equal."""
    generator = torch.Generator().manual_seed(size)
    batch, tokens, channels = 2 + size, 19 + 2 * size, 5
    features = sample_features("clustered", batch, tokens, channels, generator).to(dtype)
    scores = sample_scores("ties", batch, tokens, generator)
    q, k, v = sample_qkv(batch, 11 + 2 * size, 4 + 6 * size, 8, dtype, seed=size)
    rule = (0.3, 3, "pairwise")
    if op in ("select", "prune"):
        return [(features, scores.to(dtype), 6 + size), (features, scores, 7, *rule)]
    if op == "select_varlen":
        lengths = [7 + size, 0, *[5] * (1 + size)]
        keep = [(n + 1) // 2 for n in lengths]
        total = sum(lengths)
        packed = (features.flatten(0, 1)[:total], scores.flatten()[:total])
        sizes = (sample_offsets(lengths), sample_offsets(keep), max(lengths), sum(keep))
        return [(*packed, *sizes), (*packed, *sizes, *rule)]
    if op == "select_topk":
        return [(scores.to(dtype), 6 + size)]
    if op == "select_rows":
        return [(scores.to(dtype)[:, : 3 * (5 + size)], 5 + size, 3 - size % 2)]
    if op == "cls_attention":
        return [(q, k, v), (q, k, v, 0.2, 3)]
    if op == "cls_scores":
        return [(q, k), (q, k, 0.2, 3)]
    if op == "received_scores":
        lse = 8.0 + torch.randn(batch, q.shape[2], q.shape[1], generator=generator)
        return [(q, k), (q, k, 0.2, 3, lse)]
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    lengths = [5, 0, 1, len(q) - 6]
    lse = 8.0 + torch.randn(q.shape[1], len(q), generator=generator)
    sizes = (sample_offsets(lengths), max(lengths))
    return [(q, k, *sizes), (q, k, *sizes, 0.2, lse)]


CASES = [
    pytest.param(op, number, id=f"{op}-{number}")
    for op in OPERATORS
    for number in range(len(samples(op)))
]


def leaves(got: Any) -> tuple[Tensor, ...]:
    return got if isinstance(got, tuple) else (got,)


@pytest.fixture(params=["registered", "reference", pytest.param("native", marks=needs_native)])
def kernel(request):
    """An operator's implementation by the operator's name."""
    if request.param == "registered":
        return overload
    return lambda op: _backends._implementation(op, request.param)


def assert_same_answer(got: Any, expected: Any) -> None:
    for one, other in zip(leaves(got), leaves(expected), strict=True):
        assert_same_bits(one, other)


def with_gradients(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in args
    )


# Owners and schemas.


def test_operators():
    names = {name.removeprefix("vispruner::").split(".")[0] for name in registered_names()}
    assert names == set(SCHEMAS) == set(_schemas.SCHEMAS) == set(vispruner_kernels.__all__)


def registered_names() -> list[str]:
    every = torch._C._dispatch_get_all_op_names()
    return [name for name in every if name.startswith("vispruner::")]


@pytest.mark.parametrize("op", OPERATORS)
def test_schema_is_the_contracts(op):
    assert str(overload(op)._schema) == SCHEMAS[op]


@pytest.mark.parametrize("op", OPERATORS)
def test_one_kernel_per_key(op):
    lines = torch._C._dispatch_dump(f"vispruner::{op}").splitlines()
    keys = [line.split(":")[0] for line in lines if "registered at" in line]
    own = {"CPU", "CUDA", "Meta", "Autograd[alias]", "CompositeExplicitAutograd[alias]", "debug"}
    assert sorted(keys) == sorted(own)


def runs_in(call: Callable[[], Any]) -> list[str]:
    """The files of the package whose functions ran, first call first."""
    files = []

    def profile(frame, event, argument):
        if event == "call" and frame.f_code.co_name in SCHEMAS:
            files.append((frame.f_code.co_filename, frame.f_code.co_name))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return files


@pytest.mark.parametrize("device", _backends.KEYS)
@pytest.mark.parametrize("op", OPERATORS)
def test_the_owner_is_who_runs(op, device):
    # The kernel of the key, called with CPU tensors: the reference takes any.
    key = getattr(torch._C.DispatchKey, _backends.KEYS[device])
    owner = _backends.OWNERS[op, device]
    module, devices = _backends.BACKENDS[owner]
    assert device in devices
    assert getattr(module, "INSTALLED", True)
    if device != "cpu" and owner != "reference":
        pytest.skip(f"{owner} does not take CPU tensors")
    calls = runs_in(lambda: overload(op)._op_dk(key, *samples(op)[0]))
    assert calls[0] == (module.__file__, op)


def test_every_pair_has_an_owner():
    assert set(_backends.OWNERS) == set(itertools.product(SCHEMAS, ("cpu", "cuda")))


@needs_native
def test_native_owns_the_cpu():
    if _backends.REQUESTED == "reference":
        pytest.skip("VISPRUNER_KERNELS_BACKEND=reference")
    for op in OPERATORS:
        assert _backends.OWNERS[op, "cpu"] == "native"


def test_requested_reference_owns_everything():
    if _backends.REQUESTED != "reference":
        pytest.skip("another VISPRUNER_KERNELS_BACKEND")
    assert set(_backends.OWNERS.values()) == {"reference"}


@pytest.mark.parametrize("op", OPERATORS)
def test_defaults(op):
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
        _backends._implementation(op, _backends.OWNERS[op, "cpu"])(*args),
    ):
        assert_same_answer(other, got)


@pytest.mark.parametrize(("op", "number"), CASES)
def test_keywords(op, number):
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
def test_opcheck(op, number, dtype):
    torch.library.opcheck(overload(op), samples(op, dtype)[number])


@pytest.mark.parametrize(("op", "number"), CASES)
def test_opcheck_with_gradients(op, number):
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if op not in NO_BACKWARD:  # whose backward, which the last test runs, is an error
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(overload(op), with_gradients(samples(op)[number]), test_utils=tests)


@pytest.mark.parametrize("batch", [slice(0, 0), slice(0, 1), slice(None)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "number"), CASES)
def test_fakes_look_like_results(op, number, dtype, batch):
    args = samples(op, dtype)[number]
    if not op.endswith("_varlen"):
        args = tuple(x[batch] if isinstance(x, Tensor) else x for x in args)
    assert_fake_is_like_real(op, args)


@pytest.mark.parametrize("op", ["cls_attention", "cls_scores", "received_scores"])
def test_fakes_of_one_head_or_one_channel(op):
    for heads, head_dim in itertools.product((1, 2), (1, 4)):
        args = sample_qkv(2, 5, heads, head_dim, torch.float32, seed=1)
        assert_fake_is_like_real(op, args if op == "cls_attention" else args[:2])


@pytest.mark.parametrize(("op", "number"), CASES)
def test_fakes_of_permuted_tensors(op, number):
    # Dense in another order of dimensions, which empty_like would give to the output.
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


# Compilation.


def compiled(function: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("op", "number"), CASES)
def test_compile(op, number, dynamic):
    args = samples(op)[number]
    for function in (getattr(vispruner_kernels, op), overload(op)):
        again = compiled(lambda *args, f=function: f(*args), dynamic)
        assert_same_answer(again(*args), function(*args))


@pytest.mark.parametrize("op", OPERATORS)
def test_dynamic_shapes_compile_once(op):
    function = getattr(vispruner_kernels, op)
    again = compiled(lambda *args: function(*args), dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in range(4):
            args = samples(op, size=size)[0]
            assert_same_answer(again(*args), function(*args))
    # Were it static, that would be an error.
    again = compiled(lambda *args: function(*args), dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        again(*samples(op, size=0)[0])
        with pytest.raises(torch._dynamo.exc.RecompileError):
            again(*samples(op, size=1)[0])


@pytest.mark.parametrize("op", ["select", "prune", "select_topk"])
def test_another_keep_compiles_once_more_at_most(op):
    # Without dynamic=True: the second value makes it dynamic, and that is all.
    function = getattr(vispruner_kernels, op)
    again = compiled(lambda *args: function(*args), dynamic=None)
    *inputs, _ = samples(op)[0]
    for number, keep in enumerate((5, 6, 7, 18)):
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            assert_same_answer(again(*inputs, keep), function(*inputs, keep))


def test_inductor():
    torch._dynamo.reset()

    def function(features, scores, keep):
        kept, indices = vispruner_kernels.prune(features * 2, scores + 0.5, keep)
        return kept + 1, indices + 1

    again = torch.compile(function, fullgraph=True, backend="inductor")
    try:
        for size in range(2):
            args = samples("prune", size=size)[0]
            assert_same_answer(again(*args), function(*args))
    except torch._inductor.exc.InductorError as error:
        if "compiler" not in str(error).lower():
            raise
        pytest.skip("Inductor finds no C++ compiler")


def test_keep_from_data_in_a_compiled_function():
    def function(scores, mask):
        return vispruner_kernels.select_topk(scores, mask.sum().item())

    (scores, _) = samples("select_topk")[0]
    masks = {keep: torch.arange(30) < keep for keep in (3, 4, 19, 20)}
    again = compiled(function, dynamic=None)
    with torch._dynamo.config.patch(capture_scalar_outputs=True, error_on_recompile=True):
        for keep in (3, 4, 19):
            assert_same_answer(again(scores, masks[keep]), function(scores, masks[keep]))
        # The fake could not know; the kernel checks again.
        with pytest.raises(ValueError, match="select_topk: keep is 20, expected 1 <= keep <= 19"):
            again(scores, masks[20])


class Select(torch.nn.Module):
    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, features: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        indices = torch.ops.vispruner.select(features, scores, self.keep)
        return indices, vispruner_kernels.select(features, scores, self.keep, matching="pairwise")


def test_export():
    (features, scores, keep) = samples("select")[0]
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", min=keep, max=16384)
    shapes = {0: batch, 1: tokens}
    program = torch.export.export(Select(keep), (features, scores), dynamic_shapes=(shapes, shapes))
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.vispruner.select.default) == 2
    for size in range(3):
        features, scores, _ = samples("select", size=size)[0]
        assert_same_answer(program.module()(features, scores), Select(keep)(features, scores))


# Gradients and modes.


@pytest.mark.parametrize("op", sorted(NO_BACKWARD))
def test_backward_raises(op):
    args = with_gradients(samples(op)[0])
    first, second = overload(op)(*args)
    assert first.requires_grad
    assert not second.requires_grad
    message = rf"vispruner::{op} has no gradient \(inference only\); .*"
    with pytest.raises(RuntimeError, match=message + NO_BACKWARD[op]):
        first.sum().backward()
    first, _ = overload(op)(*args)
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(first.sum(), args[0])
    assert args[0].grad is None


@pytest.mark.parametrize(("op", "number"), CASES)
def test_indices_and_scores_carry_no_gradient(op, number, kernel):
    args = with_gradients(samples(op)[number])
    results = leaves(kernel(op)(*args))
    for result in results[1:] if op in NO_BACKWARD else results:
        assert not result.requires_grad
        assert result.grad_fn is None
    expected = kernel(op)(*samples(op)[number])
    assert_same_answer(tuple(x.detach() for x in results), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [0, 1])
def test_the_function_prune_is_differentiable(number, dtype):
    features, *rest = samples("prune", dtype)[number]
    weights = torch.randn(
        features.shape[0], rest[1], features.shape[2], generator=torch.Generator().manual_seed(7)
    ).to(dtype)

    def gradient(prune: Callable[..., Any]) -> tuple[Any, Tensor]:
        x = features.clone().requires_grad_()
        kept, indices = prune(x, *rest)
        assert kept.requires_grad
        assert not indices.requires_grad
        (kept * weights).sum().backward()
        return (kept.detach(), indices), x.grad

    def indexed(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        indices = vispruner_kernels.select(x, *rest)
        return x[torch.arange(len(x))[:, None], indices], indices

    got, expected = gradient(vispruner_kernels.prune), gradient(indexed)
    assert_same_answer(got[0], expected[0])
    assert_same_bits(got[1], expected[1])
    assert_same_answer(got[0], vispruner_kernels.prune(features, *rest))
    again = compiled(vispruner_kernels.prune, dynamic=False)
    assert_same_bits(gradient(again)[1], expected[1])


def test_forward_mode_through_the_function_prune():
    features, scores, keep = samples("prune")[0]
    tangent = torch.randn(features.shape, generator=torch.Generator().manual_seed(8))
    kept, kept_tangent = torch.func.jvp(
        lambda x: vispruner_kernels.prune(x, scores, keep)[0], (features,), (tangent,)
    )
    indices = vispruner_kernels.select(features, scores, keep)
    rows = torch.arange(len(features))[:, None]
    assert_same_bits(kept, features[rows, indices])
    assert_same_bits(kept_tangent, tangent[rows, indices])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("op", "number"), CASES)
def test_without_gradients(op, number, mode):
    expected = overload(op)(*samples(op)[number])
    for args in (samples(op)[number], with_gradients(samples(op)[number])):
        for function in (getattr(vispruner_kernels, op), overload(op)):
            with mode():
                results = leaves(function(*args))
            assert not any(x.requires_grad for x in results)
            assert_same_answer(results, expected)


@pytest.mark.parametrize("op", OPERATORS)
def test_autocast_changes_nothing(op, kernel):
    for dtype, lower in itertools.product(DTYPES, (torch.bfloat16, torch.float16)):
        for args in samples(op, dtype):
            expected = kernel(op)(*args)
            with torch.autocast("cpu", dtype=lower):
                assert_same_answer(kernel(op)(*args), expected)


@pytest.mark.parametrize("op", OPERATORS)
def test_global_settings_change_nothing(op, kernel):
    args = samples(op)[0]
    expected = kernel(op)(*args)
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert_same_answer(kernel(op)(*args), expected)
        torch.set_default_dtype(dtype)
        # Fills empty tensors with NaN.
        torch.use_deterministic_algorithms(True)
        assert_same_answer(kernel(op)(*args), expected)
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("op", OPERATORS)
def test_a_default_device_changes_nothing(op):
    args = samples(op)[0]
    expected = overload(op)(*args)
    with torch.device("meta"):
        assert_same_answer(overload(op)(*args), expected)
        assert_same_answer(getattr(vispruner_kernels, op)(*args), expected)


def test_views_with_a_negative_bit():
    # The dispatcher resolves them; a kernel that took the pointer would see the other sign.
    (scores, keep) = samples("select_topk")[0]
    assert_same_bits(
        vispruner_kernels.select_topk(torch._neg_view(scores), keep),
        vispruner_kernels.select_topk(-scores, keep),
    )
