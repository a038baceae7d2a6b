"""Outputs of `forward` beside logits, the core model alone, and options of the tower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import vlm_oracle
import vlms
from pruned import assert_same, method_of, several
from vlms import FAMILIES, picture, prompts

from vispruner_kernels.integrations.transformers import attach, prune_inputs
from vispruner_kernels.methods import Method, VisPruner

GREEDY = dict(max_new_tokens=4, do_sample=False)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def features_in(out: Any, kind: str) -> Any:
    """Projected features for each image or, before transformers 5.24, concatenated."""
    if hasattr(out, f"{kind}_outputs"):
        return getattr(out, f"{kind}_outputs").pooler_output
    return getattr(out, f"{kind}_hidden_states", None)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_projected_features_are_those_of_kept_tokens(family, kind):
    if kind == "video" and family not in ("video-llava", "llava-onevision", "qwen2.5-vl"):
        pytest.skip("it has no videos")
    model, method = vlms.shared(family), method_of(family)
    pictures = [picture(family, seed, frames=3 if kind == "video" else 0) for seed in (1, 2)]
    inputs = prompts(family, [3, pictures[0], 5], [2, pictures[1]])
    kept = prune_inputs(model, inputs, method).kept
    all_of_them = vlm_oracle.embeddings(model, inputs)[kind]
    expected = [x[chosen] for x, chosen in zip(all_of_them, kept, strict=True)]
    with attach(model, method), torch.no_grad():
        out = model(**inputs)
        as_tuple = model(**inputs, return_dict=False)
    found = features_in(out, kind)
    if found is None:
        pytest.skip("this version does not return them")
    together = found if isinstance(found, Tensor) else torch.cat(found)
    assert_same([together], [torch.cat(expected)])
    if not isinstance(found, Tensor):
        assert [len(x) for x in found] == [len(x) for x in expected]
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == len(out.to_tuple())
    assert torch.equal(as_tuple[0], out.logits)


def test_out_labels_have_the_pruned_length(family):
    """They match the logits, so a caller can compute a loss from both."""
    model, method, inputs = vlms.shared(family), method_of(family), several(family)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with attach(model, method), torch.no_grad():
        out = model(**inputs, labels=labels)
        assert not hasattr(model(**inputs), "labels")
    assert out.labels.shape == out.logits.shape[:2]
    assert "labels" not in out
    loss = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), out.labels[:, 1:].flatten()
    )
    assert_same([out.loss], [loss])


def test_a_first_token_that_gets_padding_before_it_has_no_label(family):
    """Without pruning nothing predicts this token, so its label must not count."""
    model, method = vlms.shared(family), method_of(family)
    image = picture(family, 1)
    inputs = prompts(family, [image, 3], [image.tokens + 3])
    assert bool(inputs["attention_mask"].all())
    pruned = prune_inputs(model, inputs, method)
    rows = vlm_oracle.logits(vlm_oracle.eager(model), inputs, pruned.kept)
    losses = [
        torch.nn.functional.cross_entropy(row[:-1], ids[mask.bool()][1:], reduction="none")
        for row, ids, mask in zip(rows, pruned.input_ids, pruned["attention_mask"], strict=True)
    ]
    with attach(model, method), torch.no_grad():
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    assert_same([loss], [torch.cat(losses).mean()])


def test_a_default_device(family):
    """Host tensors are made on the host even if the default device is another."""
    model, method, inputs = vlms.shared(family), method_of(family), several(family)
    expected = prune_inputs(model, inputs, method)
    # It acts like torch.set_default_device, which PyTorch 2.8 cannot reset.
    with torch.device("meta"):
        pruned = prune_inputs(model, inputs, method)
        with attach(model, method), torch.no_grad():
            logits = model(**inputs).logits
    assert torch.equal(pruned["inputs_embeds"], expected["inputs_embeds"])
    assert not logits.is_meta


def test_the_core_model_prunes_and_decodes_alone(family):
    """`model.model(...)` prunes like `model(...)`, and can decode from its cache."""
    model, method, inputs = vlms.shared(family), method_of(family), several(family)
    name = vlms.CACHE_NAMES[0]
    with attach(model, method), torch.no_grad():
        expected = model(**inputs).logits
        tokens = model.generate(**inputs, **GREEDY)[:, -4:]
        out = model.model(**inputs, use_cache=True)
        assert torch.equal(model.lm_head(out[0]), expected)
        mask = inputs["attention_mask"]
        for i in range(4):
            token = model.lm_head(out[0][:, -1:]).argmax(-1)
            assert torch.equal(token[:, 0], tokens[:, i])
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            cache = {name: vlms.cache_of(out)}
            out = model.model(input_ids=token, attention_mask=mask, use_cache=True, **cache)
    with torch.no_grad():
        assert model.model(**inputs)[0].shape[1] == inputs["input_ids"].shape[1]


def test_an_image_larger_than_the_tower_was_made_for():
    """LLaVA passes `interpolate_pos_encoding` on to its tower."""
    model = vlms.shared("llava")
    large = vlms.Picture("image", 36, dict(pixel_values=torch.randn(1, 3, 84, 84)))
    inputs = prompts("llava", [3, large, 5])
    option = dict(interpolate_pos_encoding=True)
    core = model.model
    whole = prune_inputs(model, inputs | option, VisPruner(1.0))
    assert "interpolate_pos_encoding" not in whole
    features = core.get_image_features(
        inputs["pixel_values"], vision_feature_layer=-2, return_dict=True, **option
    ).pooler_output
    assert_same(whole.features["image"], list(features))
    with attach(model, VisPruner(4)), torch.no_grad():
        assert model(**inputs, **option).logits.shape[1] == 1 + 3 + 4 + 5
        assert model.generate(**inputs, **option, **GREEDY).shape[1] == 45 + 4


def test_refuses_an_option_that_the_model_does_not_pass_on(family):
    if family in ("llava", "llava-siglip"):
        pytest.skip("it does")
    model, inputs = vlms.shared(family), prompts(family, [3, picture(family, 1), 5])
    prune_inputs(model, inputs | {"interpolate_pos_encoding": False}, method_of(family))
    words = "interpolate_pos_encoding is given, but a .*Model does not pass it on"
    with pytest.raises(ValueError, match=words):
        prune_inputs(model, inputs | {"interpolate_pos_encoding": True}, method_of(family))


def test_generation_of_prompts_padded_at_the_right(family):
    """Padding moves to the left, so each answer is that of the prompt alone."""
    model, method = vlms.shared(family), method_of(family)
    a, b = picture(family, 1), picture(family, 2)
    batch = prompts(family, [3, a, 1], [2, b, 9], padding="right", extra=2)
    length = batch["input_ids"].shape[1]
    alone = []
    for i, part in enumerate(([3, a, 1], [2, b, 9])):
        single = prompts(family, part)
        single["input_ids"] = batch["input_ids"][i][batch["attention_mask"][i].bool()][None]
        alone.append(single)
    expected = torch.stack(vlm_oracle.logits(model, batch, _kept(model, batch, method), 4))
    with attach(model, method):
        out = model.generate(**batch, **GREEDY)
        assert torch.equal(out[:, :length], batch["input_ids"])
        assert torch.equal(out[:, length:], expected)
        for row, single in zip(out, alone, strict=True):
            assert torch.equal(model.generate(**single, **GREEDY)[0, -4:], row[length:])
    pruned = prune_inputs(model, batch, method)
    assert bool(pruned["attention_mask"][:, -1].all())
    assert torch.equal(model.generate(**pruned, **GREEDY), expected)
    # `forward` leaves padding on the caller's side.
    with attach(model, method), torch.no_grad():
        logits = model(**batch).logits
        for i, single in enumerate(alone):
            row = model(**single).logits[0]
            assert_same([logits[i, : len(row)]], [row])


def _kept(model: Any, inputs: dict[str, Tensor], method: Method) -> list[Tensor]:
    return prune_inputs(model, inputs, method).kept
