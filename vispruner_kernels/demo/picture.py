"""Photographs in, one picture out. Pillow, NumPy and matplotlib are imported when needed."""

from __future__ import annotations

import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

# The bundled picture, with questions and the boxes of its things beside it in a .json.
SAMPLE = Path(__file__).parent / "tiny_vlm" / "sample.png"

# Okabe and Ito's colours, told apart with any colour vision, and white for the control.
IMPORTANT = "#E69F00"
DIVERSE = "#56B4E9"
CHANCE = "#FFFFFF"

COLUMNS, ROWS = 3, 2
# All in pixels of the picture; 456 is 24 patches of 19 pixels.
PANEL, GAP, HEADER, CAPTION, FOOTER = 456, 18, 154, 74, 82
WIDTH = COLUMNS * PANEL + (COLUMNS + 1) * GAP
HEIGHT = HEADER + ROWS * (CAPTION + PANEL) + FOOTER
_DPI = 120
_INK, _QUIET = "#1A1A1A", "#5A5A5A"
# Before an answer that is right, wrong, or who knows; the colours are those two scholars' green and
# red, darker for white paper.
_SIGNS = {True: ("\u2713 ", "#007A5A"), False: ("\u2717 ", "#B84A00"), None: ("", _INK)}

# A square of twice as many pixels or more is made smaller as it is read.
_SIDE = 1024
# What reading a picture may add to the memory of the process, in bytes.
_MEMORY = 180_000_000
# What decoders take for a pixel beside Pillow's own image, in bytes: measured and rounded up.
_DECODER_BYTES = {"AVIF": 9, "WEBP": 13, "JPEG2000": 21}


class InputError(Exception):
    """Something the caller can mend; its text is one line for them."""


@dataclass(frozen=True)
class Panel:
    """One system's panel.

    Attributes:
        title: the name of the system.
        caption: what it kept, in a few words.
        groups: outline colour and token indices, in raster order; all other tokens are pruned.
        note: words across the middle, where there is nothing to show.
        answer: what the VLM says when it sees the tokens kept, where it was asked.
        right: whether that is true, where that is known.
    """

    title: str
    caption: str
    groups: Sequence[tuple[str, Tensor]]
    note: str = ""
    answer: str | None = None
    right: bool | None = None


def sample_answers() -> dict[str, str]:
    """The questions about the bundled picture, and their answers."""
    facts = json.loads(SAMPLE.with_suffix(".json").read_text())
    return {asked["question"]: asked["answer"] for asked in facts["questions"]}


def sample_photo() -> Path:
    """A photograph that matplotlib ships, for a try with one."""
    from matplotlib import cbook

    return Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


def load_photo(path: Path) -> Image:
    """Read a picture of any mode, upright, as RGB, cropped to the square in its middle.

    A square of 2048 pixels or more comes back smaller, 1024 to 2047 pixels wide. A process that
    reads one grows by some 180 MB at most; a picture that needs more is refused.
    """
    from PIL import Image, UnidentifiedImageError

    if os.path.isdir(path):
        raise InputError(f"{path} is a directory, not an image")
    try:
        with warnings.catch_warnings(), open(path, "rb") as file, _at_most(_MEMORY) as shrink:
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Of a file without a name Pillow maps no pixels, which would count as memory.
            with Image.open(file) as opened:
                shrink(_check_memory(opened, path, os.fstat(file.fileno()).st_size))
                return _read_square(opened)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"no such image: {path}") from None
    except UnidentifiedImageError:
        raise InputError(f"{path} is not an image that Pillow can read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path} is too large, save it smaller: {error}") from None
    except MemoryError:
        raise InputError(
            f"{path} is too large, save it smaller: to read it takes more than the "
            f"{_MEMORY // 10**6} MB of memory that the demo allows"
        ) from None
    # Decoders of broken files raise what they like.
    except Exception as error:
        raise InputError(
            f"cannot read the image {path}: {error} (it is broken, or to read it takes more than "
            f"the {_MEMORY // 10**6} MB of memory that the demo allows)"
        ) from None


