"""`attach` and `remove`: the changes on a model, and that they are undone."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import vlms
from pruned import (
    GREEDY,
    assert_same,
    method_of,
    real_logits,
)
from vlms import FAMILIES, picture, prompts

from vispruner_kernels.integrations.transformers import attach
from vispruner_kernels.methods import VisPruner


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_refuses_to_copy_or_pickle_a_model_that_prunes(tmp_path):
    model = vlms.make("llava")
    with attach(model, VisPruner(4)):
        with pytest.raises(RuntimeError, match=r"call remove\(\) .* before copying"):
            copy.deepcopy(model)
        with pytest.raises(RuntimeError, match=r"call remove\(\) .* saving it whole"):
            torch.save(model, tmp_path / "model.pt")
        model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    copy.deepcopy(model)


def state(model: Any) -> dict[str, Any]:
    """Public attributes of a model."""
    return {name: value for name, value in vars(model).items() if not name.startswith("_")}


def hooks(model: Any) -> int:
    """Number of hooks and of replaced forwards in a model."""
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m))
        for m in model.modules()
    )


@pytest.mark.parametrize("broken", ["tower", "projector", "language_model", "keep"])
def test_an_exception_leaves_the_model_unchanged(family, broken):
    model = vlms.make(family)
    inputs = prompts(family, [3, picture(family, 1), 5])
    expected = real_logits(model, inputs)
    attributes, count = state(model), hooks(model)
    configs = [id(m.config) for m in model.modules() if hasattr(m, "config")]
    core = model.model
    names = {
        "tower": ("visual", "vision_tower", "image_tower"),
        "projector": ("multi_modal_projector",),
        "language_model": ("language_model",),
        "keep": (),
    }[broken]
    if broken == "projector" and family == "qwen2.5-vl":
        module = core.visual.merger.mlp
    elif broken == "tower" and family == "qwen2.5-vl":
        module = core.visual.blocks[-1].attn.proj
    else:
        module = next((getattr(core, name) for name in names if hasattr(core, name)), None)
        if broken == "tower":
            module = getattr(module, "vision_model", module).post_layernorm

    def fail(module, args):
        raise RuntimeError("broken on purpose")

    hook = module.register_forward_pre_hook(fail) if module is not None else None
    method = method_of(family, 4 if hook else 1000)
    with pytest.raises((RuntimeError, ValueError)), attach(model, method):
        model.generate(**inputs, **GREEDY)
    if hook:
        hook.remove()
    assert state(model) == attributes
    assert hooks(model) == count
    assert [id(m.config) for m in model.modules() if hasattr(m, "config")] == configs
    assert_same(real_logits(model, inputs), expected)


def test_remove_restores_a_forward_that_was_stored_before():
    model = vlms.make("llava")
    inputs = prompts("llava", [3, picture("llava", 1), 5])
    calls = []
    original = model.forward

    def mine(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = mine
    handle = attach(model, VisPruner(4))
    with pytest.raises(RuntimeError, match="already attached"):
        attach(model, VisPruner(5))
    with torch.no_grad():
        assert model(**inputs).logits.shape[1] == 1 + 3 + 4 + 5
    assert calls == [1]
    handle.remove()
    handle.remove()
    assert model.forward is mine
    assert "generate" not in vars(model)
