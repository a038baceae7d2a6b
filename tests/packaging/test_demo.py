"""The demo: what it prints, answers, draws and refuses, and what its encoder looks at."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("transformers")

from vispruner_kernels import cls_scores, select_topk  # noqa: E402
from vispruner_kernels.demo import compare, encoder, main, picture, tiny_vlm  # noqa: E402
from vispruner_kernels.integrations.transformers import prune_inputs  # noqa: E402
from vispruner_kernels.methods import Random, VisPruner  # noqa: E402
from vispruner_kernels.published import select_published  # noqa: E402

COMMAND = [sys.executable, "-m", "vispruner_kernels.demo"]
# The package that this process tests, installed or not.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(
        [str(Path(picture.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    ),
}
NUMBER = r"\d+\.\d\d"
SYSTEMS = ["VisPruner", "FasterVLM", "FoPru rank", "FoPru row", "Random"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the demo itself, for the same bits and for the patience of a busy machine."""
    with encoder.one_thread():
        yield


@pytest.fixture(scope="module")
def photo():
    return picture.load_photo(picture.sample_photo())


@pytest.fixture(scope="module")
def sample():
    return picture.load_photo(picture.SAMPLE)


@pytest.fixture(scope="module")
def image(sample):
    return picture.to_tensor(sample, 192)


@pytest.fixture(scope="module")
def encoded(image):
    return encoder.encode(image)


@pytest.fixture(scope="module")
def polls(image):
    """The bundled questions, asked in this process."""
    known = picture.sample_answers().items()
    return [compare.poll(image, question, truth, 64) for question, truth in known]


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """The command of the README, in an empty folder and a process of its own."""
    folder = tmp_path_factory.mktemp("default")
    done = subprocess.run(
        COMMAND, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    return done, folder / "vispruner_demo.png"


def size_of(source) -> tuple[int, int]:
    with Image.open(source) as opened:
        assert opened.format == "PNG"
        return opened.size


def refused(capsys, *argv) -> str:
    """Run the demo, assert that it ends with one line on stderr, and return that line."""
    assert main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("vispruner_kernels.demo: ")
    return err


# What it prints


def test_default_run_prints_the_duel_first(default_run):
    done, _ = default_run
    assert done.returncode == 0
    # On a fresh machine Matplotlib may say there that it builds its cache of fonts.
    assert [line for line in done.stderr.splitlines() if "font cache" not in line] == []
    first, second, *_ = done.stdout.splitlines()
    match = re.fullmatch(
        rf"published loop ({NUMBER}) ms, ours ({NUMBER}) ms, ratio (\d+\.\d), (\d+) of 64 tokens "
        r"equal to the float64 loop \(the loop in float32: (\d+)\)",
        first,
    )
    assert match, first
    published, ours, ratio = (float(match[i]) for i in (1, 2, 3))
    # All three are rounded.
    assert published / (ours + 0.005) - 0.1 <= ratio <= published / max(ours - 0.005, 1e-9) + 0.1
    assert 32 <= int(match[4]) <= 64
    match = re.fullmatch(
        r"published loop raises \w+ at a budget of (\d+) tokens, ours keeps exactly (\d+)", second
    )
    assert match, second
    assert match[1] == match[2]
    assert "  sample.png, cropped to the square in its middle, 24 x 24 patches, tiny VLM\n" in (
        done.stdout
    )
    assert "float32 features [1, 576, 128] on the cpu, 1 thread, median of " in done.stdout


def test_default_run_prints_a_row_per_system(default_run):
    done, _ = default_run
    rows = {
        line[:10].strip(): line[10:].split()
        for line in done.stdout.splitlines()
        if line.endswith(" ms")
    }
    assert list(rows) == SYSTEMS
    assert [row[0] for row in rows.values()] == ["64", "64", "64", "48", "64"]
    # What duplicate removal is for: more of the picture covered, less said twice.
    coverage = {name: float(row[3]) for name, row in rows.items()}
    redundancy = {name: float(row[4]) for name, row in rows.items()}
    assert coverage["VisPruner"] > coverage["FasterVLM"] + 0.2
    assert redundancy["VisPruner"] == min(redundancy.values())


def test_broken_budget_is_one_at_which_the_published_loop_raises(encoded, monkeypatch):
    monkeypatch.setattr(compare, "_RUNS", 1)
    contest = compare.duel(encoded, 63)
    scores = cls_scores(encoded.q, encoded.k)
    assert contest.broken_keep == 63
    with pytest.raises((RuntimeError, IndexError)):
        select_published(encoded.features, scores, 63)
    assert contest.exact == 63
    # The loop does not run at 63, so the race is held next to it.
    assert contest.keep in (62, 64)
    exact = select_published(encoded.features.double(), scores.double(), contest.keep)
    ours = VisPruner(contest.keep).select(encoded.features, scores)
    assert contest.equal == len(set(exact[0].tolist()) & set(ours[0].tolist()))


def test_picture_is_written_when_nobody_reads_on(tmp_path):
    # Unbuffered, so that the first line is what fails.
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": "1"}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        COMMAND, cwd=tmp_path, env=environment, stdout=writer, stderr=subprocess.PIPE, timeout=120
    )
    os.close(writer)
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if b"font cache" not in line] == []
    assert size_of(tmp_path / "vispruner_demo.png") == (picture.WIDTH, picture.HEIGHT)


