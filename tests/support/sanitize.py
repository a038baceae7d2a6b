"""A few small calls of every operator, for compute-sanitizer; gpu_command.py starts this program.

The optional argument is a limit in seconds, after which the program prints its stack and ends.
"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable

import gpu
import torch
from torch import Tensor

from vispruner_kernels.testing import assert_close, assert_same_bits, hub_cases

# More tokens than a selection holds in registers (`SMALL` in _triton/select.py). In attention they
# are three blocks of 64 tokens, the last one partly filled.
TOKENS = gpu.some(150, 20)


def contradictory() -> list[gpu.Call]:
    """Calls with invalid offsets: some decrease, are negative, or exceed the tensors."""
    sequences = torch.tensor([7, 90, -5, 40, 2**31 - 1, 60, -(2**31)], dtype=torch.int32)
    kept = torch.tensor([-1, 2**31 - 1, 3, 50, -(2**31), 20, 30], dtype=torch.int32)
    every = gpu.calls(TOKENS)
    features, scores, *_ = every["select_varlen"][1]
    q, k, *_ = every["received_scores_varlen"][1]
    args = (features, scores, sequences, kept, TOKENS, 40)
    return [
        ("select_varlen", args),
        ("select_varlen", (*args, 0.5, 8, "pairwise")),
        ("received_scores_varlen", (q, k, sequences, TOKENS)),
    ]


def check(call: gpu.Call, run: Callable[[gpu.Call], gpu.Answer] = gpu.run) -> None:
    """Assert that the answer is the CPU's, within a tolerance for attention and scores."""
    got = tuple(x.cpu() for x in run(gpu.uploaded(call)))
    for x, y in zip(got, gpu.expected(call), strict=True):
        if call[0] in gpu.EXACT:
            assert_same_bits(x, y)
        else:
            assert_close(x, y, 1e-2 if x.dtype == torch.float16 else 2e-5)


def check_variants(call: gpu.Call) -> None:
    """Assert that every variant of the CUDA kernels gives the CPU's answer."""
    wanted = gpu.expected(call)
    for _, answer in gpu.run_variants(gpu.uploaded(call)):
        for x, y in zip(answer, wanted, strict=True):
            assert_same_bits(x.cpu(), y)


def check_in_bounds(call: gpu.Call, run: Callable[[gpu.Call], gpu.Answer] = gpu.run) -> None:
    """Assert that indices are in [0, tokens) and that scores are finite."""
    (got,) = (x.cpu() for x in run(gpu.uploaded(call)))
    tokens = call[1][0].shape[0]
    valid = (got >= 0) & (got < tokens) if got.dtype == torch.int64 else got.isfinite()
    assert bool(valid.all()), call[0]


def main() -> int:
    if why := gpu.unprepared():
        print(f"sanitize: {why}", file=sys.stderr)
        return 2
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else gpu.LIMIT
    faulthandler.dump_traceback_later(seconds, exit=True)
    right = [*gpu.calls(TOKENS).values(), *gpu.calls(TOKENS, torch.float32, 1, False).values()]
    for call in right:
        check(call)
    # On a CPU invalid offsets are an error.
    wrong = [] if gpu.SIMULATED else contradictory()
    for call in wrong:
        check_in_bounds(call)
    native = not gpu.SIMULATED and not gpu.native.REASON
    equal = [("select", tuple(case)) for case in hub_cases(TOKENS)]
    for call in (right + equal) * native:
        if call[0] in gpu.NATIVE_OPS:
            check_variants(call)
    for call in wrong * native:
        if call[0] in gpu.NATIVE_OPS:
            check_in_bounds(call, gpu.run_native)
    gpu.synchronize()
    sizes = sum(x.numel() for _, args in right for x in args if isinstance(x, Tensor))
    kernels = "Triton's and those of the C++ core" if native else "Triton's"
    count = len(right) + len(wrong)
    print(f"sanitize: {count} calls of {sizes} elements agree, {kernels}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
