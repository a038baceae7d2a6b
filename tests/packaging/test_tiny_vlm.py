"""The tiny VLM: its task, its training, its answers and the figures about them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from benchmarks import accuracy  # noqa: E402
from benchmarks.tiny_vlm import answers, attention, scenes, supervision, train  # noqa: E402
from benchmarks.tiny_vlm import model as tiny  # noqa: E402
from vispruner_kernels.demo import tiny_vlm  # noqa: E402
from vispruner_kernels.methods import FasterVLM, FoPru, Random, VisPruner  # noqa: E402

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
    """The answer, worked out from pixels and names alone."""
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


def test_splits_share_no_digit_photograph_and_layout():
    parts = {split: set() for split in scenes.PHOTOGRAPHS}
    for split, found in parts.items():
        for digit in range(10):
            found.update(image.tobytes() for image in scenes._digits_of(split, digit))
    images, _ = scenes.digits()
    assert len(images) == 1797
    # Two of scikit-learn's may be equal, but not across the splits.
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


def test_things_are_where_they_are_said_to_be():
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


def test_words_of_the_folder_are_those_of_the_task():
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
def test_packed_answers_are_those_of_generate(model, batch, method):
    kept = None if method is None else answers.select(method, batch)
    right = answers.right(model, batch, kept)
    said = answers.answers(model, batch, kept)
    wrong = 0
    for i in range(2):
        scene = scenes.scene("test", i)
        image = torch.from_numpy(scene.pixels).movedim(-1, 0) / 255
        for j, question in enumerate(scene.questions):
            answer = tiny_vlm.answer(tiny_vlm.inputs(image, question.text), method)
            assert (answer == question.answer) == right[i, j]
            words = [tiny.WORDS[word] for word in said[i, j].tolist() if word >= 0]
            shown = " ".join(word for word in words if word != tiny.END)
            length = len(question.answer.split())
            assert shown.split()[:length] == answer.split()[:length]
            wrong += answer != question.answer
    assert method is not None or wrong <= 4


def test_questions_do_not_see_one_another(model, batch):
    order = torch.tensor([7, 2, 5, 0, 1, 6, 4, 3])
    ids, labels = (x.unflatten(-1, (8, -1))[:, order].flatten(1) for x in (batch.ids, batch.labels))
    shuffled = batch._replace(ids=ids, labels=labels)
    want = answers.right(model, batch, None)[:, order]
    assert torch.equal(answers.right(model, shuffled, None), want)


def test_random_tokens_are_others_of_each_picture(batch):
    kept = accuracy.chance(batch, 64, 0, 0)
    assert kept.shape == (6, 64)
    assert len({tuple(row.tolist()) for row in kept}) == 6
    assert torch.equal(accuracy.chance(batch, 64, 0, 0), kept)
    later = batch._replace(features=batch.features[2:])
    assert torch.equal(accuracy.chance(later, 64, 2, 0), kept[2:])
    assert not torch.equal(accuracy.chance(batch, 64, 0, 1), kept)


def test_fastv_with_every_token_is_the_model(model, batch):
    want = answers.right(model, batch, None)
    found = answers.fastv(model, batch, [576, 2])
    assert torch.equal(found[576], want)
    assert found[2].sum() < want.sum()


# The figures


@pytest.fixture(scope="module")
def committed():
    return json.loads(accuracy.COMMITTED.read_text())


def figure(committed, system, budget):
    rows = committed["accuracy"]
    (row,) = (row for row in rows if (row["system"], row["budget"]) == (system, budget))
    return row["all"]["%"]


def test_all_tokens_answer_nine_in_ten(committed):
    assert {row["pictures"] for row in committed["accuracy"]} == {accuracy.PICTURES}
    assert figure(committed, "all tokens", 576) >= 90


# Percent: two to three standard errors for 75 pictures.
MARGIN = 4.0


def test_accuracy_at_64_tokens(model, committed):
    methods = {
        "all tokens": None,
        "VisPruner 0.5 bipartite": VisPruner(64),
        "VisPruner 0.5 pairwise": VisPruner(64, matching="pairwise"),
        "FasterVLM": FasterVLM(64),
        "random": Random(64),
    }
    hits = {name: [] for name in methods}
    for start in range(0, 75, 25):
        numbers = range(start, start + 25)
        part = answers.encode(model, [scenes.scene("test", i, accuracy.SET) for i in numbers])
        for name, method in methods.items():
            kept = None if method is None else answers.select(method, part)
            if name == "random":
                kept = accuracy.chance(part, 64, start, 0)
            hits[name].append(answers.right(model, part, kept).float().mean().item())
    for name, parts in hits.items():
        budget = 64 if methods[name] else 576
        share = 100 * sum(parts) / len(parts)
        assert abs(share - figure(committed, name, budget)) <= MARGIN, name


def test_committed_figures_of_the_first_pictures(committed):
    def cases(name):
        return [(row["system"], row["budget"], row["tokens"]) for row in committed[name]]

    assert cases("quick") == cases("accuracy")
    assert {row["pictures"] for row in committed["quick"]} == {accuracy.QUICK}


def compared(**changes):
    """Committed and new rows of three systems, 80 +- 2 % each; `changes` added to the first."""
    names = ("all", *scenes.TYPES)
    cases = [
        {"system": system, "budget": 64, "pictures": 150}
        for system in ("FastV", "FoPru row", "random")
    ]
    old = [{**case, **{name: {"%": 80.0, "error": 2.0} for name in names}} for case in cases]
    new = [{**case, **{name: accuracy.Figure(80.0, 2.0) for name in names}} for case in cases]
    new[0] |= {name: accuracy.Figure(80 + change, 2.0) for name, change in changes.items()}
    return old, new


@pytest.mark.parametrize(
    ("changes", "said", "agree"),
    [
        ({}, "21 as committed, 100.0% within", True),
        ({"all": 3.9, "count": -3.9}, "19 as committed, 100.0% within", True),
        ({"all": 4.1}, "20 as committed, 95.2% within", True),
        ({"all": 4.1, "count": -4.1}, "19 as committed, 90.5% within", False),
        ({"all": 6.5}, "95.2% within the 95 % intervals, 0 beyond", True),
        ({"all": -6.7}, "95.2% within the 95 % intervals, 1 beyond", False),
    ],
)
def test_comparison_with_the_committed_figures(changes, said, agree):
    old, new = compared(**changes)
    lines, right = accuracy.compare(new, old)
    assert lines[0].startswith("21 figures of the first 150 pictures: ")
    assert said in lines[0]
    assert right == agree
    assert len(lines) == 1 + (" 1 beyond" in said)


def test_comparison_misses_no_figure():
    old, new = compared()
    lines, right = accuracy.compare(new[1:], old)
    assert lines[1:] == ["  not computed: FastV, 64 tokens"]
    assert not right
    with pytest.raises(KeyError):
        accuracy.compare(new, old[1:])


def test_comparison_of_a_figure_without_spread():
    old, new = compared()
    old[0]["all"] = {"%": 100.0, "error": 0.0}
    for wrong, agree in ((1, True), (2, False)):
        new[0]["all"] = accuracy.Figure(100 - 100 * wrong / 150, 0.5)
        assert accuracy.compare(new, old)[1] == agree


def test_hits_of_the_first_pictures():
    hits = {("FastV", 64): (64, torch.eye(8))}
    assert torch.equal(accuracy.first(hits, 3)["FastV", 64][1], torch.eye(8)[:3])


def test_figures_by_hand():
    hits = {
        ("random", 64): (64, torch.tensor([[1.0, 0, 0, 0, 1, 0, 1, 1], [0.0] * 8])),
        ("FoPru row", 64): (48, torch.tensor([[1.0] * 8, [0.0] * 8])),
    }
    rows = {row["system"]: row for row in accuracy.rows_of(hits)}
    assert rows["FoPru row"]["tokens"] == 48
    assert rows["FoPru row"]["all"].mean == 50
    assert rows["FoPru row"]["all"].error == pytest.approx(50)
    assert rows["random"]["all"].mean == 25
    assert rows["random"]["count"].mean == 50
    assert rows["random"]["relation"].mean == 25
    assert rows["FoPru row"]["less random"].mean == 25


# Training


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon came with PyTorch 2.9")
def test_training_runs_and_is_reproducible(tmp_path, monkeypatch):
    small = [
        replace(stage, steps=2, batch=2, scenes=stage.scenes and 4, sizes=(16, 32))
        for stage in train.STAGES
    ]
    monkeypatch.setattr(train, "STAGES", small)
    monkeypatch.setattr(train, "score", lambda model: "not asked")
    for name in ("one", "two"):
        assert train.main(["--out", str(tmp_path / name), "--device", "cpu", "--workers", "0"]) == 0
    # And from the second stage on.
    state = str(tmp_path / "one" / "stage-1.pt")
    rest = ["--out", str(tmp_path / "three"), "--device", "cpu", "--workers", "0", "--from", state]
    assert train.main(rest) == 0
    from safetensors.torch import load_file

    one, two, three = (
        load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "three")
    )
    assert one.keys() == load_file(tiny_vlm.FOLDER / "model.safetensors").keys()
    fresh = tiny.make().state_dict()
    assert len(fresh) > 100
    for name, weights in one.items():
        assert torch.equal(weights, two[name]), name
        assert torch.equal(weights, three[name]), name
        assert weights.isfinite().all()
        assert weights.dtype == torch.float16


def test_heads_start_out_looking_at_a_neighbour_each():
    torch.manual_seed(0)
    tower = tiny.make().model.vision_tower
    attention.look_around(tower)
    positions = tower.embeddings.position_embedding.weight.detach()
    found = []
    for layer in tower.encoder.layers:
        block = layer.self_attn
        x = torch.nn.functional.layer_norm(positions, positions.shape[-1:])
        q, k = (f(x).unflatten(-1, (-1, block.head_dim)) for f in (block.q_proj, block.k_proj))
        # Of a patch in the middle, row 10 and column 12.
        here = 10 * scenes.SIDE + 12
        seen = torch.einsum("hd,nhd->hn", q[1 + here], k[1:]).argmax(-1)
        found += [divmod(place, scenes.SIDE) for place in seen.tolist()]
    steps = [(row - 10, column - 12) for row, column in found]
    # Right, left, below, above, the diagonals, and two steps away.
    assert steps[:4] == [(0, 1), (0, -1), (1, 0), (-1, 0)]
    assert set(steps[4:8]) == {(-1, -1), (-1, 1), (1, -1), (1, 1)}
    assert set(steps[8:]) == {(-2, 0), (2, 0), (0, -2), (0, 2)}


def test_watched_attention_is_that_of_the_model(model, batch):
    """Of the first head, to START and the picture; the question's own words are left out."""
    llama = model.model.language_model
    embeddings, mask, positions = tiny.packed(model, answers.project(model, batch), batch.ids)
    rows = 577 + torch.tensor([3, 40, 75]).expand(len(batch.ids), -1)
    before = llama.config._attn_implementation
    watch = attention.Watch(llama, (1, 2))
    try:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            out = llama(
                inputs_embeds=embeddings,
                attention_mask=torch.where(mask, 0.0, -torch.inf).expand(len(rows), -1, -1, -1),
                position_ids=positions,
                use_cache=False,
                output_attentions=True,
            )
            for layer in (1, 2):
                wanted = out.attentions[layer][:, 0].gather(
                    1, rows[..., None].expand(-1, -1, mask.shape[-1])
                )[..., :577]
                wanted = wanted / wanted.sum(-1, keepdim=True)
                torch.testing.assert_close(watch.logs(layer, rows, 576).exp(), wanted)
    finally:
        model.set_attn_implementation(before)
        for hook in watch.hooks:
            hook.remove()


