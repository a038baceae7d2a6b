"""Calls on a GPU: answers, CUDA graphs, launches, streams, threads, compilers, devices, errors."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import bad_calls
import calls as every
import gpu
import pytest
import torch
from gpu import (
    CALLS,
    DEVICE,
    EXACT,
    Answer,
    Call,
    answers,
    assert_agree,
    assert_answers,
    calls,
    download,
    expected,
    needs_cuda,
    poison,
    run,
    some,
    streams,
    synchronize,
    upload,
    uploaded,
)
from torch import Tensor

import vispruner_kernels
from vispruner_kernels.testing import assert_close

pytestmark = gpu.marks
watch = gpu.watch

TOKENS = some(300, 30)
each_call = pytest.mark.parametrize("name", CALLS)
OPERATORS = gpu.NATIVE_OPS if gpu.NATIVE else every.OPERATORS


def differences(got: Answer, wanted: Answer) -> Tensor:
    """The number of elements that differ, on the device. The answers must not have NaN."""
    return torch.stack([(x != y).sum() for x, y in zip(got, wanted, strict=True)]).sum()


@each_call
def test_answers_are_those_of_the_cpu_and_inputs_stay(name):
    call = calls(TOKENS)[name]
    there = uploaded(call)
    inputs = [x for x in there[1] if isinstance(x, Tensor)]
    before = [x.clone() for x in inputs]
    (got,) = download([run(there)])
    for x, y in zip(inputs, before, strict=True):
        assert torch.equal(x, y)
    assert_agree(call, got, expected(call))


# CUDA graphs.


class Graph:
    """A CUDA graph of calls, with memory for their inputs and their answers."""

    def __init__(self, first: Sequence[Call], stream: Any = None, garbage: bool = False) -> None:
        self.inputs = [uploaded(call) for call in first]
        # The first call compiles and loads kernels, which a capture does not allow.
        for call in self.inputs:
            run(call)
        words = torch.empty(2**22, dtype=torch.int64, device=DEVICE).random_(-(2**63), 2**63 - 1)
        synchronize()
        self.graph = torch.cuda.CUDAGraph()
        self.answers = []
        with torch.cuda.graph(self.graph, stream=stream):
            for call in self.inputs:
                if garbage:
                    # Every replay writes garbage to the memory in which the call has its scratch.
                    blocks = [words[:n].clone() for n in (2**6, 2**10, 2**14, 2**16, 2**18, 2**22)]
                    del blocks
                self.answers.append(run(call))
        self.words = words

    def load(self, following: Sequence[Call]) -> None:
        """Copy the inputs of other calls into the memory of the graph."""
        for (_, args), (_, others) in zip(self.inputs, following, strict=True):
            for x, y in zip(args, others, strict=True):
                if isinstance(x, Tensor):
                    x.copy_(y)

    def replay(self) -> None:
        self.graph.replay()


@needs_cuda
@each_call
def test_a_graph_answers_other_inputs(name):
    variations = [calls(TOKENS, seed=seed)[name] for seed in range(5)]
    graph = Graph(variations[:1], garbage=True)
    there = [uploaded(call) for call in variations]
    wanted = [run(call) for call in there]
    if variations[0][0] in EXACT:
        assert_answers(download(wanted), [expected(call) for call in variations])
    wrong = []
    for i in range(100):
        graph.load([there[i % 5]])
        graph.replay()
        wrong.append(differences(graph.answers[0], wanted[i % 5]))
    assert torch.stack(wrong).count_nonzero() == 0


@needs_cuda
@pytest.mark.parametrize("garbage", [False, True])
def test_one_graph_of_all_operators_answers_other_inputs(garbage):
    """Without garbage, a call gets scratch that the call before it has just used."""
    variations = [list(calls(TOKENS, seed=seed).values()) for seed in range(3)]
    graph = Graph(variations[0], garbage=garbage)
    there = [[uploaded(call) for call in variation] for variation in variations]
    wanted = [[run(call) for call in variation] for variation in there]
    wrong = []
    for i in range(60):
        graph.load(there[i % 3])
        graph.replay()
        pairs = zip(graph.answers, wanted[i % 3], strict=True)
        wrong.append(torch.stack([differences(*pair) for pair in pairs]))
    assert torch.stack(wrong).count_nonzero() == 0


@needs_cuda
@each_call
def test_two_graphs_replay_at_once(name):
    """They are captured on one stream and replayed on two, so they must not share memory."""
    capture, *replays = streams(3)
    variations = [calls(TOKENS, seed=seed)[name] for seed in range(2)]
    graphs = [Graph([call], capture) for call in variations]
    wanted = [run(uploaded(call)) for call in variations]
    synchronize()
    wrong = []
    for _ in range(50):
        for stream, graph, answer in zip(replays, graphs, wanted, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                wrong.append(differences(graph.answers[0], answer))
    synchronize()
    assert torch.stack(wrong).count_nonzero() == 0


# Types of the nodes of a graph (CUgraphNodeType).
KERNEL, COPY = 0, 1


def captured_nodes(function: Callable[[], object]) -> list[int]:
    """The types of the graph nodes that a function launches, sorted."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        function()
    driver = ctypes.CDLL("libcuda.so.1")
    handle = ctypes.c_void_p(graph.raw_cuda_graph())
    count = ctypes.c_size_t()
    assert driver.cuGraphGetNodes(handle, None, ctypes.byref(count)) == 0
    nodes = (ctypes.c_void_p * count.value)()
    assert driver.cuGraphGetNodes(handle, nodes, ctypes.byref(count)) == 0
    types = []
    for node in nodes:
        kind = ctypes.c_int(-1)
        assert driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)) == 0
        types.append(kind.value)
    return sorted(types)


