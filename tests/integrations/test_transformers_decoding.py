"""`forward` of a model that `attach` prunes, and decoding by hand from its cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import vlm_oracle
import vlms
from pruned import (
    BATCHES,
    GREEDY,
    NEW,
    assert_same,
    expected_tokens,
    method_of,
    several,
)
from vlms import FAMILIES, picture, prompts

from vispruner_kernels.integrations._cache import held
from vispruner_kernels.integrations.transformers import attach, prune_inputs
from vispruner_kernels.methods import VisPruner

# The tests also use the old name of the cache argument, while transformers accepts it.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=vlms.CACHE_NAMES)
def cache_name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_forward_returns_logits_and_loss_of_the_pruned_prompt(family):
    model, method, inputs = vlms.shared(family), method_of(family), several(family)
    pruned = prune_inputs(model, inputs, method)
    labels = _labels(inputs["input_ids"], inputs["attention_mask"])
    with torch.no_grad():
        expected = model(**pruned, labels=_labels(pruned.input_ids, pruned["attention_mask"]))
        with attach(model, method):
            out = model(**inputs, labels=labels)
            # Padded prompts start at other positions, so rounding differs.
            real = pruned["attention_mask"].bool()
            assert_same([out.logits[real]], [expected.logits[real]])
            assert_same([out.loss], [expected.loss])
            # Also with a positional argument, with a tuple as output, and without images.
            rest = {name: x for name, x in inputs.items() if name != "input_ids"}
            assert torch.equal(model(inputs["input_ids"], **rest).logits, out.logits)
            assert torch.equal(model(**inputs, return_dict=False)[0], out.logits)
            text = prompts(family, [7])
            if family == "qwen2.5-vl":
                # transformers 5.3 applies old rope_deltas to the next prompt, even without pruning.
                model.model.rope_deltas = None
            assert torch.equal(model(**text).logits, _unattached(model, text))


def _labels(ids: Tensor, mask: Tensor) -> Tensor:
    """Labels of all tokens except the first of each prompt."""
    return ids.masked_fill(mask.cumsum(-1) * mask < 2, -100)


def _unattached(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return type(model).forward(model, **inputs).logits


def _decoded(
    model: Any, inputs: dict[str, Tensor], masks: bool, prefill: bool, steps: bool, cache_name: str
) -> Tensor:
    """Decode greedily by calling `forward`, with or without the caller's mask and positions."""
    mask, tokens = inputs["attention_mask"], []
    inputs = dict(inputs)
    if not masks:
        del inputs["attention_mask"]
    if prefill:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        for _ in range(NEW):
            tokens.append(out.logits[:, -1].argmax(-1))
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            step: dict[str, Any] = dict(input_ids=tokens[-1][:, None])
            if masks:
                step["attention_mask"] = mask
            if steps:
                step["position_ids"] = (mask.cumsum(-1) - 1)[:, -1:]
            out = model(**step, **{cache_name: vlms.cache_of(out)}, use_cache=True)
    return torch.stack(tokens, 1)


# The combinations that are right without pruning. A padded batch needs a mask, and positions in
# prefill and steps or in neither. Callers do not make the three rows of positions of Qwen2.5-VL.
HOW = [
    (name, batch, masks, positions)
    for name in FAMILIES
    for batch in BATCHES
    for masks in (True, False)
    for positions in ("none", "both", "prefill", "steps")
    if batch != "padded" or (masks and positions in ("none", "both"))
    if name != "qwen2.5-vl" or positions == "none"
]


@pytest.mark.parametrize(("name", "batch", "masks", "positions"), HOW)
def test_decoding_by_hand_as_if_nothing_were_removed(name, batch, masks, positions, cache_name):
    """Every call that is right without pruning is right with it."""
    model, method, inputs = vlms.shared(name), method_of(name), BATCHES[batch](name)
    ends = positions in ("both", "prefill"), positions in ("both", "steps")
    with attach(model, method):
        tokens = _decoded(model, inputs, masks, *ends, cache_name)
    assert torch.equal(tokens, expected_tokens(model, inputs, method))


