"""Caches that hold a pruned prompt: changes of their rows, copies, cuts, and later turns."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import transformers
import vlms
from pruned import assert_same
from vlms import picture, prompts

from vispruner_kernels.integrations._cache import held
from vispruner_kernels.integrations.transformers import attach
from vispruner_kernels.methods import VisPruner

METHOD, NAME = VisPruner(4), vlms.CACHE_NAMES[0]
GREEDY = dict(max_new_tokens=3, do_sample=False)
MORE = torch.tensor([[5], [6]])


def two() -> dict[str, Tensor]:
    """Two prompts that lose different numbers of tokens."""
    return prompts("llava", [3, picture("llava", 1), 5], [2, 9])


def ones(mask: Tensor, count: int) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), count)], 1)


def filled(model: Any, inputs: dict[str, Tensor], **arguments: Any) -> Any:
    return vlms.cache_of(model(**inputs, use_cache=True, **arguments))


def positions(mask: Tensor, last: int) -> Tensor:
    return (mask.cumsum(-1) - 1)[:, -last:]


@pytest.mark.parametrize("beams", [1, 2])
def test_a_cache_passed_to_generate_gets_the_record(beams):
    """It has the same record as a cache that `generate` makes."""
    model, inputs = vlms.shared("llava"), two()
    settings = GREEDY | dict(num_beams=beams)
    with attach(model, METHOD), torch.no_grad():
        own = model.generate(**inputs, **settings, return_dict_in_generate=True)
        cache = transformers.DynamicCache()
        tokens = model.generate(**inputs, **settings, **{NAME: cache})
        assert torch.equal(tokens, own.sequences)
        more = torch.cat([tokens, MORE], 1)
        with pytest.raises(ValueError, match="holds a pruned prompt"):
            model.generate(input_ids=more, **GREEDY, **{NAME: cache})
        if beams == 1:
            step = dict(input_ids=MORE, attention_mask=ones(inputs["attention_mask"], 3))
            out = [model(**step, **{NAME: x}).logits for x in (cache, vlms.cache_of(own))]
            assert torch.equal(*out)


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_answers_that_ended_early_are_masked_in_the_next_turn(name):
    model = vlms.shared(name)
    method = VisPruner(4, scores="received") if name != "llava" else METHOD
    first = prompts(name, [3, picture(name, 1), 5], [2, picture(name, 2), 9])
    answer, seen = torch.tensor([[5, 6], [7, vlms.PAD]]), torch.tensor([[1, 1], [1, 0]])
    turn = torch.tensor([[8, 9, 10], [11, 12, 13]])
    mask = torch.cat([first["attention_mask"], seen, torch.ones_like(turn)], 1)
    with attach(model, method), torch.no_grad():
        cache = {NAME: filled(model, first)}
        model(input_ids=answer, attention_mask=ones(first["attention_mask"], 2), **cache)
        out = model(input_ids=turn, attention_mask=mask, **cache).logits
        # The second prompt alone, without the padding token.
        alone = {k: v[1:] for k, v in first.items() if k in ("input_ids", "attention_mask")}
        alone = {k: v[:, first["attention_mask"][1] == 1] for k, v in alone.items()}
        rest = {k: v for k, v in prompts(name, [2, picture(name, 2), 9]).items() if k not in alone}
        rest.pop("mm_token_type_ids", None)
        cache = {NAME: filled(model, alone | rest)}
        both = torch.cat([answer[1:, :1], turn[1:]], 1)
        # Use the positions of the batch, where the padding token has a position.
        n = alone["input_ids"].shape[1]
        place = None
        if name == "llava":
            place = torch.cat([torch.tensor([n]), torch.arange(n + 2, n + 5)])[None]
        step = dict(input_ids=both, attention_mask=ones(alone["attention_mask"], 4))
        expected = model(**step, position_ids=place, **cache).logits[:, 1:]
    if name == "llava":
        assert_same([out[1]], [expected[0]])
    else:
        assert out.shape == (2, 3, 96)


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ],
    ids=["reorder", "repeat", "select"],
)
@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("copied", [False, True])
def test_the_record_follows_changes_of_the_rows_of_a_cache(change, rows, masks, copied):
    model, inputs = vlms.shared("llava"), two()
    mask = ones(inputs["attention_mask"], 1)
    step: dict[str, Any] = dict(input_ids=MORE)
    if masks:
        step |= dict(attention_mask=mask, position_ids=positions(mask, 1))
    with attach(model, METHOD), torch.no_grad():
        cache = filled(model, inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, :-1])
        expected = model(**step, **{NAME: copy.deepcopy(cache)}).logits[rows]
        if copied:
            cache = copy.deepcopy(cache)
        change(cache)
        changed = {name: x[rows] for name, x in step.items()}
        out = model(**changed, **{NAME: cache}).logits
    assert_same([out], [expected])


def test_a_cache_keeps_the_name_of_its_class_and_pickles():
    model = vlms.shared("llava")
    with attach(model, METHOD), torch.no_grad():
        cache = filled(model, two())
        assert isinstance(cache, transformers.DynamicCache)
        assert repr(type(cache)) == repr(transformers.DynamicCache)
        stream = io.BytesIO()
        pickle.dump(cache, stream)
        stream.seek(0)
        twin = pickle.load(stream)
        expected = model(input_ids=MORE, **{NAME: cache}).logits
        assert torch.equal(model(input_ids=MORE, **{NAME: twin}).logits, expected)


def test_continues_from_a_cut_outside_the_pruned_prompt():
    """A cut within the answer, and one before the image. A cut within the prompt is an error."""
    model = vlms.shared("llava")
    inputs = prompts("llava", [6, picture("llava", 1), 5])
    other = prompts("llava", [picture("llava", 2), 4])
    other = {k: v[:, 1:] if v.dim() == 2 else v for k, v in other.items()}
    with attach(model, METHOD), torch.no_grad():
        cache = filled(model, inputs)
        expected = model(input_ids=MORE[:1], **{NAME: copy.deepcopy(cache)}).logits
        step = torch.tensor([[9, 10]])
        model(input_ids=step, **{NAME: cache})
        cache.crop(cache.get_seq_length() - 2 if vlms.VERSION < (5, 23) else -2)
        assert_same([model(input_ids=MORE[:1], **{NAME: cache}).logits], [expected])
        within = copy.deepcopy(cache)
        within.crop(9 if vlms.VERSION < (5, 23) else 9 - within.get_seq_length())
        words = f"{NAME} was cut to 9 tokens, within a pruned prompt that ends at 16, expected at "
        with pytest.raises(ValueError, match=words + "most 7, before the first image"):
            model(input_ids=step, **{NAME: within})
        cache.crop(7 if vlms.VERSION < (5, 23) else 7 - cache.get_seq_length())
        assert held(cache) is None
        n = 7 + other["input_ids"].shape[1]
        turn = other | {"attention_mask": torch.ones(1, n).long()}
        out = model(**turn, position_ids=torch.arange(7, n)[None], **{NAME: cache}).logits
        whole = other | {
            "input_ids": torch.cat([inputs["input_ids"][:, :7], other["input_ids"]], 1),
            "attention_mask": torch.ones(1, n).long(),
        }
        expected = model(**whole).logits
    assert_same([out[0]], [expected[0, 7:]])