class Table:
    """In place of a Watch: what layers 1 and 2 see, `[1, S, 1 + visual]` each."""

    def __init__(self, visual):
        self.seen = torch.zeros(3, 1, 1 + visual + supervision.SLOTS * tiny.SLOT, 1 + visual)
        self.seen[..., 0] = 1

    def look(self, layer, row, where):
        self.seen[layer, 0, row] = where / where.sum()

    def logs(self, layer, rows, visual):
        logs = self.seen[layer].clamp_min(1e-9).log()
        return logs.gather(1, rows[..., None].expand(-1, -1, 1 + visual))


def test_pointing_wants_looks_at_what_is_asked_about():
    scene = scenes.scene("train", 5)
    sample = supervision.Sample(*(x[None] for x in supervision.sample_of(scene)))
    things, middle = sample.things, sample.patches[..., -1] > 0
    visual = things.shape[1]
    table = Table(visual)
    looks = []
    for slot, question in enumerate(scene.questions):
        row = 1 + visual + slot * tiny.SLOT + len(question.text.split()) - 1
        on = torch.zeros(1 + visual)
        for thing in question.seen:
            on[1:] += things[0] == thing
        if question.type == "count":
            on[1:] *= middle[0]
            on[0] = 1
            assert on.sum() == 1 + int(question.answer)
        looks.append((question.type, 1, row, on))
        if question.type == "number":
            looks.append(("second digit", 1, row + 1, on))
        if question.type == "relation":
            there = torch.zeros(1 + visual)
            there[1:] = things[0] == question.then
            looks.append(("what is there", 2, row, there))
    assert {name for name, *_ in looks} == {*scenes.TYPES, "second digit", "what is there"}
    for _, layer, row, where in looks:
        table.look(layer, row, where)
    assert attention.pointing(table, sample, things, middle) < 1e-4
    for name, layer, row, where in looks:
        table.look(layer, row, 1.0 * (where == 0))
        assert attention.pointing(table, sample, things, middle) > 0.2, name
        # Where things may be missing, nothing is said of counts.
        assert (attention.pointing(table, sample, things, None) < 1e-4) == (name == "count"), name
        table.look(layer, row, where)
    # START has its share in a count.
    _, layer, row, where = next(x for x in looks if x[0] == "count" and x[-1].sum() > 1)
    where[0] = 0
    table.look(layer, row, where)
    assert attention.pointing(table, sample, things, middle) > 0.2