@contextmanager
def _at_most(size: int) -> Iterator[Callable[[int], None]]:
    """Let the data of this process grow by `size` bytes at most: then allocations fail.

    Yields a function that takes some of them away again. Linux alone keeps to such a limit, so
    `_check_memory` refuses what it can foresee.
    """
    try:
        import resource

        data = re.search(r"^VmData:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except (ImportError, OSError):
        data = None
    if not data:
        yield lambda taken: None
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = int(data[1]) * 1024 + size
    if soft != resource.RLIM_INFINITY:
        allowed = min(allowed, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))
    try:
        yield lambda taken: resource.setrlimit(resource.RLIMIT_DATA, (allowed - taken, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _check_memory(opened: Any, path: Path, size: int) -> int:
    """Refuse a picture that takes too much memory; a JPEG is decoded smaller where that helps.

    Returns:
        Bytes of the file that its decoder maps into memory.
    """
    width, height = opened.size
    opened.draft(None, (_SIDE, _SIDE))
    # libtiff maps the file. Pillow has 4 bytes for a pixel, whatever its mode, or fewer.
    mapped = size if any(tile[0] == "libtiff" for tile in opened.tile) else 0
    per_pixel = _DECODER_BYTES.get(opened.format, 1)
    if sampling := [(h, v) for _, h, v, _ in getattr(opened, "layer", ())]:
        # A JPEG of several scans: two bytes for each coefficient, whatever size it is decoded to.
        largest = max(h for h, _ in sampling) * max(v for _, v in sampling)
        per_pixel = 2 * sum(h * v for h, v in sampling) / max(largest, 1)
    need = mapped + per_pixel * width * height + 4 * opened.width * opened.height
    if need > _MEMORY:
        raise InputError(
            f"{path} is too large, save it smaller: to read its {width} x {height} pixels takes "
            f"about {need / 1e6:.0f} MB of memory, and the demo allows {_MEMORY // 10**6}"
        )
    return mapped


def _read_square(opened: Any) -> Image:
    """The square in the middle, a band of rows at a time: whole copies are what takes memory."""
    from PIL import Image

    opened.load()
    orientation = opened.getexif().get(0x0112, 1)
    factor = max(1, min(opened.size) // _SIDE)
    side = min(opened.size) // factor * factor
    # Where the sides differ by an odd number, the middle is rounded as if turned before.
    left = (opened.width - side + (orientation in (2, 3, 7, 8))) // 2
    top = (opened.height - side + (orientation in (3, 4, 6, 7))) // 2
    levels = _levels(opened) if opened.mode[0] in "IF" else (0.0, 0.0)
    photo = Image.new("RGB", (side // factor,) * 2)
    for start, stop in _bands(side, side, factor):
        band = opened.crop((left, top + start, left + side, top + stop))
        photo.paste(_to_rgb(band, *levels).reduce(factor), (0, start // factor))
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return photo if turn is None else photo.transpose(turn)


def _bands(width: int, height: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """First and last + 1 row of bands of some million pixels, each of a multiple of rows."""
    rows = max(1, 2**20 // (width * multiple)) * multiple
    return ((start, min(start + rows, height)) for start in range(0, height, rows))


def _values(photo: Image) -> np.ndarray:
    import numpy as np

    return np.nan_to_num(np.asarray(photo, dtype=np.float64), posinf=0, neginf=0)


def _levels(photo: Image) -> tuple[float, float]:
    """What is black and what is white in a picture of 16 bits or floats."""
    bands = (
        _values(photo.crop((0, start, photo.width, stop)))
        for start, stop in _bands(photo.width, photo.height)
    )
    lows, highs = zip(*((band.min(), band.max()) for band in bands), strict=True)
    low, high = min(*lows, 0.0), max(highs)
    if photo.mode != "F":
        high = max(high, 255.0) if high <= 255 else max(high, 65535.0)
    return low, high


def _to_rgb(photo: Image, low: float, high: float) -> Image:
    import numpy as np
    from PIL import Image

    if photo.mode[0] in "IF":
        # Pillow would clip at 255.
        scaled = (_values(photo) - low) * (255 / max(high - low, 1e-12))
        return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")
    if photo.has_transparency_data:
        rgba = photo.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return photo.convert("RGB")


def to_tensor(photo: Image, size: int) -> Tensor:
    """`[3, size, size]` float32 between 0 and 1, resized as CLIP does it (bicubic)."""
    import numpy as np
    from PIL import Image

    resized = np.array(photo.resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(resized).permute(2, 0, 1) / 255


def panel_pixels(photo: Image, side: int, kept: Tensor) -> np.ndarray:
    """`[h, w, 3]` uint8: the photograph with every patch that is not in `kept` dark and grey."""
    import numpy as np
    from PIL import Image

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
    photo: Image, side: int, heading: Sequence[str], question: str, panels: Sequence[Panel]
) -> bytes:
    """Draw up to six panels, whatever the user's matplotlib settings.

    Args:
        photo: the square photograph.
        side: patches along one side.
        heading: the large line at the top, and small ones under it, three at most in all.
        question: a line between those, or nothing.
        panels: the first shows the photograph as it is, the others what the systems kept.

    Returns:
        A PNG of `WIDTH` x `HEIGHT` pixels.
    """
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        # A file name may hold letters that the font lacks.
        warnings.simplefilter("ignore")
        return _draw(photo, side, heading, question, panels)


def _draw(
    photo: Image, side: int, heading: Sequence[str], question: str, panels: Sequence[Panel]
) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / _DPI, HEIGHT / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def write(x: float, y: float, words: str, size: float, **style: Any) -> None:
        figure.text(x / WIDTH, 1 - y / HEIGHT, words, fontsize=size, parse_math=False, **style)

    write(GAP, 45, heading[0], 19, weight="bold", color=_INK)
    # Long ones are written smaller, here and below, so that they end in time.
    write(GAP, 82, question, 14 * min(1, 80 / max(len(question), 1)), color=_INK)
    for line, words in enumerate(heading[1:]):
        write(GAP, (111 if question else 80) + 25 * line, words, 11.5, color=_QUIET)
    for index, panel in enumerate(panels):
        left, top = panel_origin(index)
        write(left, top - 38, panel.title, 14, weight="bold", color=_INK)
        write(left, top - 12, panel.caption, 11.5, color=_QUIET)
        if panel.answer is not None:
            sign, colour = _SIGNS[panel.right]
            words = sign + panel.answer
            style = {"ha": "right", "weight": "bold", "color": colour}
            write(left + PANEL, top - 38, words, 14 * min(1, 18 / len(words)), **style)
        box = (left / WIDTH, 1 - (top + PANEL) / HEIGHT, PANEL / WIDTH, PANEL / HEIGHT)
        axes = figure.add_axes(box)
        axes.set_axis_off()
        axes.set_xlim(0, side)
        axes.set_ylim(side, 0)
        groups = panel.groups if index else [("", torch.arange(side * side))]
        kept = torch.cat([tokens for _, tokens in groups]) if groups else torch.arange(0)
        pixels = panel_pixels(photo, side, kept)
        axes.imshow(pixels, extent=(0, side, side, 0), interpolation="antialiased")
        if not index:
            lines = range(1, side)
            axes.vlines(lines, 0, side, color="white", linewidth=0.5, alpha=0.3)
            axes.hlines(lines, 0, side, color="white", linewidth=0.5, alpha=0.3)
        for colour, tokens in panel.groups:
            axes.add_collection(_outlines(tokens, side, colour))
        if panel.note:
            half = side / 2
            axes.text(half, half, panel.note, ha="center", va="center", color="white", fontsize=12)
    _legend(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white")
    return buffer.getvalue()


def _outlines(tokens: Tensor, side: int, colour: str) -> Any:
    """A thin frame just inside every patch, so that neighbours keep frames of their own."""
    from matplotlib.collections import PolyCollection

    inset = 0.06
    corners = [(inset, inset), (1 - inset, inset), (1 - inset, 1 - inset), (inset, 1 - inset)]
    squares = [
        [(token % side + x, token // side + y) for x, y in corners] for token in tokens.tolist()
    ]
    width = min(1.2, 29 / side)
    return PolyCollection(squares, facecolors="none", edgecolors=colour, linewidths=width)


def _legend(figure: Any) -> None:
    """On a dark strip, like the panels, so that every outline shows."""
    from matplotlib.patches import Patch, Rectangle

    height = FOOTER - 2 * GAP
    corner, width = (GAP / WIDTH, GAP / HEIGHT), 1 - 2 * GAP / WIDTH
    strip = Rectangle(
        corner, width, height / HEIGHT, transform=figure.transFigure, facecolor="#1C1C1C"
    )
    figure.add_artist(strip)
    entries = [
        ("#8A8A8A", IMPORTANT, "kept for its attention"),
        ("#8A8A8A", DIVERSE, "kept for diversity: duplicates removed"),
        ("#8A8A8A", CHANCE, "kept by chance (control)"),
        ("#3A3A3A", "#3A3A3A", "pruned"),
    ]
    handles = [
        Patch(facecolor=face, edgecolor=edge, linewidth=2, label=label)
        for face, edge, label in entries
    ]
    legend = figure.legend(
        handles=handles,
        loc="center",
        ncols=len(handles),
        frameon=False,
        fontsize=12,
        labelcolor="white",
        handlelength=1.2,
        handleheight=1.2,
        columnspacing=2.4,
        bbox_to_anchor=(0.5, (GAP + height / 2) / HEIGHT),
    )
    legend.set_zorder(strip.get_zorder() + 1)
