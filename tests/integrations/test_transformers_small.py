"""small="keep": images with no more tokens than the count keep all; others do not change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import vlm_oracle
import vlms
from pruned import assert_same, methods, real_logits
from vlms import FAMILIES, Picture, picture, prompts

from vispruner_kernels.integrations import _visual
from vispruner_kernels.integrations.transformers import attach, prune_inputs
from vispruner_kernels.methods import FasterVLM, FoPru, Method, Random, VisPruner

# Family, images (sizes), videos (frames), budget, count, and the expected number of kept tokens
# without newlines, for each image, then for each video. At least one of them is small; in the cases
# "all" every one is.
CASES = {
    "llava": ("llava", [None, None], [], "image", 17, [16, 16]),
    "llava, as many": ("llava", [None], [], "image", 16, [16]),
    "llava-siglip": ("llava-siglip", [None], [], "tile", 100, [16]),
    "llava-next": ("llava-next", [(112, 112), (56, 56), (300, 1)], [], "image", 40, [40, 32, 16]),
    "llava-next, all": ("llava-next", [(112, 112), (56, 56)], [], "image", 1000, [80, 32]),
    # Tiles have 16 patches or, after unpadding, 8 or none.
    "llava-next, tiles": (
        "llava-next", [(112, 112), (30, 150), (300, 1)], [], "tile", 12, [60, 12 + 8 + 8, 12],
    ),
    # The first image is interpolated to 41 tokens.
    "llava-onevision": ("llava-onevision", [(112, 112), (56, 56)], [], "image", 40, [40, 32]),
    "llava-onevision, all": ("llava-onevision", [(112, 112), (56, 56)], [], "image", 41, [41, 32]),
    "llava-onevision, tiles": (
        "llava-onevision", [(50, 100), (40, 56)], [], "tile", 13, [3 * 13, 13 + 12 + 12],
    ),
    "llava-onevision, frames": ("llava-onevision", [], [3], "image", 5, [12]),
    # No budget includes the [CLS] tokens of frames.
    "video-llava": ("video-llava", [None], [2], "image", 17, [16, 34]),
    "qwen2.5-vl": ("qwen2.5-vl", [(4, 4), (6, 10), (10, 8)], [], "image", 15, [4, 15, 15]),
    "qwen2.5-vl, frames": ("qwen2.5-vl", [(6, 10)], [2], "image", 20, [15, 40]),
}  # fmt: skip


def parts_of(case: str) -> list[Picture]:
    family, sizes, frames, *_ = CASES[case]
    parts = [picture(family, 5 + i, size) for i, size in enumerate(sizes)]
    return parts + [picture(family, 9 + i, frames=n) for i, n in enumerate(frames)]


def inputs_of(case: str) -> dict[str, Tensor]:
    return prompts(CASES[case][0], *([2 + i, part, 3] for i, part in enumerate(parts_of(case))))


def test_every_family_has_a_case():
    assert {family for family, *_ in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("newlines", ["keep", "drop"])
@pytest.mark.parametrize("case", CASES)
def test_small_images_keep_all_tokens_and_others_the_count(case, newlines):
    """With every method. Logits are those of the model without the dropped tokens."""
    family, _, _, budget, count, expected = CASES[case]
    model, inputs = vlms.shared(family), inputs_of(case)
    options = dict(budget=budget, newlines=newlines, small="keep")
    for method in methods(family, count):
        pruned = prune_inputs(model, inputs, method, **options)
        # With and without newlines, the same patches are kept.
        dropped = prune_inputs(model, inputs, method, **options | dict(newlines="drop"))
        assert [len(kept) for kept in dropped.kept] == expected
        for kept, others in zip(pruned.kept, dropped.kept, strict=True):
            assert torch.isin(others, kept).all()
    by_hand = vlm_oracle.logits(vlm_oracle.eager(model), inputs, pruned.kept)
    assert_same(real_logits(model, pruned), by_hand)


@pytest.mark.parametrize("case", CASES)
def test_an_image_keeps_the_same_tokens_in_a_batch_and_alone(case):
    """A small image keeps all its tokens; another keeps the same tokens without the option."""
    family, _, _, budget, count, expected = CASES[case]
    model = vlms.shared(family)
    everything = prune_inputs(model, inputs_of(case), Random(1.0), newlines="drop").kept
    options = dict(budget=budget, newlines="drop")
    for method in methods(family, count):
        together = prune_inputs(model, inputs_of(case), method, **options, small="keep").kept
        for part, kept, every, n in zip(
            parts_of(case), together, everything, expected, strict=True
        ):
            alone = prompts(family, [2, part, 3])
            (own,) = prune_inputs(model, alone, method, **options, small="keep").kept
            assert torch.equal(kept, own)
            if n == len(every):
                assert torch.equal(kept, every)
            elif budget == "image":
                assert torch.equal(kept, prune_inputs(model, alone, method, **options).kept[0])


METHODS: list[Method] = [
    VisPruner(12),
    VisPruner(12, matching="pairwise"),
    VisPruner(12, important_ratio=0.0, scores="received"),
    FasterVLM(12),
    FoPru(12),
    FoPru(12, "row"),
    Random(12, seed=3),
]
# For each image, the rows and columns of its grid.
GRIDS = {
    "mixed": [(3, 3), (4, 6), (1, 5), (6, 4), (3, 4), (4, 6)],
    # The larger images have one size.
    "one size left": [(2, 5), (4, 6), (3, 3), (4, 6)],
    "one left": [(2, 5), (4, 6)],
    "all small": [(3, 3), (1, 7), (3, 4)],
    "all small, of one size": [(3, 3)] * 3,
    "none small": [(4, 6), (8, 4), (4, 6)],
    "none small, of one size": [(4, 6)] * 3,
    "no patches": [(4, 6), (0, 4), (6, 4)],
}


def visual_of(grids: list[tuple[int, int]], first: int = 0) -> _visual.Visual:
    """Images of one grid each, in one source."""
    generator = torch.Generator().manual_seed(len(grids))
    lengths = [h * w for h, w in grids]
    same = len(set(lengths)) == 1
    shape = (len(grids), lengths[0] + first) if same else (1, sum(lengths) + first)
    rows = torch.arange(shape[0] * shape[1])
    patches = rows[rows % shape[1] >= first]
    column, grid = torch.full((2, len(rows)), -1)
    column[patches] = torch.cat([torch.arange(h * w) % max(w, 1) for h, w in grids])
    grid[patches] = torch.arange(len(grids)).repeat_interleave(torch.tensor(lengths))
    return _visual.Visual(
        kind="image",
        source=torch.randn(*shape, 8, generator=generator),
        scores=torch.rand(shape[0], shape[1] - first, generator=generator),
        first=first,
        layouts=list(patches.split(lengths)),
        numbers=[*range(len(grids))],
        grid=grid,
        column=column,
        embed=lambda rows: rows,
    )


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_the_method_selects_only_in_larger_images(grids, method, first):
    """Its choice is bit for bit that for each image alone, in one launch or in several."""
    visual = visual_of(grids, first)
    rows, counts = _visual.select(visual, method, False, keep_small=True)
    scores = torch.zeros(visual.source.shape[:2])
    scores[:, first:] = visual.scores
    features, scores, expected = visual.source.flatten(0, 1), scores.flatten(), []
    for layout, (_, width) in zip(visual.layouts, grids, strict=True):
        chosen = torch.arange(len(layout))
        if len(layout) > 12:
            alone = method.on_grid(width)
            chosen = alone.select(features[layout][None], scores[layout][None])[0]
        expected.append(layout[chosen])
    assert counts == [len(kept) for kept in expected]
    assert rows.dtype == torch.int64
    assert torch.equal(rows.sort().values, torch.cat(expected))


def test_the_method_is_not_called_for_small_images():
    """The method may not support grids of that size. One call selects in all larger images."""
    seen = []

    class Own(Method):
        def select(self, features, scores):
            seen.append(features.shape[:2])
            return torch.arange(self.keep).expand(len(features), -1)

    visual = visual_of(GRIDS["one size left"])
    rows, counts = _visual.select(visual, Own(12), False, keep_small=True)
    assert seen == [(2, 24)]
    assert counts == [10, 12, 9, 12]
    assert len(rows) == 43
    _visual.select(visual_of(GRIDS["all small"]), Own(12), False, keep_small=True)
    assert len(seen) == 1


def test_a_fraction_is_not_a_count():
    """The fraction 1.0 is not a count of 1, and a small image keeps its fraction."""
    visual = visual_of([(1, 1), (4, 6), (2, 2)])
    for keep, counts in ((1.0, [1, 24, 4]), (0.5, [1, 12, 2])):
        for small in (False, True):
            assert _visual.select(visual, FasterVLM(keep), False, small)[1] == counts
    assert _visual.select(visual, FasterVLM(1), False, True)[1] == [1, 1, 1]


@pytest.mark.parametrize("method", [FasterVLM(12), FasterVLM(0.5), FoPru(12)], ids=str)
def test_an_image_without_patches_is_an_error_unless_small_ones_are_kept(method):
    """There is nothing to select, and the error names the image."""
    with pytest.raises(ValueError, match=r"^image 1 of the batch: keep is .*, expected 1 <= keep"):
        _visual.select(visual_of(GRIDS["no patches"]), method, False)
    assert _visual.select(visual_of(GRIDS["no patches"]), method, False, True)[1][1] == 0


def test_the_error_names_the_remedies():
    inputs = prompts("qwen2.5-vl", [picture("qwen2.5-vl", 1, (6, 8)), 3])
    model, method = vlms.shared("qwen2.5-vl"), VisPruner(32, scores="received")
    words = (
        r"^image 0 of the batch: keep is 32, expected 1 <= keep <= 12, the tokens of the image: "
        r'use a fraction, for example keep=0\.25, or small="keep" of the integrations$'
    )
    for options in ({}, dict(small="error")):
        with pytest.raises(ValueError, match=words):
            prune_inputs(model, inputs, method, **options)
    assert len(prune_inputs(model, inputs, method, small="keep").kept[0]) == 12
    # The suggested remedies work.
    assert len(prune_inputs(model, inputs, VisPruner(0.25, scores="received")).kept[0]) == 3


def test_refuses_a_count_that_is_no_multiple_of_the_row_length():
    """It is an error even if small images in the batch keep all their tokens."""
    model = vlms.shared("qwen2.5-vl")

    def kept(count: int, *sizes: tuple[int, int]) -> list[int]:
        pictures = [picture("qwen2.5-vl", i, size) for i, size in enumerate(sizes)]
        inputs = prompts("qwen2.5-vl", *([part, 3] for part in pictures))
        found = prune_inputs(model, inputs, FoPru(count, "row"), small="keep").kept
        return [len(indices) for indices in found]

    # Grids of 2 x 2, 3 x 5 and 5 x 4 tokens.
    assert kept(16, (4, 4), (6, 10), (10, 8)) == [4, 15, 16]
    assert kept(10, (4, 4), (6, 10)) == [4, 10]
    with pytest.raises(ValueError, match="image 1 of the batch: keep is 10, expected a multiple"):
        kept(10, (4, 4), (10, 8))
    # After unpadding, rows may differ in length. That is an error unless all tokens are kept.
    model, inputs = vlms.shared("llava-next"), prompts("llava-next", [picture("llava-next", 1), 3])
    with pytest.raises(ValueError, match="its rows have no common width"):
        prune_inputs(model, inputs, FoPru(8, "row"), small="keep")
    pruned = prune_inputs(model, inputs, FoPru(1000, "row"), small="keep")
    assert pruned.removed.sum() == 0


@pytest.mark.parametrize("small", ["drop", True, None, ["keep"]])
def test_refuses_an_unknown_value_of_small(small):
    model, inputs = vlms.shared("llava"), prompts("llava", [picture("llava", 1), 3])
    for call in (
        lambda: prune_inputs(model, inputs, VisPruner(4), small=small),
        lambda: attach(model, VisPruner(4), small=small),
    ):
        with pytest.raises(ValueError, match=r"^small is .*, expected 'error' or 'keep'$"):
            call()


def test_a_harness_gets_an_answer_for_images_of_mixed_sizes():
    """A small image gets the answer of the unpruned model."""
    model = vlms.make("qwen2.5-vl")
    parts = [picture("qwen2.5-vl", i, size) for i, size in enumerate([(16, 16), (6, 8), (20, 12)])]
    calls = [prompts("qwen2.5-vl", [4, part, 6]) for part in parts]
    calls.append(prompts("qwen2.5-vl", *([4, part, 6] for part in parts)))
    settings = dict(max_new_tokens=4, do_sample=False, output_logits=True)
    settings["return_dict_in_generate"] = True

    def logits() -> list[Tensor]:
        """Logits of four new tokens for each prompt."""
        steps = [torch.stack(model.generate(**call, **settings).logits, 1) for call in calls]
        return [*torch.cat(steps)]

    before = logits()
    with attach(model, VisPruner(32, scores="received"), small="keep"):
        after = logits()
    assert len(before) == len(after) == 6
    same = [torch.allclose(old, new, atol=1e-4) for old, new in zip(before, after, strict=True)]
    assert same == [False, True, False] * 2
    with attach(model, VisPruner(32, scores="received")):
        with pytest.raises(ValueError, match=r"use a fraction, for example keep=0\.25, or small="):
            model.generate(**calls[1], **settings)
