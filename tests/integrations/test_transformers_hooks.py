"""Hooks of users and replaced forwards in a model that prunes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import vlm_oracle
import vlms
from pruned import assert_same, method_of, scores_of
from vlms import FAMILIES, picture, prompts

from vispruner_kernels.integrations.transformers import prune_inputs
from vispruner_kernels.methods import Random, VisPruner


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def tower_of(model: Any) -> Any:
    names = ("visual", "vision_tower", "image_tower")
    return next(getattr(model.model, name) for name in names if hasattr(model.model, name))


def layers_of(tower: Any) -> Any:
    if hasattr(tower, "blocks"):
        return tower.blocks
    return getattr(tower, "vision_model", tower).encoder.layers


def test_hooks_in_an_eager_tower_get_the_unpruned_values(family):
    """The hooks get every layer's attention map and output, including those of later layers."""
    model = vlm_oracle.eager(vlms.shared(family))
    inputs = prompts(family, [3, picture(family, 1), 5])
    layers = layers_of(tower_of(model))
    seen: dict[int, list[Tensor]] = {}

    def note(number: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen.setdefault(number, []).extend(x for x in output if isinstance(x, Tensor))

        return hook

    watched = [m for x in layers for m in (getattr(x, "self_attn", None) or x.attn, x.mlp)]
    hooks = [module.register_forward_hook(note(i)) for i, module in enumerate(watched)]
    with torch.no_grad():
        model(**inputs)
    expected = dict(seen)
    seen.clear()
    pruned = prune_inputs(model, inputs, method_of(family))
    for hook in hooks:
        hook.remove()
    assert sorted(seen) == sorted(expected) == [*range(len(watched))]
    for number, tensors in expected.items():
        assert_same(seen[number], tensors)
    # The hooks do not change the kept tokens.
    again = prune_inputs(model, inputs, method_of(family))
    assert torch.equal(again.kept[0], pruned.kept[0])


def test_a_hook_on_the_tower_gets_its_output():
    model, inputs = vlms.make("llava"), prompts("llava", [3, picture("llava", 1), 5])
    seen: list[Tensor] = []
    hook = tower_of(model).register_forward_hook(
        lambda module, args, out: seen.append(out.pooler_output)
    )
    with torch.no_grad():
        model(**inputs)
    prune_inputs(model, inputs, VisPruner(4))
    hook.remove()
    assert_same(seen[1:], seen[:1])


@pytest.mark.parametrize("how", ["hook", "layer", "forward"])
@pytest.mark.parametrize("name", ["llava", "llava-onevision", "video-llava"])
def test_changes_by_users_in_the_tower_take_effect(name, how):
    """With a hook on the tower, a hook on its last layer, or a replaced forward."""
    model, inputs = vlms.make(name), prompts(name, [3, picture(name, 1), 5])
    tower = tower_of(model)

    def change(out: Any) -> Any:
        out.hidden_states = tuple(None if x is None else 2 * x for x in out.hidden_states)
        return out

    seen: list[Any] = []
    if how == "hook":
        tower.register_forward_hook(lambda module, args, out: change(out))
    elif how == "layer":
        layers_of(tower)[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    else:
        forward = tower.forward
        tower.forward = lambda *args, **kwargs: change(forward(*args, **kwargs))
    with torch.no_grad():
        expected = model(**inputs).logits
    kept = VisPruner(1.0, scores=scores_of(name))
    with torch.no_grad():
        assert_same([model(**prune_inputs(model, inputs, kept)).logits], [expected])
    assert len(seen) == (2 if how == "layer" else 0)


def test_global_hooks_run_on_all_modules_of_the_tower():
    model, inputs = vlms.make("llava"), prompts("llava", [3, picture("llava", 1), 5])
    tower, seen = tower_of(model), []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(module)
    )
    prune_inputs(model, inputs, VisPruner(4))
    hook.remove()
    assert {*layers_of(tower).modules()} - {layers_of(tower)} <= {*seen}


@pytest.mark.parametrize("which", ["tower", "merger"])
def test_refuses_hooks_on_the_tower_or_merger_of_qwen(which):
    model = vlms.make("qwen2.5-vl")
    inputs = prompts("qwen2.5-vl", [3, picture("qwen2.5-vl", 1), 5])
    tower = tower_of(model)
    hook = (tower if which == "tower" else tower.merger).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"hooks on the vision tower .* or on its merger"):
        prune_inputs(model, inputs, Random(4))
    hook.remove()
    assert len(prune_inputs(model, inputs, Random(4)).kept[0]) == 4


@pytest.mark.parametrize("how", ["here", "in a thread"])
@pytest.mark.parametrize("same", [True, False])
def test_a_hook_in_the_tower_may_prune(how, same):
    """The two calls do not wait for each other, and do not mix scores or features."""
    model = vlms.make("llava")
    other = model if same else vlms.make("llava", seed=1)
    inputs, inner = (prompts("llava", [3, picture("llava", seed), 5]) for seed in (1, 2))
    expected = [prune_inputs(m, x, VisPruner(4)).kept for m, x in ((model, inputs), (other, inner))]
    found: list[Any] = []

    def hook(module: Any, args: Any) -> None:
        if not found:
            found.append(None)
            work = lambda: found.append(prune_inputs(other, inner, VisPruner(4)).kept)  # noqa: E731
            if how == "here":
                return work()
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            thread.join(60)
        return None

    # In the captured layer, before its attention.
    attention = layers_of(tower_of(model))[-2].self_attn
    handle = attention.register_forward_pre_hook(hook)
    kept = prune_inputs(model, inputs, VisPruner(4)).kept
    handle.remove()
    assert len(found) == 2
    assert torch.equal(found[1][0], expected[1][0])
    assert torch.equal(kept[0], expected[0][0])


def test_a_hook_may_run_the_model_during_captures_of_two_models():
    """The model's attention is replaced, but the active capture is that of the other model."""
    models = [vlms.make("llava", seed=seed) for seed in (0, 1)]
    inputs = [prompts("llava", [3, picture("llava", seed), 5]) for seed in (1, 2)]
    expected = [
        prune_inputs(m, x, VisPruner(4)).kept[0] for m, x in zip(models, inputs, strict=True)
    ]
    with torch.no_grad():
        logits = models[0](**inputs[0]).logits
    found: list[Any] = []

    def once(work: Any) -> Any:
        calls: list[int] = []

        def hook(module: Any, args: Any) -> None:
            if not calls:
                calls.append(1)
                found.append(work())

        return hook

    def plain() -> Tensor:
        with torch.no_grad():
            return models[0](**inputs[0]).logits

    inner = lambda: prune_inputs(models[1], inputs[1], VisPruner(4)).kept[0]  # noqa: E731
    for model, work in zip(models, (inner, plain), strict=True):
        layers_of(tower_of(model))[-2].self_attn.register_forward_pre_hook(once(work))
    kept = prune_inputs(models[0], inputs[0], VisPruner(4)).kept[0]
    assert torch.equal(kept, expected[0])
    assert torch.equal(found[1], expected[1])
    assert_same([found[0]], [logits])
