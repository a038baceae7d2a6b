"""The operators under torch.compile and torch.export."""

from __future__ import annotations

import pytest
import torch
from calls import (
    CASES,
    OPERATORS,
    assert_same_answer,
    compiled,
    overload,
    samples,
)
from torch import Tensor

import vispruner_kernels


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("op", "number"), CASES)
def test_compiled_functions_give_the_same_answer(op, number, dynamic):
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
    # With static shapes the same calls recompile.
    again = compiled(lambda *args: function(*args), dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        again(*samples(op, size=0)[0])
        with pytest.raises(torch._dynamo.exc.RecompileError):
            again(*samples(op, size=1)[0])


@pytest.mark.parametrize("op", ["select", "prune", "select_topk"])
def test_another_keep_compiles_once_more_at_most(op):
    # Without dynamic=True, the second value makes `keep` dynamic; no later value recompiles.
    function = getattr(vispruner_kernels, op)
    again = compiled(lambda *args: function(*args), dynamic=None)
    *inputs, _ = samples(op)[0]
    for number, keep in enumerate((5, 6, 7, 18)):
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            assert_same_answer(again(*inputs, keep), function(*inputs, keep))


def test_inductor_gives_the_same_answer():
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


def test_a_compiled_function_may_take_keep_from_data():
    def function(scores, mask):
        return vispruner_kernels.select_topk(scores, mask.sum().item())

    (scores, _) = samples("select_topk")[0]
    masks = {keep: torch.arange(30) < keep for keep in (3, 4, 19, 20)}
    again = compiled(function, dynamic=None)
    with torch._dynamo.config.patch(capture_scalar_outputs=True, error_on_recompile=True):
        for keep in (3, 4, 19):
            assert_same_answer(again(scores, masks[keep]), function(scores, masks[keep]))
        # The fake cannot know this value; the kernel checks it.
        with pytest.raises(ValueError, match="select_topk: keep is 20, expected 1 <= keep <= 19"):
            again(scores, masks[20])


class Select(torch.nn.Module):
    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, features: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        indices = torch.ops.vispruner.select(features, scores, self.keep)
        return indices, vispruner_kernels.select(features, scores, self.keep, matching="pairwise")


def test_an_exported_program_gives_the_same_answer():
    (features, scores, keep) = samples("select")[0]
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", min=keep, max=16384)
    shapes = {0: batch, 1: tokens}
    program = torch.export.export(Select(keep), (features, scores), dynamic_shapes=(shapes, shapes))
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.vispruner.select.default) == 2
    for size in range(3):
        features, scores, _ = samples("select", size=size)[0]
        assert_same_answer(program.module()(features, scores), Select(keep)(features, scores))
