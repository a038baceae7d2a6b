"""Labels of a training picture, and the linear heads that predict them from visual tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from benchmarks.tiny_vlm import model as tiny
from benchmarks.tiny_vlm.scenes import (
    COLOURS,
    KINDS,
    PATCH,
    PLACES,
    SHAPES,
    SIDE,
    TRAINED,
    TYPES,
    Scene,
)

NAMES = [*COLOURS]
SLOTS = sum(TRAINED.values())
# The index of patches without a thing, larger than the index of every thing.
NOTHING = PLACES**2
# Pairs of a colour and a kind (shapes, frame), then kinds of shapes, then digits.
TAGS = len(COLOURS) * (len(SHAPES) + 1) + len(SHAPES) + 10


class Sample(NamedTuple):
    """A picture, its questions and its labels, for N = 576 patches and Q = SLOTS questions.

    Attributes:
        pixels: `[192, 192, 3]` uint8.
        ids, labels: `[Q * SLOT]`, the questions as `tiny.pack` returns them.
        types: `[Q]`, indices of the types of the questions.
        patches: `[N, 8]`, seven labels from 1, or 0 for none: kind, colour and digit of the thing
            that a patch shows, and the kinds of the things left of, right of, above and below
            that thing; last 1 in the patch with the middle of the thing, else 0.
        things: `[N]`, the index of the thing that a patch shows, or NOTHING.
        tags: `[TAGS]`, 1 for each property that a caption of the picture could name, else 0.
        about, target: `[Q, NOTHING + 1]` bool, the things that a question is about, and the thing
            that answers it.
    """

    pixels: Tensor
    ids: Tensor
    labels: Tensor
    types: Tensor
    patches: Tensor
    things: Tensor
    tags: Tensor
    about: Tensor
    target: Tensor


def sample_of(s: Scene) -> Sample:
    patches = np.zeros((SIDE, SIDE, 8), dtype=np.int64)
    things = np.full((SIDE, SIDE), NOTHING)
    tags = torch.zeros(TAGS)
    centres = np.arange(SIDE) * PATCH + PATCH / 2
    by_colour = len(SHAPES) + 1
    at = {thing.place: KINDS.index(thing.kind) for thing in s.things}
    for i, thing in enumerate(s.things):
        rows = np.flatnonzero((centres > thing.top) & (centres < thing.bottom))
        columns = np.flatnonzero((centres > thing.left) & (centres < thing.right))
        here = np.ix_(rows, columns)
        kind = KINDS.index(thing.kind)
        colour = NAMES.index(thing.colour) if thing.colour else -1
        things[here] = i
        row, column = thing.place
        near = [(row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)]
        kinds = [at.get(place, -1) for place in near]
        patches[here] = [1 + x for x in (kind, colour, -1, *kinds, -1)]
        middle = (thing.top + thing.bottom) // 2 // PATCH, (thing.left + thing.right) // 2 // PATCH
        patches[middle][-1] = 1
        for part, digit in enumerate(thing.digits):
            width = (thing.right - thing.left) / len(thing.digits)
            left = thing.left + part * width
            inside = columns[(centres[columns] > left) & (centres[columns] <= left + width)]
            patches[rows[:, None], inside, 2] = 1 + digit
        if thing.colour:
            tags[colour * by_colour + min(kind, len(SHAPES))] = 1
        if thing.kind in SHAPES:
            tags[len(COLOURS) * by_colour + kind] = 1
        tags[[TAGS - 10 + digit for digit in thing.digits]] = 1
    about, target = torch.zeros(2, SLOTS, NOTHING + 1, dtype=torch.bool)
    for i, question in enumerate(s.questions):
        about[i, list(question.about)] = True
        target[i, question.target] = question.target >= 0
    types = [TYPES.index(question.type) for question in s.questions]
    return Sample(
        torch.from_numpy(s.pixels),
        *tiny.pack(s.questions, SLOTS),
        torch.tensor(types + [0] * (SLOTS - len(types))),
        torch.from_numpy(patches).flatten(0, 1),
        torch.from_numpy(things).flatten(),
        tags,
        about,
        target,
    )


class Pictures(Dataset[Sample]):
    """`count` sheets or training scenes, from number `first` on."""

    def __init__(self, make: Callable[[int], Scene], first: int, count: int) -> None:
        self.make, self.first, self.count = make, first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return sample_of(self.make(self.first + index))


class Heads(nn.Module):
    """Linear heads that exist in training only. From each visual token, before and after the
    projector, they predict the content and the position of its patch; from CLS they predict the
    tags."""

    def __init__(self, width: int, projected: int) -> None:
        super().__init__()
        self.sizes = [len(KINDS) + 1, len(COLOURS), 10, SIDE, SIDE, *4 * [len(KINDS) + 1], 2]
        self.feature = nn.Linear(width, sum(self.sizes))
        self.visual = nn.Linear(projected, sum(self.sizes))
        self.cls = nn.Linear(width, TAGS)

    def tags(self, cls: Tensor, s: Sample) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.cls(cls).float(), s.tags)

    def patches(self, read: Tensor, s: Sample) -> Tensor:
        logits = read.float().flatten(0, 1).split(self.sizes, -1)
        kind, colour, digit, *near, middle = s.patches.flatten(0, 1).unbind(-1)
        at = torch.arange(SIDE, device=kind.device)
        row, column = at.repeat_interleave(SIDE), at.repeat(SIDE)
        # Most patches show nothing.
        weight = torch.ones(self.sizes[0], device=kind.device)
        weight[0] = 0.2
        sides = [
            F.cross_entropy(one, torch.where(kind > 0, side, -1), ignore_index=-1)
            for one, side in zip(logits[5:-1], near, strict=True)
        ]
        return (
            F.cross_entropy(logits[0], kind, weight)
            + F.cross_entropy(logits[1], colour - 1, ignore_index=-1)
            + F.cross_entropy(logits[2], digit - 1, ignore_index=-1)
            + 0.2 * F.cross_entropy(logits[3], row.repeat(len(read)))
            + 0.2 * F.cross_entropy(logits[4], column.repeat(len(read)))
            + 0.5 * torch.stack(sides).mean()
            + F.cross_entropy(logits[-1], torch.where(kind > 0, middle, -1), ignore_index=-1)
        )
