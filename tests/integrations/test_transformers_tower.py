"""The run of the vision tower: its layers, its attention, gradients, threads."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
import torch

pytest.importorskip("transformers")

import vlm_oracle
import vlms
from pruned import assert_same, methods, real_logits, recording, scores_of
from vlms import FAMILIES, picture, prompts

from vispruner_kernels.integrations.transformers import prune_inputs
from vispruner_kernels.methods import FasterVLM, FoPru, Random, VisPruner

TOWERS = ("visual", "vision_tower", "image_tower")


@pytest.mark.parametrize("family", FAMILIES)
def test_only_kept_tokens_are_projected(family):
    model = vlms.shared(family)
    core = model.model
    projector = core.visual.merger.mlp if family == "qwen2.5-vl" else core.multi_modal_projector
    size = (40, 56) if family == "llava-onevision" else None
    inputs = prompts(family, [3, picture(family, 1, size), 2])
    rows = []
    hook = projector.register_forward_pre_hook(lambda m, args: rows.append(args[0]))
    method = VisPruner(4, scores=scores_of(family))
    prune_inputs(model, inputs, method, newlines="drop")
    hook.remove()
    assert [len(x) for x in rows] == [4]


@pytest.mark.parametrize(("index", "runs"), [(-2, 2), (-1, 3), (1, 1)])
def test_layers_after_the_captured_one_do_not_run(index, runs, monkeypatch):
    model = vlms.make("llava", vision_feature_layer=index)
    tower = model.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    ran = []
    # Replace the forward of the class: a hook or a forward on a layer would make all layers run.
    mlps = {layer.mlp: i for i, layer in enumerate(layers)}
    cls = type(layers[0].mlp)
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda mlp, x: (ran.append(mlps[mlp]), forward(mlp, x))[1])
    inputs = prompts("llava", [3, picture("llava", 1), 5])
    prune_inputs(model, inputs, VisPruner(4))
    assert ran == [*range(runs)]
    ran.clear()
    real_logits(model, inputs)
    assert ran == [0, 1, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_one_layer_changes_its_attention(family, monkeypatch):
    model = vlms.shared(family)
    tower = next(getattr(model.model, name) for name in TOWERS if hasattr(model.model, name))
    kind = "attn" if family == "qwen2.5-vl" else "self_attn"
    modules = [m for name, m in tower.named_modules() if name.endswith(f".{kind}")]
    before = [(m.config, m.config._attn_implementation, dict(vars(m.config))) for m in modules]
    used, outputs, inputs = [], [], prompts(family, [picture(family, 1)])

    cls = type(modules[0])
    forward = cls.forward

    def note(module, *args, **kwargs):
        out = forward(module, *args, **kwargs)
        used.append(module.config._attn_implementation)
        outputs.append(out)
        return out

    # Replace the forward of the class: a hook or a forward on a layer would make all layers run.
    monkeypatch.setattr(cls, "forward", note)
    prune_inputs(model, inputs, methods(family)[0])
    target = {"llava-onevision": -1, "llava-siglip": -1, "qwen2.5-vl": -1}.get(family, -2)
    count = len(modules) if target == -1 else len(modules) - 1
    assert used == ["sdpa"] * (count - 1) + ["vispruner_sdpa"]
    # No layer makes an attention map.
    assert all(out[1] is None for out in outputs if isinstance(out, tuple))
    for module, (config, name, content) in zip(modules, before, strict=True):
        assert module.config is config
        assert (config._attn_implementation, vars(config)) == (name, content)


def test_the_tower_keeps_its_attention_dropout():
    """With dropout the layer runs its own attention, and scores are computed beside it."""
    model = vlms.make("llava", vision_config__attention_dropout=0.5).train()
    inputs = prompts("llava", [3, picture("llava", 1), 5])
    features = []
    method = recording(4)
    with torch.no_grad():
        for _ in range(2):
            torch.manual_seed(0)
            prune_inputs(model, inputs, method)
            torch.manual_seed(0)
            out = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
            features.append(out.hidden_states[-2][:, 1:])
    for (read, _, _), expected in zip(method.calls, features, strict=True):
        assert torch.equal(read, expected)


@pytest.mark.parametrize("index", [1, 2, 3, -1, -3])
def test_captures_the_requested_layer(index):
    model = vlms.make("llava", vision_feature_layer=index)
    inputs = prompts("llava", [3, picture("llava", 1), 2])
    for method in (VisPruner(5), FasterVLM(5, scores="received")):
        pruned = prune_inputs(model, inputs, method)
        (grids,) = vlm_oracle.grids_of(vlm_oracle.eager(model), inputs, "image", method.needs)
        assert torch.equal(pruned.kept[0], vlm_oracle.select(grids, 16, method, False))
    # An argument of the call selects the layer too.
    other = vlms.make("llava")
    called = prune_inputs(other, inputs | {"vision_feature_layer": index}, method)
    assert torch.equal(called.kept[0], pruned.kept[0])


def test_scores_of_windowed_attention_are_sums():
    """Windows differ in size: sums of received attention are comparable there, means are not."""
    model = vlms.make("qwen2.5-vl", vision_config__fullatt_block_indexes=[1])
    inputs = prompts("qwen2.5-vl", [picture("qwen2.5-vl", 1, (6, 10)), 3])
    for method in (FoPru(7), VisPruner(7, scores="received")):
        (kept,) = prune_inputs(model, inputs, method).kept
        (grids,) = vlm_oracle.grids_of(vlm_oracle.eager(model), inputs, "image", "received")
        assert torch.equal(kept, vlm_oracle.select(grids, 15, method, False))


@pytest.mark.parametrize("full", [[2], [0]])
def test_packed_images_stay_packed_for_flash_attention(full):
    """An implementation with "flash" in its name gets all images in one call, in every layer."""
    from transformers import AttentionInterface

    shapes = []

    def flash(module, q, k, v, attention_mask=None, scaling=None, cu_seq_lens_q=None, **_):
        # flash_attention_forward reads the config to find its kernel.
        assert module.config._attn_implementation == "tests_flash"
        shapes.append(tuple(q.shape))
        mask = torch.zeros(q.shape[2], q.shape[2], dtype=torch.bool)
        for start, stop in pairwise(cu_seq_lens_q.tolist()):
            mask[start:stop, start:stop] = True
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scaling)
        return out.transpose(1, 2), None

    AttentionInterface.register("tests_flash", flash)
    rows = [[picture("qwen2.5-vl", i, size), 3] for i, size in enumerate([(4, 8), (6, 10)])]
    inputs = prompts("qwen2.5-vl", *rows)
    method = VisPruner(5, scores="received")
    model = vlms.make("qwen2.5-vl", vision_config__fullatt_block_indexes=full)
    expected = prune_inputs(model, inputs, method)
    model.model.visual.config._attn_implementation = "tests_flash"
    pruned = prune_inputs(model, inputs, method)
    assert shapes == [(1, 2, 32 + 60, 16)] * 3
    assert all(torch.equal(a, b) for a, b in zip(pruned.kept, expected.kept, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_tower_through_kept_tokens(family):
    model = vlms.make(family)
    inputs = prompts(family, [3, picture(family, 1), 5])
    inputs["labels"] = inputs["input_ids"].clone()
    pruned = prune_inputs(model, inputs, methods(family)[0])
    model(**pruned).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("projector" in name or "merger" in name for name in grads)
    assert any("layers.0" in name and "lang" not in name for name in grads) or any(
        "blocks.0" in name for name in grads
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_an_eager_tower_equal_those_of_dropping_by_hand(family, checkpointing):
    """The same holds with gradient checkpointing, which runs layers again."""
    model = vlms.make(family)
    core = model.model
    tower = next(getattr(core, n) for n in TOWERS if hasattr(core, n))
    tower.set_attn_implementation("eager")
    if checkpointing:
        # transformers 5 renamed the method.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        next(getattr(model, name) for name in names if hasattr(model, name))()
        model.train()
    inputs = prompts(family, [3, picture(family, 1), 5])
    method = methods(family)[0]
    pruned = prune_inputs(model, inputs, method)
    model(**pruned).logits.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.eval()
    model.zero_grad()
    # Drop the same tokens from the model's own features.
    kept = pruned.kept[0]
    names = ("image_sizes", "image_grid_thw", "batch_num_images")
    rest = {name: inputs[name] for name in names if name in inputs}
    pixels = inputs.get("pixel_values", inputs.get("pixel_values_images"))
    image = model.model.get_image_features(pixels, **rest, return_dict=True).pooler_output[0]
    ids = pruned.input_ids[0]
    embeds = model.get_input_embeddings()(ids).index_put(
        ((ids == vlms.IMAGE).nonzero()[:, 0],), image[kept]
    )
    positions = pruned.get("position_ids")
    model(inputs_embeds=embeds[None], position_ids=positions).logits.square().sum().backward()
    assert any("layers.0" in name or "blocks.0" in name for name in grads)
    for name, p in model.named_parameters():
        if p.grad is not None:
            bound = 1e-3 * float(p.grad.abs().max()) + 1e-6
            torch.testing.assert_close(grads[name], p.grad, rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize(("family", "side"), [("llava", 24), ("qwen2.5-vl", 4)])
def test_threads_do_not_notice_each_other(family, side):
    """Four threads prune, and one runs the model without pruning."""
    model = vlms.make(family, side)
    inputs = [prompts(family, [3, picture(family, seed, side=side), 5]) for seed in range(4)]
    chosen = [VisPruner(5, scores=scores_of(family)), FoPru(5), Random(5), FoPru(4)]
    expected = [prune_inputs(model, x, m) for x, m in zip(inputs, chosen, strict=True)]
    with torch.no_grad():
        unpruned = model(**inputs[0]).logits
    failures: list[object] = []

    def work(i: int) -> None:
        try:
            for _ in range(12):
                with torch.no_grad():
                    if i == 4:
                        same = torch.equal(model(**inputs[0]).logits, unpruned)
                    else:
                        pruned = prune_inputs(model, inputs[i], chosen[i])
                        embeds = expected[i]["inputs_embeds"]
                        same = torch.equal(pruned["inputs_embeds"], embeds)
                if not same:
                    failures.append(i)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_another_thread_may_run_the_model_during_a_capture():
    """Its features and scores are not captured, and all its layers run."""
    model = vlms.make("llava")
    ours, other = (prompts("llava", [3, picture("llava", seed), 5]) for seed in (1, 2))
    expected = prune_inputs(model, ours, VisPruner(5))
    unpruned = real_logits(model, other)
    tower = model.model.vision_tower
    last = getattr(tower, "vision_model", tower).encoder.layers[-1]
    here, found = threading.get_ident(), []

    def meanwhile(module, args):
        if threading.get_ident() == here:
            thread = threading.Thread(target=lambda: found.append(real_logits(model, other)))
            thread.start()
            thread.join()

    hook = last.register_forward_pre_hook(meanwhile)
    pruned = prune_inputs(model, ours, VisPruner(5))
    hook.remove()
    assert torch.equal(pruned["inputs_embeds"], expected["inputs_embeds"])
    assert_same(found[0], unpruned)
