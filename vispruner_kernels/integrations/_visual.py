"""Apply a method and its budget to the visual tokens of a call.

    Visual          the visual tokens: features, scores, grids, positions in the prompt
    budgets(...)    units that share a budget, and their counts; from sizes on the host alone
    select(...)     the rows that are kept
    keep(...)       their places in the prompt and their embeddings

A *row* identifies a visual token: its index in `Visual.source.flatten(0, 1)`, the features of the
tower. A *grid row* is a row of patches. A *grid* is a tile or a frame. A *unit* has one budget: an
image, or one grid of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vispruner_kernels.methods import FoPru, Method

# In `Visual.layouts`: a token that ends a row of patches and has no feature.
NEWLINE = -1


def send(x: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to the device without waiting for work queued there."""
    return x.to(device, non_blocking=True)


def on_host() -> AbstractContextManager[Any]:
    """Inside the context, new tensors without a device are on the host, even if
    `torch.set_default_device` names another device."""
    # In PyTorch 2.8 torch.get_default_device() fails after the default was reset to None.
    elsewhere = torch.empty(0).device.type != "cpu"
    return torch.device("cpu") if elsewhere else nullcontext()


@dataclass
class Visual:
    """The visual tokens of the images, or of the videos, of a call.

    Images that the model interpolates have a `Visual` of their own.
    """

    # "image" or "video"
    kind: str
    # [G, S, C]: features of G grids (tiles, frames) of S tokens.
    source: Tensor
    # [G, S - first]; None for a method that needs no scores.
    scores: Tensor | None
    # Number of leading tokens of a grid that are no patches. They are always kept.
    first: int
    # For each image, int64 on the host: the row of each of its tokens in prompt order, or NEWLINE.
    layouts: list[Tensor]
    # The numbers of these images among all images of the call.
    numbers: list[int]
    # For each row, int64 on the host: its grid, and its column there, or -1 without columns.
    grid: Tensor
    column: Tensor
    # Maps rows [K] to embeddings [K, D] for the language model.
    embed: Callable[[Tensor], Tensor]
    # [D] the embedding of NEWLINE.
    newline: Tensor | None = None
    # Whether a grid can have a budget of its own.
    tiles: bool = True


