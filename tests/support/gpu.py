"""Helpers of the tests that need a GPU (tests/gpu); gpu_command.py runs these tests.

The tests call the Triton kernels, or with VISPRUNER_KERNELS_BACKEND=native the CUDA kernels of the
C++ core. VISPRUNER_TEST_DEVICE=cpu checks the tests themselves without a GPU: every test that needs
no CUDA runs in Triton's interpreter, with fewer and smaller cases.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from vispruner_kernels import _backends, _native, _schemas
from vispruner_kernels._native import cuda as native
from vispruner_kernels._triton import operators
from vispruner_kernels.testing import (
    assert_close,
    assert_same_bits,
    sample_features,
    sample_offsets,
    sample_qkv,
    sample_scores,
)

DEVICE = torch.device(os.environ.get("VISPRUNER_TEST_DEVICE", "cuda"))
# Whether Triton's interpreter, which is thousands of times slower, replaces the GPU.
SIMULATED = DEVICE.type == "cpu"
# Seconds after which a test counts as hanging, and after which gpu_command.py ends the steps that
# still run. On a GPU the command ends within ten minutes.
HANG, LIMIT = (900, 1700) if SIMULATED else (200, 520)

# Whether the CUDA kernels of the C++ core are tested, and the operators that they implement.
NATIVE = _backends.REQUESTED == "native"
NATIVE_OPS = ("select", "prune", "select_varlen")

Call = tuple[str, tuple[Any, ...]]
Answer = tuple[Tensor, ...]


def some(real: int, simulated: int) -> int:
    """The first on a GPU, the second in the interpreter."""
    return simulated if SIMULATED else real


@functools.cache
def unavailable() -> str:
    """The reason why the tests cannot run on this machine, or ""."""
    if not SIMULATED:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = torch.cuda.is_available()
        if torch.version.hip:
            return "these tests are for NVIDIA GPUs"
        if not found:
            built = "" if torch.version.cuda else " (built without CUDA)"
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
    """The reason why the tests cannot run in this process, or ""."""
    if why := unavailable():
        return why
    if SIMULATED != operators.INTERPRETED:
        return f"TRITON_INTERPRET={int(operators.INTERPRETED)}, but the device is {DEVICE}"
    if NATIVE and native.REASON:
        return f"the CUDA kernels of the C++ core are {native.REASON}"
    owner = "native" if NATIVE else "triton"
    if _backends.CHECKED or _backends.OWNERS["select", DEVICE.type] != owner:
        return "VISPRUNER_KERNELS_BACKEND or VISPRUNER_KERNELS_CHECK excludes these tests"
    return ""


@pytest.fixture(autouse=True)
def watch() -> Iterator[None]:
    """Skip tests if there is no GPU. End the process if a test hangs or makes the GPU unusable."""
    if why := unprepared():
        (pytest.fail if "VISPRUNER_TEST_DEVICE" in os.environ else pytest.skip)(why)
    # A call that waits for a hanging device cannot be interrupted, so the process must end.
    faulthandler.dump_traceback_later(HANG, exit=True, file=sys.__stderr__)
    try:
        yield
        synchronize()
        if not SIMULATED:
            # The next test then gets new memory, which it fills with garbage.
            torch.cuda.empty_cache()
    except RuntimeError as error:
        pytest.exit(f"nothing more can run on this device: {error}", returncode=1)
    finally:
        faulthandler.cancel_dump_traceback_later()


needs_cuda = pytest.mark.skipif(SIMULATED, reason="the interpreter has no CUDA")
needs_triton = pytest.mark.skipif(NATIVE, reason="for the Triton kernels only")
# The warnings of PyTorch and Triton on a GPU differ by version, so they are no errors here.
marks = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


# Tensors and answers.


def upload(x: Tensor, device: torch.device = DEVICE) -> Tensor:
    """x on the device, with its strides, its alignment and the rest of its storage."""
    size = x.untyped_storage().nbytes() // x.element_size()
    memory = x.as_strided((size,), (1,), 0).to(device, copy=True)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def uploaded(call: Call, device: torch.device = DEVICE) -> Call:
    op, args = call
    return op, tuple(upload(x, device) if isinstance(x, Tensor) else x for x in args)


def run(call: Call) -> Answer:
    """The answer of the backend that owns the operator on the device of the arguments."""
    op, args = call
    answer = getattr(torch.ops.vispruner, op).default(*args)
    return answer if isinstance(answer, tuple) else (answer,)


def run_native(call: Call) -> Answer:
    """The answer of the C++ core's CUDA kernels, even if another backend owns the operator."""
    op, args = call
    answer = _backends._implementation(op, "native", "cuda")(*_schemas.complete(op, args, {}))
    return answer if isinstance(answer, tuple) else (answer,)


