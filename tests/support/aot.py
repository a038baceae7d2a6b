"""Compiles the kernels for GPUs that are not present, and reports their registers, shared memory,
spills and instructions.

    python tests/support/aot.py [--target sm_90] [--op select] [--quick] [--json FILE]

The variants are those that the operators launch: each operator is called with CPU tensors in the
shapes of real models, and its launches are recorded instead of run. A new variant needs a line in
aot_cases.py, a new rule needs an entry in `RULES` of aot_rules.py.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from aot_cases import Case, cases
from aot_rules import QUICK_TARGETS, TARGETS, Result, faults, instructions, table
from torch import Tensor

import vispruner_kernels._triton
from vispruner_kernels._triton import operators


class Variant(NamedTuple):
    ops: set[str]
    label: str
    kernel: Any
    args: tuple[Any, ...]
    meta: dict[str, Any]


class _Driver:
    """Triton's driver for a device that is not present."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        backend, arch, _, shared, warp_size = TARGETS[target]
        self.target = GPUTarget(backend, arch, warp_size)
        # Triton caches compiled kernels by device.
        self.device = list(TARGETS).index(target)
        properties = {"max_shared_mem": shared}
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def _launches(case: Case, call: Callable[..., Any], target: str, tag: int) -> list[Variant]:
    """The launches of a call; `tag` replaces the random bits that it would draw."""
    from triton.runtime.jit import JITFunction

    from vispruner_kernels._triton import launch, select

    caught: list[Variant] = []

    def run(kernel: Any, grid: int, like: Tensor, *args: Any, **meta: Any) -> None:
        caught.append(Variant({case.op}, case.label, kernel, args, meta))

    def run_past(kernel: Any, *args: Any, grid: Any, warmup: bool, **meta: Any) -> None:
        run(kernel, 0, args[0], *args, **meta)

    with ExitStack() as patches:
        for owner, name, value in (
            (select, "FUSED", TARGETS[target].backend == "cuda"),
            (launch, "run", run),
            # Launches that do not use launch.run.
            (JITFunction, "run", run_past),
            (launch, "_RANDOM", SimpleNamespace(getrandbits=lambda bits: tag)),
            (torch.cuda, "get_device_capability", lambda *args: TARGETS[target].capability),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        call(*case.args)
    return caught


def _key(variant: Variant) -> str:
    """The key by which Triton distinguishes the variants of a kernel."""
    from triton.runtime.driver import driver

    binder = variant.kernel.device_caches[driver.active.get_current_device()][-1]
    _, specialization, options = binder(*variant.args, debug=False, **variant.meta)
    return f"{variant.kernel.__module__}.{variant.kernel.__name__} {specialization} {options}"


def _calls(path: str) -> Iterator[tuple[Case, Callable[..., Any]]]:
    """The cases of the operators, or the CALLS of a Python file instead."""
    if not path:
        yield from ((case, getattr(operators, case.op, None)) for case in cases())
        return
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for op, call, args in module.CALLS:
        yield Case(op, call.__name__, True, args, args), call


class Plan(NamedTuple):
    variants: list[Variant]
    # The reasons why launches could not be recorded, by operator.
    errors: dict[str, str]


@functools.cache
def plan(target: str, ops: tuple[str, ...], quick: bool, path: str) -> Plan:
    """The variants for a target, without duplicates."""
    from triton.runtime.driver import driver

    driver.set_active(_Driver(target))
    variants: dict[str, Variant] = {}
    errors: dict[str, str] = {}
    for case, call in _calls(path):
        if case.op in errors or (quick and not case.quick) or (ops and case.op not in ops):
            continue
        if case.frontend and target != QUICK_TARGETS[-1]:
            continue
        try:
            caught = _launches(case, call, target, 0)
            other = _launches(case._replace(args=case.other), call, target, 1)
        except Exception as error:
            errors[case.op] = f"{case.label}: {type(error).__name__}: {error}"
            continue
        keys = [_key(variant) for variant in caught]
        if keys != [_key(variant) for variant in other]:
            errors[case.op] = f"{case.label}: other random bits or sizes needed another compilation"
        for key, variant in zip(keys, caught, strict=True):
            variants.setdefault(key, variant).ops.add(case.op)
    return Plan(list(variants.values()), errors)


# Seconds after which a compilation is taken for endless.
LONGEST = 300


def _resources(kernel: Any) -> dict[str, int]:
    if "amdgcn" in kernel.asm:
        names = {"registers": "vgpr_count", "stack": "private_segment_fixed_size"}
        text = kernel.asm["amdgcn"]
        pattern = r"\.{}: +(\d+)"
    else:
        import triton

        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(kernel.asm["cubin"])
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        names = {"registers": "REG", "stack": "STACK", "local": "LOCAL"}
        pattern = r"\b{}:(\d+)"
    sizes = {name: re.findall(pattern.format(word), text) for name, word in names.items()}
    # A report has exactly one kernel.
    return {name: int(size) for name, (size,) in sizes.items()}


def compiled(target: str, number: int, *settings: Any) -> Result:
    """Compile variant `number` of a plan as its launch would."""
    import triton
    from triton.runtime.driver import driver

    variant = plan(target, *settings).variants[number]
    driver.set_active(_Driver(target))
    result = _blank(target, variant)
    # The assembler's warnings are printed from Triton 3.5 on, and not for cached kernels.
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    # Ends this process if the compilation takes too long.
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    begun = time.perf_counter()
    meta = variant.meta
    if TARGETS[target].backend == "hip":
        # As launch.run does.
        meta = {name: value for name, value in meta.items() if name != "maxnreg"}
    try:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            binary = variant.kernel.warmup(*variant.args, grid=(1,), **meta)
        seconds = time.perf_counter() - begun
        return result._replace(
            **_resources(binary),
            warps=binary.metadata.num_warps,
            shared=binary.metadata.shared,
            seconds=seconds,
            serialized="instructions are serialized" in log.getvalue(),
            found=instructions(binary.asm.get("ptx", ""), triton.__version__),
        )
    except Exception as error:
        return result._replace(error=_reason(error))
    finally:
        faulthandler.cancel_dump_traceback_later()


def _reason(error: BaseException | None) -> str:
    """The first and last lines of an error and its causes; between them Triton quotes source."""
    text: list[str] = []
    while error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
        text += [type(error).__name__, *(lines[:1] if error.__cause__ else lines[:1] + lines[-1:])]
        error = error.__cause__
    return " ".join(dict.fromkeys(text))


def _blank(target: str, variant: Variant) -> Result:
    kernel, ops = variant.kernel, sorted(variant.ops)
    result = Result(target, ops, kernel.__module__, kernel.__name__, variant.label)
    return result._replace(fusion=variant.meta.get("enable_fp_fusion") is not None)


def compile_all(plans: dict[str, Plan], settings: tuple[Any, ...], jobs: int) -> list[Result]:
    # Spawned, because a process that has run threads cannot be forked safely.
    spawn = multiprocessing.get_context("spawn")
    tasks: list[tuple[Result, Future[Result]]] = []
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        for target, variants in ((target, plan.variants) for target, plan in plans.items()):
            for i, variant in enumerate(variants):
                future = pool.submit(compiled, target, i, *settings)
                tasks.append((_blank(target, variant), future))
        results = []
        for blank, future in tasks:
            try:
                results.append(future.result())
            except BrokenProcessPool:
                why = f"not compiled: some variant crashed the compiler or took over {LONGEST} s"
                results.append(blank._replace(error=why))
    return results


def kernels() -> set[str]:
    """The names of all kernels of the package."""
    from triton.runtime.jit import JITFunction

    found = set()
    package = vispruner_kernels._triton
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                found.add(value.__name__)
    return found


def unavailable(target: str) -> str:
    """Why this installation of Triton cannot compile for a target; empty if it can."""
    from triton.backends import backends

    if TARGETS[target].backend == "hip":
        try:
            # Before Triton 3.5 the linker is that of ROCm, which may not be installed.
            getattr(backends["amd"].compiler, "path_to_rocm_lld", lambda: None)()
        except Exception as error:
            return str(error)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=[])
    parser.add_argument("--op", nargs="+", default=[])
    parser.add_argument("--quick", action="store_true", help="fewer shapes, dtypes and targets")
    parser.add_argument("--json", help="also write the results to a file")
    parser.add_argument(
        "--calls", default="", help="a Python file with CALLS instead of those of the operators"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    from vispruner_kernels._triton import launch

    if launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: nothing is compiled")
    targets = options.target or (QUICK_TARGETS if options.quick else TARGETS)
    settings = (tuple(options.op), options.quick, options.calls)
    missing = {target: why for target in targets if (why := unavailable(target))}
    plans = {target: plan(target, *settings) for target in targets if target not in missing}
    results = compile_all(plans, settings, options.jobs)
    errors = {op: why for p in plans.values() for op, why in p.errors.items()}
    print(table(results))
    for what, why in {**missing, **errors}.items():
        print(f"{what}: {why}")
    if options.json:
        report = {
            "unavailable": missing,
            "errors": errors,
            "kernels": sorted(kernels()),
            "results": [r._asdict() for r in results],
        }
        Path(options.json).write_text(json.dumps(report))
    return bool(errors or any(map(faults, results)))


if __name__ == "__main__":
    sys.exit(main())
