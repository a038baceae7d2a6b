"""The operators that the C++ core registers in PyTorch: a call has the answer, the error and the
memory of the function of Python that would be registered otherwise."""

from __future__ import annotations

import ctypes
import json
import math
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import arguments, leaves, overload
from fresh import python
from torch import Tensor

import vispruner_kernels
from vispruner_kernels import _backends, _native
from vispruner_kernels._native import registration

OPS = sorted(op for op, device in _backends.FROM_CPP if device == "cpu")
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
EXPECTED = _native.INSTALLED and sys.platform == "linux" and VERSION >= (2, 10)
needs_registration = pytest.mark.skipif(not OPS, reason="no operator is registered from C++")


@pytest.mark.skipif(not EXPECTED, reason="PyTorch is older than 2.10, or there is no C++ core")
def test_this_pytorch_has_every_function():
    assert registration.REASON == ""
    every = {("select", "cpu"), ("prune", "cpu"), ("select_topk", "cpu"), ("cls_scores", "cpu")}
    assert every <= registration.OPERATORS
    by_python = _backends.CHECKED or _backends.BY_PYTHON
    if _backends.REQUESTED in ("auto", "native") and not by_python:
        assert every <= _backends.FROM_CPP


def in_python(op: str) -> Callable[..., Any]:
    return _backends._checked(op, _backends._implementation(op, "native"))


