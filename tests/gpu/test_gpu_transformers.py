"""The transformers integration on a GPU: same tokens as the CPU reference, no waits of the host."""

from __future__ import annotations

import gpu
import pytest
import torch
from gpu import DEVICE, SIMULATED, needs_cuda

pytest.importorskip("transformers", minversion="5.3")

import vlms
from pruned import methods, recording, scores_of, several

from vispruner_kernels import reference
from vispruner_kernels.integrations.transformers import attach, prune_inputs
from vispruner_kernels.methods import VisPruner

pytestmark = gpu.marks
watch = gpu.watch

FAMILIES = ["llava", "qwen2.5-vl"] if SIMULATED else vlms.FAMILIES


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return vlms.make(family).to(DEVICE)


def inputs_of(family: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    inputs = {name: x.to(DEVICE) for name, x in several(family).items()}
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def test_keeping_all_changes_nothing(family, model):
    inputs = inputs_of(family)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits[real]
        for method in methods(family, 1.0)[: 2 if SIMULATED else None]:
            logits = model(**prune_inputs(model, inputs, method)).logits[real]
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_indices_equal_those_of_the_reference_on_the_cpu(family, dtype):
    model = vlms.make(family).to(DEVICE, dtype)
    method = recording(5, scores=scores_of(family))
    prune_inputs(model, inputs_of(family, dtype), method)
    assert method.calls
    for features, scores, kept in method.calls:
        expected = reference.select(features.cpu(), scores.cpu(), 5)
        assert torch.equal(kept.cpu(), expected)


def test_generates_the_same_tokens_twice(family, model):
    inputs = inputs_of(family)
    length = inputs["input_ids"].shape[1]
    with attach(model, VisPruner(4, scores=scores_of(family))):
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        again = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(tokens[:, :length], inputs["input_ids"])
    assert torch.equal(tokens, again)
    assert tokens.shape[1] == length + 3


@needs_cuda
def test_the_host_does_not_wait_after_the_tower_has_started(family, model):
    """So the selection is queued behind the tower. Interpolated images are left out, because the
    model's own packing copies a list to the device."""
    size = (50, 100) if family == "llava-onevision" else None
    parts = [3, vlms.picture(family, 1, size), 5], [6]
    inputs = {name: x.to(DEVICE) for name, x in vlms.prompts(family, *parts).items()}
    core = model.model
    tower = next(
        getattr(core, n) for n in ("visual", "vision_tower", "image_tower") if hasattr(core, n)
    )
    method = VisPruner(4, scores=scores_of(family))
    prune_inputs(model, inputs, method)

    def strict(module, args, out):
        torch.cuda.set_sync_debug_mode("error")

    hook = tower.register_forward_hook(strict)
    try:
        prune_inputs(model, inputs, method)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        hook.remove()