def test_parts_of_the_tokens():
    torch.manual_seed(0)
    features = torch.randn(3, 576, 8)
    first = (torch.rand(3, 576) < 0.2).float()
    for kept in (train.part(features, 200), train.part(features, 200, first)):
        assert kept.shape == (3, 200)
        assert (kept.diff() > 0).all()
    assert first.sum(1).max() < 200
    assert torch.equal(first.gather(1, kept).sum(1), first.sum(1))
    assert not torch.equal(kept, train.part(features, 200, first))


def test_attention_of_the_training_is_that_of_torch():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 37, 32, dtype=torch.float64)
    mask = torch.rand(2, 1, 37, 37) < 0.5
    mask |= torch.eye(37, dtype=torch.bool)
    for seen in (None, mask):
        y, _ = attention.attention(None, q, k, v, seen, scaling=0.25)
        right = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=0.25)
        torch.testing.assert_close(y, right.transpose(1, 2))


def test_sheets_are_training_material():
    first, again = (scenes.sheet(3) for _ in range(2))
    assert (first.pixels == again.pixels).all()
    assert first.things == again.things
    assert not first.questions
    assert (scenes.sheet(3, seed=1).pixels != first.pixels).any()
    sheets = [scenes.sheet(i) for i in range(150)]
    layouts = {frozenset(thing.place for thing in s.things) for s in sheets}
    asked = {frozenset(thing.place for thing in scenes.scene("test", i).things) for i in range(150)}
    assert not layouts & asked
    assert all(sum(1 << (4 * row + column) for row, column in places) % 5 for places in layouts)
    things = [thing for s in sheets for thing in s.things]
    assert {thing.kind for thing in things} == set(scenes.KINDS)
    written = [digit for thing in things for digit in thing.digits]
    assert set(written) == set(range(10))
    assert len(written) > 3 * len(sheets)


