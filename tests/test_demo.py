"""The demo: what it prints, draws and refuses, and that its encoder looks at the subject."""

from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from vispruner_kernels import cls_scores, select_topk  # noqa: E402
from vispruner_kernels.demo import compare, encoder, main, picture  # noqa: E402
from vispruner_kernels.methods import Random, VisPruner  # noqa: E402
from vispruner_kernels.published import select_published  # noqa: E402

# Stated by eye in pixels of the shipped photograph (512 x 600): left, top, right and bottom of the
# hat, the face, the collar and the tie. The flag, the sky and most of the uniform are outside.
SUBJECT = (145, 22, 378, 530)
COMMAND = [sys.executable, "-m", "vispruner_kernels.demo"]
# The package that this process tests, installed or not.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(
        [str(Path(picture.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    ),
}
NUMBER = r"\d+\.\d\d"


@pytest.fixture(scope="module")
def photo():
    return picture.load_photo(picture.sample_photo())


@pytest.fixture(scope="module")
def encoded(photo):
    return encoder.encode(picture.to_tensor(photo, 336))


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
    assert "rule-made encoder, not CLIP" in done.stdout
    assert "float32 features [1, 576, 1024] on the cpu, 1 thread, median of " in done.stdout


def test_default_run_prints_a_row_per_system(default_run):
    done, _ = default_run
    rows = {
        line[:10].strip(): line[10:].split()
        for line in done.stdout.splitlines()
        if line.endswith(" ms")
    }
    assert list(rows) == ["VisPruner", "FasterVLM", "FoPru rank", "FoPru row", "Random"]
    assert [row[0] for row in rows.values()] == ["64", "64", "64", "48", "64"]
    # Duplicate removal is what it is for: more of the picture covered, less said twice.
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


# What the encoder sees


def test_important_tokens_fall_on_the_subject(encoded):
    left, top, right, bottom = SUBJECT
    # The square in the middle of 512 x 600 begins 44 pixels down.
    centres = (torch.arange(24) + 0.5) * 512 / 24
    across = (centres > left) & (centres < right)
    down = (centres + 44 > top) & (centres + 44 < bottom)
    subject = (down[:, None] & across).flatten()
    scores = VisPruner(64).attention_scores(encoded.q, encoded.k)
    important = select_topk(scores, 32)[0]
    hits = subject[important].float().mean().item()
    chance = [
        subject[Random(32, seed=seed).select(encoded.features, None)[0]].float().mean().item()
        for seed in range(20)
    ]
    assert hits >= 0.7
    assert hits > max(chance)
    assert hits > sum(chance) / len(chance) + 0.2


@pytest.mark.parametrize("dims", [(1,), (2,), (1, 2)])
def test_encoder_has_no_preference_for_a_place(photo, encoded, dims):
    mirrored = encoder.encode(picture.to_tensor(photo, 336).flip(dims))
    want = cls_scores(encoded.q, encoded.k).view(1, 24, 24)
    got = cls_scores(mirrored.q, mirrored.k).view(1, 24, 24)
    torch.testing.assert_close(got.flip(dims), want)


def test_encoder_has_the_shape_of_clip_and_is_deterministic(photo, encoded):
    assert encoded.features.shape == (1, 576, 1024)
    assert encoded.q.shape == encoded.k.shape == (1, 577, 16, 64)
    again = encoder.encode(picture.to_tensor(photo, 336))
    for name in ("features", "q", "k"):
        tensor = getattr(encoded, name)
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()
        assert torch.equal(tensor, getattr(again, name))


def test_flat_picture_has_equal_patches():
    flat = encoder.encode(torch.full((3, 336, 336), 0.3))
    assert compare.evaluate(flat, 8)[0].coverage == pytest.approx(1)
    assert cls_scores(flat.q, flat.k).std() < 1e-6


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


def test_pruned_patches_are_dim(photo):
    kept = torch.tensor([0, 30, 300, 575])
    pixels = picture.panel_pixels(photo, 24, kept)
    bright = picture.panel_pixels(photo, 24, torch.arange(576))
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


def test_file_name_is_drawn_as_it_is(photo):
    # Not as mathematics, not as a missing letter's warning.
    png = picture.draw(photo, 24, ["$a_b$ \u4e00", "x^2$"], [])
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


@pytest.mark.parametrize("module", ["matplotlib", "PIL"])
def test_missing_extra(capsys, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert f"needs {module}: pip install vispruner_kernels[demo]" in refused(capsys)


def test_missing_transformers(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    err = refused(capsys, "--model", tmp_path, "--out", tmp_path / "x.png")
    assert "pip install vispruner_kernels[transformers]" in err


def test_missing_model_folder(capsys, tmp_path):
    err = refused(capsys, "--model", tmp_path / "none", "--out", tmp_path / "x.png")
    assert "there is no folder" in err


# A CLIP tower


@pytest.fixture
def tower(tmp_path):
    """A CLIP vision tower of random weights, 4 x 4 patches, three layers, and its folder."""
    transformers = pytest.importorskip("transformers")
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
