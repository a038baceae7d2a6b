"""The prompt after pruning: positions, labels, embeddings."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import vlm_oracle
import vlms
from pruned import assert_same, real_logits, scores_of, several
from vlms import FAMILIES, picture, prompts

from vispruner_kernels.integrations.transformers import prune_inputs
from vispruner_kernels.methods import FoPru, VisPruner


@pytest.mark.parametrize("padding", ["left", "right"])
def test_rope_deltas_continue_the_unpruned_positions(padding):
    """The next position is that of the unpruned prompt."""
    model = vlms.make("qwen2.5-vl")
    inputs = several("qwen2.5-vl", padding, extra=2)
    positions = vlm_oracle.spatial_positions(model, inputs)
    pruned = prune_inputs(model, inputs, FoPru(4))
    for b, mask in enumerate(inputs["attention_mask"].bool()):
        following = int(positions[:, b, mask].max()) + 1
        tokens = int(pruned["attention_mask"][b].sum())
        assert int(model.model.rope_deltas[b]) == following - tokens


def test_accepts_positions_in_space_from_the_caller():
    """Three rows in space do not change. A fourth, in front of them, has text positions."""
    model = vlms.shared("qwen2.5-vl")
    inputs = several("qwen2.5-vl")
    mask = inputs["attention_mask"]
    space = vlm_oracle.spatial_positions(model, inputs)
    text = (mask.cumsum(-1) - 1).clamp(min=0)[None]
    expected = prune_inputs(model, inputs, FoPru(4))
    three = prune_inputs(model, inputs | {"position_ids": space}, FoPru(4))
    assert torch.equal(three["position_ids"], expected["position_ids"])
    four = prune_inputs(model, inputs | {"position_ids": torch.cat([text, space])}, FoPru(4))
    assert torch.equal(four["position_ids"][1:], expected["position_ids"])
    for row, real in zip(four["position_ids"][0], four["attention_mask"].bool(), strict=True):
        assert row[real].tolist() == list(range(int(real.sum())))
    assert_same(real_logits(model, four), real_logits(model, expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_accepts_embeddings_instead_of_ids(family):
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


def test_positions_and_labels_match_the_pruned_prompt():
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


def test_accepts_image_sizes_as_lists_and_empty_pixels():
    model, method = vlms.shared("llava-next"), VisPruner(4)
    inputs = prompts("llava-next", [3, picture("llava-next", 1), 5])
    expected = prune_inputs(model, inputs, method)
    listed = inputs | {"image_sizes": inputs["image_sizes"].tolist()}
    assert torch.equal(prune_inputs(model, listed, method).kept[0], expected.kept[0])
    none = prompts("llava-next", [7]) | {"pixel_values": torch.zeros(0, 5, 3, 56, 56)}
    assert prune_inputs(model, none, method).kept is None
