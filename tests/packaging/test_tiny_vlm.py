"""The tiny VLM: its task, its words and its answers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

np = pytest.importorskip("numpy")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from benchmarks.tiny_vlm import answers, scenes  # noqa: E402
from benchmarks.tiny_vlm import model as tiny  # noqa: E402
from vispruner_kernels.demo import tiny_vlm  # noqa: E402
from vispruner_kernels.methods import FasterVLM, FoPru, VisPruner  # noqa: E402

SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@pytest.fixture(scope="module")
def model():
    return tiny_vlm.load()


@pytest.fixture(scope="module")
def batch(model):
    return answers.encode(model, [scenes.scene("test", i) for i in range(6)])


def named(things, words):
    found = [thing for thing in things if thing.name == words]
    assert len(found) == 1
    return found[0]


def truth(question, things):
    """The answer, from boxes and names alone."""
    *words, mark = question.text.split()
    assert mark == "?"
    text = " ".join(words)
    middle = scenes.SIZE / 2
    if text == "what is the number":
        return " ".join(map(str, named(things, "number").digits))
    if text.startswith("which digit is in the "):
        return str(named(things, text.removeprefix("which digit is in the ")).digits[0])
    if text.startswith("what colour is the "):
        return named(things, text.removeprefix("what colour is the ")).colour
    if text.startswith("in which half is the "):
        thing = named(things, text.removeprefix("in which half is the "))
        return "bottom" if thing.top + thing.bottom > 2 * middle else "top"
    if text.startswith("on which side is the "):
        thing = named(things, text.removeprefix("on which side is the "))
        return "right" if thing.left + thing.right > 2 * middle else "left"
    if text.startswith("how many "):
        what = words[2]
        shapes = [thing for thing in things if thing.kind in scenes.SHAPES]
        return str(sum(what in (thing.kind, thing.colour) for thing in shapes))
    side = next(side for side in SIDES if f"what is {side} the " in text)
    thing = named(things, text.removeprefix(f"what is {side} the "))
    down, right = SIDES[side]
    cell = scenes.SIZE // scenes.PLACES
    row, column = thing.top // cell + down, thing.left // cell + right
    there = [x for x in things if (x.top // cell, x.left // cell) == (row, column)]
    assert len(there) == 1
    return there[0].kind


# The task


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_true(split):
    asked = set()
    for i in range(60):
        scene = scenes.scene(split, i)
        if split == "test":
            assert tuple(question.type for question in scene.questions) == scenes.ASKED
        assert len({question.text for question in scene.questions}) == len(scene.questions)
        for question in scene.questions:
            assert question.answer == truth(question, scene.things), question.text
            asked.add(question.type)
    assert asked == set(scenes.TYPES)


def test_scenes_are_reproducible_and_differ():
    first, again, other = (scenes.scene("test", i) for i in (3, 3, 4))
    assert (first.pixels == again.pixels).all()
    assert first.things == again.things
    assert first.questions == again.questions
    assert (first.pixels != other.pixels).any()
    assert (scenes.scene("test", 3, seed=1).pixels != first.pixels).any()


def test_splits_share_no_digit_photograph_or_layout():
    parts = {split: set() for split in scenes.PHOTOGRAPHS}
    for split, found in parts.items():
        for digit in range(10):
            found.update(image.tobytes() for image in scenes._digits_of(split, digit))
    images, _ = scenes.digits()
    assert len(images) == 1797
    # Two digits of scikit-learn may be equal, but not in different splits.
    assert not parts["train"] & parts["test"]
    assert len(parts["train"] | parts["test"]) > 1700
    files = [
        {(package, name) for package, names in packages.items() for name in names}
        for packages in scenes.PHOTOGRAPHS.values()
    ]
    assert not files[0] & files[1]
    layouts = {
        split: {
            frozenset(thing.place for thing in scenes.scene(split, i).things) for i in range(150)
        }
        for split in parts
    }
    assert not layouts["train"] & layouts["test"]


def test_things_lie_in_their_boxes_and_do_not_overlap():
    for i in range(20):
        scene = scenes.scene("test", i)
        for one, thing in enumerate(scene.things):
            assert 0 <= thing.left < thing.right <= scenes.SIZE
            assert 0 <= thing.top < thing.bottom <= scenes.SIZE
            for other in scene.things[one + 1 :]:
                apart = thing.right <= other.left or other.right <= thing.left
                assert apart or thing.bottom <= other.top or other.bottom <= thing.top
            if thing.kind in scenes.SHAPES:
                middle = scene.pixels[
                    (thing.top + thing.bottom) // 2, (thing.left + thing.right) // 2
                ]
                colour = np.array(scenes.COLOURS[thing.colour])
                assert np.abs(middle - colour).max() <= 22


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(scenes, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-image"):
        scenes._file("skimage", "data/moon.png")


# The model


def test_weights_are_small_and_in_half_precision():
    from safetensors import safe_open

    file = tiny_vlm.FOLDER / "model.safetensors"
    assert file.stat().st_size <= 8_000_000
    with safe_open(file, "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}


def test_the_tokenizer_has_the_words_of_the_task():
    words = tiny_vlm.tokenizer()
    assert words.convert_ids_to_tokens(range(len(tiny.WORDS))) == list(tiny.WORDS)
    for i in range(30):
        for question in scenes.scene("train", i).questions:
            text = f"{question.text} {question.answer}"
            ids = words(text, add_special_tokens=False).input_ids
            assert ids == [tiny.WORDS.index(word) for word in text.split()]
            assert len(ids) <= tiny.SLOT


@pytest.mark.parametrize(
    "method", [None, VisPruner(64), VisPruner(40, matching="pairwise"), FasterVLM(64), FoPru(32)]
)
def test_packed_answers_equal_those_of_generate(model, batch, method):
    kept = None if method is None else answers.select(method, batch)
    right = answers.right(model, batch, kept)
    decoded = answers.answers(model, batch, kept)
    wrong = 0
    for i in range(2):
        scene = scenes.scene("test", i)
        image = torch.from_numpy(scene.pixels).movedim(-1, 0) / 255
        for j, question in enumerate(scene.questions):
            answer = tiny_vlm.answer(tiny_vlm.inputs(image, question.text), method)
            assert (answer == question.answer) == right[i, j]
            words = [tiny.WORDS[word] for word in decoded[i, j].tolist() if word >= 0]
            generated = [*answer.split(), tiny.END]
            length = min(len(words), len(generated))
            assert words[:length] == generated[:length]
            wrong += answer != question.answer
    assert method is not None or wrong <= 4


def test_each_decoded_token_follows_the_decoded_ones(monkeypatch):
    """The next token of this model is the last one plus 1. The true answers are other tokens."""
    ids = torch.tensor([[5, 9, 7, 0] * len(scenes.ASKED)])
    labels = torch.tensor([[9, 7, 3, -1] * len(scenes.ASKED)])
    monkeypatch.setattr(answers, "project", lambda model, batch, kept: None)
    monkeypatch.setattr(answers.tiny, "logits", lambda model, visual, ids: F.one_hot(ids + 1, 20))
    decoded = answers.answers(None, SimpleNamespace(ids=ids, labels=labels), None)
    assert decoded.tolist() == [[[6, 7, 8, -1]] * len(scenes.ASKED)]


def test_questions_do_not_see_one_another(model, batch):
    order = torch.tensor([7, 2, 5, 0, 1, 6, 4, 3])
    ids, labels = (x.unflatten(-1, (8, -1))[:, order].flatten(1) for x in (batch.ids, batch.labels))
    shuffled = batch._replace(ids=ids, labels=labels)
    expected = answers.right(model, batch, None)[:, order]
    assert torch.equal(answers.right(model, shuffled, None), expected)


def test_fastv_with_all_tokens_equals_the_unpruned_model(model, batch):
    expected = answers.right(model, batch, None)
    found = answers.fastv(model, batch, [576, 2])
    assert torch.equal(found[576], expected)
    assert found[2].sum() < expected.sum()