@needs_cuda
@each_call
def test_a_call_launches_one_kernel_and_nothing_else(name):
    """Received scores without lse launch two."""
    there = uploaded(calls(TOKENS)[name])
    run(there)
    two = name in ("received_scores", "received_scores_varlen")
    assert captured_nodes(lambda: run(there)) == [KERNEL] * (2 if two else 1)
    # `captured_nodes` also reports copies.
    x = torch.ones(2, 1000, device=DEVICE)
    assert captured_nodes(lambda: (x[0].copy_(x[1]), x[0].add_(1))) == [KERNEL, COPY]


@contextlib.contextmanager
def no_synchronization() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@each_call
def test_calls_do_not_synchronize(name):
    there = uploaded(calls(TOKENS)[name])
    run(there)
    with no_synchronization():
        run(there)
        getattr(vispruner_kernels, there[0])(*there[1])
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device=DEVICE).item()


# Streams and threads.


@needs_cuda
@each_call
def test_calls_run_on_the_current_stream(name):
    """The inputs are written late on that stream; a call on another stream would read old ones."""
    there, right = (uploaded(calls(TOKENS, seed=seed)[name]) for seed in range(2))
    wanted = run(right)
    run(there)
    (stream,) = streams(1)
    synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(2 * 10**7)
        for x, y in zip(there[1], right[1], strict=True):
            if isinstance(x, Tensor):
                x.copy_(y)
        got = run(there)
    synchronize()
    assert differences(got, wanted) == 0


def test_many_threads_get_the_same_answers():
    """Each thread has a stream of its own; all read the same inputs."""
    there = {name: uploaded(call) for name, call in calls(TOKENS).items()}
    wanted = {name: run(call) for name, call in there.items()}
    workers = some(8, 2)
    turns = streams(workers)
    synchronize()

    def work(number: int) -> int:
        names = [*there] * some(10, 1)
        random.Random(number).shuffle(names)
        with torch.cuda.stream(turns[number]):
            poison()
            wrong = [differences(run(there[name]), wanted[name]) for name in names]
            return int(torch.stack(wrong).count_nonzero())

    with ThreadPoolExecutor(workers) as pool:
        assert list(pool.map(work, range(workers))) == [0] * workers


# Compilers, and the registration of the operators in PyTorch.


