"""The CUDA kernels, compiled unchanged for a CPU and run thread by thread (cuda_on_cpu).

They give the bits of the C++ core for every order of threads and blocks, and every size of shared
memory. Where up to 8 blocks are resident at a time, they take turns at random: at barriers, atomic
operations on global memory and fences. In the build with `RACES` they also take turns at other
accesses to scratch and results, and a release and an acquire must order every two accesses of
different blocks (races.h). Faults put into a copy of the sources are found.

These tests do not run the PTX of `csrc/cuda/ptx.cuh`, which the emulation replaces, and measure no
time. Loads never return old values. A race with a load is missed if another block has loaded the
same word since.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import variants

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
CSRC = ROOT / "csrc"
# Bytes of shared memory: compute capability 9.0 and 10.0; 8.6, 8.9 and 12.0; little more than a
# tile needs.
SHARED = {"most": 232448, "some": 101376, "little": 49152}
CXX = shlex.split(os.environ.get("CXX", "g++"))
# g++ calls the functions of races.h at every access to memory. libtsan also has functions of these
# names, so it is not linked.
RACES = (
    "-O1",
    "-g",
    "-fsanitize=thread",
    "--param=tsan-distinguish-volatile=1",
    "--param=tsan-instrument-func-entry-exit=0",
    *("-nodefaultlibs", "-lstdc++", "-lm", "-lc", "-lgcc_s"),
)

try:
    import pybind11
except ImportError:
    pybind11 = None

pytestmark = [
    pytest.mark.skipif(not shutil.which(CXX[0]), reason="no C++ compiler"),
    pytest.mark.skipif(pybind11 is None, reason="pybind11 is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="cuda_on_cpu needs Linux"),
]


def build(folder: Path, *flags: str, csrc: Path = CSRC) -> str:
    """Compile the library, once for all test processes."""
    folder.mkdir(exist_ok=True)
    library = folder / "_C.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            includes = [f"-I{SUPPORT / 'cuda_on_cpu'}", f"-I{csrc}"]
            for path in (pybind11.get_include(), sysconfig.get_path("include")):
                includes += ["-isystem", path]
            options = "-x c++ -std=c++17 -Wall -Wextra -Wno-unknown-pragmas -Werror -fPIC -shared"
            # As nvcc with -fmad=false. Kernels load vectors from arrays of other types.
            options += " -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing"
            defines = ["-DVISPRUNER_KERNELS_WITH_CUDA"]
            defines += ['-DVISPRUNER_KERNELS_CUDA_ARCHITECTURES="none"']
            command = [*CXX, *options.split(), *includes, *defines]
            sources = [str(csrc / "cuda" / "select.cu"), str(csrc / "bindings.cpp")]
            part = folder / "part.so"
            subprocess.run([*command, *sources, *flags, "-o", str(part)], check=True, timeout=300)
            part.rename(library)
    return str(library)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder that all workers of pytest-xdist share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def library(shared_folder) -> str:
    return build(shared_folder / "cuda_on_cpu", "-O2")


def emulate(
    library: str, environment: dict[str, str] | None = None, **todo: object
) -> subprocess.CompletedProcess[str]:
    """Run emulated.py."""
    return subprocess.run(
        [sys.executable, str(SUPPORT / "emulated.py"), library, json.dumps(todo)],
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def run(library: str, environment: dict[str, str] | None = None, **todo: object) -> int:
    """Run emulated.py; return the number of calls that agreed."""
    done = emulate(library, environment, **todo)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stderr[-4000:]}"
    return int(done.stdout.split()[-1])


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.kernels) for n in (1, 2))])
def test_random_cases_give_the_bits_of_the_core(library, seed, shared):
    """Every dtype, layout, rule and operator; threads in ascending, descending and random order."""
    begin = 1000 * list(SHARED).index(shared) + 300 * seed
    task = {"random": [begin, begin + 240, 130], "seed": seed, "shared": SHARED[shared]}
    assert run(library, **task) == 300


@pytest.mark.parametrize("shared", [pytest.param("little", marks=pytest.mark.kernels), "most"])
@pytest.mark.parametrize(
    "seed", [*(pytest.param(n, marks=pytest.mark.kernels) for n in range(4)), 4]
)
def test_blocks_at_the_same_time_give_the_bits_of_the_core(library, seed, shared):
    """Two calls at the same time, each with several tiles, and a replay of both."""
    task = {"interleaved": [500 * seed, 120, 170], "seed": seed, "shared": SHARED[shared]}
    assert run(library, **task, resident=8) == 120


@pytest.mark.kernels
def test_no_accesses_race(shared_folder):
    library = build(shared_folder / "cuda_on_cpu_races", *RACES)
    for seed, shared in enumerate(SHARED.values()):
        task = {"interleaved": [3000 + 500 * seed, 40, 200], "seed": seed, "shared": shared}
        assert run(library, **task, resident=8) == 40
    for kind in ("clustered", "duplicates"):
        task = {"models": [[[1, 300, 8, 24]], kind, "float16"], "turns": 7}
        assert run(library, **task, seed=4, shared=SHARED["most"]) == 14


def changed(folder: Path, name: str, found: str, replacement: str) -> Path:
    """A copy of the sources in which csrc/cuda/`name` is changed."""
    csrc = folder / "csrc"
    if not csrc.exists():
        shutil.copytree(CSRC, csrc)
    path = csrc / "cuda" / name
    source = path.read_text()
    assert source.count(found) == 1
    path.write_text(source.replace(found, replacement))
    return csrc


CLAIM = "atomicCAS(word, found, tag << kCountBits)"
ARRIVAL = "arrive_at(counter)"
# Faults in scratch.cuh: the text, its replacement, and a part of the message.
FAULTS = {
    "a store opens a counter": (CLAIM, "*word = tag << kCountBits", "a race"),
    "arrival has no release": (
        ARRIVAL,
        "atomicAdd(reinterpret_cast<unsigned long long*>(counter), 1ull)",
        "a race",
    ),
    "no barrier before the arrival": (
        "__syncthreads();\n  bool last = false;",
        "bool last = false;",
        "a race",
    ),
    "a counter stays open": ("if (last) *counter = 0;", "", "differ"),
}


@pytest.mark.kernels
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_between_blocks_are_found(tmp_path, fault):
    *change, message = FAULTS[fault]
    library = build(tmp_path / "library", *RACES, csrc=changed(tmp_path, "scratch.cuh", *change))
    task = {"interleaved": [0, 20, 200], "seed": 3, "shared": SHARED["most"]}
    done = emulate(library, **task, resident=8)
    assert done.returncode != 0
    assert message in done.stderr


# Faults within a block: the file, the text and its replacement.
FAULTS_OF_A_BLOCK = {
    "sums are cleared while threads read them": (
        "bipartite.cuh",
        "__syncthreads();\n  passes.ranks.sizes.turn();",
        "passes.ranks.sizes.turn();\n  __syncthreads();",
    ),
    "a warp reads entries that it still collects": (
        "bipartite.cuh",
        "__syncwarp();\n#pragma unroll\n      for (int32_t x = lane_id()",
        "\n#pragma unroll\n      for (int32_t x = lane_id()",
    ),
}


@pytest.mark.kernels
@pytest.mark.parametrize("fault", FAULTS_OF_A_BLOCK)
def test_faults_within_a_block_are_found(tmp_path, fault):
    csrc = changed(tmp_path, *FAULTS_OF_A_BLOCK[fault])
    library = build(tmp_path / "library", *RACES, csrc=csrc)
    task = {"models": [[[1, 300, 8, 24]], "clustered", "float16"], "turns": 7}
    done = emulate(library, **task, seed=4, shared=SHARED["most"])
    assert done.returncode != 0
    assert "a race in shared memory" in done.stderr


# Wrong ranks of keys in overfull buckets: the text in ranks.cuh and its replacement.
NOT_COMPARED = {
    "": None,
    "keys without room": ("rank[e] + rank_among_homeless(i[e])", "rank[e]"),
    "all keys": (": rank_among_all(i[e], n);", ": rank[e] + 0 * n;"),
}


@pytest.mark.kernels
@pytest.mark.parametrize("fault", NOT_COMPARED)
def test_overfull_buckets_give_the_bits_of_the_core(tmp_path, fault):
    """Buckets that never follow the similarities are overfull in most passes."""
    csrc = changed(tmp_path, "bipartite.cuh", "kAdapt = 8;", "kAdapt = 1 << 20;")
    if fault:
        changed(tmp_path, "ranks.cuh", *NOT_COMPARED[fault])
    library = build(tmp_path / "library", "-O2", csrc=csrc)
    statuses = []
    for kind in ("clustered", "duplicates"):
        task = {"models": [[[1, 700, 8, 40], [1, 576, 16, 64]], kind, "float16"], "turns": 7}
        done = emulate(library, **task, seed=3, shared=SHARED["most"])
        statuses.append(done.returncode)
        assert fault or done.stdout.split()[-1] == "28", done.stderr[-4000:]
    assert any(statuses) == bool(fault)


@pytest.mark.kernels
@pytest.mark.parametrize("rounds", [0, 1])
def test_pairwise_does_not_depend_on_the_eager_rounds(library, rounds):
    task = {"random": [5000, 5150, 90], "eager_rounds": rounds, "device": 3 + 80 * rounds}
    assert run(library, **task, seed=2 + rounds, shared=SHARED["most"]) > 150


# Images, tokens, channels, tokens kept. The sizes cover whole lists, halved lists and no lists in
# shared memory, last passes over similarities in shared memory, and more scores than fit at once.
MODELS = [
    ("most", "clustered", "float16", [[1, 576, 1024, 64]]),
    ("some", "clustered", "bfloat16", [[2, 576, 96, 32], [1, 729, 72, 128]]),
    ("most", "duplicates", "float32", [[1, 1100, 16, 40]]),
    ("some", "constant", "float16", [[1, 300, 40, 20]]),
    ("little", "clustered", "float32", [[1, 900, 16, 60], [1, 4200, 3, 4190]]),
]


@pytest.mark.parametrize(
    "model",
    [*MODELS[:-1], pytest.param(MODELS[-1], marks=pytest.mark.kernels)],
    ids=lambda model: "-".join(map(str, model[:3])),
)
def test_sizes_of_models_give_the_bits_of_the_core(library, model):
    shared, kind, dtype, sizes = model
    todo = {"models": [sizes, kind, dtype], "seed": 3, "shared": SHARED[shared]}
    assert run(library, **todo) == 2 * len(sizes)


@pytest.mark.kernels
@pytest.mark.parametrize("shared", ["most", "some"])
def test_every_variant_gives_the_bits_of_the_core(library, shared):
    """Seven turns: the core's own choice and six variants, or those of them whose arrays fit."""
    sizes = [[1, 576, 40, 64], [3, 200, 24, 20]]
    todo = {"models": [sizes, "clustered", "float16"], "turns": 7}
    assert run(library, **todo, seed=8, shared=SHARED[shared]) == 28


