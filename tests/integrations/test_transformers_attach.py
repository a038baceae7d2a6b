"""`attach`: generate and forward of a whole model prune by themselves, and nothing else changes."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import vlm_oracle
import vlms
from pruned import assert_same, real_logits, scores_of, several
from vlms import FAMILIES, picture, prompts

from vispruner_kernels.integrations._cache import held
from vispruner_kernels.integrations.transformers import attach, prune_inputs
from vispruner_kernels.methods import Method, VisPruner

# The old name of the argument for a cache is tested too, for as long as there is one.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")

NEW = 5
GREEDY = dict(max_new_tokens=NEW, do_sample=False)


def method_of(family: str, keep: float = 4) -> Method:
    return VisPruner(keep, scores=scores_of(family))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=vlms.CACHE_NAMES)
def cache_name(request: pytest.FixtureRequest) -> str:
    return request.param


def expected_tokens(model: Any, inputs: dict[str, Tensor], method: Method) -> Tensor:
    """Greedy decoding without a cache, prompt by prompt, of tokens dropped by hand."""
    kept = prune_inputs(model, inputs, method).kept
    return torch.stack(vlm_oracle.logits(vlm_oracle.eager(model), inputs, kept, NEW))


def test_generation_with_a_cache_is_that_without(family):
    """One image, several, none; padded at the left. The prompt returned is the caller's."""
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
    # And without attach, where there are no ids, only the new tokens come back.
    pruned = prune_inputs(model, inputs, method)
    assert torch.equal(model.generate(**pruned, **GREEDY), expected)


def test_generation_of_prompts_with_videos():
    for name in ("video-llava", "llava-onevision", "qwen2.5-vl"):
        model, method = vlms.shared(name), method_of(name, 2)
        video, image = picture(name, 6, frames=3), picture(name, 8)
        inputs = prompts(name, [2, video, 3], [1, image, 7])
        with attach(model, method):
            out = model.generate(**inputs, **GREEDY)
        assert torch.equal(out[:, -NEW:], expected_tokens(model, inputs, method))


def test_beams(family):
    """The likelihood that beam search claims for its sequences is that by hand."""
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


def test_forward_prunes(family):
    model, method, inputs = vlms.shared(family), method_of(family), several(family)
    pruned = prune_inputs(model, inputs, method)
    labels = _labels(inputs["input_ids"], inputs["attention_mask"])
    with torch.no_grad():
        expected = model(**pruned, labels=_labels(pruned.input_ids, pruned["attention_mask"]))
        with attach(model, method):
            out = model(**inputs, labels=labels)
            # Positions of padded prompts begin elsewhere, so rounding differs.
            real = pruned["attention_mask"].bool()
            assert_same([out.logits[real]], [expected.logits[real]])
            assert_same([out.loss], [expected.loss])
            # By position, as a tuple, and without images.
            rest = {name: x for name, x in inputs.items() if name != "input_ids"}
            assert torch.equal(model(inputs["input_ids"], **rest).logits, out.logits)
            assert torch.equal(model(**inputs, return_dict=False)[0], out.logits)
            text = prompts(family, [7])
            if family == "qwen2.5-vl":
                # transformers 5.3 takes them for those of any next prompt, also without us.
                model.model.rope_deltas = None
            assert torch.equal(model(**text).logits, _unattached(model, text))


def _labels(ids: Tensor, mask: Tensor) -> Tensor:
    """Of all tokens that others come before."""
    return ids.masked_fill(mask.cumsum(-1) * mask < 2, -100)