@pytest.mark.parametrize("op", OPERATORS)
def test_dynamic_shapes_compile_once(op):
    function = getattr(vispruner_kernels, op)
    compiled = every.compiled(lambda *args: function(*args), dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in range(some(3, 2)):
            _, args = uploaded((op, every.samples(op, size=size)[0]))
            every.assert_same_answer(compiled(*args), function(*args))


@needs_cuda
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_compiles_the_operators(mode):
    """The operators run between kernels of Inductor; "reduce-overhead" adds its CUDA graphs."""

    def function(features: Tensor, scores: Tensor, keep: int) -> tuple[Tensor, ...]:
        kept, indices = vispruner_kernels.prune(features * 2, scores + 0.5, keep)
        received = vispruner_kernels.received_scores(kept[:, :, None], kept[:, :, None])
        return kept + 1, indices + 1, received * 2

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, mode=mode)
    for size in (0, 0, 0, 1, 1):
        _, args = uploaded(("prune", every.samples("prune", torch.float16, size)[0]))
        torch.compiler.cudagraph_mark_step_begin()
        got, wanted = compiled(*args), function(*args)
        assert_answers(download([got[:2]]), download([wanted[:2]]))
        assert_close(got[2].cpu(), wanted[2].cpu(), 4e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("op", OPERATORS)
def test_opcheck_passes(op, number):
    if number >= len(every.samples(op)):
        pytest.skip("the operator has one sample")
    _, args = uploaded((op, every.samples(op)[number]))
    torch.library.opcheck(every.overload(op), args)


# Devices and errors.


@needs_cuda
def test_calls_run_on_the_device_of_their_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    device = torch.device("cuda", 1)
    for call in calls(TOKENS).values():
        (wanted,) = download([run(uploaded(call))])
        assert torch.cuda.current_device() == 0
        there = uploaded(call, device)
        got = run(there)
        assert {x.device for x in got} == {device}
        with torch.cuda.device(device):
            again = run(there)
        assert_answers(download([got, again]), [wanted, wanted])
        if call[0] not in ("select_topk", "select_rows"):
            op, (first, *rest) = there
            with pytest.raises(ValueError, match=r"cuda:0.*cuda:1|cuda:1.*cuda:0"):
                run((op, (upload(first.cpu()), *rest)))


def test_no_images_give_an_empty_answer():
    for op in [op for op in OPERATORS if not op.endswith("varlen")]:
        for args in every.samples(op):
            none = tuple(x[:0] if isinstance(x, Tensor) else x for x in args)
            assert_answers(answers([(op, none)]), [expected((op, none))])


@pytest.mark.parametrize("op", OPERATORS)
def test_errors_are_those_of_the_cpu(op):
    function = every.CALLS["function"]
    for bad in bad_calls.TABLE:
        if op not in bad.ops or bad.hidden:
            continue
        kwargs = bad_calls.bad_arguments(op, bad)
        wanted = bad_calls.error_of(function, op, kwargs)
        there = {
            name: upload(x) if isinstance(x, Tensor) and x.device.type == "cpu" else x
            for name, x in kwargs.items()
        }
        error = bad_calls.error_of(function, op, there)
        message = re.sub(r"cuda:\d+", "cpu", str(error))
        assert (type(error), message) == (type(wanted), str(wanted))


@needs_cuda
@pytest.mark.parametrize("op", [op for op in OPERATORS if op not in every.SCORES])
def test_tensors_on_two_devices_are_refused(op):
    kwargs = every.tensors(every.arguments(op), upload)
    for name in kwargs:
        if isinstance(kwargs[name], Tensor):
            mixed = kwargs | {name: kwargs[name].cpu()}
            with pytest.raises(ValueError, match=f"^{op}: .*expected the device of"):
                getattr(vispruner_kernels, op)(**mixed)


@gpu.needs_triton
@needs_cuda
def test_a_gpu_that_is_too_old_is_refused(monkeypatch):
    launch = importlib.import_module("vispruner_kernels._triton.launch")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (7, 0))
    # Kernels of earlier tests would be launched without the check.
    monkeypatch.setattr(launch, "_COMPILED", {})
    launch._check_device.cache_clear()
    message = "compute capability 7.0, the Triton kernels need 7.5; set VISPRUNER_KERNELS_BACKEND"
    for call in calls(TOKENS).values():
        with pytest.raises(RuntimeError, match=re.escape(message)):
            run(uploaded(call))


@gpu.needs_triton
def test_without_triton_a_call_names_the_reason(monkeypatch):
    operators = importlib.import_module("vispruner_kernels._triton.operators")
    reason = "Triton is not installed; pip install 'triton>=3.4'"
    monkeypatch.setattr(operators, "INSTALLED", False)
    monkeypatch.setattr(operators, "REASON", reason)
    operators._load.cache_clear()
    for op, args in calls(TOKENS).values():
        message = f"{op}: no kernels for a cuda device: {reason}, or set VISPRUNER_KERNELS_BACKEND"
        with pytest.raises(RuntimeError, match=re.escape(message)):
            run(uploaded((op, args)))