@pytest.mark.parametrize("kind", ["scene", "sheet"])
def test_supervision_says_what_is_in_the_picture(kind):
    scene = scenes.sheet(5) if kind == "sheet" else scenes.scene("train", 5)
    sample = supervision.sample_of(scene)
    grid = sample.things.view(scenes.SIDE, scenes.SIDE)
    kinds = sample.patches.view(scenes.SIDE, scenes.SIDE, 8)
    for i, thing in enumerate(scene.things):
        row, column = ((thing.top + thing.bottom) // 16, (thing.left + thing.right) // 16)
        assert grid[row, column] == i
        assert scenes.KINDS[kinds[row, column, 0] - 1] == thing.kind
        assert kinds[grid == i][:, -1].sum() == kinds[row, column, -1] == 1
        for part, digit in enumerate(thing.digits):
            share = (2 * part + 1) / (2 * len(thing.digits))
            column = int(thing.left + share * (thing.right - thing.left)) // 8
            assert kinds[row, column, 2] == 1 + digit
        left = [x for x in scene.things if x.place == (thing.place[0], thing.place[1] - 1)]
        assert kinds[row, column, 3] == (scenes.KINDS.index(left[0].kind) + 1 if left else 0)
    assert (grid == supervision.NOTHING).float().mean() > 0.5
    for i, question in enumerate(scene.questions):
        assert sample.seen[i].nonzero().flatten().tolist() == list(question.seen)
        if question.type == "relation":
            (there,) = sample.then[i].nonzero().flatten().tolist()
            assert scene.things[there].kind == question.answer
    assert not sample.seen[:, supervision.NOTHING].any()


# What the documentation says


def cells(text, first, columns):
    """The rows of the table whose head begins with these cells, without their names."""
    lines = text.splitlines()
    start = lines.index(next(line for line in lines if line.startswith(f"| {first} |")))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *values = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(values) == columns
        rows[name] = values
    return rows


def test_tables_of_the_documentation_are_the_committed_figures(committed):
    text = (accuracy.PLOT.parent / "accuracy.md").read_text()
    known = {(row["system"], row["budget"]): row for row in committed["accuracy"]}

    def shown(value):
        return f"{value['%']:.1f} ± {accuracy.INTERVAL * value['error']:.1f}"

    for name, values in cells(text, "system | 192", 5).items():
        for budget, value in zip(accuracy.BUDGETS, values, strict=True):
            row = known.get((name, budget))
            assert value == (shown(row["all"]) if row else "")
    for name, (tokens, *values) in cells(text, "system | tokens", 1 + len(scenes.TYPES)).items():
        row = known.get((name, 64)) or known[name, 576]
        assert int(tokens) == row["tokens"]
        assert values == [f"{row[each]['%']:.1f}" for each in scenes.TYPES]
    stable = {(row["features"], row["system"]): row for row in committed["stability"]}
    table = cells(text, "features", 3)
    assert len(table) == 2
    lines = [line for line in text.splitlines() if line.startswith(("| bfloat16", "| eager"))]
    assert len(lines) == len(stable)
    for line in lines:
        features, system, tokens, words = (cell.strip() for cell in line.strip("|").split("|"))
        row = stable[features, system]
        assert tokens == (shown(row["other tokens"]) if row["tokens"] else "")
        assert words == shown(row["other answers"])
