"""Run the demo: write the picture, and put the report together."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from vispruner_kernels.demo import InputError, clip, encoder, picture, tiny_vlm
from vispruner_kernels.demo.compare import ALL, Result, compare_with_loop, evaluate


def run(image: Path | None, question: str | None, keep: int, out: Path, model: str | None) -> str:
    """Write the picture to `out` and return the report. The arguments are those of the command.

    Raises:
        InputError: an argument that cannot be used.
    """
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: the picture is a PNG, so the name must end in .png")
    if os.path.isdir(out):
        raise InputError(f"--out {out} is a directory")
    if not os.path.isdir(out.parent):
        raise InputError(f"--out {out}: there is no folder {out.parent}")
    if model is not None and question is not None:
        raise InputError(
            "--question: a vision tower (--model) answers no question, use one of the two"
        )
    path = image or picture.SAMPLE
    photo = picture.load_photo(path)
    pixels = picture.to_tensor(photo, encoder.SIZE)
    encoded = encoder.encode(pixels) if model is None else clip.encode(photo, model)
    side, n = encoded.side, encoded.side**2
    if not 1 <= keep <= n:
        raise InputError(f"--keep {keep} is out of range: want 1 to {n}, the tokens of the picture")

    truths: dict[str, str | None] = {} if question is None else {question: None}
    if image is None and model is None:
        truths |= picture.sample_answers()
    try:
        inputs = [tiny_vlm.inputs(pixels, words) for words in truths]
    except ValueError as error:
        raise InputError(f"--{error}") from None
    results = evaluate(encoded, keep, [*zip(inputs, truths.values(), strict=True)])
    asked = ""
    if truths:
        first, truth = next(iter(truths.items()))
        asked = f"question: {first}" + (f"   (true answer: {truth})" if truth else "")
    # File names may have bytes that are not UTF-8.
    name = path.name.encode(errors="replace").decode()
    heading = [
        f"{n} visual tokens, {keep} kept",
        f"{name}, patches scored by a {encoded.label}",
        "attention: share of the CLS token's attention that is kept; "
        "coverage: mean of the largest cosine to a kept token",
    ]
    panels = [_panel(result, side) for result in results]
    try:
        out.write_bytes(picture.draw(photo, side, heading, asked, panels))
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror or error}") from None
    known = sum(truth is not None for truth in truths.values())
    lines = [
        *compare_with_loop(encoded, keep),
        f"  {name}, cropped to its central square, {side} x {side} patches, {encoded.label}\n",
        *([f"{asked}\n"] if asked else []),
        "system      tokens   share  attention  coverage  redundancy  selection"
        + ("  answer" if asked else ""),
        *(_row(result, n, known) for result in results),
        "  attention: share of the CLS token's attention to patches that went to kept ones",
        "  coverage: mean over all tokens of the largest cosine to a kept one (more is better)",
        "  redundancy: mean over kept tokens of the largest cosine to another (less is better)",
        "  share: kept tokens of all; selection: median time, without that of the scores",
        f"  FoPru row: only whole rows of {side} tokens; left out if the budget is less than a row",
        *([f"  N of {known}: right answers to the picture's {known} questions"] if known else []),
        f"\npicture: {out}",
    ]
    return "\n".join(lines)


def _row(result: Result, n: int, known: int) -> str:
    redundancy = "-" if len(result.kept) == 1 else f"{result.redundancy:.3f}"
    ms = "-" if result.name == ALL else f"{result.ms:.3f} ms"
    mark = {True: "right", False: "wrong", None: ""}[result.right]
    row = (
        f"{result.name:10}  {len(result.kept):6}  {len(result.kept) / n:6.1%}  "
        f"{result.attention:9.1%}  {result.coverage:8.3f}  {redundancy:>10}  {ms:>9}  "
        f"{result.answer:12}  {mark:5}  {f'{result.correct} of {known}' if known else ''}"
    )
    return row.rstrip()


def _panel(result: Result, side: int) -> picture.Panel:
    if result.name == ALL:
        size = f"{side} x {side} patches = {side * side} visual tokens"
        return picture.Panel("Picture", size, [], result.answer, result.right)
    caption = f"{len(result.kept)} tokens, attention {result.attention:.0%}, "
    caption += f"coverage {result.coverage:.2f}"
    others = result.kept[~torch.isin(result.kept, result.important)]
    colour = picture.DIVERSE if result.name == "VisPruner" else picture.CHANCE
    groups = [(picture.IMPORTANT, result.important), (colour, others)]
    return picture.Panel(result.name, caption, groups, result.answer, result.right)