def run_variants(call: Call) -> Iterator[tuple[int, Answer]]:
    """The number and the answer of each variant of the CUDA kernels that fits; 0: the choice of the
    core."""
    before = native.VARIANT
    try:
        for number in range(1 + len(native.VARIANTS)):
            native.VARIANT = number
            try:
                yield number, run_native(call)
            except ValueError as error:
                if "do not fit" not in str(error):
                    raise
    finally:
        native.VARIANT = before


def expected(call: Call) -> Answer:
    """The answer of the CPU: from the C++ core if it is built, else from the reference."""
    op, args = call
    backend = "native" if _native.INSTALLED else "reference"
    answer = _backends._implementation(op, backend)(*_schemas.complete(op, args, {}))
    return answer if isinstance(answer, tuple) else (answer,)


def synchronize() -> None:
    if not SIMULATED:
        torch.cuda.synchronize()


def streams(count: int) -> list[Any]:
    """New streams. In the interpreter they are None, which `torch.cuda.stream` ignores."""
    return [None if SIMULATED else torch.cuda.Stream() for _ in range(count)]


def download(answers: Sequence[Answer]) -> list[Answer]:
    """The answers on the CPU, by one copy for each dtype instead of one for each tensor."""
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
    """The device's answers, copied to the CPU. All calls are launched before the first answer is
    read, in turn on `width` streams, in memory full of garbage."""
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
    """Assert the same bits; the error names the answers that differ."""
    wrong = []
    for name, one, other in zip(names or range(len(got)), got, wanted, strict=True):
        try:
            for x, y in zip(one, other, strict=True):
                assert_same_bits(x, y)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, f"{len(wrong)} of {len(got)} differ\n" + "\n".join(wrong[:8])


def assert_agree(call: Call, got: Answer, wanted: Answer) -> None:
    """Assert the same bits for operators in `EXACT`, a tolerance for the others. The contract has
    closer bounds for scores; test_gpu_scores.py checks those."""
    if call[0] in EXACT:
        assert_answers([got], [wanted])
    else:
        for x, y in zip(got, wanted, strict=True):
            assert_close(x, y, 4e-3 if x.dtype == torch.float16 else 4e-6)


def poison() -> None:
    """Fill the memory that the next torch.empty on the current stream gets with NaN and with random
    words."""
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
    """torch.empty returns NaN or the largest integer, which shows elements that are not written."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def placed(x: Tensor, aligned: bool, rng: random.Random) -> Tensor:
    """x [B, N, C] as a view; the memory around it is NaN. In elements, its offset and its strides
    of images and tokens are multiples of 16 if `aligned`. Else the offset is 1, and the strides are
    odd and at least 3."""

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


# Calls of every operator and rule.


def calls(
    tokens: int, dtype: torch.dtype = torch.float16, seed: int = 0, aligned: bool = True
) -> dict[str, Call]:
    """Calls by name. The seed changes the values in the tensors and nothing else."""
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
    every = {
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
    return {name: call for name, call in every.items() if not NATIVE or call[0] in NATIVE_OPS}


CALLS = tuple(calls(10))
# Operators that give the same bits on every device.
EXACT = ("select", "prune", "select_varlen", "select_topk", "select_rows")


# Extremes of an int32, and the values beside 0.
ENDS = (-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 1)


def random_offsets(rng: random.Random, count: int, most: int) -> Tensor:
    """Invalid offsets: they contradict each other or the sizes of the tensors."""
    kind = rng.choice(["any", "rising", "ends", "one", "falling"])
    values = [rng.randint(-5, most + 50) for _ in range(count)]
    if kind != "any":
        values = sorted(max(0, x) for x in values)
    if kind == "falling":
        values.reverse()
    if kind == "ends":
        values = [rng.choice([*ENDS, x]) for x in values]
    if kind == "one":
        values[rng.randrange(count)] = rng.choice(ENDS)
    return torch.tensor(values, dtype=torch.int32)
