"""The tests that need a GPU: `python -m tests.gpu` runs them, and some calls in compute-sanitizer.

Where no GPU can run the kernels it says so and exits with status 2. VISPRUNER_TEST_DEVICE=cpu tests
the tests: fewer and smaller cases of all that needs no CUDA, in Triton's interpreter. The rest of
this module is what these tests share.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import os
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    import pytest
    import torch
    from torch import Tensor

    from vispruner_kernels import _backends, _native
    from vispruner_kernels._triton import operators
    from vispruner_kernels.testing import (
        assert_close,
        assert_same_bits,
        sample_features,
        sample_offsets,
        sample_qkv,
        sample_scores,
    )
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"tests.gpu: {sys.executable} has no {error.name}; pip install it", file=sys.stderr)
    raise SystemExit(2) from None

ROOT = Path(__file__).parent.parent
DEVICE = torch.device(os.environ.get("VISPRUNER_TEST_DEVICE", "cuda"))
# Whether Triton's interpreter, which is thousands of times slower, has the part of the GPU.
SIMULATED = DEVICE.type == "cpu"
# Seconds after which a test hangs, and what compute-sanitizer watches.
HANG, LONGEST = (900, 900) if SIMULATED else (200, 600)

Call = tuple[str, tuple[Any, ...]]
Answer = tuple[Tensor, ...]


def some(real: int, simulated: int) -> int:
    return simulated if SIMULATED else real


@functools.cache
def unavailable() -> str:
    """Why the tests cannot run, or nothing."""
    if not SIMULATED:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = torch.cuda.is_available()
        if torch.version.hip:
            return "the reference owns AMD GPUs, and these tests are of the kernels"
        if not found:
            built = "" if torch.version.cuda else ", which is built without CUDA,"
            why = "".join(f": {str(w.message).splitlines()[0]}" for w in caught[:1])
            return f"PyTorch {torch.__version__}{built} finds no NVIDIA GPU{why}"
    if operators.REASON:
        return operators.REASON
    from vispruner_kernels._triton import launch

    if not SIMULATED:
        try:
            launch._check_device(torch.cuda.current_device())
        except RuntimeError as error:
            return str(error)
    return ""


def unprepared() -> str:
    """Why the tests cannot run in this process, or nothing."""
    if why := unavailable():
        return why
    if SIMULATED != operators.INTERPRETED:
        return f"TRITON_INTERPRET={int(operators.INTERPRETED)}, but the device is {DEVICE}"
    if _backends.CHECKED or _backends.OWNERS["select", DEVICE.type] != "triton":
        return "VISPRUNER_KERNELS_BACKEND or VISPRUNER_KERNELS_CHECK is not that of these tests"
    return ""


@pytest.fixture(autouse=True)
def watch() -> Iterator[None]:
    """Skips without a GPU; ends the process where a test hangs, or leaves the device unusable."""
    if why := unprepared():
        (pytest.fail if "VISPRUNER_TEST_DEVICE" in os.environ else pytest.skip)(why)
    # Waiting for a device that hangs, nothing but the end of the process helps.
    faulthandler.dump_traceback_later(HANG, exit=True, file=sys.__stderr__)
    try:
        yield
        synchronize()
        if not SIMULATED:
            # So that the next test fills memory of its own with garbage.
            torch.cuda.empty_cache()
    except RuntimeError as error:
        pytest.exit(f"nothing more can run on this device: {error}", returncode=1)
    finally:
        faulthandler.cancel_dump_traceback_later()


needs_cuda = pytest.mark.skipif(SIMULATED, reason="the interpreter has no CUDA")
# What PyTorch and Triton warn of on a GPU differs by version.
marks = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


# Tensors and answers.


def upload(x: Tensor, device: torch.device = DEVICE) -> Tensor:
    """x on the device, with its strides, its alignment and the memory around it."""
    size = x.untyped_storage().nbytes() // x.element_size()
    memory = x.as_strided((size,), (1,), 0).to(device, copy=True)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def uploaded(call: Call, device: torch.device = DEVICE) -> Call:
    op, args = call
    return op, tuple(upload(x, device) if isinstance(x, Tensor) else x for x in args)


def run(call: Call) -> Answer:
    """The answer of whoever owns the operator on the device of the arguments."""
    op, args = call
    answer = getattr(torch.ops.vispruner, op).default(*args)
    return answer if isinstance(answer, tuple) else (answer,)


def expected(call: Call) -> Answer:
    """The answer of the CPU: of the compiled core if it is built, else of the reference."""
    op, args = call
    answer = _backends._implementation(op, "native" if _native.INSTALLED else "reference")(*args)
    return answer if isinstance(answer, tuple) else (answer,)


def synchronize() -> None:
    if not SIMULATED:
        torch.cuda.synchronize()


def streams(count: int) -> list[Any]:
    # None leaves the current stream as it is.
    return [None if SIMULATED else torch.cuda.Stream() for _ in range(count)]


def download(answers: Sequence[Answer]) -> list[Answer]:
    """One copy for each dtype, not for each tensor."""
    tensors = [x for answer in answers for x in answer]
    parts: dict[int, Tensor] = {}
    for dtype in {x.dtype for x in tensors}:
        numbers = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        memory = torch.cat([tensors[i].flatten() for i in numbers]).cpu()
        for i, part in zip(
            numbers, memory.split([tensors[i].numel() for i in numbers]), strict=True
        ):
            parts[i] = part.view(tensors[i].shape)
    flat = iter(range(len(tensors)))
    return [tuple(parts[next(flat)] for _ in answer) for answer in answers]


def answers(calls: Sequence[Call], width: int = 1) -> list[Answer]:
    """The device's answers, on the CPU. All calls are launched before the first is looked at, in
    turn on `width` streams, in memory full of garbage."""
    calls = [uploaded(call) for call in calls]
    turns = streams(width)
    for stream in turns:
        with torch.cuda.stream(stream):
            poison()
    synchronize()
    got = []
    for i, call in enumerate(calls):
        with torch.cuda.stream(turns[i % width]):
            got.append(run(call))
    synchronize()
    return download(got)


def assert_answers(
    got: Sequence[Answer], wanted: Sequence[Answer], names: Sequence[object] | None = None
) -> None:
    """The same bits; says which of many answers are wrong."""
    wrong = []
    for name, one, other in zip(names or range(len(got)), got, wanted, strict=True):
        try:
            for x, y in zip(one, other, strict=True):
                assert_same_bits(x, y)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, f"{len(wrong)} of {len(got)} differ\n" + "\n".join(wrong[:8])


def assert_agree(call: Call, got: Answer, wanted: Answer) -> None:
    """To the bit where that is promised; of scores the contract says more than this."""
    if call[0] in EXACT:
        assert_answers([got], [wanted])
    else:
        for x, y in zip(got, wanted, strict=True):
            assert_close(x, y, 4e-3 if x.dtype == torch.float16 else 4e-6)


def poison() -> None:
    """Fills what the current stream's next torch.empty will get with NaN and with random words."""
    if SIMULATED:
        return
    blocks = []
    for words in (2**6, 2**9, 2**12, 2**15, 2**18, 2**22):
        for _ in range(2):
            blocks += [torch.empty(words, dtype=torch.int64, device=DEVICE) for _ in range(2)]
            blocks[-2].random_(-(2**63), 2**63 - 1)
            blocks[-1].view(torch.float32).fill_(torch.nan)


