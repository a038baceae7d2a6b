"""The demo's pictures: reading a photograph, its limit of memory, and drawing the panels."""

from __future__ import annotations

import io
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

from vispruner_kernels.demo import InputError, picture  # noqa: E402


@pytest.fixture(scope="module")
def sample():
    return picture.load_photo(picture.SAMPLE)


# Reading.


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_reads_every_mode_of_8_bits(tmp_path, mode):
    grey = np.linspace(0, 255, 120 * 120).reshape(120, 120).astype(np.uint8)
    image = Image.fromarray(grey).convert("RGB").convert(mode)
    assert image.mode == mode
    image.save(tmp_path / "image.tif")
    read = picture.load_photo(tmp_path / "image.tif")
    assert read.mode == "RGB"
    difference = np.abs(np.asarray(read.convert("L")).astype(int) - grey)
    # Black and white has noise for shades, and a palette has 256 colours.
    assert difference.mean() < {"1": 120, "P": 20}.get(mode, 2)


@pytest.mark.parametrize(("dtype", "mode"), [("uint16", "I;16"), ("int32", "I"), ("float32", "F")])
def test_refuses_more_than_8_bits(tmp_path, dtype, mode):
    path = tmp_path / "image.tif"
    Image.fromarray(np.ones((8, 8), dtype)).save(path)
    expected = rf"has 16 or 32 bits per channel \(mode {mode}\), save it with 8"
    with pytest.raises(InputError, match=expected):
        picture.load_photo(path)


def test_transparent_pixels_are_white(tmp_path):
    path = tmp_path / "clear.png"
    Image.new("RGBA", (40, 40), (200, 0, 0, 0)).save(path)
    assert np.asarray(picture.load_photo(path)).min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["image.png", "raw.tif", "lzw.tif"])
