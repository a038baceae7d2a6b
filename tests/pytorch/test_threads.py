"""Threads of Python and of the operators. No answer depends on either, or on the batch."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from installed import needs_native
from torch import Tensor

import vispruner_kernels
from vispruner_kernels import _native
from vispruner_kernels.testing import (
    assert_same_bits,
    sample_features,
    sample_offsets,
    sample_qkv,
    sample_scores,
)

Call = tuple[str, tuple[Any, ...]]


def calls(batch: int, tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Call]:
    """Calls of every operator. Batched ones have their images in the first dimension of tensors."""
    generator = torch.Generator().manual_seed(seed)
    features = sample_features("clustered", batch, tokens, 48, generator).to(dtype)
    scores = sample_scores("ties", batch, tokens, generator)
    q, k, v = sample_qkv(batch, tokens + 1, 3, 32, dtype, seed=seed)
    lse = 8.0 + torch.randn(batch, 3, tokens + 1, generator=generator)
    lengths, keep = [tokens // 2, 0, tokens - tokens // 2], [tokens // 5, 0, tokens // 7]
    packed = (features[0], scores[0], sample_offsets(lengths), sample_offsets(keep))
    sizes = (max(lengths), sum(keep))
    width = next(w for w in (7, 5, 4, 3, 2, 1) if tokens % w == 0)
    return [
        ("select", (features, scores, tokens // 3)),
        ("select", (features, scores, tokens // 3, 0.3, 5, "pairwise")),
        ("prune", (features, scores, tokens // 4)),
        ("select_topk", (scores, tokens // 3)),
        ("select_rows", (scores, width, (tokens // width + 1) // 2)),
        ("cls_attention", (q, k, v)),
        ("cls_scores", (q, k, 0.3, 4)),
        ("received_scores", (q, k)),
        ("received_scores", (q, k, 0.3, 2, lse)),
        ("select_varlen", (*packed, *sizes)),
        ("select_varlen", (*packed, *sizes, 0.4, 3, "pairwise")),
        ("received_scores_varlen", (q[0, 1:], k[0, 1:], packed[2], sizes[0])),
    ]


def is_varlen(call: Call) -> bool:
    return call[0].endswith("_varlen")


def name(call: Call) -> str:
    return f"{call[0]}{call[1][3:]}" if call[0] == "select" else call[0]


def run(call: Call) -> tuple[Tensor, ...]:
    answer = getattr(torch.ops.vispruner, call[0])(*call[1])
    return answer if isinstance(answer, tuple) else (answer,)


def each_tensor(args: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    return tuple(change(x) if isinstance(x, Tensor) else x for x in args)


def assert_same_answers(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other)


@pytest.fixture(autouse=True)
def intra_op_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# A small odd number of tokens, and one larger than a thread's share in the core.
CALLS = [call for tokens in (13, 300) for call in calls(3, tokens)]
IDS = [f"{name(call)}-{tokens}" for tokens in (13, 300) for call in calls(3, tokens)]


@pytest.mark.parametrize("threads", [1, 2])
def test_concurrent_python_threads_get_the_answers_of_one(threads):
    torch.set_num_threads(threads)
    # The same shapes with other values: if threads shared scratch, answers would differ.
    different = [call for seed in range(4) for call in calls(3, 60, seed=seed)]
    expected = [tuple(x.clone() for x in run(call)) for call in different]
    workers = 8
    together = threading.Barrier(workers)

    def work(seed: int) -> None:
        numbers = list(range(len(different))) * 3
        random.Random(seed).shuffle(numbers)
        # PyTorch keeps the number of intra-op threads per thread.
        torch.set_num_threads(threads)
        together.wait(timeout=60)
        for number in numbers:
            with torch.inference_mode(seed % 2 == 0):
                assert_same_answers(run(different[number]), expected[number])

    with ThreadPoolExecutor(workers) as pool:
        for result in [pool.submit(work, seed) for seed in range(workers)]:
            result.result(timeout=300)


@needs_native
def test_an_instruction_set_may_change_during_calls():
    """A caller can change no other state of the core, and every set gives the same bits."""
    exact = [call for call in calls(3, 60) if call[0].startswith(("select", "prune"))]
    sets, before = _native._C.simd_sets(), _native._C.simd()
    expected = [tuple(x.clone() for x in run(call)) for call in exact]
    workers, changes, ended = 4, 0, threading.Event()
    together = threading.Barrier(workers + 1)

    def work() -> None:
        torch.set_num_threads(1)
        together.wait(timeout=60)
        for _ in range(10):
            for call, answer in zip(exact, expected, strict=True):
                assert_same_answers(run(call), answer)

    def change() -> None:
        nonlocal changes
        together.wait(timeout=60)
        while not ended.is_set():
            _native._C.use_simd(sets[changes % len(sets)])
            assert _native._C.simd() == sets[changes % len(sets)]
            changes += 1

    try:
        with ThreadPoolExecutor(workers + 1) as pool:
            changing = pool.submit(change)
            working = [pool.submit(work) for _ in range(workers)]
            try:
                for result in working:
                    result.result(timeout=300)
            finally:
                ended.set()
            changing.result(timeout=60)
    finally:
        _native._C.use_simd(before)
    assert changes > len(sets)


def large_calls() -> list[Call]:
    """Calls with enough work for the core to start threads, over images and inside an image."""
    generator = torch.Generator().manual_seed(1)
    features = sample_features("clustered", 3, 1100, 1024, generator)
    scores = sample_scores("ties", 3, 1100, generator)
    many = sample_scores("ties", 40, 16384, generator)
    q, k, _ = sample_qkv(2, 577, 16, 64, torch.float32, seed=1)
    q16, k16, _ = sample_qkv(16, 577, 16, 64, torch.float16, seed=1)
    offsets = sample_offsets([1100, 1100, 1100])
    images = sample_offsets([577, 577])
    keep = sample_offsets([64, 65, 66])
    return [
        ("select", (features, scores, 64)),
        ("select", (features[:1], scores[:1], 64, 0.5, 8, "pairwise")),
        ("prune", (features, scores, 64)),
        ("select_varlen", (features.flatten(0, 1), scores.flatten(), offsets, keep, 1100, 195)),
        ("select_topk", (many, 777)),
        ("select_rows", (many, 128, 64)),
        ("cls_scores", (q16, k16)),
        ("received_scores", (q, k)),
        ("received_scores", (q[:1], k[:1])),
        ("received_scores_varlen", (q.flatten(0, 1), k.flatten(0, 1), images, 577)),
    ]


@pytest.mark.parametrize("call", large_calls(), ids=lambda call: name(call))
def test_large_calls_do_not_depend_on_intra_op_threads(call):
    torch.set_num_threads(1)
    expected = run(call)
    for threads in (2, 3, 16):
        torch.set_num_threads(threads)
        for _ in range(3):
            assert_same_answers(run(call), expected)


def test_each_thread_gets_its_own_error():
    features, scores = CALLS[0][1][:2]

    def work(number: int) -> str:
        with pytest.raises(ValueError, match="select: keep is") as caught:
            vispruner_kernels.select(features, scores, -number)
        return str(caught.value)

    with ThreadPoolExecutor(8) as pool:
        messages = list(pool.map(work, range(64)))
    assert messages == [f"select: keep is {-n}, expected 1 <= keep <= 13 = N" for n in range(64)]


@pytest.mark.parametrize("call", CALLS, ids=IDS)
def test_small_calls_do_not_depend_on_intra_op_threads(call):
    torch.set_num_threads(1)
    expected = run(call)
    # Among them: more threads than images, and more than processors.
    for threads in (2, 4, 7):
        torch.set_num_threads(threads)
        assert torch.get_num_threads() == threads
        assert_same_answers(run(call), expected)
        assert_same_answers(run(call), expected)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [13, 300])
def test_a_batch_gives_the_answers_of_its_images(tokens, dtype, threads):
    torch.set_num_threads(threads)
    batched = [call for call in calls(5, tokens, dtype) if not is_varlen(call)]
    assert len({op for op, _ in batched}) == 7
    for op, args in batched:
        together = run((op, args))
        for i in range(5):
            alone = run((op, each_tensor(args, lambda x, i=i: x[i : i + 1])))
            assert_same_answers(each_tensor(together, lambda x, i=i: x[i : i + 1]), alone)
        # In another order, and one image twice.
        again = run((op, each_tensor(args, lambda x: x[[3, 1, 3, 0]])))
        assert_same_answers(again, each_tensor(together, lambda x: x[[3, 1, 3, 0]]))


@pytest.mark.parametrize("tokens", [13, 300])
def test_packed_images_give_the_answers_of_single_images(tokens):
    lengths = [tokens, 1, 0, tokens // 2, tokens]
    keep = [tokens // 3, 1, 0, tokens // 4, tokens]
    total = sum(lengths)
    generator = torch.Generator().manual_seed(3)
    features = sample_features("duplicates", 1, total, 48, generator)[0]
    scores = sample_scores("ties", 1, total, generator)[0]
    q, k, _ = (x[0] for x in sample_qkv(1, total, 3, 32, torch.float32, seed=3))
    lse = 8.0 + torch.randn(3, total, generator=generator)
    offsets, kept = sample_offsets(lengths), sample_offsets(keep)
    for matching in ("bipartite", "pairwise"):
        rule = (0.4, 3, matching)
        got = vispruner_kernels.select_varlen(
            features, scores, offsets, kept, tokens, sum(keep), *rule
        )
        for i, count in enumerate(keep):
            if count:
                image = slice(offsets[i], offsets[i + 1])
                alone = vispruner_kernels.select(
                    features[None, image], scores[None, image], count, *rule
                )
                assert torch.equal(got[kept[i] : kept[i + 1]], alone[0] + offsets[i])
    for each in (None, lse):
        got = vispruner_kernels.received_scores_varlen(q, k, offsets, tokens, None, each)
        for i, length in enumerate(lengths):
            if length:
                image = slice(offsets[i], offsets[i + 1])
                part = None if each is None else each[None, :, image]
                alone = vispruner_kernels.received_scores(
                    q[None, image], k[None, image], None, 0, part
                )
                assert_same_bits(got[image], alone[0])


def test_answers_outlive_the_thread_of_their_call():
    answers = []

    def work():
        torch.set_num_threads(2)
        answers.extend(run(call) for call in CALLS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=120)
    for got, call in zip(answers, CALLS, strict=True):
        assert_same_answers(got, run(call))


# Fork: a child process does not have the threads of its parent.

FORK = """
import os, sys, torch, vispruner_kernels as vk
from vispruner_kernels import testing
torch.set_num_threads(4)
generator = torch.Generator().manual_seed(0)
features = testing.sample_features("clustered", 4, 300, 64, generator)
scores = testing.sample_scores("ties", 4, 300, generator)
q, k, _ = testing.sample_qkv(4, 100, 3, 32, torch.float32, 0)
def answers():
    yield vk.select(features, scores, 60)
    yield vk.select(features, scores, 60, matching="pairwise")
    yield vk.cls_scores(q, k)
    yield vk.received_scores(q, k)
