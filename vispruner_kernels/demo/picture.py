"""Read a photograph, and draw the tokens that each method keeps."""

from __future__ import annotations

import io
import json
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vispruner_kernels.demo import InputError

# The bundled picture; the .json beside it has questions and the boxes of its things.
SAMPLE = Path(__file__).parent / "tiny_vlm" / "sample.png"

# Okabe and Ito's colours, distinct for any colour vision, and white for the control.
IMPORTANT, DIVERSE, CHANCE = "#E69F00", "#56B4E9", "#FFFFFF"

COLUMNS, ROWS = 3, 2
# All in pixels of the picture; 456 is 24 patches of 19 pixels.
PANEL, GAP, HEADER, CAPTION, FOOTER = 456, 18, 154, 74, 82
WIDTH = COLUMNS * PANEL + (COLUMNS + 1) * GAP
HEIGHT = HEADER + ROWS * (CAPTION + PANEL) + FOOTER
_DPI = 120
_INK, _QUIET, _STRIP = "#1A1A1A", "#5A5A5A", "#1C1C1C"
# The sign before an answer that is right, wrong or not known to be either, and its colour: Okabe
# and Ito's green and red, darker for white paper.
_SIGNS = {True: ("\u2713 ", "#007A5A"), False: ("\u2717 ", "#B84A00"), None: ("", _INK)}

# A larger photograph comes back with sides of this length.
_SIDE = 1024
# Largest number of pixels, so that reading adds less than 500 MB of memory (measured: progressive
# CMYK JPEG 455, lossless WebP 431, JPEG 2000 383, PNG with alpha 262).
_PIXELS, _JPEG_PIXELS = 20_000_000, 55_000_000


class Panel(NamedTuple):
    """One panel, with two lines and the answer above it.

    `groups` are outline colours with token indices in raster order; all other tokens are pruned.
    """

    title: str
    caption: str
    groups: Sequence[tuple[str, Tensor]]
    answer: str = ""
    right: bool | None = None


def sample_answers() -> dict[str, str]:
    """The questions about the bundled picture, and their answers."""
    facts = json.loads(SAMPLE.with_suffix(".json").read_text())
    return {asked["question"]: asked["answer"] for asked in facts["questions"]}


def load_photo(path: Path) -> Image.Image:
    """Read a picture of 8 bits per channel: upright, RGB, cropped to its central square."""
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # If Pillow gets a file name, it maps a raw TIFF into memory, and then rotates it
            # wrongly.
            with Image.open(file) as opened:
                return _read(opened, path)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"no such image: {path}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory, not an image") from None
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image that Pillow can read") from None
    # Decoders of broken files raise many types.
    except Exception as error:
        raise InputError(f"cannot read the image {path}: {str(error) or repr(error)}") from None


def _read(opened: Any, path: Path) -> Image.Image:
    if opened.mode[0] in "IF":
        raise InputError(
            f"{path} has 16 or 32 bits per channel (mode {opened.mode}), save it with 8"
        )
    width, height = opened.size
    # Decode a large JPEG at a smaller size.
    opened.draft(None, (_SIDE, _SIDE))
    if opened.width * opened.height > _PIXELS or width * height > _JPEG_PIXELS:
        raise InputError(
            f"{path} is too large, save it smaller: it has {width} x {height} pixels, and the demo "
            f"reads {_PIXELS // 10**6} million (of a JPEG {_JPEG_PIXELS // 10**6} million)"
        )
    photo = opened.convert("RGBA" if opened.has_transparency_data else "RGB")
    opened.close()
    side = min(_SIDE, *photo.size)
    photo = ImageOps.fit(ImageOps.exif_transpose(photo), (side, side))
    if photo.mode == "RGBA":
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
    return photo.convert("RGB")


