"""The demo: one picture, one question, three pruning systems and a control, and what a VLM answers.

```
python -m vispruner_kernels.demo [IMAGE] [--question TEXT] [--keep 64] [--out FILE.png]
                                 [--model PATH_OR_NAME]
```
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from vispruner_kernels.demo import encoder, tiny_vlm
from vispruner_kernels.demo.compare import ALL, Duel, Poll, Result, duel, evaluate, poll
from vispruner_kernels.demo.picture import (
    CHANCE,
    DIVERSE,
    IMPORTANT,
    SAMPLE,
    InputError,
    Panel,
    draw,
    load_photo,
    sample_answers,
    to_tensor,
)

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: the command line without the program's name; that of the process if None.

    Returns:
        The exit status: 0, or 2 after one line on stderr that says what is wrong.
    """
    arguments = _parser().parse_args(argv)
    try:
        _run(arguments)
    except InputError as error:
        print("vispruner_kernels.demo:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    """One line for a bad argument, as for everything else that is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"vispruner_kernels.demo: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m vispruner_kernels.demo",
        description="Prune the visual tokens of one picture with VisPruner, FasterVLM, FoPru "
        "and a random control; print a comparison and what a small VLM answers, and write one "
        "picture.",
    )
    parser.add_argument(
        "image",
        nargs="?",
        type=Path,
        help="a photograph, cropped to the square in its middle (default: a bundled picture)",
    )
    parser.add_argument(
        "--question",
        metavar="TEXT",
        help="what the small VLM is asked, in its words with spaces between them (default: "
        f"'{next(iter(sample_answers()))}' about the bundled picture, nothing about another)",
    )
    parser.add_argument("--keep", type=int, default=64, help="tokens to keep (default: 64)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("vispruner_demo.png"),
        metavar="FILE.png",
        help="where the picture goes (default: %(default)s)",
    )
    parser.add_argument(
        "--model",
        metavar="PATH_OR_NAME",
        help="a CLIP vision tower, from a folder or the Hugging Face hub, through transformers "
        "(default: that of a small VLM which is bundled, no download)",
    )
    return parser


def _run(arguments: argparse.Namespace) -> None:
    _require_extras()
    keep, out, model = arguments.keep, arguments.out, arguments.model
    _check_out(out)
    _check_keep(keep, None if model is not None else tiny_vlm.SIDE**2)
    if model is not None and arguments.question is not None:
        raise InputError("--question: a vision tower (--model) does not answer, leave one away")
    path = arguments.image or SAMPLE
    name = _printable(path.name)
    shown = name if len(name) <= 60 else f"{name[:40]}...{name[-17:]}"
    photo = load_photo(path)
    polls: list[Poll] = []
    if model is not None:
        from vispruner_kernels.demo.clip import encode as encode_clip

        encoded = encode_clip(photo, model)
        _check_keep(keep, encoded.side**2)
    else:
        image = to_tensor(photo, encoder.SIZE)
        encoded = encoder.encode(image)
        polls = _polls(image, arguments.question, sample_answers() if path is SAMPLE else {}, keep)

    n, side = encoded.side**2, encoded.side
    contest = duel(encoded, keep)
    for line in [*_duel_lines(contest, keep, n), *_conditions(contest, encoded.features)]:
        _say(line)
    _say(
        f"  {shown}, cropped to the square in its middle, {side} x {side} patches, "
        f"{encoded.label}\n"
    )
    results = evaluate(encoded, keep)
    _say(_table(results, n))
    if keep >= side > 1 and keep % side:
        _say(f"  FoPru row keeps whole rows of {side}: {keep // side * side} of {keep} tokens")
    elif keep < side:
        _say(f"  FoPru row is left out: a row of the grid has {side} tokens, more than {keep}")
    if polls:
        _say(f"\n{_answers(polls)}")
    heading = [
        f"{n} visual tokens, {keep} kept",
        f"{shown}, patches scored by a {encoded.label}",
        "attention: share of the CLS token's attention that is kept; "
        "coverage: mean of the largest cosine to a kept token",
    ]
    asked = polls[0] if polls else None
    png = draw(photo, side, heading, _question(asked), _panels(results, keep, side, asked))
    try:
        out.write_bytes(png)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from None
    _say(f"\npicture: {_printable(out)}")


def _polls(image: Tensor, question: str | None, truths: dict[str, str], keep: int) -> list[Poll]:
    """The question to show first, then the others whose answers are known."""
    questions = dict.fromkeys([*([] if question is None else [question]), *truths])
    return [poll(image, asked, truths.get(asked), keep) for asked in questions]


