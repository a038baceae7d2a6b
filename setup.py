"""Builds vispruner_kernels._C, the C++ core, with pybind11 and ninja. pyproject.toml has the rest.

Two environment variables, each auto (the default, also if it is empty), 0 or 1:

VISPRUNER_KERNELS_NATIVE   auto: build _C; if that fails, print why and install without it
                           1: build _C or fail          0: install without it
VISPRUNER_KERNELS_CUDA     auto: compile csrc/cuda/*.cu into _C if nvcc is found; if that fails,
                           print why and build without them
                           1: compile them or fail      0: leave them out

The CUDA kernels are compiled for all of ARCHITECTURES that nvcc knows.
VISPRUNER_KERNELS_CUDA_ARCHITECTURES replaces this list, as in "80;90".
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from itertools import dropwhile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

# No -march: one build serves every processor, because functions choose their instruction set at run
# time. No contraction and no fast math on either device: the contract fixes every rounding.
CXX_FLAGS = "-std=c++17 -O3 -g0 -fno-fast-math -ffp-contract=off -fPIC -fvisibility=hidden".split()
CXX_FLAGS += "-pthread -Wall -Wextra".split()
NVCC_FLAGS = "-std=c++17 -O3 -fmad=false -Xcompiler=-fPIC,-fvisibility=hidden,-pthread".split()
# Compile as many architectures at once as there are processors, and report on every kernel.
NVCC_FLAGS += "--threads=0 -Xptxas=-v".split()
# Each line lists alternatives: the first one that the compiler and its linker accept is used.
HARDENING = [
    ["-U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=3", "-U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2"],
    ["-fstack-protector-strong"],
]
LINK_HARDENING = [["-Wl,-z,relro,-z,now"], ["-Wl,-z,noexecstack"]]
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
# Also compiled to PTX, from which the driver compiles for later GPUs that are not in the list.
PTX_ARCHITECTURE = "100"


def switch(name):
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 0 or 1, not {value!r}")
    return value


def find_cxx():
    command = shlex.split(os.environ.get("CXX", ""))
    command = command or [next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")]
    if not shutil.which(command[0]):
        raise BaseError(f"the C++ compiler {command[0]} is not found")
    return command


def nvcc_flag(flag):
    """The option by which nvcc passes a flag to the host's compiler or linker."""
    return f"-Xlinker={flag[4:]}" if flag.startswith("-Wl,") else f"-Xcompiler={flag}"


def find_flags(command, wanted, form=str):
    """For each line of `wanted`, the first flags that make a shared library without a warning."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        # The headers of the C library warn of a level of FORTIFY that the library does not have.
        source.write_text("#include <cstring>\n")
        for alternatives in wanted:
            for flags in ([form(flag) for flag in words.split()] for words in alternatives):
                probe = [*command, *flags, form("-Werror"), "-shared", source.name, "-o", "probe"]
                done = subprocess.run(probe, cwd=folder, capture_output=True, check=False)
                if done.returncode == 0:
                    found += flags
                    break
    return found


def find_ninja():
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH") or os.defpath])
    ninja = shutil.which("ninja", path=path)
    if not ninja:
        raise BaseError("ninja is not found")
    return ninja


def find_cuda():
    """nvcc and the sources for it, or None and no sources."""
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which(os.path.join(home, "bin", "nvcc"))) or shutil.which("nvcc")
    sources = [] if CUDA == "0" else sorted(Path("csrc/cuda").glob("*.cu"))
    if nvcc and sources:
        return nvcc, sources
    problem = (
        "there is no csrc/cuda/*.cu to compile" if nvcc else "nvcc is not found (CUDA_HOME, PATH)"
    )
    if CUDA == "1":
        raise BaseError(f"VISPRUNER_KERNELS_CUDA=1, but {problem}")
    if sources:
        print(f"vispruner_kernels: WITHOUT the CUDA kernels: {problem}", file=sys.stderr)
    return None, []


def find_architectures(nvcc):
    """The architectures to compile for, and their flags of nvcc."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    known = [code.removeprefix("sm_") for code in known.stdout.split()]
    asked = os.environ.get("VISPRUNER_KERNELS_CUDA_ARCHITECTURES", "").replace(";", " ").split()
    if wrong := [architecture for architecture in asked if architecture not in known]:
        raise BaseError(
            f"VISPRUNER_KERNELS_CUDA_ARCHITECTURES names {', '.join(wrong)}, {nvcc} knows "
            f"{', '.join(known) or 'none'}"
        )
    found = asked or [architecture for architecture in ARCHITECTURES if architecture in known]
    if not found:
        raise BaseError(f"{nvcc} knows none of sm_{', sm_'.join(ARCHITECTURES)}")
    missing = [] if asked else [name for name in ARCHITECTURES if name not in known]
    for architecture in missing:
        print(f"vispruner_kernels: {nvcc} cannot compile for sm_{architecture}", file=sys.stderr)
    newest = max(found, key=lambda architecture: int(re.sub(r"\D", "", architecture)))
    ptx = PTX_ARCHITECTURE if PTX_ARCHITECTURE in found else newest
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in found]
    return found, [*flags, f"-gencode=arch=compute_{ptx},code=compute_{ptx}"]


