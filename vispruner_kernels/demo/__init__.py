"""Demo: prune the visual tokens of one picture, ask a small VLM about it, and draw the result.

```
python -m vispruner_kernels.demo [IMAGE] [--question TEXT] [--keep 64] [--out FILE.png]
                                 [--model PATH_OR_NAME]
```

The demo crops a photograph to its central square. It asks eight questions with known answers about
the bundled picture; the question TEXT, if given, comes first. About another picture it asks only
TEXT. With a vision tower from --model it asks no question.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

__all__ = ["InputError", "main"]


class InputError(Exception):
    """An input that the caller can correct; the text is the message for them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `argv` (None: that of the process).

    Returns:
        The exit status: 0, or 2 after one line on stderr about a bad input.
    """
    arguments = _parser().parse_args(argv)
    # Several threads are slower on such small products, and change PyTorch's sums.
    torch.set_num_threads(1)
    try:
        _check_packages()
        from vispruner_kernels.demo import report

        text = report.run(**vars(arguments))
    except InputError as error:
        print("vispruner_kernels.demo:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    try:
        # A file name may have characters that stdout cannot encode.
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:
        # The reader closed the pipe, as `head -2` does. Python flushes stdout again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vispruner_kernels.demo",
        description="Prune the visual tokens of one picture with VisPruner, FasterVLM, FoPru and "
        "a random control. Print a comparison and the answers of a small VLM, and draw a picture.",
    )
    add = parser.add_argument
    add("image", nargs="?", type=Path, help="a photograph (default: a bundled picture)")
    add("--question", metavar="TEXT", help="a question in the words of the bundled small VLM")
    add("--keep", type=int, default=64, help="tokens to keep (default: %(default)s)")
    hint = "the picture to write (default: %(default)s)"
    add("--out", type=Path, default=Path("vispruner_demo.png"), metavar="FILE.png", help=hint)
    hint = (
        "a CLIP vision tower: a folder, or a name on the Hugging Face hub (default: a bundled one)"
    )
    add("--model", metavar="PATH_OR_NAME", help=hint)
    return parser


def _check_packages() -> None:
    """Import the packages of the `demo` extra, and silence their logs."""
    try:
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
        import transformers
    except ImportError as error:
        needed = error.name or error
        raise InputError(f'the demo needs {needed}: pip install ".[demo]" in a clone') from None
    # Warnings about the unused text half of a CLIP checkpoint and about retries. Errors are raised.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
