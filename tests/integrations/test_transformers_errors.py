"""Bad calls of the transformers integration. Each error names the argument and the remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import vlms
from vlms import picture, prompts

from vispruner_kernels.integrations import _cache
from vispruner_kernels.integrations import transformers as integration
from vispruner_kernels.integrations._readers import qwen2_5_vl
from vispruner_kernels.integrations.transformers import attach, prune_inputs
from vispruner_kernels.methods import FasterVLM, FoPru, Random, VisPruner


def one(family: str, size: tuple[int, int] | None = None, frames: int = 0) -> dict:
    return prompts(family, [3, picture(family, 1, size, frames), 5])


def fails(model, inputs, method, error, *words, **options) -> None:
    """Check the error of `prune_inputs` and of a model with `attach`."""
    for call in (
        lambda: prune_inputs(model, inputs, method, **options),
        lambda: _generate(model, inputs, method, **options),
    ):
        with pytest.raises(error) as caught:
            call()
        for word in words:
            assert re.search(word, str(caught.value)), (word, str(caught.value))
        assert "\n" not in str(caught.value)


def _generate(model, inputs, method, **options):
    with attach(model, method, **options):
        model.generate(**inputs, max_new_tokens=1)


def test_refuses_an_unsupported_model():
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**vlms.TEXT))
    for call in (prune_inputs, lambda model, inputs, method: attach(model, method)):
        with pytest.raises(TypeError, match="model is a LlamaForCausalLM, expected one of Llava"):
            call(model, prompts("llava", [3]), VisPruner(5))


def test_refuses_an_unsupported_vision_tower():
    model = vlms.make("llava")

    class Other(torch.nn.Module):
        config = model.model.vision_tower.config

    model.model.vision_tower = Other()
    fails(model, one("llava"), VisPruner(4), ValueError, "tower is a Other, .*CLIPVisionModel")


@pytest.mark.parametrize("index", [0, 4, -4, 17, [-2, -1], "last"])
def test_refuses_a_layer_that_the_tower_does_not_have(index):
    inputs = one("llava") | {"vision_feature_layer": index}
    words = re.escape(f"vision_feature_layer is {index}, expected one layer"), "1 to 3, or -3 to -1"
    fails(vlms.shared("llava"), inputs, VisPruner(4), ValueError, *words)


def test_refuses_an_unknown_strategy():
    inputs = one("llava") | {"vision_feature_select_strategy": "half"}
    words = "vision_feature_select_strategy is 'half', expected 'default' or 'full'"
    fails(vlms.shared("llava"), inputs, VisPruner(4), ValueError, words)


@pytest.mark.parametrize("family", ["llava-siglip", "llava-onevision", "qwen2.5-vl"])
@pytest.mark.parametrize("method", [VisPruner(4), FasterVLM(4)])
def test_refuses_a_method_that_needs_cls_for_a_tower_without_one(family, method):
    words = f"{type(method).__name__} needs .*CLS", "scores='received'"
    fails(vlms.shared(family), one(family), method, ValueError, *words)


def test_refuses_placeholders_that_do_not_match_the_images():
    model = vlms.shared("llava")
    good = one("llava")
    fewer = {k: v[:, 1:-1] if v.dim() == 2 else v for k, v in good.items()}
    fewer["input_ids"] = fewer["input_ids"].masked_fill(
        torch.arange(fewer["input_ids"].shape[1]) == 8, 7
    )
    words = (
        r"input_ids has \[15\] image placeholders by prompt, expected those of 1 image",
        "16",
    )
    fails(model, fewer, VisPruner(4), ValueError, *words)
    # One image is missing; then the placeholders of an image are in two prompts.
    two = prompts("llava", [3, picture("llava", 1)], [2, picture("llava", 2), 1])
    missing = two | {"pixel_values": two["pixel_values"][:1]}
    fails(model, missing, VisPruner(4), ValueError, r"\[16, 16\] image placeholders", "1 images")
    ids = two["input_ids"].clone()
    places = (ids == vlms.IMAGE).nonzero()
    ids[tuple(places[0])] = 7
    ids[1, -1] = vlms.IMAGE
    fails(
        model, two | {"input_ids": ids}, VisPruner(4), ValueError, r"\[15, 17\] image placeholders"
    )
    embeds = model.get_input_embeddings()(ids).detach()
    by_embeds = {k: v for k, v in two.items() if k != "input_ids"} | {"inputs_embeds": embeds}
    fails(model, by_embeds, VisPruner(4), ValueError, "inputs_embeds has")
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        prune_inputs(model, {"pixel_values": two["pixel_values"]}, VisPruner(4))


@pytest.mark.parametrize("family", vlms.FAMILIES)
@pytest.mark.parametrize("how", ["cut", "one", "more", "none"])
@pytest.mark.parametrize("frames", [0, 3])
def test_placeholders_that_a_prompt_lost(family, how, frames):
    """Prompts cut at the left, as harnesses do; one placeholder per image, as from old processors;
    one too many; none."""
    if frames and family not in ("video-llava", "llava-onevision", "qwen2.5-vl"):
        pytest.skip("it has no videos")
    part = picture(family, 1, frames=frames)
    inputs = prompts(family, [3, part, 5])
    ids, token = inputs["input_ids"], vlms.VIDEO if frames else vlms.IMAGE
    columns = [torch.arange(6, ids.shape[1])]
    if how != "cut":
        count = {"one": 1, "more": part.tokens + 1, "none": 0}[how]
        text = torch.arange(4 + part.tokens, ids.shape[1])
        columns = [torch.arange(4), torch.full((count,), 4), text]
    columns = torch.cat(columns)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = inputs[name][:, columns]
    found = int((inputs["input_ids"] == token).sum())
    kind = "video" if frames else "image"
    words = rf"input_ids has \[{found}\] {kind} placeholders by prompt, expected those of 1 {kind}"
    method = Random(1)
    fails(vlms.shared(family), inputs, method, ValueError, words, rf"\[{part.tokens}\] tokens")
    with attach(vlms.shared(family), method), pytest.raises(ValueError, match=words):
        vlms.shared(family)(**inputs)


def test_refuses_pixels_that_do_not_match_their_grid():
    inputs = one("qwen2.5-vl")
    bad = inputs | {"pixel_values": inputs["pixel_values"][:-4]}
    words = "pixels of the images have 92 patches, expected the 96 that image_grid_thw"
    fails(vlms.shared("qwen2.5-vl"), bad, Random(4), ValueError, words)


def test_refuses_a_count_above_the_tokens_of_an_image():
    words = "image 0 of the batch", "keep is 17, expected 1 <= keep <= 16"
    fails(vlms.shared("llava"), one("llava"), VisPruner(17), ValueError, *words)
    small = [[picture("qwen2.5-vl", i, size), 3] for i, size in enumerate([(8, 8), (4, 4)])]
    words = "image 1 of the batch", "keep is 9, expected 1 <= keep <= 4"
    model = vlms.shared("qwen2.5-vl")
    fails(model, prompts("qwen2.5-vl", *small), FoPru(9), ValueError, *words)
    # Unpadding leaves 8 of the 16 patches of a tile.
    wide = one("llava-next", (30, 150))
    words = "image 0, tile or frame 1 of the batch", "keep is 9, expected 1 <= keep <= 8"
    model = vlms.shared("llava-next")
    fails(model, wide, VisPruner(9), ValueError, *words, budget="tile")
    words = "video 0, tile or frame 0 of the batch", "keep is 17"
    model = vlms.shared("video-llava")
    fails(model, one("video-llava", frames=2), VisPruner(17), ValueError, *words)


def test_refuses_fopru_rows_of_different_lengths():
    model = vlms.shared("llava-next")
    words = "image 0 of the batch", "no common width", "strategy='rank'"
    fails(model, one("llava-next", (100, 80)), FoPru(0.5, "row"), ValueError, *words)
    model = vlms.shared("llava-onevision")
    fails(model, one("llava-onevision"), FoPru(0.5, "row"), ValueError, *words)
    model = vlms.shared("llava")
    fails(model, one("llava"), FoPru(6, "row"), ValueError, "keep is 6, expected a multiple")


def test_refuses_a_budget_for_interpolated_tiles():
    model, method = vlms.shared("llava-onevision"), FoPru(2)
    words = "budget is 'tile', expected 'image'"
    fails(model, one("llava-onevision"), method, ValueError, words, budget="tile")


def test_refuses_unknown_options():
    model, inputs = vlms.shared("llava"), one("llava")
    fails(model, inputs, VisPruner(4), ValueError, "budget is 'crop', expected", budget="crop")
    fails(model, inputs, VisPruner(4), ValueError, "newlines is True, expected", newlines=True)
    fails(model, inputs, "vispruner", TypeError, "method is 'vispruner', expected one of")
    assert "generate" not in vars(model)


def test_refuses_tiles_that_do_not_match_image_sizes():
    model = vlms.shared("llava-next")
    inputs = one("llava-next")
    bad = inputs | {"pixel_values": inputs["pixel_values"][:, :3]}
    words = r"pixel_values has the shape \[1, 3, 3, 56, 56\], expected the 5 tiles of 1 images"
    fails(model, bad, VisPruner(4), ValueError, words)


def test_refuses_arguments_that_cannot_be_pruned():
    model, inputs = vlms.shared("llava"), one("llava")
    text = {name: x for name, x in inputs.items() if name != "pixel_values"}
    for given in (inputs, text):
        features = given | {"mm_encoder_outputs": {"image": 1}}
        words = "mm_encoder_outputs: they hold no scores"
        fails(model, features, VisPruner(4), ValueError, words)
        with attach(model, VisPruner(4)), pytest.raises(ValueError, match=words):
            model(**features)
    sizes = inputs | {"image_sizes": torch.tensor([[56, 56]])}
    with pytest.raises(ValueError, match="image_sizes"):
        prune_inputs(model, sizes, VisPruner(4))
    with attach(model, VisPruner(4)), torch.no_grad():
        with pytest.raises(ValueError, match="logits_to_keep is a tensor"):
            model(**inputs, logits_to_keep=torch.tensor([1, 2]))
        cache = vlms.cache_of(model(**prompts("llava", [9]), use_cache=True))
        for name in vlms.CACHE_NAMES:
            with pytest.raises(ValueError, match=f"{name} holds tokens"):
                model.generate(**inputs, **{name: cache}, max_new_tokens=1)


def test_refuses_shapes_that_do_not_match_the_prompt():
    model, inputs = vlms.shared("llava"), prompts("llava", [3, picture("llava", 1), 5], [9])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for name, x, words in (
        ("attention_mask", mask[:, None, None], r"got \[2, 1, 1, 25\], expected \[2, 25\]"),
        ("attention_mask", mask[:1], r"got \[1, 25\], expected \[2, 25\]"),
        ("attention_mask", mask[:, 1:], r"got \[2, 24\], expected \[2, 25\]"),
        ("attention_mask", {"full": mask}, r"got dict, expected \[2, 25\]"),
        ("labels", ids[:, :-1], r"got \[2, 24\], expected \[2, 25\]"),
        ("labels", torch.cat([ids, ids[:, :3]], 1), r"got \[2, 28\], expected \[2, 25\]"),
        ("labels", ids[:1], r"got \[1, 25\]"),
        ("position_ids", ids[:, :-1], r"got \[2, 24\]"),
        ("position_ids", ids[0], r"got \[25\]"),
    ):
        with pytest.raises(ValueError, match=f"{name}: {words}"):
            prune_inputs(model, inputs | {name: x}, VisPruner(4))
    row = torch.arange(25)[None]
    expanded = prune_inputs(model, inputs | {"position_ids": row.expand(2, -1)}, VisPruner(4))
    one = prune_inputs(model, inputs | {"position_ids": row}, VisPruner(4))
    assert torch.equal(one["position_ids"], expanded["position_ids"])


def test_refuses_arguments_that_are_no_tensors_or_have_other_dimensions():
    model, inputs = vlms.shared("llava"), one("llava")
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    for name, x, error, words in (
        ("input_ids", ids.tolist(), TypeError, "input_ids is a list, expected a tensor"),
        ("input_ids", ids[0], ValueError, r"input_ids: got \[25\], expected \[B, L\]"),
        ("input_ids", ids[:0], ValueError, r"got \[0, 25\], expected \[B, L\] with B >= 1"),
        ("pixel_values", pixels.tolist(), TypeError, "pixel_values is a list, expected a tensor"),
        ("pixel_values", pixels.numpy(), TypeError, "pixel_values is a ndarray, expected"),
        ("pixel_values", torch.tensor(1.0), TypeError, "pixel_values is a Tensor, expected"),
        ("pixel_values", pixels[0], ValueError, r"pixel_values has shape \[3, 56, 56\], expected"),
        ("labels", ids.tolist(), ValueError, r"labels: got list, expected \[1, 25\]"),
        ("position_ids", [1], ValueError, r"position_ids: got list, expected \[1, 25\]"),
    ):
        bad = inputs | {name: x}
        with pytest.raises(error, match=words):
            prune_inputs(model, bad, VisPruner(4))
        with attach(model, VisPruner(4)), pytest.raises(error, match=words):
            model(**bad)
        del bad["attention_mask"]
        with attach(model, VisPruner(4)), pytest.raises(error, match=words):
            model.generate(**bad, max_new_tokens=1)
    for family, name in (("video-llava", "pixel_values_videos"), ("qwen2.5-vl", "pixel_values")):
        bad = one(family, frames=2 if name.endswith("videos") else 0)
        bad[name] = bad[name][None]
        with pytest.raises(ValueError, match=f"{name} has shape .*, expected"):
            prune_inputs(vlms.shared(family), bad, Random(4))
    with attach(model, VisPruner(4)), pytest.raises(ValueError, match="shift_labels"):
        model(**inputs, shift_labels=ids)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llava-next", "image_sizes"),
        ("llava-onevision", "image_sizes"),
        ("qwen2.5-vl", "image_grid_thw"),
    ],
)
def test_names_a_missing_output_of_the_processor(family, name):
    inputs = {k: v for k, v in one(family).items() if k != name}
    fails(vlms.shared(family), inputs, FoPru(4), ValueError, f"{name} is missing: pass on")


def test_more_patches_than_an_operator_takes(monkeypatch):
    monkeypatch.setattr(qwen2_5_vl, "MAX_TOKENS", 90)
    model, inputs = vlms.shared("qwen2.5-vl"), one("qwen2.5-vl", (8, 12))
    words = "image 0 of the batch has 8 x 12 patches, expected at most 90", "max_pixels"
    fails(model, inputs, FoPru(4), ValueError, *words)
    assert len(prune_inputs(model, inputs, Random(4)).kept[0]) == 4


@pytest.mark.parametrize(
    "name",
    ["assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "prefill_chunk_size"],
)
def test_refuses_unsupported_decoding(name):
    model, inputs = vlms.shared("llava"), one("llava")
    with attach(model, VisPruner(4)):
        with pytest.raises(ValueError, match=f"{name} is given: not supported"):
            model.generate(**inputs, max_new_tokens=1, **{name: 3})
        text = {name: x for name, x in inputs.items() if name != "pixel_values"}
        with pytest.raises(ValueError, match="inputs and input_ids are given"):
            model.generate(inputs["input_ids"], **text, max_new_tokens=1)


def test_qwen_needs_positions_for_images_after_a_cached_prompt():
    model = vlms.shared("qwen2.5-vl")
    with torch.no_grad():
        cache = vlms.cache_of(model(**prompts("qwen2.5-vl", [9]), use_cache=True))
    for name in vlms.CACHE_NAMES:
        inputs = one("qwen2.5-vl") | {name: cache}
        words = (
            f"position_ids are missing: {name} has tokens already, pass the positions after theirs"
        )
        with pytest.raises(ValueError, match=words):
            prune_inputs(model, inputs, FoPru(4))


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_cache_under_a_name_that_would_be_ignored(monkeypatch):
    model = vlms.shared("llava")
    with torch.no_grad():
        cache = vlms.cache_of(model(**prompts("llava", [9]), use_cache=True))
    step = dict(input_ids=torch.tensor([[5]]))

    def refused(of, names, words):
        with attach(model, VisPruner(4)), pytest.raises(ValueError, match=words):
            of()(**step, **dict.fromkeys(names, cache))

    refused(lambda: model, ("cache", "past_key_values"), "cache and past_key_values are both given")
    if vlms.VERSION >= (5, 24):
        words = "past_key_values is given, expected cache, as transformers .* calls it"
        for version in ((5, 40), (6, 0)):
            monkeypatch.setattr(_cache, "VERSION", version)
            refused(lambda: model, ("past_key_values",), words)
            refused(lambda: model.model, ("past_key_values",), words)
        refused(lambda: model.generate, ("past_key_values",), words)
    else:
        words = "cache is given, expected past_key_values, as transformers .* calls it"
        refused(lambda: model, ("cache",), words)


def test_refuses_a_version_that_is_too_old(monkeypatch):
    import importlib

    import transformers

    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"transformers>={".".join(map(str, integration.MINIMUM))}"' in project
    monkeypatch.setattr(transformers, "__version__", "5.2.1")
    with pytest.raises(ImportError, match=r"transformers is 5\.2\.1, expected at least 5\.3"):
        importlib.reload(integration)