def print_resources(log):
    """Print the registers and spills that ptxas reported, one line per architecture."""
    kernels = re.findall(
        r"entry function '\S+' for '(sm_\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores"
        r".*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    for name in dict.fromkeys(kernel[0] for kernel in kernels):
        numbers = [[int(x) for x in kernel[1:]] for kernel in kernels if kernel[0] == name]
        stack, spilled, registers = (max(column) for column in zip(*numbers, strict=True))
        print(
            f"vispruner_kernels: {name}: {len(numbers)} kernels, at most {registers} registers, "
            f"{stack} bytes of stack, {spilled} bytes spilled"
        )


def ninja_path(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_command(command):
    return shlex.join(command).replace("$", "$$")


class NinjaBuildExt(build_ext):
    """Compiles the sources of an extension in parallel; a rebuild compiles only changed ones."""

    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name))
        nvcc, cuda_sources = None, []
        try:
            nvcc, cuda_sources = find_cuda()
            return self._build(ext, output, nvcc, cuda_sources)
        except (BaseError, ImportError) as error:
            problem = str(error)
        if cuda_sources and CUDA == "auto":
            # If nvcc does not work with this compiler, the rest of the core may still build.
            print(f"vispruner_kernels: WITHOUT the CUDA kernels: {problem}", file=sys.stderr)
            try:
                return self._build(ext, output, None, [])
            except (BaseError, ImportError) as error:
                problem = str(error)
        # Delete an older build, which would be mistaken for the one that failed.
        for stale in (output, Path(*ext.name.split(".")[:-1], output.name)):
            stale.unlink(missing_ok=True)
        if "1" in (NATIVE, CUDA):
            raise BaseError(f"vispruner_kernels._C was not built: {problem}")
        print(
            f"vispruner_kernels: WITHOUT the C++ core, CPU operators run on the slower PyTorch "
            f"reference: {problem}. VISPRUNER_KERNELS_NATIVE=1 makes this an error. To try again: "
            "pip install --no-cache-dir --force-reinstall --no-deps .",
            file=sys.stderr,
        )

    def _build(self, ext, output, nvcc, cuda_sources):
        if self.compiler.compiler_type != "unix":
            raise BaseError(f"needs GCC or Clang, not {self.compiler.compiler_type}")
        import pybind11

        cxx, ninja = find_cxx(), find_ninja()

        # The flags of Python and of CXXFLAGS, CPPFLAGS and LDFLAGS, without the compiler's name.
        compile_flags, link_flags = (
            list(dropwhile(lambda word: not word.startswith("-"), command))
            for command in (self.compiler.compiler_so_cxx, self.compiler.linker_so_cxx)
        )
        includes = ["-Icsrc", "-isystem", pybind11.get_include()]
        includes += ["-isystem", sysconfig.get_path("include")]
        defines, nvcc_flags = [], []
        if cuda_sources:
            architectures, nvcc_flags = find_architectures(nvcc)
            defines = ["-DVISPRUNER_KERNELS_WITH_CUDA"]
            defines += [f'-DVISPRUNER_KERNELS_CUDA_ARCHITECTURES="{" ".join(architectures)}"']
        hardening = find_flags([*cxx, *CXX_FLAGS], HARDENING)
        compile_cxx = [*cxx, *compile_flags, *CXX_FLAGS, *hardening, *defines, *includes]
        if cuda_sources:
            # nvcc chooses its own compiler for the host, and links with it.
            host = [nvcc, "-O3", nvcc_flag("-fPIC")]
            nvcc_flags += find_flags(host, HARDENING, nvcc_flag)
            link = [nvcc, "-shared", "-ldl", *find_flags(host, LINK_HARDENING, nvcc_flag)]
        else:
            link = [*cxx, *link_flags, "-pthread", "-ldl"]
            link += find_flags([*cxx, *CXX_FLAGS], LINK_HARDENING)

        build_dir = Path(self.build_temp)
        lines = [
            f"builddir = {ninja_path(build_dir)}",
            "rule cxx",
            f"  command = {ninja_command(compile_cxx)} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = C++ $in",
            "rule link",
            f"  command = {ninja_command(link)} $in -o $out",
            "  description = link $out",
        ]
        if cuda_sources:
            lines += [
                "rule nvcc",
                f"  command = {ninja_command([nvcc, *NVCC_FLAGS, *nvcc_flags, *includes])} "
                "-MD -MF $out.d -c $in -o $out > $out.txt 2>&1 || { cat $out.txt; exit 1; }",
                "  depfile = $out.d",
                "  deps = gcc",
                "  description = CUDA $in",
            ]
        objects = []
        for source in [*ext.sources, *cuda_sources]:
            objects.append(ninja_path(build_dir / f"{source}.o"))
            rule = "nvcc" if source in cuda_sources else "cxx"
            lines.append(f"build {objects[-1]}: {rule} {ninja_path(source)}")
        lines.append(f"build {ninja_path(output)}: link {' '.join(objects)}")

        build_dir.mkdir(parents=True, exist_ok=True)
        build_file = build_dir / "build.ninja"
        build_file.write_text("\n".join(lines) + "\n")
        self.spawn([ninja, "-f", str(build_file)])
        for source in cuda_sources:
            print_resources((build_dir / f"{source}.o.txt").read_text())


NATIVE = switch("VISPRUNER_KERNELS_NATIVE")
CUDA = switch("VISPRUNER_KERNELS_CUDA")
if (NATIVE, CUDA) == ("0", "1"):
    raise SystemExit("VISPRUNER_KERNELS_CUDA=1 needs VISPRUNER_KERNELS_NATIVE=auto or 1, not 0")

native = Extension(
    "vispruner_kernels._C",
    sources=["csrc/bindings.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))],
    depends=sorted(map(str, Path("csrc").rglob("*.*h"))),
    optional="1" not in (NATIVE, CUDA),
)
setup(
    ext_modules=[] if NATIVE == "0" else [native],
    cmdclass={"build_ext": NinjaBuildExt},
)
