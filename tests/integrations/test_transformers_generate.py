"""`generate` of a model that `attach` prunes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import vlm_oracle
import vlms
from pruned import (
    GREEDY,
    NEW,
    expected_tokens,
    method_of,
    several,
)
from vlms import FAMILIES, picture, prompts

from vispruner_kernels.integrations.transformers import attach, prune_inputs
from vispruner_kernels.methods import VisPruner


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_generate_equals_greedy_decoding_without_a_cache(family):
    """Prompts with one image, several and none, padded at the left. The output begins with them."""
    model, method, inputs = vlms.shared(family), method_of(family), several(family)
    expected = expected_tokens(model, inputs, method)
    length = inputs["input_ids"].shape[1]
    before = model.generate(**inputs, **GREEDY)
    with attach(model, method):
        out = model.generate(**inputs, **GREEDY)
        assert torch.equal(out[:, :length], inputs["input_ids"])
        assert torch.equal(out[:, length:], expected)
        details = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        assert torch.equal(details.sequences, out)
        assert torch.equal(details["sequences"], out)
        ids = inputs["input_ids"]
        rest = {name: x for name, x in inputs.items() if name != "input_ids"}
        assert torch.equal(model.generate(ids, **rest, **GREEDY), out)
    assert torch.equal(model.generate(**inputs, **GREEDY), before)
    # Without attach the call has no ids, so generate returns only the new tokens.
    pruned = prune_inputs(model, inputs, method)
    assert torch.equal(model.generate(**pruned, **GREEDY), expected)


def test_generates_from_prompts_with_videos():
    for name in ("video-llava", "llava-onevision", "qwen2.5-vl"):
        model, method = vlms.shared(name), method_of(name, 2)
        video, image = picture(name, 6, frames=3), picture(name, 8)
        inputs = prompts(name, [2, video, 3], [1, image, 7])
        with attach(model, method):
            out = model.generate(**inputs, **GREEDY)
        assert torch.equal(out[:, -NEW:], expected_tokens(model, inputs, method))


def test_beam_scores_equal_the_likelihood_by_hand(family):
    """The oracle computes the log-likelihood of each returned sequence."""
    model, method, inputs = vlms.shared(family), method_of(family), several(family)
    settings = GREEDY | dict(num_beams=3, num_return_sequences=2, length_penalty=0.0)
    settings |= dict(return_dict_in_generate=True, output_scores=True)
    pruned = prune_inputs(model, inputs, method)
    expected = model.generate(**pruned, **settings).sequences
    with attach(model, method):
        out = model.generate(**inputs, **settings)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(out.sequences[:, :length], inputs["input_ids"].repeat_interleave(2, 0))
    assert torch.equal(out.sequences[:, length:], expected)
    for beam in range(2):
        likelihood = _likelihood(model, inputs, pruned.kept, expected[beam::2])
        torch.testing.assert_close(out.sequences_scores[beam::2], likelihood, rtol=0, atol=1e-3)


def _likelihood(model: Any, inputs: dict, kept: list[Tensor], new: Tensor) -> Tensor:
    """Log-likelihood of the new tokens of each prompt."""
    longer = inputs | {
        "input_ids": torch.cat([inputs["input_ids"], new], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1),
    }
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        text = torch.zeros_like(new, dtype=types.dtype)
        longer["mm_token_type_ids"] = torch.cat([types, text], 1)
    rows = zip(vlm_oracle.logits(model, longer, kept), new, strict=True)
    return torch.stack(
        [x.log_softmax(-1)[-NEW - 1 : -1].gather(1, t[:, None]).sum() for x, t in rows]
    )


def test_generates_from_embeddings(family):
    model, method, inputs = vlms.shared(family), method_of(family), several(family)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    with attach(model, method):
        out = model.generate(inputs_embeds=embeds, **rest, **GREEDY)
        both = model.generate(inputs_embeds=embeds, **inputs, **GREEDY)
    expected = expected_tokens(model, inputs, method)
    assert torch.equal(out, expected)
    assert torch.equal(both[:, -NEW:], expected)


def test_max_length_counts_the_prompt_of_the_caller(family):
    from transformers import GenerationConfig

    model, method = vlms.shared(family), method_of(family)
    inputs = prompts(family, [3, picture(family, 1), 5])
    length = inputs["input_ids"].shape[1]
    common = dict(do_sample=False, pad_token_id=vlms.PAD)
    with attach(model, method):
        assert model.generate(**inputs, max_length=length + 3, **common).shape[1] == length + 3
        config = GenerationConfig(max_length=length + 4, eos_token_id=None, **common)
        assert model.generate(**inputs, generation_config=config).shape[1] == length + 4
        assert config.max_length == length + 4
        with torch.no_grad():
            stop = int(model.generate(**inputs, max_new_tokens=1, **common)[0, -1])
        ends = common | dict(eos_token_id=stop)
        assert model.generate(**inputs, max_length=length + 9, **ends).shape[1] == length + 1
        long = model.generate(**inputs, max_length=length + 9, min_length=length + 4, **ends)
        assert long.shape[1] >= length + 4


def test_max_length_counts_the_embeddings_of_the_caller(family):
    model, method, inputs = vlms.shared(family), method_of(family), several(family)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {k: v for k, v in inputs.items() if k != "input_ids"} | {"inputs_embeds": embeds}
    length = embeds.shape[1]
    before = model.generate(**rest, do_sample=False, max_length=length + 3)
    with attach(model, method):
        out = model.generate(**rest, do_sample=False, max_length=length + 3)
    assert out.shape == before.shape == (3, 3)


def test_infers_no_mask_if_the_padding_token_ends_sequences():
    """If the end of a sequence and padding are the same token, transformers infers no mask."""
    model, method = vlms.shared("llava"), method_of("llava")
    inputs = prompts("llava", [3, picture("llava", 1), 5], [2, picture("llava", 2), 9])
    ends = GREEDY | dict(eos_token_id=[vlms.PAD, 95], pad_token_id=vlms.PAD)
    del inputs["attention_mask"]
    ones = torch.ones_like(inputs["input_ids"])
    with attach(model, method):
        out = model.generate(**inputs, **ends)
        assert torch.equal(out, model.generate(**inputs, attention_mask=ones, **ends))


def test_infers_the_mask_from_padding_tokens():
    model, method = vlms.shared("llava"), method_of("llava")
    inputs = prompts("llava", [3, picture("llava", 1), 5], [2, picture("llava", 2), 9])
    with attach(model, method):
        expected = model.generate(**inputs, **GREEDY)
        del inputs["attention_mask"]
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)


def test_callbacks_of_generate_get_the_prompt_of_the_caller(family):
    """Harnesses count the tokens after the prompt that they passed."""
    from transformers import (
        LogitsProcessor,
        LogitsProcessorList,
        StoppingCriteria,
        StoppingCriteriaList,
    )

    model, method = vlms.shared(family), method_of(family)
    inputs = prompts(family, [3, picture(family, 1), 5])
    length = inputs["input_ids"].shape[1]
    seen: dict[str, list[Tensor]] = {"processor": [], "criterion": [], "streamer": []}

    class Processor(LogitsProcessor):
        def __call__(self, ids, scores):
            seen["processor"].append(ids)
            return scores

    class AfterThree(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            seen["criterion"].append(ids)
            return torch.full((len(ids),), ids[:, length:].shape[1] >= 3)

    class Streamer:
        def put(self, value):
            seen["streamer"].append(value)

        def end(self):
            pass

    with attach(model, method):
        out = model.generate(
            **inputs,
            max_new_tokens=9,
            do_sample=False,
            logits_processor=LogitsProcessorList([Processor()]),
            stopping_criteria=StoppingCriteriaList([AfterThree()]),
            streamer=Streamer(),
        )
    assert torch.equal(out[:, length:], expected_tokens(model, inputs, method)[:, :3])
    assert [torch.equal(x, out[:, : length + i]) for i, x in enumerate(seen["processor"])] == [
        True
    ] * 3
    assert torch.equal(seen["criterion"][-1], out)
    assert torch.equal(torch.cat([x.flatten() for x in seen["streamer"]]), out[0])


@pytest.mark.parametrize(
    "settings",
    [dict(use_cache=False), dict(cache_implementation="static"), dict(min_new_tokens=NEW)],
    ids=str,
)
def test_other_settings_of_generate_give_the_same_tokens(family, settings):
    model, method, inputs = vlms.shared(family), method_of(family), several(family)
    with attach(model, method):
        out = model.generate(**inputs, **GREEDY, **settings)
    assert torch.equal(out[:, -NEW:], expected_tokens(model, inputs, method))


def test_generate_runs_the_tower_without_gradients():
    model = vlms.shared("llava")
    modes = []
    tower = model.model.vision_tower
    hook = tower.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    with attach(model, VisPruner(4)):
        model.generate(**prompts("llava", [3, picture("llava", 1), 5]), **GREEDY)
    hook.remove()
    assert modes == [False]


def test_settings_of_the_model_apply_if_the_config_has_none():
    """transformers reads a setting from the model if the caller's config does not have it."""
    from transformers import GenerationConfig

    model = vlms.make("llava")
    inputs = prompts("llava", [3, picture("llava", 1), 5], [2, picture("llava", 2), 9])
    length = inputs["input_ids"].shape[1]
    model.generation_config.max_length = length + 3
    config = GenerationConfig(do_sample=False)
    with attach(model, VisPruner(4)):
        out = model.generate(**inputs, generation_config=config)
        assert out.shape[1] == length + 3
        del inputs["attention_mask"]
        assert torch.equal(model.generate(**inputs, generation_config=config), out)