@contextlib.contextmanager
def filled() -> Iterator[None]:
    """torch.empty is full of NaN or of the largest integer: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def placed(x: Tensor, aligned: bool, rng: random.Random) -> Tensor:
    """x [B, N, C] as a view into memory that is NaN elsewhere, with an address and strides that are
    multiples of 16, or odd and not 1."""

    def stride(size: int) -> int:
        size += rng.choice([0, 0, 40])
        return -(-size // 16) * 16 if aligned else max(3, size | 1)

    batch, tokens, channels = x.shape
    if rng.random() < 0.2:
        image = stride(channels)
        row = stride(max(1, batch) * image)
        size = tokens * row
    else:
        row = stride(channels)
        image = stride(tokens * row)
        size = max(1, batch) * image
    offset = 16 if aligned else 1
    memory = torch.full((offset + size,), torch.nan, dtype=x.dtype)
    return memory.as_strided(x.shape, (image, row, 1), offset).copy_(x)


# One call of every operator and rule.


def calls(
    tokens: int, dtype: torch.dtype = torch.float16, seed: int = 0, aligned: bool = True
) -> dict[str, Call]:
    """Calls by name. Another seed changes what is in the tensors, and nothing else."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    features = sample_features("clustered", 3, tokens, 48, generator).to(dtype)
    features = placed(features, aligned, random.Random(0))
    scores = sample_scores("ties", 3, tokens, generator)
    q, k, v = sample_qkv(3, tokens + 1, 3, 32, dtype, seed)
    lse = 8.0 + torch.randn(3, 3, tokens + 1, generator=generator)
    cut = rng.randint(1, tokens - 1)
    lengths = [cut, 0, tokens - cut]
    keep, width = tokens // 3, next(w for w in (20, 10, 5, 3, 2, 1) if tokens % w == 0)
    packed = (features[0], scores[0], sample_offsets(lengths))
    packed = (*packed, sample_offsets([n // 3 for n in lengths]), tokens, keep)
    images = (q[0, 1:], k[0, 1:], packed[2], tokens)
    pairwise = (0.4, 3, "pairwise")
    return {
        "select": ("select", (features, scores, keep)),
        "select-pairwise": ("select", (features, scores, keep, *pairwise)),
        "select-scores": ("select", (features, scores, keep, 1.0)),
        "prune": ("prune", (features, scores, keep)),
        "prune-pairwise": ("prune", (features, scores, keep, *pairwise)),
        "select_varlen": ("select_varlen", packed),
        "select_varlen-pairwise": ("select_varlen", (*packed, *pairwise)),
        "select_topk": ("select_topk", (scores, keep)),
        "select_rows": ("select_rows", (scores, width, (tokens // width + 1) // 2)),
        "cls_attention": ("cls_attention", (q, k, v)),
        "cls_scores": ("cls_scores", (q, k, 0.3, 4)),
        "received_scores": ("received_scores", (q, k)),
        "received_scores-lse": ("received_scores", (q, k, 0.3, 2, lse)),
        "received_scores_varlen": ("received_scores_varlen", images),
        "received_scores_varlen-lse": ("received_scores_varlen", (*images, None, lse[0, :, 1:])),
    }


CALLS = tuple(calls(10))
# Operators whose answer is the same to the bit on every device.
EXACT = ("select", "prune", "select_varlen", "select_topk", "select_rows")


# The command.

FILES = ("test_gpu_select.py", "test_gpu_scores.py", "test_gpu_launch.py", "test_gpu_memory.py")
STEPS = ("tests", "memcheck", "racecheck")


def _environment() -> dict[str, str]:
    """Of a process that tests the kernels, whatever is chosen for this one."""
    ours = ("VISPRUNER_KERNELS_", "TRITON_INTERPRET")
    environment = {n: v for n, v in os.environ.items() if not n.startswith(ours)}
    path = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    # Named, so that tests that cannot run fail.
    environment["VISPRUNER_TEST_DEVICE"] = str(DEVICE)
    if SIMULATED:
        environment |= {"TRITON_INTERPRET": "1", "VISPRUNER_KERNELS_BACKEND": "triton"}
    return environment


def _output(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Status and output, which is also printed."""
    options = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **options)
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def _pytest(arguments: list[str], jobs: int) -> bool:
    """Whether all passed. Several files at once, for the time goes into compilers; in processes of
    their own, for an invalid access ends a process' use of the device."""
    # Not captured by file descriptor: what `watch` writes is to be seen.
    options = ["-m", "gpu", "-v", "--capture=sys", "--durations=5", "-p", "no:cacheprovider"]
    start = [sys.executable, "-m", "pytest", *options]
    commands = [[*start, f"tests/{file}", *arguments] for file in FILES]
    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(lambda command: _output(command, _environment()), commands)
        statuses = [status for status, _ in done]
    print(f"tests.gpu: status {dict(zip(FILES, statuses, strict=True))}", flush=True)
    # 5: no test of the file is among those that were asked for.
    return set(statuses) <= {0, 5} and 0 in statuses


def _sanitizer() -> str | None:
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    homes = [home for home in (*homes, "/usr/local/cuda") if home]
    folders = [f"{home}/{folder}" for home in homes for folder in ("bin", "compute-sanitizer")]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *folders])
    return shutil.which("compute-sanitizer", path=path)


def _sanitize(tools: list[str]) -> bool:
    """Whether the tools, where there are any, found nothing."""
    program = _sanitizer()
    if program is None:
        print("tests.gpu: no compute-sanitizer here; it comes with the CUDA toolkit", flush=True)
        return True
    script = [sys.executable, str(ROOT / "tests" / "sanitize.py")]
    # Each tensor in memory of its own: what lies beyond it is seen.
    environment = _environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        environment.pop(name, None)
    # Alone first: after it everything is compiled, and what fails fails for another reason.
    passed = _output(script, environment)[0] == 0
    for tool in tools if passed else ():
        options = ["--tool", tool, "--error-exitcode", "86", "--print-limit", "20"]
        # PyTorch asks for what a driver may not have, and is content with an error.
        options += ["--report-api-errors", "no", "--target-processes", "application-only"]
        print(f"tests.gpu: {' '.join([program, *options, *script])}", flush=True)
        status, output = _output([program, *options, *script], environment)
        if "Device not supported" in output and "agree" not in output:
            print(f"tests.gpu: {tool} cannot watch this device and was not run", flush=True)
        elif status or "SUMMARY" not in output:
            print(f"tests.gpu: {tool} failed with status {status}", flush=True)
            passed = False
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tests.gpu", description="Other arguments are pytest's.", allow_abbrev=False
    )
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, help="some of the steps")
    parser.add_argument("--jobs", type=int, default=len(FILES), help="files tested at once")
    options, arguments = parser.parse_known_args()
    if why := unavailable():
        print(f"tests.gpu: {why}", file=sys.stderr)
        return 2
    name = "Triton's interpreter" if SIMULATED else torch.cuda.get_device_name()
    print(f"tests.gpu: {name}, PyTorch {torch.__version__}", flush=True)
    passed = "tests" not in options.only or _pytest(arguments, options.jobs)
    tools = [step for step in STEPS[1:] if step in options.only]
    if tools and not SIMULATED:
        passed = _sanitize(tools) and passed
    print(f"tests.gpu: {'passed' if passed else 'FAILED'}", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