def test_contradictory_offsets_stay_in_bounds(library):
    assert run(library, offsets=60, seed=4, shared=SHARED["some"]) == 60


def test_pairwise_with_hubs_gives_the_bits_of_the_core(library):
    """A hub is a token that is the nearest of most others. Groups of equal tokens are here too."""
    assert run(library, hubs=[0, 1, 64], tokens=210, seed=5, shared=SHARED["some"]) == 42


@pytest.mark.kernels
def test_tuning_checks_and_times_every_variant(library, tmp_path):
    """A stand-in for a GPU takes as long as this CPU, so the times mean nothing."""
    file = tmp_path / "tuned.json"
    todo = {"tune": [str(file), [[2, 66, 8, 20], [1, 700, 8, 96]]], "seed": 6}
    done = emulate(library, **todo, shared=SHARED["some"])
    assert done.returncode == 0, done.stderr[-4000:]
    found = re.findall(r"^emulated .* native +\d+ +(.*?)  ", done.stdout, re.MULTILINE)
    names = [", ".join(f"{k} {n}" for k, n in each.items()) for each in variants.native()]
    # For each shape and matching the launcher's choice, then all variants.
    assert found == ["own", *names] * 4
    assert "does not fit" in done.stdout
    rows = json.loads(file.read_text())
    sizes = [(row["matching"], row["images"], row["tokens"]) for row in rows["native"]]
    assert sizes == [
        (name, *size) for name in ("bipartite", "pairwise") for size in ((1, 700), (2, 66))
    ]
    assert rows["triton"] == []


