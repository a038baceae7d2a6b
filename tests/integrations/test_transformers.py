"""Pruning of five model families: the kept tokens, and the logits without the other tokens."""

from __future__ import annotations

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
    family, prompt = CASES[case]
    if prompt == "one":
        return family, prompts(family, [4, picture(family, 5), 6])
    if prompt == "several":
        return family, several(family)
    if prompt == "right":
        return family, several(family, "right", extra=3)
    if prompt == "videos":
        video, other = picture(family, 6, frames=3), picture(family, 7, frames=3)
        image = picture(family, 8)
        return family, prompts(family, [2, video, 3], [1, image, 2, other, 7])
    sizes = {
        "wide": [(30, 150), (40, 56)],
        "square": [(112, 112)],
        "small": [(50, 100), (100, 50)],
        "sizes": [(4, 4), (6, 10), (10, 8)],
    }[prompt]
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
def test_logits_equal_those_of_dropping_tokens_by_hand(case, budget, newlines):
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
    """Indices of all visual tokens, for each image and video."""
    found = vlm_oracle.embeddings(model, inputs)
    return [torch.arange(len(x)) for kind in ("image", "video") for x in found.get(kind, [])]


@pytest.mark.parametrize("case", CASES)
def test_keeps_the_tokens_that_full_attention_maps_select(case):
    """Compare with the maps of eager attention, if a little noise does not change the choice."""
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
            for grids in vlm_oracle.grids_of(twin, inputs, kind, method.needs):
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
    """Add noise as large as the largest differences between eager attention and SDPA."""

    def noisy(x: Tensor) -> Tensor:
        return x + x.abs().mean() * 3e-6 * torch.randn(x.shape, generator=generator)

    return [(places, noisy(f), noisy(s), column) for places, f, s, column in grids]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [4, 24])
def test_indices_equal_select_on_the_captured_features_and_scores(side, dtype):
    """With 576 tokens too: there, two implementations of the tower may select different tokens."""
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


# LLaVA-OneVision interpolates the second image only.
SIZES = {
    "llava-next": [(40, 56), (100, 80), (30, 150)],
    "llava-onevision": [(50, 100), (100, 80), (30, 40)],
    "qwen2.5-vl": [(4, 6), (8, 12), (6, 4)],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_the_results_of_its_prompts_alone(family):
    model, sizes = vlms.shared(family), SIZES.get(family, [None] * 3)
    pictures = [picture(family, seed, size) for seed, size in enumerate(sizes)]
    parts = [[3, pictures[0], 5], [2, pictures[1], 9], [pictures[2], 1]]
    batch = prompts(family, *parts)
    alone = []
    for i, part in enumerate(parts):
        single = prompts(family, part)
        # Take the words of the batch.
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
    (grids,) = vlm_oracle.grids_of(vlm_oracle.eager(model), inputs, "image", "received")
    n = len(_all(model, inputs)[0])
    expected = vlm_oracle.select(grids, n, method, budget == "tile")
    assert torch.equal(kept[0], expected)


def test_llava_next_meets_a_budget_exactly_beside_newlines():
    """Newlines are kept or dropped without changing the count of patches."""
    model = vlms.shared("llava-next")
    rows, side = 8, vlms.SIDE
    inputs = prompts("llava-next", [picture("llava-next", 1, (112, 112)), 3])
    assert int((inputs["input_ids"] == vlms.IMAGE).sum()) == 5 * side * side + rows
    for keep, budget, count in ((20, "image", 20), (4, "tile", 5 * 4), (0.5, "tile", 5 * 8)):
        for newlines, extra in (("keep", rows), ("drop", 0)):
            pruned = prune_inputs(model, inputs, VisPruner(keep), budget=budget, newlines=newlines)
            assert len(pruned.kept[0]) == count + extra
            assert pruned["inputs_embeds"].shape[1] == 1 + 3 + count + extra


def test_keeps_the_cls_token_of_each_video_frame():
    model = vlms.shared("video-llava")
    inputs = prompts("video-llava", [picture("video-llava", 1, frames=3), 3])
    (kept,) = prune_inputs(model, inputs, FasterVLM(2)).kept
    frames = kept.split(3)
    assert [int(frame[0]) for frame in frames] == [0, 17, 34]
    assert all(17 * i < int(x) < 17 * (i + 1) for i, f in enumerate(frames) for x in f[1:])


def test_keeps_the_cls_token_in_the_features_of_an_image():
    model = vlms.make("llava", vision_feature_select_strategy="full")
    image = picture("llava", 1)
    image.tokens += 1
    inputs = prompts("llava", [3, image, 2])
    pruned = prune_inputs(model, inputs, VisPruner(5))
    assert len(pruned.kept[0]) == 6
    assert pruned.kept[0][0] == 0
    assert_same(real_logits(model, pruned), vlm_oracle.logits(model, inputs, pruned.kept))


def test_drops_the_first_patch_if_the_model_does():
    """The "default" strategy drops the first token, even of a tower without a [CLS] token."""
    model = vlms.make("llava-siglip", vision_feature_select_strategy="default")
    image = picture("llava-siglip", 1)
    image.tokens -= 1
    inputs = prompts("llava-siglip", [3, image, 2])
    method = recording(5, scores="received")
    pruned = prune_inputs(model, inputs, method)
    ((features, scores, kept),) = method.calls
    assert scores.shape == (1, 15)
    model.config.vision_feature_select_strategy = "full"
    ((grid,),) = vlm_oracle.grids_of(vlm_oracle.eager(model), inputs, "image", "received")
    torch.testing.assert_close(features[0], grid[1][1:], rtol=0, atol=1e-4)
    torch.testing.assert_close(scores[0], grid[2][1:], rtol=0, atol=1e-6)
    assert torch.equal(pruned.kept[0], kept[0])