expected = list(answers())
child = os.fork()
if child == 0:
    torch.set_num_threads(4)
    same = all(torch.equal(a, b) for a, b in zip(answers(), expected, strict=True))
    os._exit(7 if same else 1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
assert all(torch.equal(a, b) for a, b in zip(answers(), expected, strict=True))
"""


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_operators_work_after_a_fork():
    environment = {n: v for n, v in os.environ.items() if n != "VISPRUNER_KERNELS_CHECK"}
    # The reference uses PyTorch's threads, which do not survive a fork.
    environment["VISPRUNER_KERNELS_BACKEND"] = "native"
    path = [str(Path(vispruner_kernels.__file__).parent.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_default_device_of_the_caller_changes_nothing(tmp_path):
    """TorchScript calls operators from C++, where the default device of Python still applies."""
    script = """
import torch, vispruner_kernels as vk
from vispruner_kernels.methods import Random
x, s = torch.randn(2, 32, 8), torch.rand(2, 32)
q = torch.randn(2, 9, 2, 4)
expected = vk.select(x, s, 8), vk.cls_scores(q, q)

@torch.jit.script
def call(x: torch.Tensor, s: torch.Tensor, q: torch.Tensor):
    return torch.ops.vispruner.select(x, s, 8), torch.ops.vispruner.cls_scores(q, q)

with torch.device("meta"):
    got = call(x, s, q)
    random = Random(4).select(x)
assert all(torch.equal(one, other) for one, other in zip(got, expected))
assert random.device.type == "cpu"
print("same")
"""
    # In a file, because TorchScript reads the source of its functions.
    file = tmp_path / "script.py"
    file.write_text(script)
    root = str(Path(vispruner_kernels.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(file)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "same\n"
