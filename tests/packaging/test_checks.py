"""VISPRUNER_KERNELS_CHECK=1 finds inputs that are not finite and kernels that answer wrongly.

The interpreters here run with -O, which removes assert statements.
"""

from __future__ import annotations

import json

import pytest
import torch
from answers import ANSWER, OPERATORS, default_answers, owners
from fresh import python
from installed import needs_native

from vispruner_kernels import _backends, reference

CHECK = (
    ANSWER
    + """
def error(op, *args, **kwargs):
    try:
        getattr(vk, op)(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)

nan, inf = torch.full_like(scores, torch.nan), features.clone()
inf[1, 99, 32] = -torch.inf
minus = q.clone()
minus[0, 0, 0, 0] = torch.nan
got = {
    "features": error("select", inf, scores, 30),
    "scores": error("prune", features, scores=nan, keep=30),
    "topk": error("select_topk", nan, 30),
    "varlen": error("select_varlen", inf[1], *calls["select_varlen"][1:]),
    "q": error("cls_scores", minus, k),
    "k": error("received_scores", q, minus),
    "v": error("cls_attention", q, k, minus),
    "lse": error("received_scores", q, k, lse=torch.full((2, 3, 40), torch.inf)),
    "argument": error("select", inf, scores, 0),
    "no images": error("select", features[:0], scores[:0], 30),
    "fine": error("select", features, scores, 30),
}
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("error")
    for op in calls:
        args = [x.clone().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x
                for x in calls[op]]
        got[f"gradient {op}"] = error(op, *args)
"""
)


@pytest.fixture(scope="module")
def checked():
    done = python(CHECK + "print(json.dumps(got)); answer()", "-O", VISPRUNER_KERNELS_CHECK="1")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_names_the_argument_that_is_not_finite(checked):
    errors = checked[0]
    for name, op, argument in [
        ("features", "select", "features"),
        ("scores", "prune", "scores"),
        ("topk", "select_topk", "scores"),
        ("varlen", "select_varlen", "features"),
        ("q", "cls_scores", "q"),
        ("k", "received_scores", "k"),
        ("v", "cls_attention", "v"),
        ("lse", "received_scores", "lse"),
    ]:
        assert errors[name] == ["ValueError", f"{op}: {argument} has values that are not finite"]
    assert errors["argument"][1].startswith("select: keep is 0, ")
    assert errors["no images"] is None
    assert errors["fine"] is None


def test_accepts_tensors_that_require_gradients(checked):
    assert {op: checked[0][f"gradient {op}"] for op in OPERATORS} == dict.fromkeys(OPERATORS)


def test_changes_no_answer(checked):
    auto = default_answers()
    assert checked[1]["digests"] == auto["digests"]
    assert "checks             on (VISPRUNER_KERNELS_CHECK)" in checked[1]["report"]
    assert owners(checked[1]["report"]) == owners(auto["report"])


@needs_native
def test_catches_a_broken_kernel_of_every_operator():
    code = (
        CHECK
        + """
from types import SimpleNamespace
real, broken = _native._C, SimpleNamespace()

def by_score_alone(function):
    return lambda rule, **rest: function(rule={**rule, "important_ratio": 1.0}, **rest)

def with_another_scale(function):
    return lambda shape, **rest: function(shape={**shape, "scale": 2 * shape["scale"]}, **rest)

broken.select = by_score_alone(real.select)
broken.select_varlen = by_score_alone(real.select_varlen)
broken.select_topk = broken.select_rows = lambda **arguments: None
broken.cls_scores = with_another_scale(real.cls_scores)
broken.received_scores = with_another_scale(real.received_scores)
broken.received_scores_varlen = with_another_scale(real.received_scores_varlen)
_native.cpu._C = broken
print(json.dumps({op: error(op, *calls[op]) for op in calls}))
"""
    )
    done = python(code, "-O", VISPRUNER_KERNELS_CHECK="1")
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert sorted(errors) == sorted(OPERATORS)
    for op, (kind, message) in errors.items():
        assert kind == "RuntimeError", message
        assert message.startswith(f"{op}: the kernel and the reference disagree: ")


def test_the_check_compares_with_the_reference():
    entry = _backends._compared("select_topk", lambda scores, keep: torch.zeros(1, 2).long())
    with pytest.raises(RuntimeError, match="select_topk: the kernel and the reference disagree"):
        entry(torch.rand(1, 5), 2)
    entry = _backends._compared("select_topk", reference.select_topk)
    assert entry(torch.tensor([[1.0, 3.0, 2.0]]), 2).tolist() == [[1, 2]]
