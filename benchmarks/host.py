"""The time of an eager call on the host: what its caller waits for until the launch is made.

A call has these parts:
    dispatcher  from the Python call to the operator's kernel and back, without any work there
    check       of the arguments and of their memory
    memory      for the results and for scratch, and the Python objects of the results
    launch      of the kernel
    glue        the rest: the arguments of the kernel, the choice of a variant

"C++" is the operator as the C++ core registers it, "Python" the same as a Python function. Both
call the same CUDA code. "call" is `torch.ops.vispruner.<operator>(...)` with the required
arguments, "function" the function of `vispruner_kernels`, both under `torch.inference_mode()`.
Without it, `prune` costs some microseconds more: autograd asks whether a gradient is needed.

No GPU is needed. The core is compiled for this CPU, with tensors in its memory, and a launch that
only takes LAUNCH nanoseconds. Before anything is timed, the launches run in the emulation of the
tests, and the answers must be those of the CPU. The allocator is that of the CPU for results; for
scratch it is a list of free blocks, as on a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import vispruner_kernels
from benchmarks import harness
from benchmarks.select import inputs_of
from benchmarks.shapes import Shape
from vispruner_kernels import _backends, _schemas, _tuned, ops
from vispruner_kernels._native import cuda, registration

ROOT = Path(__file__).parents[1]
SHAPE = Shape("LLaVA-1.5", 1, 576, 1024, 64, torch.float16)
# A launch of a kernel by CUDA takes 2 to 3 us of the host's time.
LAUNCH = 3000
# The most that a call may take, in us.
LIMIT = 12.0
OPS = ("select", "prune")
PARTS = ("dispatcher", "check", "memory")
# The calls of one sample.
CALLS = 400
LIBRARY = "vispruner_host"
# Of <malloc.h>.
M_MXFAST = 1


def compile_core(folder: Path) -> Path:
    """The core with the stand-in for CUDA, as a Python module and a library for PyTorch."""
    import pybind11

    libraries = Path(torch.__file__).parent / "lib"
    output = folder / "_C.so"
    includes = [ROOT / "tests" / "support" / "cuda_on_cpu", ROOT / "csrc", pybind11.get_include()]
    command = [
        *shlex.split(os.environ.get("CXX", "g++")),
        *"-x c++ -std=c++17 -O2 -w -fPIC -shared -fvisibility=hidden".split(),
        *"-ffp-contract=off -fno-strict-aliasing".split(),
        *(f"-I{path}" for path in (*includes, sysconfig.get_path("include"))),
        *("-DVISPRUNER_KERNELS_WITH_CUDA", '-DVISPRUNER_KERNELS_CUDA_ARCHITECTURES="none"'),
        *(str(Path(__file__).with_name("host_launch.cu")), "-o", str(output)),
        # The functions of PyTorch that the stand-in does not replace are found through it.
        *("-x", "none", f"-L{libraries}", "-Wl,--no-as-needed", "-ltorch_cpu"),
        f"-Wl,-rpath,{libraries}",
    ]
    subprocess.run(command, check=True)
    return output


class Core:
    """The compiled core in this process: its operators, in the namespace LIBRARY of PyTorch."""

    def __init__(self, path: Path) -> None:
        self.module = self._load(path)
        self.library = ctypes.CDLL(str(path))
        self.library.cuda_on_cpu_configure(ctypes.c_uint64(0), 232448, 132, 1)
        self.library.set_launch_time.argtypes = [ctypes.c_int64]
        # Whenever 64 KiB are freed, the C library would join the free blocks of its heap, which the
        # allocator of a GPU does not.
        ctypes.CDLL(None).mallopt(M_MXFAST, 0)
        registration.load(self.module, str(path), str(path))
        # The Python function calls the same core.
        cuda._C = self.module
        cuda._device_and_stream = lambda tensor: (0, 0)
        _tuned.capability = lambda device: "none"
        self.definitions = torch.library.Library(LIBRARY, "DEF")
        for op in OPS:
            self._register(op)

    @staticmethod
    def _load(path: Path) -> ModuleType:
        # The operators for the CPU are not in it. Lazy binding resolves them only in a call.
        flags = sys.getdlopenflags()
        sys.setdlopenflags(os.RTLD_LAZY)
        spec = importlib.util.spec_from_file_location("_C", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.setdlopenflags(flags)
        return module

    def define(self, name: str, op: str) -> None:
        self.definitions.define(name + _schemas.SCHEMAS[op].signature)
        self.definitions.impl(name, torch.library.fallthrough_kernel, "Autograd")

    def _register(self, op: str) -> None:
        checked = _backends._checked(op, getattr(cuda, op))
        self.define(op, op)
        self.module.register_operator(
            device="cuda", name=op, library=LIBRARY, key="CPU", function=checked
        )
        self.define(f"{op}_python", op)
        self.definitions.impl(f"{op}_python", checked, "CPU")
        for number, part in enumerate(PARTS):
            self.define(f"{op}_{part}", op)
            name = f"{op}_{part}".encode()
            if self.library.register_part(LIBRARY.encode(), name, op == "prune", number):
                raise RuntimeError(f"PyTorch refuses {op}_{part}")
            self.define(f"{op}_python_{part}", op)
            self.definitions.impl(f"{op}_python_{part}", python_part(op, part), "CPU")

    def operator(self, name: str) -> Callable[..., Any]:
        return getattr(getattr(torch.ops, LIBRARY), name).default


def python_part(op: str, part: str) -> Callable[..., Any]:
    """The first parts of a call, as a Python function that is registered."""

    def nothing(features: Tensor, scores: Tensor, *rest: Any) -> Any:
        return (features, scores) if op == "prune" else features

    def memory(features: Tensor, scores: Tensor, keep: int, *rest: Any) -> Any:
        images, tokens, channels = features.shape
        device = features.device
        out = torch.empty_strided((images, keep), (keep, 1), dtype=torch.int64, device=device)
        size = cuda._scratch_bytes(images, tokens, images * tokens, True)
        torch.empty_strided((size,), (1,), dtype=torch.int8, device=device)
        if op == "select":
            return out
        return torch.empty((images, keep, channels), dtype=features.dtype, device=device), out

    function = memory if part == "memory" else nothing
    return function if part == "dispatcher" else _backends._checked(op, function)


def sample(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - begin) / CALLS


def wrong_answers(core: Core) -> list[str]:
    """The operators whose answers in the emulation are not those of the CPU."""
    core.library.set_launch_time(-1)
    features, scores = inputs_of(SHAPE)
    wrong = []
    for op in OPS:
        expected = getattr(vispruner_kernels, op)(features, scores, SHAPE.keep)
        for name in (op, f"{op}_python"):
            got = core.operator(name)(features, scores, SHAPE.keep)
            pairs = zip(got, expected, strict=True) if op == "prune" else [(got, expected)]
            if not all(torch.equal(x, y) for x, y in pairs):
                wrong.append(name)
    return wrong


def times(core: Core, rounds: int) -> dict[str, harness.Timing]:
    """The time of every operator and of its first parts, and of the public functions."""
    core.library.set_launch_time(LAUNCH)
    features, scores = inputs_of(SHAPE)
    clocks = {}
    for op in OPS:
        for name in (op, f"{op}_python"):
            for part in ("", *(f"_{part}" for part in PARTS)):
                call = functools.partial(core.operator(name + part), features, scores, SHAPE.keep)
                clocks[name + part] = functools.partial(sample, call)
        # The functions of the package call the compiled core instead.
        setattr(ops, f"_{op.upper()}", core.operator(op))
        call = functools.partial(getattr(vispruner_kernels, op), features, scores, SHAPE.keep)
        clocks[f"{op}_function"] = functools.partial(sample, call)
    with torch.inference_mode(), harness.no_collection():
        found = harness.interleaved(clocks, rounds, harness.CASE_SECONDS["cpu"])
    return {name: harness.Timing(samples, 1e6) for name, samples in found.items()}


def rows_of(found: dict[str, harness.Timing]) -> harness.Rows:
    rows = []
    for op in OPS:
        for name, by in ((op, "C++"), (f"{op}_python", "Python")):
            total = found[name].p50
            ends = [0.0, *(found[f"{name}_{part}"].p50 for part in PARTS)]
            function = found[f"{op}_function"].p50 if by == "C++" else None
            rows.append(
                {
                    "operator": op,
                    "registered by": by,
                    "call us [p10, p90]": found[name],
                    "function": function,
                    **{part: ends[i + 1] - ends[i] for i, part in enumerate(PARTS)},
                    "launch": LAUNCH / 1e3,
                    "glue": total - ends[-1] - LAUNCH / 1e3,
                    "at most": LIMIT if by == "C++" else None,
                }
            )
    return rows


def main(arguments: list[str] | None = None) -> int:
    usage = harness.parser("host time of an eager call, by its parts")
    options = usage.parse_args(arguments)
    harness.check(options, usage)
    compiler = shlex.split(os.environ.get("CXX", "g++"))[0]
    if sys.platform != "linux" or not shutil.which(compiler):
        usage.error(f"needs Linux and the C++ compiler {compiler} (CXX)")
    if registration.REASON:
        usage.error(f"operators cannot be registered from C++: {registration.REASON}")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        print("compiling the core for this CPU, for about a minute", file=sys.stderr, flush=True)
        core = Core(compile_core(Path(folder)))
        if wrong := wrong_answers(core):
            print(f"WRONG: {', '.join(wrong)}")
            return 1
        tables = {"core": rows_of(times(core, options.rounds))}
    head = harness.header(options.threads)
    head["shape"] = f"{SHAPE.batch} x {SHAPE.tokens} tokens of {SHAPE.channels}, keep {SHAPE.keep}"
    harness.report(head, tables, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
