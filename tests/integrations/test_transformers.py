"""Pruning of five model families of transformers: what is kept, and that the logits are those of
the model without the dropped tokens."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import vlm_oracle
import vlms
from pruned import assert_same, methods, real_logits, recording, scores_of, several
from vlms import FAMILIES, picture, prompts

from vispruner_kernels import reference
from vispruner_kernels.integrations.transformers import prune_inputs
from vispruner_kernels.methods import FasterVLM, FoPru, Random, VisPruner

VIDEOS = ["video-llava", "llava-onevision", "qwen2.5-vl"]
CASES = {
    **{f"{family}, one image": (family, "one") for family in FAMILIES},
    **{f"{family}, several": (family, "several") for family in FAMILIES},
    **{f"{family}, padded right": (family, "right") for family in FAMILIES},
    **{f"{family}, videos": (family, "videos") for family in VIDEOS},
    "llava-next, wide": ("llava-next", "wide"),
    "llava-next, square": ("llava-next", "square"),
    "llava-onevision, small": ("llava-onevision", "small"),
    "qwen2.5-vl, sizes": ("qwen2.5-vl", "sizes"),
}


def inputs_of(case: str) -> tuple[str, dict[str, Tensor]]:
    family, what = CASES[case]
    if what == "one":
        return family, prompts(family, [4, picture(family, 5), 6])
    if what == "several":
        return family, several(family)
    if what == "right":
        return family, several(family, "right", extra=3)
    if what == "videos":
        video, other = picture(family, 6, frames=3), picture(family, 7, frames=3)
        image = picture(family, 8)
        return family, prompts(family, [2, video, 3], [1, image, 2, other, 7])
    sizes = {
        "wide": [(30, 150), (40, 56)],
        "square": [(112, 112)],
        "small": [(50, 100), (100, 50)],
        "sizes": [(4, 4), (6, 10), (10, 8)],
    }[what]
    rows = [[2 + i, picture(family, 9 + i, size), 3] for i, size in enumerate(sizes)]
    return family, prompts(family, *rows)


@pytest.mark.parametrize("case", CASES)
def test_keeping_all_changes_nothing(case):
    family, inputs = inputs_of(case)
    model = vlms.shared(family)
    expected = real_logits(model, inputs)
    for method in methods(family, 1.0):
        pruned = prune_inputs(model, inputs, method)
        assert_same(real_logits(model, pruned), expected)
        assert pruned.removed.sum() == 0


def kinds_of(inputs: dict[str, Tensor]) -> list[str]:
    images = "pixel_values" in inputs or "pixel_values_images" in inputs
    return ["image"] * images + ["video"] * ("pixel_values_videos" in inputs)


@pytest.mark.parametrize("budget", ["image", "tile"])
@pytest.mark.parametrize("newlines", ["keep", "drop"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_dropping_by_hand(case, budget, newlines):
    family, inputs = inputs_of(case)
    model, method = vlms.shared(family), VisPruner(4, scores=scores_of(family))
    if budget == "tile" and family == "llava-onevision" and CASES[case][1] != "small":
        pytest.skip("interpolated images have no tiles: test_transformers_errors.py")
    pruned = prune_inputs(model, inputs, method, budget=budget, newlines=newlines)
    expected = vlm_oracle.logits(vlm_oracle.eager(model), inputs, pruned.kept)
    assert_same(real_logits(model, pruned), expected)
    lost = sum(len(x) for x in vlm_oracle.logits(model, inputs, _all(model, inputs)))
    assert pruned.removed.sum() == lost - sum(map(len, expected)) > 0


def _all(model, inputs: dict[str, Tensor]) -> list[Tensor]:
    found = vlm_oracle.embeddings(model, inputs)
    return [torch.arange(len(x)) for kind in ("image", "video") for x in found.get(kind, [])]


@pytest.mark.parametrize("case", CASES)
def test_end_to_end_with_output_attentions(case):
    """Against the maps of eager attention, wherever a little noise does not change the choice."""
    family, inputs = inputs_of(case)
    model = vlms.shared(family)
    twin = vlm_oracle.eager(model)
    lengths = [len(x) for x in _all(model, inputs)]
    generator = torch.Generator().manual_seed(0)
    compared = unstable = 0
    for method in methods(family, 3):
        if isinstance(method, Random):
            continue
        kept = iter(prune_inputs(model, inputs, method).kept)
        tokens = iter(lengths)
        for kind in kinds_of(inputs):
            for grids in vlm_oracle.seen(twin, inputs, kind, method.needs):
                n, mine = next(tokens), next(kept)
                expected = vlm_oracle.select(grids, n, method, kind == "video")
                steady = all(
                    torch.equal(
                        vlm_oracle.select(_noisy(grids, generator), n, method, kind == "video"),
                        expected,
                    )
                    for _ in range(64)
                )
                compared += steady
                unstable += not steady
                assert not steady or torch.equal(mine, expected), (method, mine, expected)
    assert compared > 4 * unstable


def _noisy(grids, generator):
    """Noise as large as the largest differences between eager attention and SDPA."""

    def noisy(x: Tensor) -> Tensor:
        return x + x.abs().mean() * 3e-6 * torch.randn(x.shape, generator=generator)

    return [(places, noisy(f), noisy(s), column) for places, f, s, column in grids]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [4, 24])
def test_indices_are_those_of_select_on_what_was_captured(side, dtype):
    """576 tokens too, where no comparison of two stacks would hold."""
    model = vlms.make("llava", side).to(dtype)
    a, b = picture("llava", 1, side=side), picture("llava", 2, side=side)
    inputs = prompts("llava", [3, a], [b, 2])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    layer, seen = model.model.vision_tower, {}
    layer = getattr(layer, "vision_model", layer).encoder.layers[-2]
    watched = {"features": layer, "q": layer.self_attn.q_proj, "k": layer.self_attn.k_proj}
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out}))
        for name, module in watched.items()
    ]
    keep = side * side // 9
    method = recording(keep)
    pruned = prune_inputs(model, inputs, method)
    for hook in hooks:
        hook.remove()
    ((features, scores, kept),) = method.calls
    assert torch.equal(features, seen["features"][:, 1:])
    q, k = (seen[name].double().unflatten(-1, (4, 8)).transpose(1, 2) for name in "qk")
    attention = (q[:, :, :1] @ k.mT * 8**-0.5).softmax(-1)[:, :, 0, 1:].mean(1)
    torch.testing.assert_close(scores.double(), attention, rtol=0, atol=1e-6)
    assert torch.equal(kept, reference.select(features, scores, keep))
    assert torch.equal(torch.stack(pruned.kept), kept)
    if dtype == torch.float32:
        assert_same(
            real_logits(model, pruned),
            vlm_oracle.logits(vlm_oracle.eager(model), inputs, pruned.kept),
        )


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
def test_layers_after_the_feature_do_not_run(index, runs, monkeypatch):
    model = vlms.make("llava", vision_feature_layer=index)
    tower = model.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    ran = []
    # Not by hooks or a forward of its own: layers that users watch run.
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

    # Not by hooks or a forward of its own: layers that users watch run.
    monkeypatch.setattr(cls, "forward", note)
    prune_inputs(model, inputs, methods(family)[0])
    target = {"llava-onevision": -1, "llava-siglip": -1, "qwen2.5-vl": -1}.get(family, -2)
    count = len(modules) if target == -1 else len(modules) - 1
    assert used == ["sdpa"] * (count - 1) + ["vispruner_sdpa"]
    # No maps.
    assert all(out[1] is None for out in outputs if isinstance(out, tuple))
    for module, (config, name, content) in zip(modules, before, strict=True):
        assert module.config is config
        assert (config._attn_implementation, vars(config)) == (name, content)


# Of LLaVA-OneVision the second is interpolated and the others are not.
SIZES = {
    "llava-next": [(40, 56), (100, 80), (30, 150)],
    "llava-onevision": [(50, 100), (100, 80), (30, 40)],
    "qwen2.5-vl": [(4, 6), (8, 12), (6, 4)],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_prompts(family):
    model, sizes = vlms.shared(family), SIZES.get(family, [None] * 3)
    pictures = [picture(family, seed, size) for seed, size in enumerate(sizes)]
    parts = [[3, pictures[0], 5], [2, pictures[1], 9], [pictures[2], 1]]
    batch = prompts(family, *parts)
    alone = []
    for i, part in enumerate(parts):
        single = prompts(family, part)
        # Its words are those of the batch.
        single["input_ids"] = batch["input_ids"][i][batch["attention_mask"][i].bool()][None]
        alone.append(single)
    for method in methods(family, 4):
        together = prune_inputs(model, batch, method)
        logits = real_logits(model, together)
        for i, single in enumerate(alone):
            pruned = prune_inputs(model, single, method)
            assert torch.equal(pruned.kept[0], together.kept[i])
            assert_same(real_logits(model, pruned), logits[i : i + 1])


@pytest.mark.parametrize("strategy", ["rank", "row"])
@pytest.mark.parametrize(
    ("family", "size", "budget"),
    [
        ("llava", None, "image"),
        ("llava-next", (112, 112), "image"),
        ("llava-next", (112, 112), "tile"),
        ("llava-next", (100, 80), "tile"),
        ("qwen2.5-vl", (6, 10), "image"),
        ("llava-onevision", (40, 56), "tile"),
    ],
)
def test_fopru_rows_are_rows_of_a_tile(family, size, budget, strategy):
    model = vlms.shared(family)
    inputs = prompts(family, [picture(family, 4, size), 3])
    method = FoPru(0.5, strategy)
    kept = prune_inputs(model, inputs, method, budget=budget).kept
    (grids,) = vlm_oracle.seen(vlm_oracle.eager(model), inputs, "image", "received")
    n = len(_all(model, inputs)[0])
    expected = vlm_oracle.select(grids, n, method, budget == "tile")
    assert torch.equal(kept[0], expected)


def test_counts_of_llava_next():
    """A budget is met exactly; newlines are beside it."""
    model = vlms.shared("llava-next")
    rows, side = 8, vlms.SIDE
    inputs = prompts("llava-next", [picture("llava-next", 1, (112, 112)), 3])
    assert int((inputs["input_ids"] == vlms.IMAGE).sum()) == 5 * side * side + rows
    for keep, budget, count in ((20, "image", 20), (4, "tile", 5 * 4), (0.5, "tile", 5 * 8)):
        for newlines, extra in (("keep", rows), ("drop", 0)):
            pruned = prune_inputs(model, inputs, VisPruner(keep), budget=budget, newlines=newlines)
            assert len(pruned.kept[0]) == count + extra
            assert pruned["inputs_embeds"].shape[1] == 1 + 3 + count + extra


def test_the_cls_token_of_a_video_stays():
    model = vlms.shared("video-llava")
    inputs = prompts("video-llava", [picture("video-llava", 1, frames=3), 3])
    (kept,) = prune_inputs(model, inputs, FasterVLM(2)).kept
    frames = kept.split(3)
    assert [int(frame[0]) for frame in frames] == [0, 17, 34]
    assert all(17 * i < int(x) < 17 * (i + 1) for i, f in enumerate(frames) for x in f[1:])


def test_cls_in_the_features_of_an_image():
    model = vlms.make("llava", vision_feature_select_strategy="full")
    image = picture("llava", 1)
    image.tokens += 1
    inputs = prompts("llava", [3, image, 2])
    pruned = prune_inputs(model, inputs, VisPruner(5))
    assert len(pruned.kept[0]) == 6
    assert pruned.kept[0][0] == 0
    assert_same(real_logits(model, pruned), vlm_oracle.logits(model, inputs, pruned.kept))


def test_the_first_patch_is_left_out_where_the_model_does():
    """The "default" strategy of a tower that has no [CLS] token."""
    model = vlms.make("llava-siglip", vision_feature_select_strategy="default")
    image = picture("llava-siglip", 1)
    image.tokens -= 1
    inputs = prompts("llava-siglip", [3, image, 2])
    method = recording(5, scores="received")
    pruned = prune_inputs(model, inputs, method)
    ((features, scores, kept),) = method.calls
    assert scores.shape == (1, 15)
    model.config.vision_feature_select_strategy = "full"
    ((grid,),) = vlm_oracle.seen(vlm_oracle.eager(model), inputs, "image", "received")
    torch.testing.assert_close(features[0], grid[1][1:], rtol=0, atol=1e-4)
    torch.testing.assert_close(scores[0], grid[2][1:], rtol=0, atol=1e-6)
    assert torch.equal(pruned.kept[0], kept[0])


@pytest.mark.parametrize("padding", ["left", "right"])
def test_what_the_model_remembers_of_positions(padding):
    """The next position is that of the unpruned prompt; tests of decoding by hand use it."""
    model = vlms.make("qwen2.5-vl")
    inputs = several("qwen2.5-vl", padding, extra=2)
    positions = vlm_oracle._space(model, inputs)
    pruned = prune_inputs(model, inputs, FoPru(4))
    for b, mask in enumerate(inputs["attention_mask"].bool()):
        following = int(positions[:, b, mask].max()) + 1
        tokens = int(pruned["attention_mask"][b].sum())
        assert int(model.model.rope_deltas[b]) == following - tokens


def test_positions_of_the_caller_in_space():
    """Three rows in space stay; a fourth, first, counts the text."""
    model = vlms.shared("qwen2.5-vl")
    inputs = several("qwen2.5-vl")
    mask = inputs["attention_mask"]
    space = vlm_oracle._space(model, inputs)
    text = (mask.cumsum(-1) - 1).clamp(min=0)[None]
    expected = prune_inputs(model, inputs, FoPru(4))
    three = prune_inputs(model, inputs | {"position_ids": space}, FoPru(4))
    assert torch.equal(three["position_ids"], expected["position_ids"])
    four = prune_inputs(model, inputs | {"position_ids": torch.cat([text, space])}, FoPru(4))
    assert torch.equal(four["position_ids"][1:], expected["position_ids"])
    for row, real in zip(four["position_ids"][0], four["attention_mask"].bool(), strict=True):
        assert row[real].tolist() == list(range(int(real.sum())))
    assert_same(real_logits(model, four), real_logits(model, expected))


def test_dropout_of_the_tower_stays():
    """Then the layer keeps its own attention, and scores come beside it."""
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
def test_the_layer_asked_for(index):
    model = vlms.make("llava", vision_feature_layer=index)
    inputs = prompts("llava", [3, picture("llava", 1), 2])
    for method in (VisPruner(5), FasterVLM(5, scores="received")):
        pruned = prune_inputs(model, inputs, method)
        (grids,) = vlm_oracle.seen(vlm_oracle.eager(model), inputs, "image", method.needs)
        assert torch.equal(pruned.kept[0], vlm_oracle.select(grids, 16, method, False))
    # A call may say so too.
    other = vlms.make("llava")
    called = prune_inputs(other, inputs | {"vision_feature_layer": index}, method)
    assert torch.equal(called.kept[0], pruned.kept[0])


def test_windowed_attention_of_the_last_layer():
    """Where patches attend within windows of different sizes, received sums compare."""
    model = vlms.make("qwen2.5-vl", vision_config__fullatt_block_indexes=[1])
    inputs = prompts("qwen2.5-vl", [picture("qwen2.5-vl", 1, (6, 10)), 3])
    for method in (FoPru(7), VisPruner(7, scores="received")):
        (kept,) = prune_inputs(model, inputs, method).kept
        (grids,) = vlm_oracle.seen(vlm_oracle.eager(model), inputs, "image", "received")
        assert torch.equal(kept, vlm_oracle.select(grids, 15, method, False))


@pytest.mark.parametrize("full", [[2], [0]])
def test_packed_images_stay_packed_for_flash_attention(full):
    """An implementation named "flash" gets all images in one call in every layer."""
    from transformers import AttentionInterface

    shapes = []

    def flash(module, q, k, v, attention_mask=None, scaling=None, cu_seq_lens_q=None, **_):
        # As flash_attention_forward does, to find its kernel.
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
def test_embeddings_instead_of_ids(family):
    model, method = vlms.shared(family), VisPruner(5, scores=scores_of(family))
    inputs = several(family)
    expected = prune_inputs(model, inputs, method)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
    by_embeds = {k: v for k, v in inputs.items() if k != "input_ids"} | {"inputs_embeds": embeds}
    pruned = prune_inputs(model, by_embeds, method)
    assert pruned.input_ids is None
    assert_same(real_logits(model, pruned), real_logits(model, expected))


def test_without_images_nothing_changes():
    model = vlms.shared("llava")
    inputs = prompts("llava", [5], [9])
    pruned = prune_inputs(model, inputs, VisPruner(5))
    assert pruned.keys() == inputs.keys()
    assert all(pruned[name] is value for name, value in inputs.items())
    assert pruned.kept is None


def test_positions_and_labels_follow():
    model = vlms.shared("llava")
    inputs = several("llava")
    mask = inputs["attention_mask"]
    inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs["labels"] = inputs["input_ids"].masked_fill(mask == 0, -100)
    pruned = prune_inputs(model, inputs, VisPruner(5))
    for b in range(3):
        real = pruned["attention_mask"][b].bool()
        assert pruned["position_ids"][b, real].tolist() == list(range(int(real.sum())))
        assert torch.equal(pruned["labels"][b, real], pruned.input_ids[b, real])
        assert (pruned["labels"][b, ~real] == -100).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_goes_through_the_kept_tokens(family):
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
def test_an_eager_tower_stays_eager(family, checkpointing):
    """Gradients of what is kept are those of dropping by hand, also where layers run again."""
    model = vlms.make(family)
    core = model.model
    tower = next(getattr(core, n) for n in TOWERS if hasattr(core, n))
    tower.set_attn_implementation("eager")
    if checkpointing:
        # Renamed in transformers 5.
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
    # The same tokens, from the model's own features.
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


TOWERS = ("visual", "vision_tower", "image_tower")


@pytest.mark.parametrize(("family", "side"), [("llava", 24), ("qwen2.5-vl", 4)])
def test_threads_do_not_notice_each_other(family, side):
    """Nor does the unpruned model."""
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


def test_a_thread_in_the_middle_of_a_reading():
    """Its features are not taken for ours, nor are its scores, and its layers all run."""
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


def test_sizes_as_lists_and_no_images():
    model, method = vlms.shared("llava-next"), VisPruner(4)
    inputs = prompts("llava-next", [3, picture("llava-next", 1), 5])
    expected = prune_inputs(model, inputs, method)
    listed = inputs | {"image_sizes": inputs["image_sizes"].tolist()}
    assert torch.equal(prune_inputs(model, listed, method).kept[0], expected.kept[0])
    none = prompts("llava-next", [7]) | {"pixel_values": torch.zeros(0, 5, 3, 56, 56)}
    assert prune_inputs(model, none, method).kept is None