def test_padding_between_turns_stays_masked(cache_name):
    """Later turns do not attend to padding between turns."""
    model, method = vlms.shared("llava"), VisPruner(4)
    inputs = BATCHES["made unequal"]("llava")
    words = torch.tensor([[vlms.PAD, vlms.PAD, 7], [9, 11, 12]])
    seen = torch.tensor([[0, 0, 1], [1, 1, 1]])
    last = torch.tensor([[21], [22]])
    longer = inputs | {
        "input_ids": torch.cat([inputs["input_ids"], words, last], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], seen, torch.ones(2, 1).long()], 1),
    }
    mask = longer["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    n = inputs["input_ids"].shape[1]
    with torch.no_grad(), attach(model, method):
        out = model(**inputs, position_ids=positions[:, :n], use_cache=True)
        cache = vlms.cache_of(out)
        for start, stop in ((n, n + 3), (n + 3, n + 4)):
            out = model(
                input_ids=longer["input_ids"][:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                **{cache_name: cache},
            )
    kept = prune_inputs(model, inputs, method).kept
    expected = vlm_oracle.logits(vlm_oracle.eager(model), longer, kept)
    assert_same(list(out.logits[:, -1]), [x[-1] for x in expected])


def test_copies_of_a_cache_keep_the_record_and_a_reset_drops_it(cache_name):
    """The record of what pruning removed is also valid if another `attach` prunes."""
    from transformers import StaticCache

    model, method = vlms.shared("llava"), VisPruner(4)
    inputs = BATCHES["made unequal"]("llava")
    expected = expected_tokens(model, inputs, method)
    with attach(model, method), torch.no_grad():
        out = model(**inputs, use_cache=True)
    copied = copy.deepcopy(vlms.cache_of(out))
    for cache in (copied, vlms.cache_of(out)):
        mask, tokens, logits = inputs["attention_mask"], [], out.logits
        with attach(model, VisPruner(5)), torch.no_grad():
            for _ in range(NEW):
                tokens.append(logits[:, -1].argmax(-1))
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                step = dict(input_ids=tokens[-1][:, None], attention_mask=mask)
                logits = model(**step, **{cache_name: cache}).logits
            with pytest.raises(ValueError, match=f"{cache_name} holds a pruned prompt"):
                model.generate(**step, **{cache_name: cache})
        assert torch.equal(torch.stack(tokens, 1), expected)
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    with attach(model, method), torch.no_grad():
        for _ in range(2):
            static.reset()
            logits = model(**inputs, **{cache_name: static}).logits
            step = {"input_ids": logits[:, -1].argmax(-1)[:, None], cache_name: static}
            assert torch.equal(model(**step).logits[:, -1].argmax(-1), expected[:, 1])
        static.reset()
        assert held(static) is None


@pytest.mark.parametrize("settings", [dict(num_return_sequences=2, num_beams=2), dict()], ids=str)
def test_forward_continues_from_the_cache_of_generate(settings, cache_name):
    model, method = vlms.shared("llava"), VisPruner(4)
    inputs = BATCHES["made unequal"]("llava")
    with attach(model, method), torch.no_grad():
        settings = settings | dict(return_dict_in_generate=True)
        out = model.generate(**inputs, **GREEDY, **settings)
        rows = len(out.sequences) // 2
        mask = inputs["attention_mask"].repeat_interleave(rows, 0)
        mask = torch.cat([mask, torch.ones(2 * rows, NEW).long()], 1)
        step = dict(input_ids=out.sequences[:, -1:], attention_mask=mask)
        logits = model(**step, **{cache_name: vlms.cache_of(out)}).logits
    assert logits.shape[:2] == (2 * rows, 1)
    if rows == 1:
        kept = prune_inputs(model, inputs, method).kept
        more = vlm_oracle.logits(vlm_oracle.eager(model), inputs, kept, NEW + 1)
        assert torch.equal(logits[:, -1].argmax(-1), torch.stack(more)[:, -1])


def test_prunes_images_after_a_cached_prompt(cache_name):
    """In a turn of a conversation, the mask covers the cached tokens too."""
    model, method = vlms.shared("llava"), method_of("llava")
    first, second = prompts("llava", [9]), prompts("llava", [3, picture("llava", 1), 5])
    whole = dict(second)
    for name in ("input_ids", "attention_mask"):
        whole[name] = torch.cat([first[name], second[name]], 1)
    with torch.no_grad(), attach(model, method):
        expected = model(**whole).logits
        cached = {cache_name: vlms.cache_of(model(**first, use_cache=True))}
        out = model(**second | {"attention_mask": whole["attention_mask"]}, **cached)
    assert_same([out.logits[0]], [expected[0, first["input_ids"].shape[1] :]])


def test_decodes_from_a_tuple_with_positions_and_no_mask(cache_name):
    model, method = vlms.shared("llava"), VisPruner(4)
    inputs = prompts("llava", [3, picture("llava", 1), 5])
    length = inputs["input_ids"].shape[1]
    expected = expected_tokens(model, inputs, method)
    with torch.no_grad(), attach(model, method):
        out = model(**inputs, use_cache=True, return_dict=False)
        tokens = []
        for i in range(NEW):
            tokens.append(out[0][:, -1].argmax(-1))
            out = model(
                input_ids=tokens[-1][:, None],
                position_ids=torch.tensor([[length + i]]),
                **{cache_name: out[1]},
                return_dict=False,
            )
    assert torch.equal(torch.stack(tokens, 1), expected)


def test_forward_continues_a_conversation_with_more_images(cache_name):
    """Two padded turns with images and the caller's mask equal one call with both."""
    model, method = vlms.shared("llava"), VisPruner(4)
    first = prompts("llava", [3, picture("llava", 1), 5], [4, picture("llava", 2), 9])
    second = prompts("llava", [2, picture("llava", 3), 6], [1, picture("llava", 4), 7])
    whole = dict(first)
    for name in ("input_ids", "attention_mask"):
        whole[name] = torch.cat([first[name], second[name]], 1)
    # Order the images by prompt, not by turn.
    pixels = first["pixel_values"], second["pixel_values"]
    whole["pixel_values"] = torch.stack(pixels, 1).flatten(0, 1)
    for inputs in (first, whole):
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    length = first["input_ids"].shape[1]
    turn = second | {
        "attention_mask": whole["attention_mask"],
        "position_ids": whole["position_ids"][:, length:],
    }
    with torch.no_grad(), attach(model, method):
        expected = model(**whole).logits
        cache = vlms.cache_of(model(**first, use_cache=True))
        out = model(**turn, **{cache_name: cache}).logits
        # A third turn of one word.
        mask = torch.cat([whole["attention_mask"], torch.ones(2, 1).long()], 1)
        ids = torch.tensor([[7], [8]])
        positions = (mask.cumsum(-1) - 1)[:, -1:]
        last = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, **{cache_name: cache}
        ).logits
        longer = whole | {
            "input_ids": torch.cat([whole["input_ids"], ids], 1),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        }
        once = model(**longer).logits
    for i in range(2):
        real = int(second["attention_mask"][i].sum()) - 12
        assert_same([out[i, -real:]], [expected[i, -real:]])
    assert_same(list(last[:, -1]), list(once[:, -1]))


def test_generate_refuses_a_cache_with_a_pruned_prompt(cache_name):
    model, method = vlms.shared("llava"), VisPruner(4)
    inputs = prompts("llava", [3, picture("llava", 1), 5])
    with attach(model, method):
        out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        with torch.no_grad():
            cache = vlms.cache_of(model(**inputs, use_cache=True))
        for used in (vlms.cache_of(out), cache):
            ids = torch.cat([out.sequences, torch.tensor([[5, 6]])], 1)
            with pytest.raises(ValueError, match=f"{cache_name} holds a pruned prompt"):
                model.generate(input_ids=ids, **{cache_name: used}, **GREEDY)
        for shape, words in (
            ((1, 9), r"got \[1, 9\], expected \[1, 26\], the unpruned prompt"),
            ((1, 14), r"got \[1, 14\], expected \[1, 26\]"),
            ((2, 26), r"got \[2, 26\], expected \[1, 26\]"),
        ):
            step = {"input_ids": torch.tensor([[5]]), cache_name: cache}
            with torch.no_grad(), pytest.raises(ValueError, match=f"attention_mask: {words}"):
                model(**step, attention_mask=torch.ones(shape).long())
        two = torch.tensor([[5], [6]])
        with torch.no_grad(), pytest.raises(ValueError, match="holds 1 pruned prompts, expected 2"):
            model(input_ids=two, **{cache_name: cache})