@pytest.mark.parametrize("size", [(60, 40), (40, 60)])
def test_turns_by_exif_and_crops_the_middle(tmp_path, orientation, name, size):
    pixels = np.arange(size[0] * size[1], dtype=np.uint16).reshape(size[1], size[0]) * 27
    image = Image.fromarray((pixels >> 8).astype(np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    compression = {"compression": "tiff_lzw"} if name == "lzw.tif" else {}
    image.save(tmp_path / name, exif=exif, **compression)
    upright = np.asarray(image)
    if orientation > 4:
        upright = upright.T
    # Across the columns and the rows of the upright picture.
    upright = upright[:: -1 if orientation in (3, 4, 7, 8) else 1]
    upright = upright[:, :: -1 if orientation in (2, 3, 6, 7) else 1]
    left, top = ((length - 40) // 2 for length in upright.T.shape)
    want = upright[top : top + 40, left : left + 40]
    assert (np.asarray(picture.load_photo(tmp_path / name)) == want[..., None]).all()


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_large_pictures_come_back_with_1024_pixels_a_side(tmp_path, mode):
    # Smooth, so that every filter gives about the same small picture.
    small = np.add.outer(np.arange(1024), np.arange(1024)) // 8
    large = Image.fromarray(small.repeat(3, 0).repeat(3, 1).astype(np.uint8)).convert(mode)
    wide = Image.new(mode, (3072 + 200, 3072))
    if mode == "P":
        wide.putpalette(large.getpalette())
    wide.paste(large, (100, 0))
    wide.save(tmp_path / "image.tif")
    read = np.asarray(picture.load_photo(tmp_path / "image.tif")).astype(int)
    assert read.shape == (1024, 1024, 3)
    inside = np.s_[2:-2, 2:-2]
    assert np.abs(read - small[..., None])[inside].max() <= 2


READ = """
import os, re, sys
from pathlib import Path
from vispruner_kernels.demo import InputError, picture
def peak():
    # ru_maxrss begins with the size of the process that started this one.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
for name in sys.argv[1:]:
    # A process of its own for every picture.
    if os.fork():
        assert os.wait()[1] == 0
        continue
    start = peak()
    try:
        print(picture.load_photo(Path(name)).size)
    except InputError as error:
        print(error)
    print(peak() - start, flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_a_picture_adds_at_most_500_megabytes(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    wanted = {
        # Read, and as large as possible.
        "turned.png": r"\(1024, 1024\)",
        "strip.tif": r"\(1024, 1024\)",
        "lossless.webp": r"\(1024, 1024\)",
        "scans.jpg": r"\(1024, 1024\)",
        # Refused.
        "pixels.png": r".*pixels.png is too large, save it smaller: it has 5001 x 4000 pixels, .*",
        "large.jpg": r".*large.jpg is too large, save it smaller: it has 9000 x 6112 pixels, .*",
        "bomb.png": r"cannot read the image .*bomb.png: Image size \(144000000 pixels\) .*",
    }
    Image.new("RGBA", (5000, 4000)).save(tmp_path / "turned.png", exif=turned)
    # libtiff decodes a strip as a whole.
    Image.new("RGBA", (5000, 4000)).save(
        tmp_path / "strip.tif", compression="tiff_lzw", strip_size=2**30, exif=turned
    )
    Image.new("RGBA", (5000, 4000)).save(tmp_path / "lossless.webp", lossless=True, method=0)
    # The decoder holds all coefficients of a JPEG of several scans.
    Image.new("CMYK", (10000, 5500)).save(tmp_path / "scans.jpg", progressive=True)
    Image.new("L", (5001, 4000)).save(tmp_path / "pixels.png")
    Image.new("L", (9000, 6112)).save(tmp_path / "large.jpg")
    Image.new("L", (12000, 12000)).save(tmp_path / "bomb.png")
    folder = str(Path(picture.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", READ, *(str(tmp_path / name) for name in wanted)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([folder, *sys.path])},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name, got, growth in zip(wanted, lines[::2], lines[1::2], strict=True):
        print(f"{name}: {int(growth) / 1e6:.0f} MB")
        assert re.fullmatch(wanted[name], got), got
        assert int(growth) < (500e6 if got.startswith("(") else 50e6), name


# Drawing.


def patches(pixels) -> np.ndarray:
    """Mean brightness of each of the 24 x 24 patches of a panel, without the frames."""
    cell = pixels.shape[0] // 24
    inside = pixels.reshape(24, cell, 24, cell, 3)[:, 4:-4, :, 4:-4]
    return inside.astype(float).mean((1, 3, 4)).flatten()


def drawn(photo, panels, heading=("heading",), question="") -> np.ndarray:
    """The pixels that `draw` makes, int64."""
    png = picture.draw(photo, 24, heading, question, panels)
    with Image.open(io.BytesIO(png)) as opened:
        assert (opened.format, opened.size) == ("PNG", (picture.WIDTH, picture.HEIGHT))
        return np.array(opened.convert("RGB")).astype(int)


def part(pixels, index) -> np.ndarray:
    """The pixels of panel `index`."""
    left, top = picture.panel_origin(index)
    return pixels[top : top + picture.PANEL, left : left + picture.PANEL]


def above(pixels, index) -> np.ndarray:
    """The pixels between panel `index` and what is above it."""
    left, top = picture.panel_origin(index)
    return pixels[top - picture.CAPTION : top, left : left + picture.PANEL]


def test_pruned_patches_are_dim_and_grey(sample):
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
    spread = np.ptp(pixels.astype(int), axis=-1)
    assert spread[:19, 19:38].max() <= 0.1 * 255


def test_panels_show_the_kept_tokens_in_frames_of_their_group(sample):
    groups = [
        (picture.IMPORTANT, torch.tensor([0, 1, 30, 575])),
        (picture.DIVERSE, torch.tensor([23, 100, 333])),
        (picture.CHANCE, torch.tensor([], dtype=torch.int64)),
    ]
    kept = np.isin(np.arange(576), torch.cat([tokens for _, tokens in groups]))
    panels = [picture.Panel("Picture", "", [])] + 5 * [picture.Panel("Method", "", groups)]
    pixels = drawn(sample, panels)
    before = patches(part(pixels, 0))
    lit = before > 40
    cell = picture.PANEL // 24
    for index in range(1, 6):
        panel = part(pixels, index)
        ratio = patches(panel)[lit] / before[lit]
        assert (ratio[kept[lit]] > 0.85).all()
        assert (ratio[~kept[lit]] < 0.75).all()
        for colour, tokens in groups:
            want = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            for token in tokens.tolist():
                y, x = token // 24 * cell, token % 24 * cell
                edge = panel[y : y + cell, x : x + 4].reshape(-1, 3)
                assert np.abs(edge - want).sum(-1).min() < 60


def test_answers_have_a_colour_and_a_sign_for_right_and_wrong(sample):
    # Left of this many pixels is the longest title.
    title, answers = 165, {}
    for right in (True, False, None):
        pixels = drawn(sample, [picture.Panel("FoPru rank", "64 tokens", [], "3", right)])
        answers[right] = above(pixels, 0)[:, title:]
        red, green = answers[right][..., 0], answers[right][..., 1]
        assert (green > red + 60).any() == (right is True)
        assert (red > green + 60).any() == (right is False)
    ink = {right: pixels.min(-1) < 200 for right, pixels in answers.items()}
    assert (ink[True] != ink[False]).any()
    assert ink[True].sum() > ink[None].sum() < ink[False].sum()


@pytest.mark.parametrize("answer", ["bottom right", " ".join(["triangle"] * 4)])
def test_answers_do_not_cover_the_title_or_the_caption(sample, answer):
    without, with_answer = (
        drawn(sample, 6 * [picture.Panel("FoPru rank", "64 tokens", [], words, False)])
        for words in ("", answer)
    )
    changed = (without != with_answer).any(-1)
    for index in range(6):
        left, top = picture.panel_origin(index)
        area = changed[top - picture.CAPTION : top, left + 165 : left + picture.PANEL]
        rows, columns = area.nonzero()
        assert 5 < rows.min() < rows.max() < picture.CAPTION - 30
        assert columns.min() > 10
        area[:] = False
    # Nothing changes outside these areas.
    assert not changed.any()


def test_a_long_question_ends_before_the_margin(sample):
    question = "question: " + "what colour is the triangle ? " * 9
    changed = (drawn(sample, [], question="") != drawn(sample, [], question=question)).any(-1)
    rows, columns = changed.nonzero()
    assert columns.max() < picture.WIDTH - picture.GAP
    assert rows.max() < picture.HEADER


def test_dollars_and_missing_letters_raise_nothing(sample):
    # Neither formulas nor letters that the font lacks raise an error or a warning.
    drawn(sample, [], heading=["$a_b$ \u4e00", "x^2$"], question="$")