def _unattached(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return type(model).forward(model, **inputs).logits


# As the caller sees them: padded, and not padded though pruning makes them so, also where the
# longest prompt loses nothing.
BATCHES = {
    "padded": lambda f: several(f),
    "one": lambda f: prompts(f, [3, picture(f, 1), 5]),
    "made unequal": lambda f: _filled(f, [20, picture(f, 1), 5], [2, picture(f, 2), 4, _more(f)]),
    "longest without": lambda f: _filled(f, [3, picture(f, 1), 5], []),
}


def _more(family: str) -> vlms.Picture:
    return picture(family, 3)


def _filled(family: str, *rows: list) -> dict[str, Tensor]:
    """Prompts as long as each other, by words at their end."""
    lengths = [int(x.sum()) for x in prompts(family, *rows)["attention_mask"]]
    return prompts(
        family, *([*row, max(lengths) - n] for row, n in zip(rows, lengths, strict=True))
    )


def _decoded(
    model: Any, inputs: dict[str, Tensor], masks: bool, prefill: bool, steps: bool, cache_name: str
) -> Tensor:
    """Greedy tokens, by hand, with the caller's mask and positions or without."""
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


# What is right without pruning: a padded batch needs a mask, and positions at both ends or at
# none; those of Qwen2.5-VL have three dimensions, which its callers do not make.
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
    """The caller knows nothing of what was: whatever is right unpruned is right."""
    model, method, inputs = vlms.shared(name), method_of(name), BATCHES[batch](name)
    ends = positions in ("both", "prefill"), positions in ("both", "steps")
    with attach(model, method):
        tokens = _decoded(model, inputs, masks, *ends, cache_name)
    assert torch.equal(tokens, expected_tokens(model, inputs, method))


def test_a_turn_that_is_padded(cache_name):
    """Padding between turns is in no later turn."""
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


def test_a_cache_carries_what_it_holds(cache_name):
    """In copies of it, under another handle, and not after it is emptied."""
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
def test_forward_goes_on_after_generate(settings, cache_name):
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


def test_images_after_a_cached_prompt(cache_name):
    """A turn of a conversation: the mask covers what is cached."""
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


def test_generation_from_embeddings(family):
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


def test_lengths_count_the_prompt_of_the_caller(family):
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


def test_lengths_with_embeddings_alone(family):
    model, method, inputs = vlms.shared(family), method_of(family), several(family)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {k: v for k, v in inputs.items() if k != "input_ids"} | {"inputs_embeds": embeds}
    length = embeds.shape[1]
    before = model.generate(**rest, do_sample=False, max_length=length + 3)
    with attach(model, method):
        out = model.generate(**rest, do_sample=False, max_length=length + 3)
    assert out.shape == before.shape == (3, 3)


def test_padding_that_ends_prompts_is_no_padding():
    """Where the end of a sequence and padding are one token, generate infers no mask."""
    model, method = vlms.shared("llava"), method_of("llava")
    inputs = prompts("llava", [3, picture("llava", 1), 5], [2, picture("llava", 2), 9])
    ends = GREEDY | dict(eos_token_id=[vlms.PAD, 95], pad_token_id=vlms.PAD)
    del inputs["attention_mask"]
    ones = torch.ones_like(inputs["input_ids"])
    with attach(model, method):
        out = model.generate(**inputs, **ends)
        assert torch.equal(out, model.generate(**inputs, attention_mask=ones, **ends))


def test_a_mask_that_generate_infers():
    model, method = vlms.shared("llava"), method_of("llava")
    inputs = prompts("llava", [3, picture("llava", 1), 5], [2, picture("llava", 2), 9])
    with attach(model, method):
        expected = model.generate(**inputs, **GREEDY)
        del inputs["attention_mask"]
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)


def test_everyone_sees_the_prompt_of_the_caller(family):
    """Harnesses count what comes after the prompt that they passed."""
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
def test_other_ways_to_generate(family, settings):
    model, method, inputs = vlms.shared(family), method_of(family), several(family)
    with attach(model, method):
        out = model.generate(**inputs, **GREEDY, **settings)
    assert torch.equal(out[:, -NEW:], expected_tokens(model, inputs, method))


