"""Rules for compiled kernels, for aot.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

SELECT_ALL = ("select", "prune", "select_varlen")
SELECTIONS = (*SELECT_ALL, "select_topk", "select_rows")


class Target(NamedTuple):
    backend: str
    arch: int | str
    capability: tuple[int, int]
    # The most bytes of shared memory of one program.
    shared: int
    warp_size: int = 32


TARGETS = {
    "sm_80": Target("cuda", 80, (8, 0), 163 * 1024),
    "sm_89": Target("cuda", 89, (8, 9), 99 * 1024),
    "sm_90": Target("cuda", 90, (9, 0), 227 * 1024),
    "sm_100": Target("cuda", 100, (10, 0), 227 * 1024),
    "sm_120": Target("cuda", 120, (12, 0), 99 * 1024),
    "gfx942": Target("hip", "gfx942", (9, 4), 64 * 1024, 64),
    "gfx950": Target("hip", "gfx950", (9, 5), 160 * 1024, 64),
}
QUICK_TARGETS = ("sm_80", "sm_90")


class Result(NamedTuple):
    """A compiled variant."""

    target: str
    ops: list[str]
    module: str
    kernel: str
    label: str
    warps: int = 0
    registers: int = 0
    shared: int = 0
    stack: int = 0
    local: int = 0
    seconds: float = 0.0
    # Names of `INSTRUCTIONS`.
    found: tuple[str, ...] = ()
    fusion: bool = True
    # Whether the assembler serializes wgmma, which is asynchronous.
    serialized: bool = False
    error: str = ""


# Instructions in PTX that the rules require or forbid.
INEXACT = ("div.full", "div.approx", "sqrt.approx", "rcp.approx", "fma.rn.f32", ".ftz")
INSTRUCTIONS = {
    **{name: re.escape(name) for name in INEXACT},
    "tf32": "tf32",
    "int8 tensor cores": (
        r"\b(?:(?:wgmma\.mma_async|mma\.sync)\S*\.s8\.s8|tcgen05\.mma\S*kind::i8)\b"
    ),
    "float64 product": r"\bmul(?:\.rn)?\.f64\b",
    "float64 to integer": r"\bcvt\.rzi\.s(?:32|64)\.f64\b",
    "float32 to float64": r"\bcvt\.f64\.f32\b",
}


def instructions(ptx: str, version: str = "") -> tuple[str, ...]:
    # Comments, file names and the name of the kernel do not count.
    code = re.sub(r"//.*|^\s*\.(?:file|loc|visible)\b.*", "", ptx, flags=re.MULTILINE)
    if version.startswith(("3.4.", "3.5.", "3.6.")):
        # In these versions of Triton, div_rn and sqrt_rn have .ftz; no operand is subnormal.
        code = re.sub(r"\b(div|sqrt)\.rn\.ftz\b", r"\1.rn", code)
    return tuple(name for name, pattern in INSTRUCTIONS.items() if re.search(pattern, code))


def _spills(r: Result) -> str:
    spills = r.target in QUICK_TARGETS and (r.stack or r.local)
    return f"{r.stack} bytes of stack, {r.local} of local memory" if spills else ""


def _too_much_shared(r: Result) -> str:
    limit = TARGETS[r.target].shared
    return (
        f"{r.shared} bytes of shared memory, at most {limit} available" if r.shared > limit else ""
    )


def _matches(r: Result) -> bool:
    """Whether the variant must compute similarities, not only a top-k."""
    selects = {*r.ops} & {*SELECT_ALL} and not r.module.endswith(".topk")
    return bool(selects) and TARGETS[r.target].backend == "cuda" and not r.error


def _no_int8(r: Result) -> str:
    wanted = "int8 tensor cores"
    return f"no {wanted}" if _matches(r) and wanted not in r.found else ""


def _tf32(r: Result) -> str:
    return "tf32" if "tf32" in r.found else ""


def _inexact(r: Result) -> str:
    return ", ".join(sorted({*r.found} & {*INEXACT})) if {*r.ops} & {*SELECTIONS} else ""


def _not_float64(r: Result) -> str:
    if not _matches(r) or "select_varlen" not in r.ops:
        return ""
    wrong = [n for n in ("float64 product", "float64 to integer") if n not in r.found]
    wrong = [f"no {name}" for name in wrong]
    return ", ".join([*wrong, *(n for n in r.found if n == "float32 to float64")])


# Each rule returns the fault of a variant; empty if there is none.
RULES: dict[str, Callable[[Result], str]] = {
    "compiles": lambda r: r.error,
    "does not spill": _spills,
    "fits shared memory": _too_much_shared,
    # The default changes in Triton 3.10, and 3.9 warns about that.
    "states enable_fp_fusion": lambda r: "" if r.fusion else "enable_fp_fusion is not given",
    "keeps tensor cores busy": lambda r: "wgmma is serialized" if r.serialized else "",
    "multiplies int8 on tensor cores": _no_int8,
    "has no tf32": _tf32,
    "rounds correctly": _inexact,
    "counts in float64": _not_float64,
}


def faults(result: Result) -> dict[str, str]:
    return {name: fault for name, rule in RULES.items() if (fault := rule(result))}


TABLE = "{:7} {:23} {:60} {:>5} {:>9} {:>7} {:>6} {:>6} {:>8}  {}"


def table(results: list[Result]) -> str:
    head = ("target", "kernel", "variant", "warps", "registers", "shared", "stack", "local")
    lines = [TABLE.format(*head, "seconds", "faults").rstrip()]
    for r in results:
        sizes = (r.warps, r.registers, r.shared, r.stack, r.local, f"{r.seconds:.2f}")
        wrong = "; ".join(faults(r).values())
        label = f"{', '.join(r.ops)}: {r.label}"
        lines.append(TABLE.format(r.target, r.kernel, label, *sizes, wrong).rstrip())
    return "\n".join(lines)
