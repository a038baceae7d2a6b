"""Halves the time of Triton's interpreter, which patches triton.language at every call of a device
function.

Within a launch, the first call from a module patches everything that later calls from it would
patch. The end of the launch restores it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def patch_once() -> None:
    """Patch triton.language once per launch and module; do nothing for other interpreters."""
    from triton.runtime import interpreter

    patch: Callable[..., Any] | None = getattr(interpreter, "_patch_lang", None)
    if patch is None or not hasattr(getattr(interpreter, "_LangPatchScope", None), "restore"):
        return
    launch: Any = None
    patched: set[int] = set()

    def once(fn: Any) -> Any:
        nonlocal launch
        # If nothing is left to restore, the last launch has ended and this call begins a new one.
        if launch is None or not launch._changes:
            launch = patch(fn)
            patched.clear()
        elif id(fn.__globals__) not in patched:
            patch(fn)
        patched.add(id(fn.__globals__))
        return launch

    interpreter._patch_lang = once