def test_coverage_and_redundancy_by_hand():
    cosine = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.25], [0.0, 0.25, 1.0]])
    assert compare.coverage(cosine, torch.tensor([1])) == pytest.approx((0.5 + 1 + 0.25) / 3)
    assert compare.redundancy(cosine, torch.tensor([0, 1])) == pytest.approx(0.5)
    assert compare.redundancy(cosine, torch.arange(3)) == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert math.isnan(compare.redundancy(cosine, torch.tensor([2])))


@pytest.mark.parametrize("keep", [1, 23, 24, 575, 576])
def test_budgets_at_the_edges(encoded, keep):
    results = {result.name: result for result in compare.evaluate(encoded, keep)}
    row = results.pop("FoPru row", None)
    assert (row is None) == (keep < 24)
    assert row is None or len(row.kept) == keep // 24 * 24
    for result in results.values():
        assert len(result.kept) == keep
        assert torch.equal(result.kept, result.kept.unique())
    assert len(results["VisPruner"].important) == keep // 2
    if keep == 576:
        assert results["VisPruner"].attention == pytest.approx(1)
        assert results["VisPruner"].coverage == pytest.approx(1)


def test_one_token(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "_RUNS", 1)
    assert main(["--keep", "1", "--out", str(tmp_path / "one.PNG")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "ours keeps exactly 1\n" in out
    assert "FoPru row is left out" in out
    assert size_of(tmp_path / "one.PNG") == (picture.WIDTH, picture.HEIGHT)


# What it answers


def printed_answers(out: str) -> tuple[str, dict[str, list[str]]]:
    """The line of the question, and the cells of the table under it by system."""
    *_, question, _, rows = re.split(r"^(question: .*)\n(system .*)\n", out, flags=re.MULTILINE)
    table = rows.split("\n\n")[0].splitlines()
    return question, {row[:10].strip(): re.split(" {2,}", row[12:]) for row in table}


def test_default_run_answers_the_first_question(default_run, polls):
    done, _ = default_run
    question, rows = printed_answers(done.stdout)
    asked = polls[0]
    assert question == f"question: {asked.question}   (true answer: {asked.truth})"
    assert list(rows) == [compare.ALL, *SYSTEMS]
    for name, (answer, mark, count) in rows.items():
        assert answer == asked.answers[name]
        assert mark == ("right" if answer == asked.truth else "wrong")
        assert count == f"{sum(poll.answers[name] == poll.truth for poll in polls)} of 8"


def test_answers_are_those_of_the_public_path(image, polls):
    model, words = tiny_vlm.load(), tiny_vlm.tokenizer()
    methods = dict(compare.systems(64, 24))
    for poll in polls[:3]:
        given = tiny_vlm.inputs(image, poll.question)
        assert list(poll.answers) == [compare.ALL, *methods]
        assert poll.answers[compare.ALL] == tiny_vlm.answer(given)
        for name, method in methods.items():
            pruned = prune_inputs(model, given, method)
            # All steps of `generate`, one forward at a time, without a cache.
            ids = []
            embeds = pruned["inputs_embeds"]
            while len(ids) < 4 and (not ids or ids[-1] != words.eos_token_id):
                with torch.no_grad():
                    logits = model(inputs_embeds=embeds).logits
                ids.append(int(logits[0, -1].argmax()))
                last = model.get_input_embeddings()(torch.tensor([ids[-1:]]))
                embeds = torch.cat([embeds, last], 1)
            want = words.decode(ids, skip_special_tokens=True) or "(nothing)"
            # How they are spelt is the next test but one.
            assert poll.answers[name].replace(" ", "") == want.replace(" ", "")


def test_what_is_shown_is_what_the_answer_was_made_from(image, encoded):
    given = tiny_vlm.inputs(image, "what is the number ?")
    for (name, method), result in zip(
        compare.systems(64, 24), compare.evaluate(encoded, 64), strict=True
    ):
        assert name == result.name
        assert torch.equal(prune_inputs(tiny_vlm.load(), given, method).kept[0], result.kept)


def test_answers_are_spelt_as_the_true_ones(monkeypatch):
    words = tiny_vlm.tokenizer()
    given = {"input_ids": torch.zeros(1, 0, dtype=torch.int64)}
    for truth in ("4 8", "3", *picture.sample_answers().values()):
        ids = words(truth, return_tensors="pt", add_special_tokens=False).input_ids
        model = SimpleNamespace(generate=lambda ids=ids, **_: ids)
        monkeypatch.setattr(tiny_vlm, "load", lambda model=model: model)
        assert tiny_vlm.answer(given) == truth


def test_bundled_questions_are_in_the_words_of_the_model(image):
    known = picture.sample_answers()
    assert len(known) == 8
    assert next(iter(known)) == "what is the number ?"
    for question, answer in known.items():
        tiny_vlm.inputs(image, f"{question} {answer}")


def test_question_of_the_caller_about_the_bundled_picture(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "_RUNS", 1)
    out = tmp_path / "x.png"
    assert main(["--question", "what is the number ?", "--out", str(out)]) == 0
    question, rows = printed_answers(capsys.readouterr().out)
    assert question == "question: what is the number ?   (true answer: 4 3)"
    assert all(row[1] in ("right", "wrong") for row in rows.values())
    assert main(["--question", "what is below the star ?", "--out", str(out)]) == 0
    question, rows = printed_answers(capsys.readouterr().out)
    # Nobody knows; the bundled questions are counted all the same.
    assert question == "question: what is below the star ?"
    assert all(re.fullmatch("[0-8] of 8", row[1]) for row in rows.values())


def test_photograph_of_the_caller(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "_RUNS", 1)
    path, out = picture.sample_photo(), tmp_path / "x.png"
    assert main([str(path), "--out", str(out)]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    assert "grace_hopper.jpg, cropped to the square in its middle, 24 x 24 patches" in printed
    assert "question" not in printed
    assert size_of(out) == (picture.WIDTH, picture.HEIGHT)
    # Also the question whose answer is known of another picture.
    question = next(iter(picture.sample_answers()))
    assert main([str(path), "--question", question, "--out", str(out)]) == 0
    shown, rows = printed_answers(capsys.readouterr().out)
    assert shown == f"question: {question}"
    image = picture.to_tensor(picture.load_photo(path), 192)
    want = compare.poll(image, question, None, 64).answers
    assert {name: [answer] for name, answer in want.items()} == rows


# What the encoder sees


def test_important_tokens_fall_on_things(encoded):
    centres = (torch.arange(24) + 0.5) * 8
    subject = torch.zeros(24, 24, dtype=torch.bool)
    for thing in json.loads(picture.SAMPLE.with_suffix(".json").read_text())["things"]:
        across = (centres > thing["left"]) & (centres < thing["right"])
        down = (centres > thing["top"]) & (centres < thing["bottom"])
        subject |= down[:, None] & across
    subject = subject.flatten()
    scores = VisPruner(64).attention_scores(encoded.q, encoded.k)
    important = select_topk(scores, 32)[0]
    hits = subject[important].float().mean().item()
    chance = [
        subject[Random(32, seed=seed).select(encoded.features, None)[0]].float().mean().item()
        for seed in range(20)
    ]
    assert hits >= 0.5
    assert hits > max(chance)
    assert hits > sum(chance) / len(chance) + 0.2


def test_encoder_is_the_layer_before_the_last_of_the_model(image, encoded):
    tower = tiny_vlm.load().model.vision_tower
    pixels = tiny_vlm.inputs(image, "where")["pixel_values"]
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        # What goes into that layer is the state before the one that comes out of it.
        layer = getattr(tower, "vision_model", tower).encoder.layers[-2]
        read = layer.layer_norm1(states[-3])
        q, k = (
            project(read).unflatten(-1, (2, 64))
            for project in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
    assert encoded.side == 24
    assert encoded.features.shape == (1, 576, 128)
    assert encoded.q.shape == encoded.k.shape == (1, 577, 2, 64)
    for got, want in ((encoded.features, states[-2][:, 1:]), (encoded.q, q), (encoded.k, k)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want)
    again = encoder.encode(image)
    for name in ("features", "q", "k"):
        assert torch.equal(getattr(encoded, name), getattr(again, name))


def test_encoder_wants_its_own_size():
    with pytest.raises(ValueError, match=r"image: got the shape \[3, 24, 24\]"):
        encoder.encode(torch.zeros(3, 24, 24))


# What it draws


def read_rgb(path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.array(opened.convert("RGB"))


def patches(pixels) -> np.ndarray:
    """Mean brightness of the inside of each of the 24 x 24 patches of a panel, free of frames."""
    cell = pixels.shape[0] // 24
    inside = pixels.reshape(24, cell, 24, cell, 3)[:, 4:-4, :, 4:-4]
    return inside.astype(float).mean((1, 3, 4)).flatten()


def test_pruned_patches_are_dim(sample):
    kept = torch.tensor([0, 30, 300, 575])
    pixels = picture.panel_pixels(sample, 24, kept)
    bright = picture.panel_pixels(sample, 24, torch.arange(576))
    assert pixels.shape == (picture.PANEL, picture.PANEL, 3)
    before, after = patches(bright), patches(pixels)
    assert (after[kept] == before[kept]).all()
    pruned = np.setdiff1d(np.arange(576), kept)
    assert (after[pruned] <= before[pruned]).all()
    lit = pruned[before[pruned] > 40]
    assert len(lit) > 300
    assert (after[lit] < 0.65 * before[lit]).all()
    # And grey.
    spread = np.ptp(pixels.astype(int), axis=-1)
    assert spread[:19, 19:38].max() <= 0.1 * 255


def test_picture_shows_what_was_kept(default_run, encoded):
    _, path = default_run
    assert size_of(path) == (picture.WIDTH, picture.HEIGHT)
    pixels = read_rgb(path)

    def panel(index):
        left, top = picture.panel_origin(index)
        return patches(pixels[top : top + picture.PANEL, left : left + picture.PANEL])

    before = panel(0)
    lit = before > 40
    for index, result in enumerate(compare.evaluate(encoded, 64), start=1):
        kept = np.zeros(576, dtype=bool)
        kept[result.kept] = True
        ratio = panel(index)[lit] / before[lit]
        assert (ratio[kept[lit]] > 0.85).all()
        assert (ratio[~kept[lit]] < 0.75).all()


def test_outlines_tell_important_from_diverse(default_run, encoded):
    _, path = default_run
    pixels = read_rgb(path).astype(int)
    left, top = picture.panel_origin(1)
    vispruner = compare.evaluate(encoded, 64)[0]
    cell = picture.PANEL // 24
    for token in vispruner.kept.tolist():
        y, x = top + token // 24 * cell, left + token % 24 * cell
        important = token in vispruner.important
        colour = picture.IMPORTANT if important else picture.DIVERSE
        want = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        edge = pixels[y : y + cell, x : x + 4].reshape(-1, 3)
        assert np.abs(edge - want).sum(-1).min() < 60


# Above a panel: left of this many pixels is the longest title.
TITLE = 165


def above(pixels, index) -> np.ndarray:
    """The pixels between a panel and what is above it."""
    left, top = picture.panel_origin(index)
    return pixels[top - picture.CAPTION : top, left : left + picture.PANEL].astype(int)


def answers_drawn(photo, answer, right) -> np.ndarray:
    panel = picture.Panel("FoPru rank", "64 tokens", [], answer=answer, right=right)
    png = picture.draw(photo, 24, ["heading"], "question", [panel] * 6)
    return read_rgb(io.BytesIO(png))


def test_answers_are_drawn_in_the_colour_of_their_truth(default_run, polls):
    _, path = default_run
    pixels = read_rgb(path)
    asked = polls[0]
    for index, name in enumerate(asked.answers):
        answer = above(pixels, index)[:, TITLE:].reshape(-1, 3)
        red, green = answer[:, 0], answer[:, 1]
        drawn_right, drawn_wrong = (green > red + 60).any(), (red > green + 60).any()
        assert (drawn_right, drawn_wrong) == (asked.right(name), not asked.right(name))


def test_right_and_wrong_are_told_apart_without_colour(sample):
    drawn = [above(answers_drawn(sample, "3", right), 1) for right in (True, False, None)]
    inked = [(pixels.min(-1) < 200)[:, TITLE:] for pixels in drawn]
    assert (inked[0] != inked[1]).any()
    assert inked[0].sum() > inked[2].sum() < inked[1].sum()


@pytest.mark.parametrize("answer", ["bottom right", " ".join(["triangle"] * 4)])
def test_long_answers_end_in_time(sample, answer):
    without, drawn = (answers_drawn(sample, words, False) for words in (None, answer))
    changed = (without != drawn).any(-1)
    height = picture.CAPTION
    for index in range(6):
        left, top = picture.panel_origin(index)
        part = changed[top - height : top, left + TITLE : left + picture.PANEL]
        rows, columns = part.any(1).nonzero()[0], part.any(0).nonzero()[0]
        # In a line of its own height, clear of the caption under it and of the panel above.
        assert rows.min() > 5
        assert rows.max() < height - 30
        assert columns.min() > 10
        changed[top - height : top, left + TITLE : left + picture.PANEL] = False
    # Nothing left of it, where the titles are, nothing right of it, nothing below.
    assert not changed.any()


def test_long_questions_end_in_time(sample):
    def drawn(question):
        return read_rgb(io.BytesIO(picture.draw(sample, 24, ["heading"], question, [])))

    changed = (drawn("") != drawn("question: " + "what colour is the triangle ? " * 9)).any(-1)
    columns = changed.any(0).nonzero()[0]
    assert columns.max() < picture.WIDTH - picture.GAP
    assert not changed[picture.HEADER :].any()


def test_file_name_is_drawn_as_it_is(sample):
    # Not as mathematics, not as a missing letter's warning.
    png = picture.draw(sample, 24, ["$a_b$ \u4e00", "x^2$"], "$", [])
    assert size_of(io.BytesIO(png)) == (picture.WIDTH, picture.HEIGHT)


# What it reads


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK", "I;16", "I", "F"])
def test_every_mode_is_read(photo, tmp_path, mode):
    grey = np.asarray(photo.convert("L"))
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(grey.astype(np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 255)
    else:
        image = photo.convert(mode)
    assert image.mode == mode
    path = tmp_path / "image.tif"
    image.save(path)
    read = picture.load_photo(path)
    assert read.mode == "RGB"
    difference = np.abs(np.asarray(read.convert("L")).astype(int) - grey)
    # Black and white has noise for shades, and a palette has 256 colours.
    assert difference.mean() < {"1": 120, "P": 20}.get(mode, 2)


def test_transparent_pixels_are_white(tmp_path):
    path = tmp_path / "clear.png"
    Image.new("RGBA", (40, 40), (200, 0, 0, 0)).save(path)
    assert np.asarray(picture.load_photo(path)).min() == 255


def test_turned_photograph_is_put_upright_and_cropped_in_the_middle(tmp_path):
    image = Image.new("RGB", (60, 40), "black")
    image.paste("white", (10, 0, 50, 40))
    exif = image.getexif()
    # Orientation 6: the camera was held a quarter turn to the left.
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    image.rotate(90, expand=True).save(path, exif=exif)
    read = picture.load_photo(path)
    assert read.size == (40, 40)
    assert np.asarray(read).min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["image.png", "raw.tif", "lzw.tif"])
@pytest.mark.parametrize("size", [(60, 41), (41, 60)])
def test_every_orientation(tmp_path, orientation, name, size):
    pixels = np.arange(size[0] * size[1], dtype=np.uint16).reshape(size[1], size[0]) * 26
    image = Image.fromarray((pixels >> 8).astype(np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    compression = {"compression": "tiff_lzw"} if name == "lzw.tif" else {}
    image.save(tmp_path / name, exif=exif, **compression)
    upright = np.asarray(image)
    if orientation > 4:
        upright = upright.T
    # Across the columns and the rows of the picture as it is shown.
    upright = upright[:: -1 if orientation in (3, 4, 7, 8) else 1]
    upright = upright[:, :: -1 if orientation in (2, 3, 6, 7) else 1]
    left, top = ((length - 41) // 2 for length in upright.T.shape)
    want = upright[top : top + 41, left : left + 41]
    assert (np.asarray(picture.load_photo(tmp_path / name)) == want[..., None]).all()


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "I;16", "F"])
def test_large_pictures_come_back_smaller(tmp_path, mode):
    # Blocks of 3 x 3 equal pixels, more of them than a band has, in the middle.
    small = np.random.default_rng(0).integers(0, 256, (1024, 1024), dtype=np.uint8)
    grey = np.pad(small.repeat(3, 0).repeat(3, 1), ((1, 1), (101, 101)))
    grey[:, [0, -1]] = 255
    if mode == "F":
        floats = grey.astype(np.float32) / 255
        floats[:, 0], floats[0, 1:4] = 1, (np.nan, np.inf, -np.inf)
        image = Image.fromarray(floats)
    else:
        image = Image.fromarray(grey.astype(np.uint16) * 257 if mode == "I;16" else grey)
        image = image if mode == "I;16" else image.convert(mode)
    path = tmp_path / "image.tif"
    image.save(path)
    read = np.asarray(picture.load_photo(path))
    assert (read == small[..., None]).all()


# What it reads them with

READ = """
import os, re, sys
from pathlib import Path
from vispruner_kernels import demo
def peak():
    # ru_maxrss begins with the size of the process that started this one.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(peak(), flush=True)
for name in sys.argv[1:]:
    if os.fork():
        assert os.wait()[1] == 0
        continue
    # It starts without the pages of libraries.
    start = peak()
    try:
        print(demo.load_photo(Path(name)).size)
    except demo.InputError as error:
        print(error)
    print(peak() - start, flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to a limit of memory")
def test_a_picture_takes_500_megabytes_at_most(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    floats = np.full((5500, 5500), np.nan, np.float32)
    floats[::2] = np.inf
    wanted = {
        # Read, and nearly as large as such may be.
        "turned.png": r"\(1176, 1176\)",
        "floats.tif": r"\(1100, 1100\)",
        "scans.jpg": r"\(1500, 1500\)",
        "lossless.webp": r"\(1066, 1066\)",
        # Refused.
        "bomb.png": r".*bomb.png is too large, save it smaller: Image size \(144000000 pixels\).*",
        "pixels.png": r".*save it smaller: to read its 9000 x 9000 pixels takes about 405 MB .*",
        "strip.tif": r".*strip.tif is too large, save it smaller: to read it takes more than .*",
        "canvas.webp": r"cannot read the image .*canvas.webp: .* or to read it takes more than .*",
    }
    Image.new("RGBA", (5900, 5880)).save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(floats).save(tmp_path / "floats.tif", compression="tiff_lzw")
    Image.new("RGB", (8000, 6000)).save(tmp_path / "scans.jpg", progressive=True)
    Image.new("RGBA", (3200, 3200)).save(tmp_path / "lossless.webp", lossless=True)
    Image.fromarray(np.zeros((12000, 12000), np.uint16)).save(tmp_path / "bomb.png")
    Image.new("L", (9000, 9000)).save(tmp_path / "pixels.png")
    # libtiff decodes a strip as a whole, and Pillow turns a copy.
    Image.new("RGBA", (5900, 5880)).save(
        tmp_path / "strip.tif", compression="tiff_lzw", strip_size=2**30, exif=turned
    )
    Image.new("RGB", (9000, 9000)).save(tmp_path / "canvas.webp", lossless=True)
    done = subprocess.run(
        [sys.executable, "-c", READ, *(str(tmp_path / name) for name in wanted)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    imports, *lines = done.stdout.splitlines()
    for name, got, growth in zip(wanted, lines[::2], lines[1::2], strict=True):
        print(f"{name}: {int(growth) / 1e6:.0f} MB beside {int(imports) / 1e6:.0f}")
        assert re.fullmatch(wanted[name], got), got
        # Libraries of Pillow are loaded on the way.
        assert int(growth) < 195e6, name
        # PyTorch with its libraries for CUDA is larger.
        assert int(imports) + int(growth) < 500e6 or torch.version.cuda, name


def test_the_limit_of_memory_is_lifted_again(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    picture.load_photo(picture.SAMPLE)
    (tmp_path / "x.png").write_text("not an image")
    with pytest.raises(picture.InputError):
        picture.load_photo(tmp_path / "x.png")
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


# What it refuses


@pytest.mark.parametrize("keep", ["0", "577", "-3"])
def test_keep_out_of_range(capsys, tmp_path, keep):
    err = refused(capsys, "--keep", keep, "--out", tmp_path / "x.png")
    assert f"--keep {keep} is out of range: want 1 to 576" in err
    assert not list(tmp_path.iterdir())


def test_keep_that_is_no_number(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--keep", "many"])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert "--keep" in err
    assert err.count("\n") == 1


def test_missing_image(capsys, tmp_path):
    assert "no such image" in refused(capsys, tmp_path / "none.jpg", "--out", tmp_path / "x.png")


def test_directory_for_an_image(capsys, tmp_path):
    assert "is a directory" in refused(capsys, tmp_path, "--out", tmp_path / "x.png")


def test_text_for_an_image(capsys, tmp_path):
    path = tmp_path / "text.jpg"
    path.write_text("not an image")
    assert "not an image that Pillow can read" in refused(capsys, path, "--out", tmp_path / "x.png")


def test_half_an_image(capsys, tmp_path):
    path = tmp_path / "half.jpg"
    path.write_bytes(picture.sample_photo().read_bytes()[:20_000])
    assert "cannot read the image" in refused(capsys, path, "--out", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("none/x.png", "there is no folder"),
        ("x.jpg", "must end in .png"),
        ("x", "must end in .png"),
        ("folder.png", "is a directory"),
    ],
)
def test_impossible_out(capsys, tmp_path, out, message):
    (tmp_path / "folder.png").mkdir()
    assert message in refused(capsys, "--out", tmp_path / out)


@pytest.mark.parametrize("module", ["matplotlib", "PIL", "tqdm", "transformers"])
def test_missing_extra(capsys, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert f"needs {module}: pip install vispruner_kernels[demo]" in refused(capsys)


@pytest.mark.parametrize("argv", [[], [picture.SAMPLE]])
def test_word_that_the_model_does_not_know(capsys, tmp_path, argv):
    out = tmp_path / "x.png"
    err = refused(capsys, *argv, "--question", "what colour is the hat ?", "--out", out)
    assert "--question: the model does not know 'hat'; it knows " in err
    assert " triangle " in err
    assert not out.exists()


def test_question_to_a_tower(capsys, tmp_path):
    err = refused(capsys, "--question", "where", "--model", tmp_path, "--out", tmp_path / "x.png")
    assert "a vision tower (--model) does not answer" in err


def test_missing_model_folder(capsys, tmp_path):
    err = refused(capsys, "--model", tmp_path / "none", "--out", tmp_path / "x.png")
    assert "there is no folder" in err


# A CLIP tower


@pytest.fixture
def tower(tmp_path):
    """A CLIP vision tower of random weights, 4 x 4 patches, three layers, and its folder."""
    import transformers

    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    config._attn_implementation = "eager"
    model = transformers.CLIPVisionModel(config).eval()
    folder = tmp_path / "tower"
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.filterwarnings("default")
def test_model_gives_the_features_and_attention_of_the_layer_before_the_last(photo, tower):
    from vispruner_kernels.demo import clip

    model, folder = tower
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessor", '
        '"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}'
    )
    got = clip.encode(photo, str(folder))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    pixels = (picture.to_tensor(photo, 56) - mean) / std
    with torch.no_grad():
        want = model(pixels[None], output_hidden_states=True, output_attentions=True)
    assert got.side == 4
    torch.testing.assert_close(got.features, want.hidden_states[-2][:, 1:])
    scores = want.attentions[-2][:, :, 0, 1:].mean(1)
    torch.testing.assert_close(cls_scores(got.q, got.k), scores)


@pytest.mark.filterwarnings("default")
def test_model_runs_the_demo(capsys, tower, tmp_path):
    _, folder = tower
    out = tmp_path / "tower.png"
    assert main(["--model", str(folder), "--keep", "6", "--out", str(out)]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    assert "4 x 4 patches, CLIP vision tower" in printed
    assert "question" not in printed
    assert size_of(out) == (picture.WIDTH, picture.HEIGHT)


@pytest.mark.filterwarnings("default")
def test_keep_beyond_the_grid_of_the_model(capsys, tower, tmp_path):
    _, folder = tower
    err = refused(capsys, "--model", folder, "--keep", 17, "--out", tmp_path / "x.png")
    assert "want 1 to 16" in err


@pytest.mark.filterwarnings("default")
def test_broken_models(capsys, tower, tmp_path):
    _, folder = tower
    out = tmp_path / "x.png"
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert "cannot be loaded" in refused(capsys, "--model", folder, "--out", out)
    weights.unlink()
    assert "cannot be loaded" in refused(capsys, "--model", folder, "--out", out)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert "want a CLIP vision tower" in refused(capsys, "--model", folder, "--out", out)
    (folder / "config.json").unlink()
    assert "cannot be loaded" in refused(capsys, "--model", folder, "--out", out)
    assert not out.exists()
