"""The task: composed pictures, and questions whose answers are known.

A picture is a part of a photograph with things on it, on a loose grid of 4 x 4 places: a number of
two handwritten digits on a plate, two handwritten digits in coloured frames, and five to seven
drawn shapes. The two splits share no digit, no photograph and no set of occupied places.
"""

from __future__ import annotations

import functools
import gzip
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIZE, PATCH, PLACES = 192, 8, 4
SIDE = SIZE // PATCH
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 85, 220),
    "yellow": (240, 210, 40),
    "purple": (160, 60, 190),
    "white": (245, 245, 245),
}
KINDS = (*SHAPES, "frame", "number")
# The share of each kind on a sheet, a picture that trains the vision tower.
SHEET = (0.08, 0.08, 0.08, 0.08, 0.08, 0.27, 0.33)
TYPES = ("number", "frame", "colour", "place", "relation", "count")
# The types of the questions about one test picture, in this order, and the largest number of
# questions of each type about one training picture.
ASKED = ("number", "frame", "colour", "place", "relation", "relation", "count", "count")
TRAINED = {"number": 1, "frame": 2, "colour": 3, "place": 5, "relation": 8, "count": 5}

# Photographs by split and by the package that has them. Photographs of the same scene are in the
# same split.
PHOTOGRAPHS = {
    "train": {
        "sklearn": ("datasets/images/china.jpg",),
        "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
        "skimage": tuple(
            f"data/{name}"
            for name in (
                "astronaut.png",
                "camera.png",
                "cell.png",
                "clock_motion.png",
                "coins.png",
                "gravel.png",
                "hubble_deep_field.jpg",
                "ihc.png",
                "moon.png",
                "motorcycle_left.png",
                "page.png",
                "retina.jpg",
            )
        ),
    },
    "test": {
        "sklearn": ("datasets/images/flower.jpg",),
        "skimage": tuple(
            f"data/{name}"
            for name in ("brick.png", "chelsea.png", "coffee.png", "grass.png", "rocket.jpg")
        ),
    },
}
# The number of scikit-learn's digits for training, the first ones. The others are for tests.
TRAIN_DIGITS = 1297


class Question(NamedTuple):
    """A question and its answer.

    Attributes:
        about: the indices of the scene's things that the question is about.
        target: the index of the thing that is the answer to a relation, else -1.
    """

    type: str
    text: str
    answer: str
    about: tuple[int, ...] = ()
    target: int = -1


class Thing(NamedTuple):
    """A thing in a picture, with its box in pixels and its place on the grid."""

    kind: str
    colour: str
    digits: tuple[int, ...]
    left: int
    top: int
    right: int
    bottom: int
    place: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.colour} frame" if self.kind == "frame" else self.kind


class Scene(NamedTuple):
    """`pixels` `[192, 192, 3]` uint8, the things in it, and the questions about them."""

    pixels: np.ndarray
    things: list[Thing]
    questions: list[Question]


def scene(split: str, index: int, seed: int = 0) -> Scene:
    """Make a picture with questions: one for each of ASKED in tests, up to TRAINED in training.

    Args:
        split: "train" or "test".
        index: the number of the picture, from 0 without end.
        seed: every seed gives another endless set.
    """
    random = np.random.default_rng([seed, sorted(PHOTOGRAPHS).index(split), index])
    while True:
        wanted = _plan(random, split)
        every = _questions(wanted)
        if all(len(every[name]) >= ASKED.count(name) for name in TYPES):
            break
    asked = [name for name in TYPES for _ in range(TRAINED[name])] if split == "train" else ASKED
    questions = [_pick(every[name], random) for name in asked if every[name]]
    return _drawn(wanted, questions, random, split)