def to_tensor(photo: Image.Image, size: int) -> Tensor:
    """`[3, size, size]` float32 between 0 and 1, resized as CLIP does it (bicubic)."""
    resized = np.array(photo.resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(resized).permute(2, 0, 1) / 255


def panel_pixels(photo: Image.Image, side: int, kept: Tensor) -> np.ndarray:
    """`[h, w, 3]` uint8: the photograph with every patch that is not in `kept` dark and grey."""
    cell = max(2, round(PANEL / side))
    bright = np.array(photo.resize((side * cell,) * 2, Image.Resampling.LANCZOS), dtype=np.float64)
    grey = bright @ [0.299, 0.587, 0.114]
    dark = 0.30 * grey[..., None] + 0.06 * bright + 10
    mask = np.zeros(side * side, dtype=bool)
    mask[kept.tolist()] = True
    mask = mask.reshape(side, side).repeat(cell, 0).repeat(cell, 1)
    return np.where(mask[..., None], bright, np.minimum(dark, bright)).round().astype(np.uint8)


def panel_origin(index: int) -> tuple[int, int]:
    """Left and top pixel of panel `index` (0 is the photograph) in the picture."""
    row, column = divmod(index, COLUMNS)
    return GAP + column * (PANEL + GAP), HEADER + CAPTION + row * (CAPTION + PANEL)


def draw(
    photo: Image.Image, side: int, heading: Sequence[str], question: str, panels: Sequence[Panel]
) -> bytes:
    """Draw up to six panels in a PNG of `WIDTH` x `HEIGHT` pixels.

    The heading is a large line and up to two small ones, with the question between them. The user's
    matplotlib settings have no effect.
    """
    with matplotlib.style.context("default"), warnings.catch_warnings():
        # A file name may hold letters that the font lacks.
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(WIDTH / _DPI, HEIGHT / _DPI), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        _write(figure, GAP, 45, heading[0], fontsize=19, weight="bold")
        _write(figure, GAP, 82, textwrap.shorten(question, 120, placeholder="..."), fontsize=14)
        for line, words in enumerate(heading[1:]):
            y = (111 if question else 80) + 25 * line
            _write(figure, GAP, y, words, fontsize=11.5, color=_QUIET)
        for index, panel in enumerate(panels):
            _draw_panel(figure, photo, side, index, panel)
        _draw_legend(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white")
    return buffer.getvalue()


def _write(figure: Any, x: float, y: float, words: str, **style: Any) -> None:
    """Write a line of text; `x` and `y` are pixels from the left and the top."""
    figure.text(x / WIDTH, 1 - y / HEIGHT, words, parse_math=False, **{"color": _INK} | style)


def _draw_panel(figure: Any, photo: Image.Image, side: int, index: int, panel: Panel) -> None:
    left, top = panel_origin(index)
    _write(figure, left, top - 38, panel.title, fontsize=14, weight="bold")
    _write(figure, left, top - 12, panel.caption, fontsize=11.5, color=_QUIET)
    sign, colour = _SIGNS[panel.right]
    answer = sign + textwrap.shorten(panel.answer, 16, placeholder="...")
    style = {"fontsize": 14, "weight": "bold", "color": colour}
    _write(figure, left + PANEL, top - 38, answer, ha="right", **style)

    box = (left / WIDTH, 1 - (top + PANEL) / HEIGHT, PANEL / WIDTH, PANEL / HEIGHT)
    axes = figure.add_axes(box, xlim=(0, side), ylim=(side, 0))
    axes.set_axis_off()
    kept = torch.cat([tokens for _, tokens in panel.groups] or [torch.arange(side * side)])
    axes.imshow(panel_pixels(photo, side, kept), extent=(0, side, side, 0))
    if not panel.groups:
        style = {"color": "white", "linewidth": 0.5, "alpha": 0.3}
        axes.vlines(range(1, side), 0, side, **style)
        axes.hlines(range(1, side), 0, side, **style)
    # A frame just inside every patch, so that the frames of neighbours do not overlap.
    corners = np.array([(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)])
    for colour, tokens in panel.groups:
        patches = np.stack([tokens % side, tokens // side], 1)[:, None] + corners
        width = min(1.2, 29 / side)
        axes.add_collection(
            PolyCollection(patches, facecolors="none", edgecolors=colour, linewidths=width)
        )


def _draw_legend(figure: Any) -> None:
    """Draw the legend on a dark strip, like the panels, so that every outline is visible."""
    corner, height = (GAP / WIDTH, GAP / HEIGHT), (FOOTER - 2 * GAP) / HEIGHT
    strip = {"transform": figure.transFigure, "facecolor": _STRIP, "zorder": 0}
    figure.add_artist(Rectangle(corner, 1 - 2 * corner[0], height, **strip))
    entries = {
        "kept for its attention": ("#8A8A8A", IMPORTANT),
        "kept for diversity: duplicates removed": ("#8A8A8A", DIVERSE),
        "kept by chance (control)": ("#8A8A8A", CHANCE),
        "pruned": ("#3A3A3A", "#3A3A3A"),
    }
    figure.legend(
        handles=[
            Patch(facecolor=face, edgecolor=edge, linewidth=2, label=label)
            for label, (face, edge) in entries.items()
        ],
        loc="center",
        ncols=len(entries),
        frameon=False,
        fontsize=12,
        labelcolor="white",
        handlelength=1.2,
        handleheight=1.2,
        columnspacing=2.4,
        bbox_to_anchor=(0.5, corner[1] + height / 2),
    )
