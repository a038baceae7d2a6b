"""The training of the tiny VLM: its labels, its start and its losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("numpy")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from benchmarks.tiny_vlm import answers, attention, scenes, supervision, train
from benchmarks.tiny_vlm import model as tiny
from vispruner_kernels.demo import tiny_vlm


@pytest.fixture(scope="module")
def model():
    return tiny_vlm.load()


@pytest.fixture(scope="module")
def batch(model):
    return answers.encode(model, [scenes.scene("test", i) for i in range(6)])


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
    # Once more from the file of the first stage.
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


def test_each_head_starts_by_attending_to_one_neighbour():
    torch.manual_seed(0)
    tower = tiny.make().model.vision_tower
    attention.attend_to_neighbours(tower)
    positions = tower.embeddings.position_embedding.weight.detach()
    found = []
    for layer in tower.encoder.layers:
        block = layer.self_attn
        x = torch.nn.functional.layer_norm(positions, positions.shape[-1:])
        q, k = (f(x).unflatten(-1, (-1, block.head_dim)) for f in (block.q_proj, block.k_proj))
        # For a patch in the middle: row 10, column 12.
        here = 10 * scenes.SIDE + 12
        seen = torch.einsum("hd,nhd->hn", q[1 + here], k[1:]).argmax(-1)
        found += [divmod(place, scenes.SIDE) for place in seen.tolist()]
    steps = [(row - 10, column - 12) for row, column in found]
    # Right, left, below, above, the diagonals, and two steps away.
    assert steps[:4] == [(0, 1), (0, -1), (1, 0), (-1, 0)]
    assert set(steps[4:8]) == {(-1, -1), (-1, 1), (1, -1), (1, 1)}
    assert set(steps[8:]) == {(-2, 0), (2, 0), (0, -2), (0, 2)}


def test_recorded_attention_equals_that_of_the_model(model, batch):
    """The weights of the first head to START and the picture, without the question's own words."""
    llama = model.model.language_model
    embeddings, mask, positions = tiny.packed(model, answers.project(model, batch), batch.ids)
    rows = 577 + torch.tensor([3, 40, 75]).expand(len(batch.ids), -1)
    before = llama.config._attn_implementation
    recorder = attention.Recorder(llama, (1, 2))
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
                torch.testing.assert_close(recorder.log_weights(layer, rows, 576).exp(), wanted)
    finally:
        model.set_attn_implementation(before)
        for hook in recorder.hooks:
            hook.remove()


class Table:
    """A stand-in for a Recorder: attention weights `[1, S, 1 + visual]` that a test sets."""

    def __init__(self, visual):
        self.weights = torch.zeros(3, 1, 1 + visual + supervision.SLOTS * tiny.SLOT, 1 + visual)
        self.weights[..., 0] = 1

    def attend(self, layer, row, where):
        self.weights[layer, 0, row] = where / where.sum()

    def log_weights(self, layer, rows, visual):
        logs = self.weights[layer].clamp_min(1e-9).log()
        return logs.gather(1, rows[..., None].expand(-1, -1, 1 + visual))


def test_attention_loss_is_small_only_if_heads_attend_to_the_things_asked_about():
    scene = scenes.scene("train", 5)
    sample = supervision.Sample(*(x[None] for x in supervision.sample_of(scene)))
    things, middle = sample.things, sample.patches[..., -1] > 0
    visual = things.shape[1]
    table = Table(visual)
    targets = []
    for slot, question in enumerate(scene.questions):
        row = 1 + visual + slot * tiny.SLOT + len(question.text.split()) - 1
        on = torch.zeros(1 + visual)
        for thing in question.about:
            on[1:] += things[0] == thing
        if question.type == "count":
            on[1:] *= middle[0]
            on[0] = 1
            assert on.sum() == 1 + int(question.answer)
        targets.append((question.type, 1, row, on))
        if question.type == "number":
            targets.append(("second digit", 1, row + 1, on))
        if question.type == "relation":
            there = torch.zeros(1 + visual)
            there[1:] = things[0] == question.target
            targets.append(("target", 2, row, there))
    assert {name for name, *_ in targets} == {*scenes.TYPES, "second digit", "target"}
    for _, layer, row, where in targets:
        table.attend(layer, row, where)
    assert attention.attention_loss(table, sample, things, middle) < 1e-4
    for name, layer, row, where in targets:
        table.attend(layer, row, 1.0 * (where == 0))
        assert attention.attention_loss(table, sample, things, middle) > 0.2, name
        # Where things may be missing, there is no loss on counts.
        assert (attention.attention_loss(table, sample, things, None) < 1e-4) == (
            name == "count"
        ), name
        table.attend(layer, row, where)
    # A count needs attention to START too.
    _, layer, row, where = next(x for x in targets if x[0] == "count" and x[-1].sum() > 1)
    where[0] = 0
    table.attend(layer, row, where)
    assert attention.attention_loss(table, sample, things, middle) > 0.2


def test_parts_contain_the_preferred_tokens():
    torch.manual_seed(0)
    features = torch.randn(3, 576, 8)
    first = (torch.rand(3, 576) < 0.2).float()
    for kept in (train.part(features, 200), train.part(features, 200, first)):
        assert kept.shape == (3, 200)
        assert (kept.diff() > 0).all()
    assert first.sum(1).max() < 200
    assert torch.equal(first.gather(1, kept).sum(1), first.sum(1))
    assert not torch.equal(kept, train.part(features, 200, first))


def test_explicit_attention_equals_that_of_pytorch():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 37, 32, dtype=torch.float64)
    mask = torch.rand(2, 1, 37, 37) < 0.5
    mask |= torch.eye(37, dtype=torch.bool)
    for seen in (None, mask):
        y, _ = attention.explicit_attention(None, q, k, v, seen, scaling=0.25)
        right = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=0.25)
        torch.testing.assert_close(y, right.transpose(1, 2))


def test_sheets_have_training_layouts_and_many_digits():
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
def test_labels_describe_the_things_in_the_picture(kind):
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
        assert sample.about[i].nonzero().flatten().tolist() == list(question.about)
        if question.type == "relation":
            (there,) = sample.target[i].nonzero().flatten().tolist()
            assert scene.things[there].kind == question.answer
    assert not sample.about[:, supervision.NOTHING].any()