def sheet(index: int, seed: int = 0) -> Scene:
    """Make a picture to train the vision tower: 4 to 16 things, many with digits, no questions.

    The set of occupied places is one that belongs to the split "train".

    Args:
        index: the number of the sheet, from 0 without end.
        seed: every seed gives another endless set.
    """
    random = np.random.default_rng([seed, len(PHOTOGRAPHS), index])
    names = list(COLOURS)
    while True:
        taken = np.flatnonzero(random.random(PLACES**2) < random.uniform(0.4, 1))
        if len(taken) >= PLACES and not _for_test(taken):
            break
    things = []
    for cell in taken:
        kind = KINDS[random.choice(len(KINDS), p=SHEET)]
        written = {"frame": 1, "number": 2}.get(kind, 0)
        colour = "" if kind == "number" else names[random.integers(len(names))]
        digits = tuple(random.integers(0, 10, written).tolist())
        things.append(Thing(kind, colour, digits, 0, 0, 0, 0, divmod(int(cell), PLACES)))
    return _drawn(things, [], random, "train")


# The things in a picture, and the questions about them.


def _for_test(cells: np.ndarray) -> bool:
    """Whether this set of occupied places belongs to the split "test"; else it is in "train"."""
    return sum(1 << int(cell) for cell in cells) % 5 == 0


def _plan(random: np.random.Generator, split: str) -> list[Thing]:
    """Choose kinds, colours, digits and places. `_draw` chooses the boxes in pixels."""
    names = list(COLOURS)
    while True:
        shapes = int(random.integers(5, 8))
        cells = random.choice(PLACES**2, size=shapes + 3, replace=False)
        if _for_test(cells) == (split == "test"):
            break
    digits = iter(random.integers(0, 10, 4).tolist())
    frames = random.choice(len(names), 2, replace=False)
    # Some pictures have few kinds or few colours, others many, so that counts differ.
    kinds = random.choice(len(SHAPES), int(random.integers(2, len(SHAPES) + 1)), replace=False)
    colours = random.choice(len(names), int(random.integers(2, len(names) + 1)), replace=False)
    parts = [("number", "", (next(digits), next(digits)))]
    parts += [("frame", names[colour], (next(digits),)) for colour in frames]
    for _ in range(shapes):
        kind, colour = SHAPES[random.choice(kinds)], names[random.choice(colours)]
        parts.append((kind, colour, ()))
    return [
        Thing(*part, 0, 0, 0, 0, divmod(int(cell), PLACES))
        for part, cell in zip(parts, cells, strict=True)
    ]


def _questions(things: list[Thing]) -> dict[str, list[Question]]:
    """All possible questions by type."""
    names = [thing.name for thing in things]
    half = PLACES // 2
    at = {thing.place: i for i, thing in enumerate(things)}
    sides = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
    every: dict[str, list[Question]] = {name: [] for name in TYPES}

    def add(name: str, text: str, answer: str, about: Sequence[int], target: int = -1) -> None:
        every[name].append(Question(name, text, answer, tuple(about), target))

    for i, thing in enumerate(things):
        row, column = thing.place
        spelt = " ".join(map(str, thing.digits))
        if thing.kind == "number":
            add("number", "what is the number ?", spelt, [i])
        if thing.kind == "frame":
            add("frame", f"which digit is in the {thing.name} ?", spelt, [i])
        if names.count(thing.name) > 1:
            continue
        if thing.kind in SHAPES:
            add("colour", f"what colour is the {thing.name} ?", thing.colour, [i])
        add(
            "place", f"in which half is the {thing.name} ?", "bottom" if row >= half else "top", [i]
        )
        side = "right" if column >= half else "left"
        add("place", f"on which side is the {thing.name} ?", side, [i])
        for side, (down, right) in sides.items():
            other = at.get((row + down, column + right))
            if other is not None:
                text = f"what is {side} the {thing.name} ?"
                add("relation", text, things[other].kind, [i], other)
    shapes = [i for i, thing in enumerate(things) if thing.kind in SHAPES]
    for kind in SHAPES:
        counted = [i for i in shapes if things[i].kind == kind]
        add("count", f"how many {kind} shapes are there ?", str(len(counted)), counted)
    for colour in COLOURS:
        counted = [i for i in shapes if things[i].colour == colour]
        add("count", f"how many {colour} shapes are there ?", str(len(counted)), counted)
    return every