def grids_of(count: int, tokens: int, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Grid and column of every row of a source [count, tokens, C]."""
    row = torch.arange(count * tokens)
    column = (row % tokens - first) % width if width else torch.full_like(row, -1)
    return row // tokens, column


def _units(visual: Visual, image: int, per_grid: bool) -> list[Tensor]:
    """The units of an image, as rows: all its patches, or the patches of each grid."""
    layout = visual.layouts[image]
    rows = layout[(layout != NEWLINE) & (layout % visual.source.shape[1] >= visual.first)]
    rows = rows.sort().values
    if not per_grid:
        return [rows]
    counts = visual.grid[rows].unique_consecutive(return_counts=True)[1]
    return list(rows.split(counts.tolist()))


def _width(visual: Visual, rows: Tensor) -> int | None:
    """Number of columns of the grids, or None if grid rows differ in length."""
    if not len(rows):
        return None
    column, grid = visual.column[rows], visual.grid[rows]
    starts = (column.diff() <= 0) | (grid.diff() != 0)
    ends = torch.cat([starts.nonzero()[:, 0] + 1, torch.tensor([len(rows)])])
    widths = ends.diff(prepend=torch.tensor([0])).unique()
    return int(widths) if len(widths) == 1 and column[0] >= 0 else None


@dataclass
class Budgets:
    """The units of all images, as rows, and their counts."""

    # Units that the method prunes, and the number of columns of each.
    pruned: list[Tensor]
    widths: list[int | None]
    # Units that stay whole, because they have no more tokens than the count.
    whole: list[Tensor]
    # For each image, the number of kept tokens.
    counts: list[int]


def budgets(visual: Visual, method: Method, per_grid: bool, keep_small: bool = False) -> Budgets:
    """Split images into units. A small unit is an error, or stays whole with `keep_small`."""
    found = Budgets([], [], [], [0] * len(visual.layouts))
    # A fraction is at most 1, so with a fraction only units of at most one token stay whole here.
    most_whole = method.keep if keep_small else -1
    for image in range(len(visual.layouts)):
        for rows in _units(visual, image, per_grid):
            if len(rows) <= most_whole:
                found.whole.append(rows)
                found.counts[image] += len(rows)
                continue
            width = _width(visual, rows)
            try:
                if isinstance(method, FoPru) and not (method.strategy == "rank" or width):
                    raise ValueError("its rows have no common width; use strategy='rank'")
                found.counts[image] += method.on_grid(width).retained_tokens(len(rows))
            except ValueError as error:
                where = f"{visual.kind} {visual.numbers[image]}"
                where += f", tile or frame {int(visual.grid[rows[0]])}" if per_grid else ""
                raise ValueError(f"{where} of the batch: {error}") from None
            found.pruned.append(rows)
            found.widths.append(width)
    return found


def select(
    visual: Visual, method: Method, per_grid: bool, keep_small: bool = False
) -> tuple[Tensor, list[int]]:
    """The kept rows, and the number of kept tokens of each image."""
    found = budgets(visual, method, per_grid, keep_small)
    kept = [send(torch.cat(found.whole), visual.source.device)] if found.whole else []
    if found.pruned:
        kept.append(_pruned(visual, method, found.pruned, found.widths))
    return torch.cat(kept), found.counts


def _pruned(
    visual: Visual, method: Method, units: list[Tensor], widths: list[int | None]
) -> Tensor:
    """The rows that the method keeps in these units."""
    source, scores, first = visual.source, visual.scores, visual.first
    order, lengths = torch.cat(units), [len(rows) for rows in units]
    placed = send(order, source.device)
    grids, tokens = source.shape[:2]
    row = torch.arange(grids * tokens)
    patches = row[row % tokens >= first]
    if lengths == [tokens - first] * grids and torch.equal(order, patches):
        # The units are all grids, in order: read the features in place, without a copy.
        kept = method.on_grid(widths[0]).select(source[:, first:], scores)
        starts = torch.arange(0, len(order), tokens - first, device=source.device)
        chosen = (kept + starts[:, None]).flatten()
    else:
        if scores is not None:
            scores = scores.flatten()[placed - (placed // tokens + 1) * first]
        features = source[placed // tokens, placed % tokens]
        chosen = method.select_varlen(features, scores, lengths, widths)
    return placed[chosen]


@dataclass
class Kept:
    """The kept tokens of all images, or of all videos."""

    # int64 [K], ascending: their indices among the placeholders.
    places: Tensor
    # [K, D]
    embeds: Tensor
    # For each image, the number of kept tokens and the number of all tokens.
    counts: list[int]
    lengths: list[int]


def lengths_of(visuals: list[Visual]) -> list[int]:
    """Number of tokens of each image, for visuals of one kind."""
    images = {n: len(x) for v in visuals for n, x in zip(v.numbers, v.layouts, strict=True)}
    return [images[n] for n in range(len(images))]


def keep(
    visuals: list[Visual],
    method: Method,
    per_grid: bool,
    newlines: bool,
    keep_small: bool = False,
) -> Kept:
    """Prune the visuals of one kind, each with its own images. `newlines` keeps newline tokens."""
    lengths = lengths_of(visuals)
    starts = [0, *accumulate(lengths)]
    counts = [0] * len(lengths)
    places, embeds = [], []
    for visual in visuals:
        rows, chosen = select(visual, method, per_grid, keep_small)
        layout, device = torch.cat(visual.layouts), rows.device
        is_newline = layout == NEWLINE
        is_prefix = ~is_newline & (layout % visual.source.shape[1] < visual.first)
        at = torch.cat([torch.arange(starts[n], starts[n + 1]) for n in visual.numbers])
        place_of = torch.empty(int(layout.max()) + 1, dtype=torch.int64)
        place_of[layout[~is_newline]] = at[~is_newline]
        places += [send(place_of, device)[rows], send(at[is_prefix], device)]
        embeds.append(visual.embed(torch.cat([rows, send(layout[is_prefix], device)])))
        always = is_prefix
        if newlines and visual.newline is not None:
            places.append(send(at[is_newline], device))
            newline = visual.newline.to(embeds[-1])
            embeds.append(newline.expand(int(is_newline.sum()), -1))
            always = is_prefix | is_newline
        extra = always.split([len(x) for x in visual.layouts])
        for n, count, others in zip(visual.numbers, chosen, extra, strict=True):
            counts[n] = count + int(others.sum())
    every = torch.cat(embeds)
    ordered = torch.cat(places).to(every.device).sort()
    return Kept(ordered.values, every[ordered.indices], counts, lengths)
