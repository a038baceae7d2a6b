"""Inputs, bounds and poisoned memory for the tests of scores from attention."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from vispruner_kernels.testing import (
    OUT_TOLERANCE,
    assert_close,
    sample_offsets,
    sample_qkv,
    scores_bound,
)

HEAD_DIMS = (1, 8, 63, 64, 72, 80, 88, 96, 128, 256)


class Answer(NamedTuple):
    """The answer of an operator; `out` is None unless it is cls_attention."""

    out: Tensor | None
    scores: Tensor


def arguments(
    op: str,
    qkv: Sequence[Tensor],
    scale: float | None = None,
    num_prefix: int | None = None,
    lse: Tensor | None = None,
) -> tuple[Any, ...]:
    """Every argument of an operator, from q, k, v [B, S, H, D] and lse [B, H, S].

    An operator without `v` or `lse` ignores them. The varlen operator gets the images one after
    another and takes no prefix.
    """
    q, k, v = qkv
    if num_prefix is None:
        num_prefix = 1 if op.startswith("cls") else 0
    if op == "cls_attention":
        return q, k, v, scale, num_prefix
    if op == "cls_scores":
        return q, k, scale, num_prefix
    if op == "received_scores":
        return q, k, scale, num_prefix, lse
    assert num_prefix == 0
    batch, sequence = q.shape[:2]
    offsets = sample_offsets([sequence] * batch)
    packed_lse = None if lse is None else lse.transpose(0, 1).flatten(1)
    return q.flatten(0, 1), k.flatten(0, 1), offsets, sequence, scale, packed_lse


def run(
    backend: Any,
    op: str,
    qkv: Sequence[Tensor],
    scale: float | None = None,
    num_prefix: int | None = None,
    lse: Tensor | None = None,
) -> Answer:
    """The answer of an operator of a backend; `scores` are [B, N]."""
    got = getattr(backend, op)(*arguments(op, qkv, scale, num_prefix, lse))
    if op == "cls_attention":
        return Answer(*got)
    return Answer(None, got.view(qkv[0].shape[:2]) if op == "received_scores_varlen" else got)


def exact_lse(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """float32 [B, H, S]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * scale
    return logits.logsumexp(-1).float()


def eager_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Every step in the dtype of the inputs."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT * scale).softmax(-1) @ v).transpose(1, 2)


def rms_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).square().mean().sqrt())


def assert_out(
    got: Tensor, exact: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float | None
) -> None:
    """Assert that `out` has at most twice the error of eager PyTorch in the same dtype.

    The root mean square does not depend on a single element. Eager PyTorch has no error at all in
    some tiny cases, so half a unit in the last place of the largest output is always allowed.
    """
    assert got.dtype == q.dtype
    assert got.shape == q.shape
    assert got.is_contiguous()
    rounding = torch.finfo(q.dtype).eps / 2 * float(exact.abs().max())
    bound = max(2.0 * rms_error(eager_attention(q, k, v, scale), exact), rounding)
    error = rms_error(got, exact)
    assert error <= bound, f"error {error:.3g}, expected at most {bound:.3g}"
    assert_close(got, exact, OUT_TOLERANCE[q.dtype] * float(v.abs().max()))


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
    """Fill the memory of torch.empty with NaN, so that an element that is not written is seen."""
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
    """Assert the bound of the contract that does not depend on eager PyTorch.

    With this bound half precision inputs must give scores as exact as float32 inputs do.
    """
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert_close(got, torch.from_numpy(exact), scores_bound(q, k, scale))


def sample_cancelling(
    batch: int, sequence: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor]:
    """q and k whose products are more than 20 times as large as the logits that they add up to.

    The products of one half of the channels cancel those of the other half, up to some noise.
    """
    generator = torch.Generator().manual_seed(seed)
    size, noise = (30.0, 0.001) if dtype is torch.float32 else (16.0, 0.002)
    shape = (2, batch, sequence, heads, head_dim)
    q, k = size + size * noise * torch.randn(shape, generator=generator)
    # Uneven channels give the products more bits. Sums of half precision products with few bits
    # would be exact, and the test would see no rounding.
    half = 0.25 + 1.5 * torch.rand(head_dim // 2, generator=generator)
    return (q * half.repeat(2)).to(dtype), (k * torch.cat([half, -half])).to(dtype)


def sample_nonfinite(where: str, sequence: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """q and k [2, S, 2, 4]; one value of image 0 is not finite."""
    q, k, _ = (x.contiguous() for x in sample_qkv(2, sequence, 2, 4, dtype, 21))
    # With an infinity in k, the sign of this channel is the sign of the infinite logit.
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


# Prints by how many bytes one call raises the largest resident memory of its process.
PEAK = """
import resource, sys
import torch
from vispruner_kernels import _backends, _schemas

op, sequence = sys.argv[2], int(sys.argv[3])
function = _backends._implementation(op, sys.argv[1])
torch.set_num_threads(1)

def call(sequence):
    q, k, v = torch.rand(3, 1, sequence, 1, 64)
    before = peak()
    args = (q, k, v) if op == "cls_attention" else (q, k)
    function(*_schemas.complete(op, args, {}))
    return peak() - before

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

call(128)
# Fill up to the peak, or memory that was freed before would hide what the call takes.
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
