"""The core releases the global interpreter lock, and leaves it off where Python has none."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calls import operators_of
from installed import needs_native

from vispruner_kernels import _native
from vispruner_kernels.testing import sample_offsets


@needs_native
@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python always has a GIL"
)
def test_the_core_leaves_the_gil_off():
    # Without other packages, which may need the GIL. Python warns if it enables the GIL again.
    code = "import _C, sys; assert not sys._is_gil_enabled()"
    path = str(Path(_native._C.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={n: v for n, v in os.environ.items() if n != "PYTHON_GIL"} | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# A launch on a GPU returns at once.
OTHERS = ("_", "simd", "use_simd", "cuda_", "torch_", "load_", "register_", "forget_")
CORE = [f for f in dir(_native._C) if not f.startswith(OTHERS)] if _native.INSTALLED else []


def long_calls() -> dict[str, Callable[[], Any]]:
    """A call of every operator of the core, with work for some hundredths of a second."""
    core = operators_of("native")
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1, 2000, 64, generator=generator)
    scores = torch.rand(1, 2000, generator=generator)
    many = torch.rand(1, 16384, generator=generator).expand(1000, 16384)
    q = torch.randn(1, 2000, 8, 64, generator=generator)
    rows = torch.randn(1, 1025, 8, 64, generator=generator).expand(300, 1025, 8, 64)
    offsets, keep = sample_offsets([2000]), sample_offsets([100])
    packed, rule = (features[0], scores[0], offsets, keep, 2000, 100), (0.5, 8, "bipartite")
    return {
        "select": lambda: core.select(features, scores, 100, *rule),
        "select_varlen": lambda: core.select_varlen(*packed, *rule),
        "select_topk": lambda: core.select_topk(many, 100),
        "select_rows": lambda: core.select_rows(many, 1, 100),
        "cls_scores": lambda: core.cls_scores(rows, rows),
        "received_scores": lambda: core.received_scores(q, q),
        "received_scores_varlen": lambda: core.received_scores_varlen(q[0], q[0], offsets, 2000),
    }


@needs_native
@pytest.mark.parametrize("name", CORE)
def test_the_core_releases_the_gil(name, monkeypatch):
    # Python does not switch threads by itself here. So the other thread runs only when this one
    # releases the GIL, and between the two notes only the C++ function can release it.
    count, stop, notes = 0, False, []
    call, function = long_calls()[name], getattr(_native._C, name)

    def other():
        nonlocal count
        while not stop:
            count += 1
            time.sleep(1e-4)

    def noted(**arguments):
        notes.append(count)
        function(**arguments)
        notes.append(count)

    monkeypatch.setattr(_native.cpu, "_C", SimpleNamespace(**{name: noted}))
    torch.set_num_threads(1)
    interval = sys.getswitchinterval()
    thread = threading.Thread(target=other)
    thread.start()
    try:
        sys.setswitchinterval(60)
        call()
    finally:
        sys.setswitchinterval(interval)
        stop = True
        thread.join()
    before, after = notes
    assert after - before >= 3