def outcome(call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The bits of the answer, or the error."""
    try:
        answer = call(*args)
    except (TypeError, ValueError) as error:
        return type(error), str(error)
    return [(x.shape, x.stride(), x.dtype, x.view(torch.uint8).tolist()) for x in leaves(answer)]


INTS = (-(2**63), -1, 0, 1, 2, 3, 5, 8, 2**31, 2**32 + 1, 2**62, 2**63 - 1)
FLOATS = (0.0, -0.0, 0.25, 0.5, 1.0, 1.0000001, -1e-9, 5e-324, math.inf, -math.inf, math.nan)
SCALES = (None, *FLOATS, 3.4028234663852886e38, 3.4028234663852890e38, -3.5e38, 1e300)
MATCHINGS = ("bipartite", "pairwise", "", "Pairwise", "bipartite\0", "bipartite ", "pairwise\0x")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool)


def any_tensor(rng: random.Random, sizes: list[int], dtype: torch.dtype) -> Tensor:
    """A tensor of about these sizes, in any layout, sometimes with memory missing or misaligned."""
    if rng.random() < 0.1:
        sizes = [*sizes, 1] if rng.random() < 0.5 else sizes[1:]
    sizes = [rng.choice([0, 1, n + 1, n]) if rng.random() < 0.05 else n for n in sizes]
    generator = torch.Generator().manual_seed(rng.getrandbits(30))
    x = torch.randn(sizes, generator=generator).to(dtype)
    layout = rng.choice(["", "", "", "", "", "last", "first", "transposed", "expanded", "offset"])
    if layout == "last":
        return x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x
    if layout == "first":
        return torch.cat([x, x], 1)[:, : x.shape[1]] if x.dim() > 1 else x
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x
    if layout == "expanded":
        return x[:1].expand(x.shape) if x.dim() and len(x) else x
    if layout == "offset":
        memory = torch.zeros(x.numel() * x.element_size() + 16, dtype=torch.uint8)
        shift = rng.choice([1, 2, 4, 8])
        target = torch.empty(0, dtype=dtype).set_(
            memory.untyped_storage(), 0, x.shape, x.contiguous().stride()
        )
        target.copy_(x)
        if dtype.itemsize <= shift:
            return (
                memory[shift:]
                .view(torch.uint8)[: x.numel() * x.element_size()]
                .view(dtype)
                .view(x.shape)
            )
        return target
    if rng.random() < 0.05 and not layout:
        x = x.clone()
        x.untyped_storage().resize_(rng.randrange(x.untyped_storage().nbytes() + 1))
    return x


def mostly(rng: random.Random, usual: Any, others: tuple[Any, ...]) -> Any:
    return rng.choice(others) if rng.random() < 0.1 else usual


def any_call(op: str, seed: int) -> tuple[Any, ...]:
    rng = random.Random(seed)
    dtype = mostly(rng, rng.choice(DTYPES[:3]), DTYPES)
    if op == "cls_scores":
        sizes = [rng.choice([1, 2]), rng.randrange(2, 9), rng.choice([1, 3]), rng.choice([1, 2, 8])]
        q = any_tensor(rng, sizes, dtype)
        k = any_tensor(rng, sizes, mostly(rng, dtype, DTYPES))
        return q, k, rng.choice(SCALES), mostly(rng, 1, INTS)
    images, tokens = rng.choice([1, 2]), rng.randrange(1, 9)
    scores = any_tensor(rng, [images, tokens], mostly(rng, dtype, DTYPES))
    keep = mostly(rng, rng.randrange(1, tokens + 1), INTS)
    if op == "select_topk":
        return scores, keep
    features = any_tensor(rng, [images, tokens, rng.choice([1, 2, 5])], dtype)
    rule = (
        mostly(rng, rng.random(), FLOATS),
        mostly(rng, 2, INTS),
        mostly(rng, "pairwise", MATCHINGS),
    )
    return features, scores, keep, *rule


@needs_registration
@pytest.mark.parametrize("op", OPS)
def test_any_call_ends_as_in_python(op):
    answers = errors = 0
    for seed in range(3000):
        args = any_call(op, seed)
        expected = outcome(in_python(op), args)
        assert outcome(overload(op), args) == expected, f"seed {seed}: {args}"
        answers += isinstance(expected, list)
        errors += isinstance(expected, tuple)
    assert min(answers, errors) > 500


@needs_registration
@pytest.mark.parametrize("op", OPS)
def test_calls_that_are_not_surely_valid_reach_python(op):
    # No images: Python answers.
    args = [x[:0] if isinstance(x, Tensor) else x for x in arguments(op).values()]
    for got, expected in zip(
        leaves(overload(op)(*args)), leaves(in_python(op)(*args)), strict=True
    ):
        assert got.shape == expected.shape
        assert got.shape[0] == 0


class Duck:
    """No tensor, but PyTorch calls its method instead of an operator."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("called")


@pytest.mark.parametrize("op", ["select", "prune", "select_topk", "cls_scores"])
def test_an_object_like_a_tensor_is_refused_by_functions(op):
    required = {"select": 3, "prune": 3, "select_topk": 2, "cls_scores": 2}[op]
    args = list(arguments(op).values())
    function = getattr(vispruner_kernels, op)
    for i, x in enumerate(args):
        if isinstance(x, Tensor):
            wrong = [*args[:i], Duck(), *args[i + 1 :]]
            with torch.inference_mode():
                for given in (wrong, wrong[:required]):
                    with pytest.raises(TypeError, match="of type Duck, expected a Tensor"):
                        function(*given)


def output(code: str) -> list[str]:
    done = python(code)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


class Usage(ctypes.Structure):
    """`struct mallinfo2` of <malloc.h>."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")
    ] + [(name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")]


def bytes_in_use() -> int:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Usage
    usage = mallinfo2()
    return usage.uordblks + usage.hblkhd


def cases_of_memory(op: str) -> dict[str, tuple[Any, ...]]:
    args = list(arguments(op).values())
    double = [x.double() if isinstance(x, Tensor) else x for x in args]
    none = [x[:0] if isinstance(x, Tensor) else x for x in args]
    cases = {"answer": args, "error": double, "no images": none}
    if op == "cls_scores":
        cases["scale"] = [*args[:2], 0.25, 1]
    return {name: tuple(case) for name, case in cases.items()}


@needs_registration
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
@pytest.mark.parametrize("op", OPS)
def test_calls_leave_no_memory_behind(op):
    # One handle of a tensor has 8 bytes, and the C library gives at least 24 to anything.
    calls = 4000
    for name, args in cases_of_memory(op).items():
        for _ in range(200):
            outcome(overload(op), args)
        before = bytes_in_use()
        for _ in range(calls):
            # New tensors, because those that a call keeps alive would be no new memory.
            outcome(overload(op), tuple(x[:] if isinstance(x, Tensor) else x for x in args))
        assert bytes_in_use() - before < 24 * calls / 4, name


CODE = """
import json, traceback
import torch
from vispruner_kernels import _native, _schemas
from vispruner_kernels._native import registration

class Own(BaseException):
    def __str__(self):
        raise KeyError("no text")

error = Own("mine")

def refuse(*args):
    seen.append(args)
    raise error

def answer(*args):
    return "no tensor"

core = _native._C
library = torch.library.Library("probe", "DEF")
library.define("select" + _schemas.SCHEMAS["select"].signature)
def register(function):
    core.register_operator(
        device="cpu", name="select", library="probe", key="CPU", function=function
    )
seen = []
register(refuse)
features = torch.zeros(0, 3, 2)
try:
    torch.ops.probe.select(features, features[:, :, 0], 2, matching="pairw\\0ise", step=7)
except Own as caught:
    same = caught is error
    lines = "".join(traceback.format_tb(caught.__traceback__))
(args,) = seen
result = {
    "same": same, "frame": "in refuse" in lines, "own tensor": args[0] is features,
    "rest": args[2:],
}
for name, wrong in {"key": {"key": "NoKey"}, "name": {"name": "nothing"}}.items():
    options = {"device": "cpu", "name": "select", "library": "probe", "key": "CPU"}
    try:
        core.register_operator(**{**options, **wrong}, function=answer)
    except (RuntimeError, ValueError) as caught:
        result[name] = f"{type(caught).__name__}: {caught}"
print(json.dumps(result))
"""


@needs_registration
def test_any_exception_of_python_reaches_the_caller():
    got = json.loads(output(CODE)[-1])
    assert got["same"]
    assert got["frame"]
    assert got["own tensor"]
    assert got["rest"] == [2, 0.5, 7, "pairw\0ise"]
    assert got["key"] == "RuntimeError: PyTorch refuses the operator select"
    assert got["name"] == "ValueError: no operator nothing for cpu"


ASKED = """
from vispruner_kernels import __main__, _backends
print(sorted(_backends.FROM_CPP))
print(next(x for x in __main__.report().splitlines() if x.startswith("registration")))
"""


@pytest.mark.parametrize(
    "variables", [{"VISPRUNER_KERNELS_REGISTRATION": "python"}, {"VISPRUNER_KERNELS_CHECK": "1"}]
)
def test_python_registers_everything_if_asked(variables):
    done = python(ASKED, **variables)
    assert done.returncode == 0, done.stderr
    operators, state = done.stdout.splitlines()
    assert operators == "[]"
    if "VISPRUNER_KERNELS_REGISTRATION" in variables:
        assert state.split(maxsplit=1)[1] == "by Python (VISPRUNER_KERNELS_REGISTRATION)"


MISSING = """
import torch
del torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs
import vispruner_kernels
from vispruner_kernels import __main__, _backends
from vispruner_kernels._native import registration
print(registration.REASON)
print(sorted(_backends.FROM_CPP))
print(vispruner_kernels.select_topk(torch.tensor([[1.0, 3.0, 2.0]]), 2).tolist())
print(next(x for x in __main__.report().splitlines() if x.startswith("registration")))
"""


@pytest.mark.skipif(not EXPECTED, reason="PyTorch is older than 2.10, or there is no C++ core")
def test_without_a_function_of_pytorch_operators_are_registered_by_python():
    reason, operators, answer, state = output(MISSING)
    assert reason.startswith(f"PyTorch {torch.__version__}: ")
    assert "alloc_tensors_by_stealing_from_void_ptrs" in reason
    assert operators == "[]"
    assert answer == "[[1, 2]]"
    assert state.split(maxsplit=1)[1] == f"by Python, slower to call: {reason}"


@needs_registration
def test_a_library_without_the_functions_is_named():
    with pytest.raises(RuntimeError, match="PyTorch has no aoti_torch_library_init_impl"):
        registration.load(_native._C, "/nonexistent.so", "")