def _pick(questions: list[Question], random: np.random.Generator) -> Question:
    """Remove and return a question. Its answer is drawn first, so that all answers are equally
    likely."""
    answers = sorted({question.answer for question in questions})
    answer = answers[random.integers(len(answers))]
    found = [question for question in questions if question.answer == answer]
    picked = found[random.integers(len(found))]
    questions.remove(picked)
    return picked


# Drawing.


def _drawn(
    wanted: list[Thing], questions: list[Question], random: np.random.Generator, split: str
) -> Scene:
    pixels = _background(random, split)
    things = [_draw(pixels, thing, random, split) for thing in wanted]
    return Scene(pixels.round().clip(0, 255).astype(np.uint8), things, questions)


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images `[1797, 8, 8]` with values from 0 to 16, and the digit of each."""
    with gzip.open(_file("sklearn", "datasets/data/digits.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)


@functools.cache
def _digits_of(split: str, digit: int) -> np.ndarray:
    part = slice(None, TRAIN_DIGITS) if split == "train" else slice(TRAIN_DIGITS, None)
    images, labels = digits()
    return images[part][labels[part] == digit]


@functools.cache
def _photographs(split: str) -> list[Image.Image]:
    """The photographs of a split, with at most 400 pixels along the shorter side."""
    photographs = []
    for package, names in PHOTOGRAPHS[split].items():
        for name in names:
            with Image.open(_file(package, name)) as opened:
                photograph = opened.convert("RGB")
            scale = min(1.0, 400 / min(photograph.size))
            size = [round(scale * pixels) for pixels in photograph.size]
            photographs.append(photograph.resize(size, Image.Resampling.LANCZOS))
    return photographs


def _file(package: str, name: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pip = {"sklearn": "scikit-learn", "skimage": "scikit-image"}.get(package, package)
        raise ModuleNotFoundError(f"the pictures need {pip}: pip install {pip}", name=package)
    return Path(spec.submodule_search_locations[0]) / name


def _background(random: np.random.Generator, split: str) -> np.ndarray:
    photographs = _photographs(split)
    photograph = photographs[random.integers(len(photographs))]
    side = int(random.integers(min(photograph.size) // 3, min(photograph.size) + 1))
    left = int(random.integers(0, photograph.width - side + 1))
    top = int(random.integers(0, photograph.height - side + 1))
    box = (left, top, left + side, top + side)
    part = photograph.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(part, dtype=np.float32)
    if random.random() < 0.5:
        pixels = pixels[:, ::-1]
    # Change the brightness and lower the contrast.
    return pixels * np.float32(random.uniform(0.5, 1.0)) + np.float32(random.uniform(-30, 30))


def _draw(pixels: np.ndarray, thing: Thing, random: np.random.Generator, split: str) -> Thing:
    draw: Callable[..., np.ndarray] = {"frame": _frame, "number": _number}.get(thing.kind, _shape)
    colour = np.array(COLOURS.get(thing.colour, (0, 0, 0)), dtype=np.float32)
    colour = (colour + random.uniform(-20, 20, 3)).clip(0, 255)
    drawn = draw(thing, colour, random, split)
    height, width = drawn.shape[:2]
    cell = SIZE // PLACES
    top = thing.place[0] * cell + int(random.integers(0, cell - height + 1))
    left = thing.place[1] * cell + int(random.integers(0, cell - width + 1))
    under = pixels[top : top + height, left : left + width]
    under += drawn[..., 3:] * (drawn[..., :3] - under)
    return thing._replace(left=left, top=top, right=left + width, bottom=top + height)


def _shape(thing: Thing, colour: np.ndarray, random: np.random.Generator, _: str) -> np.ndarray:
    size, turn = int(random.integers(20, 37)), int(random.integers(-3, 4)) * 5
    mask = _mask(thing.kind, size, turn)
    return np.concatenate([np.broadcast_to(colour, (size, size, 3)), mask[..., None]], 2)


@functools.cache
def _mask(kind: str, size: int, turn: int) -> np.ndarray:
    """`[size, size]`: the share of each pixel that is inside the shape."""
    fine = 8
    image = Image.new("L", (size * fine, size * fine))
    pen = ImageDraw.Draw(image)
    turned = np.deg2rad(turn)

    def polygon(radii: list[float], angles: list[float]) -> None:
        corners = [
            (0.5 + r / 2 * np.sin(a + turned), 0.5 - r / 2 * np.cos(a + turned))
            for r, a in zip(radii, np.deg2rad(angles), strict=True)
        ]
        pen.polygon([(x * size * fine, y * size * fine) for x, y in corners], fill=255)

    if kind == "circle":
        pen.ellipse([fine, fine, (size - 1) * fine, (size - 1) * fine], fill=255)
    elif kind == "square":
        polygon([1.1] * 4, [45, 135, 225, 315])
    elif kind == "triangle":
        polygon([1] * 3, [0, 120, 240])
    elif kind == "star":
        polygon([1, 0.42] * 5, [36 * corner for corner in range(10)])
    else:
        polygon(
            [0.98, 0.98, 0.38] * 4, [side + x for side in (0, 90, 180, 270) for x in (-16, 16, 45)]
        )
    return np.asarray(image.reduce(fine), dtype=np.float32) / 255


def _ink(digit: int, size: int, random: np.random.Generator, split: str) -> np.ndarray:
    """A digit `[size, size]`, from 0 (paper) to 1 (ink). Training digits are stretched and slanted
    a little."""
    candidates = _digits_of(split, digit)
    small = Image.fromarray((candidates[random.integers(len(candidates))] / 16).astype(np.float32))
    ink = small.resize((size, size), Image.Resampling.BICUBIC)
    if split == "train":
        a, b, c, d = (np.eye(2) + random.uniform(-0.15, 0.15, (2, 2))).flatten().tolist()
        middle = size / 2
        moved = (a, b, middle - (a + b) * middle, c, d, middle - (c + d) * middle)
        affine, bicubic = Image.Transform.AFFINE, Image.Resampling.BICUBIC
        ink = ink.transform(ink.size, affine, moved, bicubic)
    return np.asarray(ink).clip(0, 1)


def _written(ink: np.ndarray, margin: int, random: np.random.Generator) -> np.ndarray:
    """Draw with dark ink on light paper, or with light ink on dark paper."""
    ink = np.pad(ink, margin)[..., None]
    paper, pen = random.uniform(190, 250), random.uniform(0, 60)
    if random.random() < 0.5:
        paper, pen = pen, paper
    drawn = np.full((*ink.shape[:2], 4), 1, dtype=np.float32)
    drawn[..., :3] = paper + (pen - paper) * ink
    return drawn


def _frame(thing: Thing, colour: np.ndarray, random: np.random.Generator, split: str) -> np.ndarray:
    size, border = int(random.integers(18, 27)), int(random.integers(3, 6))
    drawn = _written(_ink(thing.digits[0], size, random, split), 1 + border, random)
    inside = drawn[border:-border, border:-border, :3].copy()
    drawn[..., :3] = colour
    drawn[border:-border, border:-border, :3] = inside
    return drawn


def _number(thing: Thing, _: np.ndarray, random: np.random.Generator, split: str) -> np.ndarray:
    size = int(random.integers(18, 23))
    ink = [_ink(digit, size, random, split) for digit in thing.digits]
    return _written(np.concatenate(ink, 1), 2, random)