@pytest.mark.kernels
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("seed", range(2))
def test_thousands_of_random_cases_give_the_bits_of_the_core(library, seed, shared):
    begin = 10_000 + 10_000 * list(SHARED).index(shared) + 1000 * seed
    task = {"random": [begin, begin + 800, 200], "seed": 10 + seed, "shared": SHARED[shared]}
    assert run(library, **task) == 1000


@pytest.mark.kernels
def test_long_images_give_the_bits_of_the_core(library):
    sizes = [[1, 2880, 16, 160], [1, 1700, 16, 64]]
    todo = {"models": [sizes, "clustered", "float16"], "seed": 6, "shared": SHARED["most"]}
    assert run(library, **todo) == 4


@pytest.mark.kernels
def test_sanitizers_find_nothing(shared_folder):
    """No access outside of an allocation, no misaligned one, no undefined overflow."""
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    library = build(shared_folder / "cuda_on_cpu_sanitized", *flags)
    # A variant that does not fit throws, and the sanitizer finds that only in a loaded libstdc++.
    libraries = []
    for name in ("libasan.so", "libstdc++.so"):
        command = [*CXX, f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"no {name}")
        libraries.append(found)
    # Python does not free all of its memory at exit.
    environment = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    for shared, begin in zip(SHARED.values(), (0, 100, 200), strict=True):
        todo = {"random": [begin, begin + 60, 130], "offsets": 20, "shared": shared}
        assert run(library, environment, **todo, seed=7) == 95
    todo = {"interleaved": [0, 30, 200], "seed": 8, "shared": SHARED["some"]}
    assert run(library, environment, **todo, resident=8) == 30
