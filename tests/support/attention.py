"""What the tests of the score operators share: hostile memory, inputs and bounds."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from vispruner_kernels.testing import assert_close, sample_qkv, scores_bound

HEAD_DIMS = (1, 8, 63, 64, 72, 80, 88, 96, 128, 256)
SCALES = (None, 0.3, -0.2, 0.0, 2.0)
# Tails of 16 and 64 lanes, one block of rows and more.
SEQUENCES = (2, 5, 16, 17, 50)


def float64(*tensors: Tensor) -> list[np.ndarray]:
    return [x.double().numpy() for x in tensors]


def poisoned_views(x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """x [..., S, H, D] as views into memory that is NaN elsewhere: view, that memory."""
    *batch, sequence, heads, head_dim = x.shape

    def nan(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=x.dtype)

    packed = nan(*batch, sequence, 3, heads, head_dim)
    heads_first = nan(*batch, 3, heads, sequence, head_dim)
    hidden = nan(*batch, sequence + 3, heads, head_dim)
    some_heads = nan(*batch, sequence, heads + 2, head_dim)
    # An odd offset: rows begin at addresses that no vector is aligned to.
    channels = nan(*batch, sequence, heads, head_dim + 3)
    every_other = nan(*batch, 2 * sequence, heads, head_dim)
    for memory, view in (
        (packed, packed.select(-3, 1)),
        (heads_first, heads_first.select(-4, 1).transpose(-3, -2)),
        (hidden, hidden.narrow(-3, 1, sequence)),
        (some_heads, some_heads.narrow(-2, 1, heads)),
        (channels, channels.narrow(-1, 1, head_dim)),
        (every_other, every_other[..., ::2, :, :]),
    ):
        yield view.copy_(x), memory


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """torch.empty is full of NaN: an element that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def assert_scores(
    got: Tensor, exact: np.ndarray, q: Tensor, k: Tensor, scale: float | None
) -> None:
    """Within the bound of the contract that does not depend on eager PyTorch.

    So half precision inputs must be as exact as float32 ones, not twice as bad as eager.
    """
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert_close(got, torch.from_numpy(exact), scores_bound(q, k, scale))


def sample_cancelling(
    batch: int, sequence: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor]:
    """q and k whose products are 20 times and more as large as the logits they add up to.

    Half of the channels add up to what the other half takes away, but for some noise.
    """
    generator = torch.Generator().manual_seed(seed)
    size, noise = (30.0, 0.001) if dtype is torch.float32 else (16.0, 0.002)
    shape = (2, batch, sequence, heads, head_dim)
    q, k = size + size * noise * torch.randn(shape, generator=generator)
    # Uneven channels, for products of half types with few bits have sums without rounding.
    half = 0.25 + 1.5 * torch.rand(head_dim // 2, generator=generator)
    return (q * half.repeat(2)).to(dtype), (k * torch.cat([half, -half])).to(dtype)


def sample_nonfinite(where: str, sequence: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """q and k [2, S, 2, 4] of which only image 0 has a value that is not finite."""
    q, k, _ = (x.contiguous() for x in sample_qkv(2, sequence, 2, 4, dtype, 21))
    # The sign of this channel decides between +inf and -inf among the logits.
    q[:, :, :, 3] = q[:, :, :, 3].abs() + 0.5
    tensor, place, value = where.split()
    row = {"first": 0, "middle": sequence // 2, "last": -1}[place]
    {"q": q, "k": k}[tensor][0, row, 1, 3] = float(value)
    return q, k


NONFINITE = [
    f"{tensor} {place} {value}"
    for tensor in "qk"
    for place in ("first", "middle", "last")
    for value in ("nan", "inf", "-inf")
]


# Largest resident memory around one call, in a process of its own.
PEAK = """
import resource, sys
import torch
from vispruner_kernels import _native, reference

backend = {"native": _native.cpu, "reference": reference}[sys.argv[1]]
op, sequence = sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)

def call(sequence):
    q, k, v = torch.rand(3, 1, sequence, 1, 64)
    before = peak()
    getattr(backend, op)(*((q, k, v) if op == "cls_attention" else (q, k)))
    return peak() - before

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

call(128)
# Freed memory must not be counted as already used: fill it up to the peak.
with open("/proc/self/statm") as statm:
    resident = int(statm.read().split()[1]) * resource.getpagesize()
ballast = torch.ones(max(1, (peak() - resident) // 4))
print(call(sequence))
"""


def peak_memory(op: str, backend: str, sequence: int) -> int:
    """Bytes by which one call raises the largest resident memory of a process."""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("resident memory is read from Linux's /proc")
    command = [sys.executable, "-c", PEAK, backend, op, str(sequence)]
    environment = {**os.environ, "VISPRUNER_KERNELS_BACKEND": "auto"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)
