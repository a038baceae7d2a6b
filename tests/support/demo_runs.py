"""Runs of the demo in the test's process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vispruner_kernels.demo import main, picture


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def photograph() -> Path:
    """A photograph that matplotlib ships."""
    from matplotlib import cbook

    return Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


def pixels_of(path: Path) -> np.ndarray:
    """The pixels of the picture that the demo wrote, int64."""
    with Image.open(path) as opened:
        assert (opened.format, opened.size) == ("PNG", (picture.WIDTH, picture.HEIGHT))
        return np.array(opened.convert("RGB")).astype(int)


def run(capsys: Any, *argv: Any) -> str:
    """Run the demo in this process and return its report."""
    assert main([str(word) for word in argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys: Any, *argv: Any) -> str:
    """Run the demo, assert that it ends with one line on stderr, and return that line."""
    assert main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("vispruner_kernels.demo: ")
    return err