def _say(text: str) -> None:
    """Print. Where nobody reads on, as in `| head -2`, the picture is still wanted."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _printable(path: Path | str) -> str:
    """The path without the bytes that no terminal and no font can show."""
    return str(path).encode("utf-8", "replace").decode()


def _require_extras() -> None:
    """Import what is optional elsewhere, and keep transformers quiet."""
    try:
        import matplotlib  # noqa: F401
        import numpy  # noqa: F401
        import PIL  # noqa: F401
        import tqdm  # noqa: F401
        import transformers
    except ImportError as error:
        raise InputError(
            f"the demo needs {error.name}: pip install vispruner_kernels[demo]"
        ) from None
    # Warnings about the text half of a CLIP checkpoint and about retries say nothing to a reader
    # of the demo; what is wrong in the end is raised. Downloads keep their progress bars.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def _check_out(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: the picture is a PNG, so the name must end in .png")
    if os.path.isdir(out):
        raise InputError(f"--out {out} is a directory")
    if not os.path.isdir(out.parent):
        raise InputError(f"--out {out}: there is no folder {out.parent}")
    if not os.access(out if os.path.exists(out) else out.parent, os.W_OK):
        raise InputError(f"--out {out} cannot be written")


def _check_keep(keep: int, n: int | None) -> None:
    if keep < 1 or (n is not None and keep > n):
        wanted = f"1 to {n}, the tokens of the picture" if n else "1 or more"
        raise InputError(f"--keep {keep} is out of range: want {wanted}")


def _duel_lines(contest: Duel, keep: int, n: int) -> list[str]:
    """The first two lines of the output."""
    at = "" if contest.keep == keep else f"; at {contest.keep} tokens, near the {keep} asked for"
    ours = contest.ours.median
    if contest.published is None:
        first = f"published loop fails at every budget of {n} tokens, ours {ours:.2f} ms"
    else:
        published = contest.published.median
        first = (
            f"published loop {published:.2f} ms, ours {ours:.2f} ms, "
            f"ratio {published / ours:.1f}, {contest.equal} of "
            f"{contest.keep} tokens equal to the float64 loop (the loop in float32: "
            f"{contest.published_equal}){at}"
        )
    if contest.broken_keep is None:
        second = f"published loop runs at every budget of {n} tokens, and so does ours"
    else:
        second = (
            f"published loop {contest.failure} at a budget of {contest.broken_keep} tokens, "
            f"ours keeps exactly {contest.exact}"
        )
    return [first, second]


def _conditions(contest: Duel, features: Tensor) -> list[str]:
    """What the numbers of the first line were measured on, and how steady they were."""
    shape = ", ".join(str(size) for size in features.shape)
    ours, published = contest.ours, contest.published
    spread = f"ours {ours.low:.2f} to {ours.high:.2f} ms"
    if published is not None:
        spread = f"published {published.low:.2f} to {published.high:.2f} ms, {spread}"
    lines = [
        f"  float32 features [{shape}] on the {features.device.type}, "
        f"1 thread, median of {ours.runs} runs after warm-up "
        f"({spread})"
    ]
    if published is not None and contest.equal < (contest.keep or 0):
        lines.append(
            "  ours rounds features to fixed point, so near-ties fall otherwise; "
            f"they cover {contest.coverage:.3f} (ours), {contest.published_coverage:.3f} (float64)"
        )
    return lines


def _table(results: Sequence[Result], n: int) -> str:
    lines = ["system      tokens   share  attention  coverage  redundancy  selection"]
    for result in results:
        redundancy = f"{result.redundancy:.3f}" if result.redundancy == result.redundancy else "-"
        lines.append(
            f"{result.name:10}  {len(result.kept):6}  {len(result.kept) / n:6.1%}  "
            f"{result.attention:9.1%}  {result.coverage:8.3f}  {redundancy:>10}  "
            f"{result.ms:6.3f} ms"
        )
    return "\n".join(
        [
            *lines,
            "  attention: share of the CLS token's attention to patches that went to kept ones",
            "  coverage: mean over all tokens of the largest cosine to a kept one (more is better)",
            "  redundancy: mean over kept tokens of the largest cosine to another (less is better)",
        ]
    )


def _question(asked: Poll | None) -> str:
    if asked is None:
        return ""
    truth = "" if asked.truth is None else f"   (true answer: {asked.truth})"
    return f"question: {asked.question}{truth}"


def _answers(polls: Sequence[Poll]) -> str:
    """The first question in full; of those whose answers are known, how many come out right."""
    asked, known = polls[0], [each for each in polls if each.truth is not None]
    lines = [_question(asked), "system      answer"]
    if known:
        lines[-1] += f"{'':28}right answers to the picture's {len(known)} questions"
    for name, answer in asked.answers.items():
        right = asked.right(name)
        mark = "" if right is None else "right" if right else "wrong"
        count = f"{sum(bool(each.right(name)) for each in known)} of {len(known)}" if known else ""
        lines.append(f"{name:10}  {answer:24}  {mark:6}  {count}".rstrip())
    return "\n".join(lines)


def _panels(results: Sequence[Result], keep: int, side: int, asked: Poll | None) -> list[Panel]:
    def answer(name: str) -> dict[str, Any]:
        return {"answer": asked.answers[name], "right": asked.right(name)} if asked else {}

    tokens = f"{side} x {side} patches = {side * side} visual tokens"
    panels = [Panel("Picture", tokens, [], **answer(ALL))]
    for result in results:
        others = result.kept[~torch.isin(result.kept, result.important)]
        colour = DIVERSE if result.name == "VisPruner" else CHANCE
        caption = (
            f"{len(result.kept)} tokens, attention {result.attention:.0%}, "
            f"coverage {result.coverage:.2f}"
        )
        groups = [(IMPORTANT, result.important), (colour, others)]
        panels.append(Panel(result.name, caption, groups, **answer(result.name)))
    if keep < side:
        note = f"a row has {side} tokens,\nmore than the budget of {keep}"
        panels.insert(4, Panel("FoPru row", "left out", [], note))
    return panels
