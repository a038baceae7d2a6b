"""The plugin in engines of vLLM, offline, on tiny models with saved weights."""

from __future__ import annotations

import gc
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import vllm_models
import vlm_oracle
from vllm_engine import ask, engine, model_of, prompt, watching
from vllm_models import SIDE, N, picture, words
from vllm_selection import chosen, expected, packing, scores_of

from vispruner_kernels.methods import Method, by_name

pytestmark = pytest.mark.filterwarnings("default")

# The second SigLIP model drops the first patch.
FAMILIES: dict[str, dict[str, Any]] = {
    "llava": {},
    "llava-siglip": {},
    "llava-siglip-default": {"vision_feature_select_strategy": "default"},
    "llava-next": {},
}
TEXT = f"{words(5, 6)} <image> {words(7, 8, 9)}"


@dataclass
class Saved:
    folder: Any
    model: Any


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function from a family to a folder and the model of transformers that is saved there."""
    made: dict[str, Saved] = {}

    def get(family: str) -> Saved:
        if family not in made:
            folder = tmp_path_factory.mktemp("models") / family
            model = vllm_models.save(family.removesuffix("-default"), folder, **FAMILIES[family])
            made[family] = Saved(folder, model)
        return made[family]

    return get


METHODS = [
    ("llava", dict(method="vispruner", keep=20)),
    ("llava", dict(method="vispruner", keep=0.25, important_ratio=0.25, step=4)),
    ("llava", dict(method="vispruner", keep=13, matching="pairwise")),
    ("llava", dict(method="vispruner", keep=20, scores="received")),
    ("llava", dict(method="fastervlm", keep=9)),
    ("llava", dict(method="fopru", keep=11)),
    ("llava", dict(method="fopru", keep=24, strategy="row")),
    ("llava", dict(method="random", keep=7)),
    ("llava", dict(method="vispruner", keep=1.0)),
    ("llava-siglip", dict(method="vispruner", keep=20, scores="received")),
    ("llava-siglip-default", dict(method="vispruner", keep=20, scores="received")),
]


@pytest.mark.parametrize(("family", "given"), METHODS, ids=str)
def test_prompt_selection_projector_and_answer(family, given, saved):
    """The prompt has the kept tokens only, the selection is that of the reference, and projector
    and answer are those of transformers with these tokens."""
    folder, model = saved(family).folder, saved(family).model
    image, method = picture(1), by_name(**given)
    keep = method.retained_tokens(N)
    with engine(folder, given) as llm:
        with watching(model_of(llm)) as seen:
            (answer,) = ask(llm, prompt(TEXT, image))
        tower = model_of(llm).vision_tower.vision_model
        assert not tower.encoder.layers[-1].self_attn.attn._forward_pre_hooks
    assert answer.length == 2 + keep + 3

    # Selection: the reference, applied to the features of vLLM's tower.
    prefix = 1 if family == "llava" else 0
    dropped = 1 if family == "llava-siglip-default" else 0
    (features,), (q,), (k,), (rows,) = seen.features, seen.q, seen.k, seen.rows
    assert features.shape[:2] == (1, N - dropped)
    scores = scores_of(method, q, k, prefix)
    scores = None if scores is None else scores[:, dropped:]
    indices = chosen(method, features[0], None if scores is None else scores[0])
    assert len(indices) == keep
    assert torch.equal(rows, features[0, indices])

    # Projector and answer: transformers, with the same tokens.
    inputs = vllm_models.inputs(folder, TEXT, image)
    embeds = vlm_oracle.embeddings(model, inputs)["image"][0][indices]
    assert torch.allclose(seen.embeds[0], embeds, rtol=1e-4, atol=1e-4)
    (tokens,) = vlm_oracle.logits(model, inputs, [indices], new=len(answer.tokens))
    assert answer.tokens == tokens.tolist()


def test_the_integration_in_transformers_gives_the_same_answer(saved):
    from vispruner_kernels.integrations.transformers import prune_inputs

    folder, model = saved("llava").folder, saved("llava").model
    image, given = picture(2), dict(method="vispruner", keep=20)
    with engine(folder, given) as llm:
        with watching(model_of(llm)) as seen:
            (answer,) = ask(llm, prompt(TEXT, image))
    features, rows = seen.features[0][0], seen.rows[0]
    indices = (features[:, None] == rows).all(-1).nonzero()[:, 0]
    assert len(indices) == 20

    class Given(Method):
        def select(self, features, scores):
            return indices[None]

    with torch.no_grad():
        pruned = prune_inputs(model, vllm_models.inputs(folder, TEXT, image), Given(20))
        out = model.generate(
            **pruned,
            max_new_tokens=len(answer.tokens),
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert out.sequences[0].tolist() == answer.tokens
    logprobs = [
        step[0].log_softmax(-1)[token].item()
        for step, token in zip(out.logits, answer.tokens, strict=True)
    ]
    assert logprobs == pytest.approx(answer.logprobs, abs=1e-4)


@pytest.mark.parametrize("family", ["llava", "llava-next"])
def test_keeping_all_tokens_equals_vllm_without_the_plugin(family, saved):
    folder = saved(family).folder
    prompts = [
        prompt(TEXT, picture(1)),
        prompt(f"<image> {words(9)} <image>", picture(2, 100, 60), picture(3, 50, 90)),
        prompt(words(3, 4, 5)),
    ]
    with engine(folder, None) as llm:
        before = ask(llm, *prompts)
    with engine(folder, dict(method="vispruner", keep=1.0)) as llm:
        after = ask(llm, *prompts)
        # The count 1 is one patch, the fraction 1.0 all of them.
        (one,) = ask(llm, prompt(TEXT, picture(1), vispruner_keep=1))
    newlines = SIDE if family == "llava-next" else 0
    assert one.length == 2 + 1 + newlines + 3
    for a, b in zip(before, after, strict=True):
        assert (a.length, a.tokens) == (b.length, b.tokens)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_a_batch_gives_the_answers_of_its_prompts_alone(saved):
    """Prompts without images, with several images, and with budgets of their own. The tower takes
    the images of the batch in parts."""
    prompts = [
        prompt(words(3, 4, 5)),
        prompt(TEXT, picture(1)),
        prompt(TEXT, picture(1), vispruner_keep=8),
        prompt(f"{words(9)} <image> {words(8)} <image>", picture(2), picture(3), vispruner_keep=5),
        prompt(f"<image> <image> <image> {words(9)}", picture(4), picture(1), picture(5)),
        prompt(TEXT, picture(6), vispruner_keep=0.1),
    ]
    # The batch may change features in their last bits; `random` does not depend on them.
    given = dict(method="random", keep=20)
    more = dict(enable_prefix_caching=False, mm_processor_cache_gb=0)
    with engine(saved("llava").folder, given, **more) as llm:
        alone = [ask(llm, one)[0] for one in prompts]
    assert [a.length for a in alone] == [3, 25, 13, 12, 61, 11]

    # The kept tokens of all eight images fit in one step; two images fit in the tower.
    budget = 2 * (N + 1) + 3
    more = dict(max_num_batched_tokens=budget, enable_chunked_prefill=True)
    with engine(saved("llava").folder, given, **more) as llm:
        with watching(model_of(llm)) as seen:
            together = ask(llm, *prompts)
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert [a.length for a in together] == [a.length for a in alone]
    sizes = [len(features) for features in seen.features]
    assert max(sizes) == 2
    # Eight images, but one occurs twice with the same budget.
    assert sum(sizes) == 7


def test_a_batch_of_tiles_gives_the_answers_of_its_prompts_alone(saved):
    """Images of several tiles with budgets of their own. The tower takes them in parts."""
    sizes = [(60, 100), (200, 200), (60, 100), (100, 60), (330, 100), (200, 210)]
    budgets = [{}, {"vispruner_keep": 5}, {"vispruner_keep": 2}, {}, {"vispruner_keep": 0.05}, {}]
    prompts = [
        prompt(TEXT, picture(i, *size), **budget)
        for i, (size, budget) in enumerate(zip(sizes, budgets, strict=True))
    ]
    given = dict(method="random", keep=7, budget="tile", newlines="drop")
    more = dict(enable_prefix_caching=False, mm_processor_cache_gb=0)
    folder = saved("llava-next").folder
    tiles = [3, 5, 3, 3, 4, 5]
    with engine(folder, given, **more) as llm:
        with watching(model_of(llm)) as seen:
            alone = [ask(llm, one)[0] for one in prompts]
        assert [len(features) for features in seen.features] == tiles
    assert [a.length - 5 for a in alone][:4] == [3 * 7, 5 * 5, 3 * 2, 3 * 7]
    more |= dict(max_num_batched_tokens=8 * (N + 1), enable_chunked_prefill=True)
    with engine(folder, given, **more) as llm:
        with watching(model_of(llm)) as seen:
            together = ask(llm, *prompts)
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert [a.length for a in together] == [a.length for a in alone]
    parts = [len(features) for features in seen.features]
    assert sum(parts) == sum(tiles)
    # A part has at most eight tiles, and one part has more than one image.
    assert 5 < max(parts) <= 8


def test_bfloat16_does_not_round_the_budget(saved):
    # In bfloat16 the budget would be 0.2578125, and the image would keep 17 tokens.
    given = dict(method="vispruner", keep=0.2578)
    with engine(saved("llava").folder, given, dtype="bfloat16") as llm:
        with watching(model_of(llm)) as seen:
            (answer,) = ask(llm, prompt(TEXT, picture(1)))
    assert answer.length == 2 + 16 + 3
    (features,), (rows,) = seen.features, seen.rows
    assert features.dtype == torch.bfloat16
    method = by_name(**given)
    scores = method.attention_scores(seen.q[0], seen.k[0])
    assert torch.equal(rows, features[0, chosen(method, features[0], scores[0])])


@pytest.mark.parametrize("budget", [32, 48])
def test_chunked_prefill_gives_the_same_answer(budget, saved):
    text = f"{words(*range(3, 20))} <image> {words(*range(20, 40))} <image> {words(9)}"
    one = prompt(text, picture(1), picture(2))
    given = dict(method="random", keep=20)
    with engine(saved("llava").folder, given, enable_prefix_caching=False) as llm:
        (whole,) = ask(llm, one)
    more = dict(max_num_batched_tokens=budget, max_num_seqs=2, enable_chunked_prefill=True)
    with engine(saved("llava").folder, given, **more) as llm:
        (parts,) = ask(llm, one)
    assert whole.length == parts.length == 17 + 20 + 20 + 20 + 1
    assert whole.tokens == parts.tokens
    assert whole.logprobs == pytest.approx(parts.logprobs, abs=1e-4)


@pytest.mark.parametrize("named", [False, True], ids=["hashed", "named by the client"])
def test_two_budgets_of_an_image_share_no_cache_entry(named, saved):
    """Requests with different budgets alternate, also if the client names the image."""
    text = f"<image> {words(*range(3, 40))}"

    def one(**kwargs: Any) -> dict[str, Any]:
        found = prompt(text, picture(1), **kwargs)
        return found | {"multi_modal_uuids": {"image": ["mine"]}} if named else found

    turns = [{}, {"vispruner_keep": 8}, {}, {"vispruner_keep": 8}, {"vispruner_keep": 20}]
    given = dict(method="random", keep=20)
    more = dict(enable_prefix_caching=False, mm_processor_cache_gb=0)
    with engine(saved("llava").folder, given, **more) as llm:
        alone = [ask(llm, prompt(text, picture(1), **turn))[0] for turn in turns]
    with engine(saved("llava").folder, given, enable_prefix_caching=True) as llm:
        with watching(model_of(llm)) as seen:
            cached = [ask(llm, one(**turn))[0] for turn in turns]
    assert [a.length for a in cached] == [57, 45, 57, 45, 57]
    assert [a.tokens for a in cached] == [a.tokens for a in alone]
    # The caches were used: the tower ran once for each budget, and blocks of the prompt were read
    # from the prefix cache. A request for the server's own budget, 20, shares its entries with a
    # request without a budget.
    assert len(seen.features) == 2
    assert [a.cached for a in cached] == [0, 0, 32, 32, 32]


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        (dict(method="vispruner", keep=30), [(60, 100)]),
        (
            dict(method="vispruner", keep=0.2, matching="pairwise"),
            [(60, 99), (330, 90), (190, 200)],
        ),
        (dict(method="vispruner", keep=6, budget="tile"), [(200, 190), (50, 90)]),
        (dict(method="fastervlm", keep=9, newlines="drop"), [(90, 50), (300, 280)]),
        (dict(method="fopru", keep=0.25, strategy="row", budget="tile"), [(112, 112), (60, 120)]),
    ],
    ids=str,
)
def test_llava_next_keeps_the_tokens_of_the_reference(given, sizes, saved):
    """Tiles, unpadding and newlines. The images of a prompt have different numbers of tiles."""
    folder, model = saved("llava-next").folder, saved("llava-next").model
    given = dict(given)
    pictures = [picture(i, *size) for i, size in enumerate(sizes)]
    text = f"{words(5)} {'<image> ' * len(sizes)}{words(7, 8)}"
    with engine(folder, given) as llm:
        with watching(model_of(llm)) as seen:
            (answer,) = ask(llm, prompt(text, *pictures))
    budget, newlines = given.pop("budget", "image"), given.pop("newlines", "keep")
    method = by_name(**given)

    features, (q, k) = torch.cat(seen.features), (torch.cat(seen.q), torch.cat(seen.k))
    scores = scores_of(method, q, k, 1)
    packed = packing(model, sizes)
    assert len(features) == sum(tiles for _, tiles in packed)
    rows, places = expected(packed, features, scores, method, budget, newlines)
    inputs = vllm_models.inputs(folder, text, *pictures)
    assert answer.length == 1 + sum(map(len, places)) + 2
    assert torch.equal(torch.cat(seen.rows), rows)
    for embeds, full, kept in zip(
        seen.embeds, vlm_oracle.embeddings(model, inputs)["image"], places, strict=True
    ):
        assert torch.allclose(embeds, full[kept], rtol=1e-4, atol=1e-4)
    (tokens,) = vlm_oracle.logits(model, inputs, places, new=len(answer.tokens))
    assert answer.tokens == tokens.tolist()


def test_small_images_keep_all_tokens_beside_large_images(saved):
    """The large images of the batch keep the same tokens as alone."""
    folder = saved("llava-next").folder
    # Patches without newlines: 320, 128, 128 and 64.
    sizes = [(224, 224), (112, 112), (112, 112), (300, 1)]
    budgets = [{}, {}, {"vispruner_keep": 20}, {"vispruner_keep": 1000}]
    prompts = [
        prompt(TEXT, picture(i, *size), **budget)
        for i, (size, budget) in enumerate(zip(sizes, budgets, strict=True))
    ]
    prompts.append(
        prompt(f"<image> <image> {words(9)}", picture(7, 112, 112), picture(8, 224, 224))
    )
    given = dict(method="vispruner", keep=150, matching="pairwise", newlines="drop", small="keep")
    more = dict(enable_prefix_caching=False, mm_processor_cache_gb=0)
    with engine(folder, given, **more) as llm:
        alone = [ask(llm, one)[0] for one in prompts]
        with watching(model_of(llm)) as seen:
            together = ask(llm, *prompts)
    counts = [150, 128, 20, 64, 128, 150]
    assert [a.length for a in alone] == [a.length for a in together]
    assert [a.length - 5 for a in together[:4]] == counts[:4]
    assert together[4].length == 128 + 150 + 1
    assert sorted(len(embeds) for embeds in seen.embeds) == sorted(counts)
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    # The answer about a small image is that without pruning.
    with engine(folder, dict(method="random", keep=1.0, newlines="drop"), **more) as llm:
        unpruned = [ask(llm, prompts[1])[0], *ask(llm, prompt(TEXT, picture(3, 300, 1)))]
    for before, after in zip(unpruned, (together[1], together[3]), strict=True):
        assert (before.length, before.tokens) == (after.length, after.tokens)
        assert before.logprobs == pytest.approx(after.logprobs, abs=1e-4)


def test_embeddings_from_the_client_are_not_pruned(saved):
    folder, model = saved("llava").folder, saved("llava").model
    inputs = vllm_models.inputs(folder, TEXT, picture(1))
    embeds = vlm_oracle.embeddings(model, inputs)["image"][0]
    given = dict(method="vispruner", keep=20)
    with engine(folder, given, enable_mm_embeds=True) as llm:
        one = prompt(TEXT)
        one["multi_modal_data"] = {"image": embeds[None]}
        (answer,) = ask(llm, one)
        # Embeddings of several lengths in one batch.
        few = [prompt(TEXT) for _ in range(2)]
        for count, short in zip((9, 12), few, strict=True):
            short["multi_modal_data"] = {"image": embeds[None, :count]}
        lengths = [a.length for a in ask(llm, *few, one, prompt(TEXT, picture(1)))]
        assert lengths == [2 + 9 + 3, 2 + 12 + 3, 2 + N + 3, 2 + 20 + 3]
        with pytest.raises(ValueError, match="vispruner_keep: image_embeds are not pruned"):
            ask(llm, one | {"mm_processor_kwargs": {"vispruner_keep": 8}})
        (pruned,) = ask(llm, prompt(TEXT, picture(1)))
    assert answer.length == 2 + N + 3
    assert pruned.length == 2 + 20 + 3
    (tokens,) = vlm_oracle.logits(model, inputs, [torch.arange(N)], new=len(answer.tokens))
    assert answer.tokens == tokens.tolist()


def test_a_bad_request_fails_alone(saved):
    with engine(saved("llava").folder, dict(method="vispruner", keep=20)) as llm:
        for kwargs, error in (
            (dict(vispruner_keep=21), "vispruner_keep is 21, expected at most the server's keep"),
            (dict(vispruner_keep="8"), "vispruner_keep: keep is '8', expected an int or a float"),
            (dict(do_resize=False, do_center_crop=False), "the processor made pixel_values"),
        ):
            with pytest.raises(ValueError, match=error):
                ask(llm, prompt(TEXT, picture(1), **kwargs))
        assert ask(llm, prompt(TEXT, picture(1), vispruner_keep=8))[0].length == 13


def test_the_code_of_the_page_runs(capsys):
    from pages import ROOT, blocks, page

    (code,) = blocks(page(ROOT / "docs" / "vllm.md"), "python")
    exec(compile(code, "docs/vllm.md", "exec"), {"__name__": "__main__"})
    # The engine was a local variable: free it.
    gc.collect()
    (comment,) = re.findall(r"print.*# (.*)$", code, re.MULTILINE)
    assert capsys.readouterr().out.splitlines()[-1].strip() == comment