def test_generate_needs_no_gradient():
    model = vlms.shared("llava")
    modes = []
    tower = model.model.vision_tower
    hook = tower.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    with attach(model, VisPruner(4)):
        model.generate(**prompts("llava", [3, picture("llava", 1), 5]), **GREEDY)
    hook.remove()
    assert modes == [False]


def test_settings_of_the_model_count():
    """transformers takes from there what the caller's config leaves open."""
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


def test_forward_as_a_tuple_and_positions_without_a_mask(cache_name):
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


def test_a_conversation_goes_on_by_forward(cache_name):
    """Two turns with images, padded, and the mask of the caller; the same as at once."""
    model, method = vlms.shared("llava"), VisPruner(4)
    first = prompts("llava", [3, picture("llava", 1), 5], [4, picture("llava", 2), 9])
    second = prompts("llava", [2, picture("llava", 3), 6], [1, picture("llava", 4), 7])
    whole = dict(first)
    for name in ("input_ids", "attention_mask"):
        whole[name] = torch.cat([first[name], second[name]], 1)
    # By prompt, not by turn.
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
        # And once more, a word.
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


def test_a_conversation_does_not_go_on_by_generate(cache_name):
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


def test_a_copy_without_a_handle_is_refused(tmp_path):
    model = vlms.make("llava")
    with attach(model, VisPruner(4)):
        with pytest.raises(RuntimeError, match=r"call remove\(\) .* before copying"):
            copy.deepcopy(model)
        with pytest.raises(RuntimeError, match=r"call remove\(\) .* saving it whole"):
            torch.save(model, tmp_path / "model.pt")
        model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    copy.deepcopy(model)


def state(model: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(model).items() if not name.startswith("_")}


def hooks(model: Any) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m))
        for m in model.modules()
    )


@pytest.mark.parametrize("broken", ["tower", "projector", "language_model", "keep"])
def test_the_model_is_as_it_was_after_an_exception(family, broken):
    model = vlms.make(family)
    inputs = prompts(family, [3, picture(family, 1), 5])
    expected = real_logits(model, inputs)
    attributes, count = state(model), hooks(model)
    configs = [id(m.config) for m in model.modules() if hasattr(m, "config")]
    core = model.model
    names = {
        "tower": ("visual", "vision_tower", "image_tower"),
        "projector": ("multi_modal_projector",),
        "language_model": ("language_model",),
        "keep": (),
    }[broken]
    if broken == "projector" and family == "qwen2.5-vl":
        module = core.visual.merger.mlp
    elif broken == "tower" and family == "qwen2.5-vl":
        module = core.visual.blocks[-1].attn.proj
    else:
        module = next((getattr(core, name) for name in names if hasattr(core, name)), None)
        if broken == "tower":
            module = getattr(module, "vision_model", module).post_layernorm

    def fail(module, args):
        raise RuntimeError("broken on purpose")

    hook = module.register_forward_pre_hook(fail) if module is not None else None
    method = method_of(family, 4 if hook else 1000)
    with pytest.raises((RuntimeError, ValueError)), attach(model, method):
        model.generate(**inputs, **GREEDY)
    if hook:
        hook.remove()
    assert state(model) == attributes
    assert hooks(model) == count
    assert [id(m.config) for m in model.modules() if hasattr(m, "config")] == configs
    assert_same(real_logits(model, inputs), expected)


def test_remove():
    model = vlms.make("llava")
    inputs = prompts("llava", [3, picture("llava", 1), 5])
    calls = []
    original = model.forward

    def mine(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = mine
    handle = attach(model, VisPruner(4))
    with pytest.raises(RuntimeError, match="prunes already"):
        attach(model, VisPruner(5))
    with torch.no_grad():
        assert model(**inputs).logits.shape[1] == 1 + 3 + 4 + 5
    assert calls == [1]
    handle.remove()
    handle.remove()
    assert model.forward is mine
    assert "generate" not in vars(model)
