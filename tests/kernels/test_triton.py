"""The Triton kernels in Triton's interpreter, with sizes for which small cases reach all branches.

make test-triton runs the tests of the operators with these kernels too.
"""

from __future__ import annotations

import importlib.metadata
import random
import re
import types

import pytest
import torch
from calls import operators_of

pytest.importorskip("triton")

from vispruner_kernels import _backends, reference
from vispruner_kernels._triton import operators
from vispruner_kernels.testing import (
    DTYPES,
    SCORE_KINDS,
    assert_same_bits,
    random_case,
    random_packed_case,
    sample_features,
    sample_offsets,
    sample_scores,
)

pytestmark = pytest.mark.skipif(
    not operators.INTERPRETED, reason="Triton compiles here: make test-gpu"
)
if operators.INTERPRETED:
    import triton
    import triton.language as tl
    from triton.runtime.errors import InterpreterError
    from triton.runtime.interpreter import interpreter_builder

    from vispruner_kernels._triton import bipartite, launch, neighbours, pairwise, rules, select


@pytest.fixture(autouse=True)
def _poisoned_scratch():
    """Fill torch.empty with NaN and the largest integers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def sizes(monkeypatch):
    """Set the sizes that decide which branches a case reaches."""

    def set_sizes(**values: int) -> None:
        for name, value in values.items():
            if name == "SORTED":
                for module in (rules, bipartite, pairwise):
                    monkeypatch.setattr(module, name, tl.constexpr(value))
            else:
                monkeypatch.setattr(select, name, value)

    return set_sizes


def small_sizes(seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    return {
        "SMALL": rng.choice([16, 128]),
        "EAGER": rng.choice([1, 3, 64]),
        "NEIGHBOURS": rng.choice([8, 16, 32]),
        "SORTED": rng.choice([16, 512]),
    }


@pytest.mark.parametrize("matching", ["bipartite", "pairwise"])
@pytest.mark.parametrize(
    "seeds", [range(50), pytest.param(range(50, 400), marks=pytest.mark.kernels)]
)
def test_select_matches_the_reference(seeds, matching, sizes):
    for seed in seeds:
        case = random_case(seed, matching=matching)
        sizes(**small_sizes(seed))
        try:
            assert_same_bits(operators.select(*case), reference.select(*case))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


@pytest.mark.parametrize(
    "seeds", [range(15), pytest.param(range(15, 100), marks=pytest.mark.kernels)]
)
def test_prune_matches_the_reference(seeds, sizes):
    for seed in seeds:
        case = random_case(seed)
        sizes(**small_sizes(seed))
        for got, expected in zip(operators.prune(*case), reference.prune(*case), strict=True):
            assert_same_bits(got, expected)


@pytest.mark.parametrize("matching", ["bipartite", "pairwise"])
@pytest.mark.parametrize(
    ("kind", "tokens"),
    [pytest.param("clustered", 576, marks=pytest.mark.kernels), ("constant", 200)],
)
def test_images_of_more_tokens_match_the_reference(kind, tokens, matching):
    generator = torch.Generator().manual_seed(1)
    features = sample_features(kind, 1, tokens, 48, generator).half()
    scores = sample_scores("softmax", 1, tokens, generator)
    args = (features, scores, 64, 0.5, 8, matching)
    assert_same_bits(operators.select(*args), reference.select(*args))


@pytest.mark.parametrize(
    "seeds", [range(20), pytest.param(range(20, 150), marks=pytest.mark.kernels)]
)
def test_select_varlen(seeds, sizes):
    for seed in seeds:
        args = random_packed_case(seed, max_tokens=140, max_images=4)
        sizes(**small_sizes(seed))
        try:
            assert_same_bits(operators.select_varlen(*args), reference.select_varlen(*args))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


@pytest.mark.parametrize(
    ("keep", "important"), [(22, 13), (22, 15), (23, 7), (23, 13), (23, 14), (26, 15), (49, 1)]
)
def test_important_tokens_of_packed_images_are_counted_in_float64(keep, important):
    """In float32 the count would differ by one, and other tokens would be kept."""
    ratio = important / keep
    count, in_float32 = int(keep * ratio), int(torch.tensor(keep) * torch.tensor(ratio))
    assert abs(in_float32 - count) == 1
    # The count of the other image is the same in float32.
    lengths, keeps = [keep + 9, 10], [keep, 7]
    generator = torch.Generator().manual_seed(keep)
    features = sample_features("normal", 1, sum(lengths), 3, generator)[0]
    scores = sample_scores("uniform", 1, sum(lengths), generator)[0]
    offsets = sample_offsets(lengths), sample_offsets(keeps)
    rule = (8, "bipartite")
    args = (features, scores, *offsets, max(lengths), sum(keeps), ratio, *rule)
    expected = reference.select_varlen(*args)
    wrong = (in_float32 + 0.5) / keep
    assert not torch.equal(expected, reference.select_varlen(*args[:-3], wrong, *rule))
    assert_same_bits(operators.select_varlen(*args), expected)


@pytest.mark.parametrize("matching", ["bipartite", "pairwise"])
@pytest.mark.parametrize("op", ["prune", "select_varlen"])
def test_larger_tiles_match_the_reference(op, matching, sizes, monkeypatch):
    blocks = []
    run = launch.run

    def recorded(*args, **meta):
        blocks.append(meta["BLOCK_N"])
        run(*args, **meta)

    monkeypatch.setattr(launch, "run", recorded)
    generator = torch.Generator().manual_seed(0)
    features = sample_features("clustered", 3, 70, 16, generator).half()
    scores = sample_scores("ties", 3, 70, generator)
    rule = (0.5, 8, matching)
    if op == "prune":
        args = (features, scores, 12, *rule)
    else:
        offsets = sample_offsets([70, 0, 110, 30]), sample_offsets([12, 0, 20, 30])
        args = (features.flatten(0, 1), scores.flatten(), *offsets, 110, 62, *rule)
    for tokens in (210, 211):
        sizes(MANY_TOKENS=tokens)
        got, expected = getattr(operators, op)(*args), getattr(reference, op)(*args)
        pairs = zip(got, expected, strict=True) if op == "prune" else [(got, expected)]
        for x, y in pairs:
            assert_same_bits(x, y)
    assert blocks == [64, 32]


@pytest.mark.parametrize(
    "seeds", [range(10), pytest.param(range(10, 150), marks=pytest.mark.kernels)]
)
def test_three_launches_match_the_reference(seeds, sizes):
    """As on AMD GPUs: ties, several images, both rules, packed images of different lengths."""
    for seed in seeds:
        sizes(**small_sizes(seed), FUSED=False)
        case = random_case(seed)
        packed = random_packed_case(seed, max_tokens=140, max_images=4)
        try:
            assert_same_bits(operators.select(*case), reference.select(*case))
            for got, expected in zip(operators.prune(*case), reference.prune(*case), strict=True):
                assert_same_bits(got, expected)
            assert_same_bits(operators.select_varlen(*packed), reference.select_varlen(*packed))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


@pytest.mark.parametrize("matching", ["bipartite", "pairwise"])
def test_three_launches_use_no_counters(matching, sizes, monkeypatch):
    """A counter would need a barrier that waits for stores, which Triton for AMD GPUs lacks."""
    launches = []
    run = launch.run

    def recorded(kernel, grid, *args, **meta):
        launches.append((grid, meta["PHASE"]))
        run(kernel, grid, *args, **meta)

    monkeypatch.setattr(launch, "run", recorded)
    monkeypatch.setattr(interpreter_builder, "create_atomic_rmw", None)
    sizes(FUSED=False, SMALL=16)
    generator = torch.Generator().manual_seed(0)
    features = sample_features("clustered", 3, 70, 8, generator)
    args = (features, sample_scores("ties", 3, 70, generator), 12, 0.5, 8, matching)
    assert_same_bits(operators.select(*args), reference.select(*args))
    # Three blocks of 32 tokens are six tiles.
    assert launches == [(18, 1), (9, 2), (3, 3)]
    sizes(FUSED=True)
    with pytest.raises(InterpreterError, match="not callable"):
        operators.select(*args)


@pytest.mark.parametrize("fused", [True, False])
def test_contradictory_offsets_stay_in_bounds(fused, sizes, monkeypatch):
    """A GPU cannot check offsets without a copy to the host. Sentinels surround the output."""
    sizes(FUSED=fused)
    monkeypatch.setattr(select, "check_offsets", lambda *args: None)
    for seed in range(60):
        rng = random.Random(seed)
        images, total = rng.randint(0, 3), rng.randint(1, 70)

        def offsets(end, rng=rng, images=images):
            values = [rng.randint(0, end), rng.randint(-(2**31), 2**31 - 1), 0]
            return torch.tensor(
                [rng.choice([rng.choice(values), rng.randint(0, end)]) for _ in range(images + 1)],
                dtype=torch.int32,
            )

        memory = torch.full((total + 64,), -7)
        kept = rng.randint(0, total)
        empty = torch.empty

        def sentinels(*shape, memory=memory, kept=kept, empty=empty, **kwargs):
            if kwargs.get("dtype") is torch.int64:
                return memory[32 : 32 + kept]
            return empty(*shape, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", sentinels)
            out = operators.select_varlen(
                torch.randn(total, 4),
                torch.rand(total),
                offsets(total),
                offsets(kept + 3),
                rng.choice([0, 1, 70, 16384]),
                kept,
                0.5,
                8,
                rng.choice(["bipartite", "pairwise"]),
            )
        assert ((out >= 0) & (out < total)).all(), f"seed {seed}"
        assert (memory[:32] == -7).all()
        assert (memory[32 + kept :] == -7).all()


def test_select_topk_and_select_rows_match_the_reference():
    for seed in range(100):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        n = rng.choice([1, 2, 3, 7, 16, 33, 60, 300])
        scores = sample_scores(rng.choice(SCORE_KINDS), rng.randint(0, 3), n, generator)
        scores = scores.to(rng.choice(DTYPES))
        keep = rng.randint(1, n)
        assert_same_bits(operators.select_topk(scores, keep), reference.select_topk(scores, keep))
        width = rng.choice([w for w in range(1, n + 1) if n % w == 0])
        args = (scores, width, rng.randint(1, n // width))
        assert_same_bits(operators.select_rows(*args), reference.select_rows(*args))


@pytest.mark.kernels
@pytest.mark.parametrize("op", ["select", "cls_attention", "cls_scores", "received_scores"])
def test_a_second_launch_with_the_same_scratch_has_the_same_bits(op, monkeypatch):
    """A CUDA graph repeats launches with the same arguments, tags and scratch included."""
    launches = []
    run = launch.run

    def recorded(*args, **meta):
        launches.append((args, meta))
        run(*args, **meta)

    monkeypatch.setattr(launch, "run", recorded)
    generator = torch.Generator().manual_seed(0)
    if op == "select":
        features = sample_features("normal", 3, 150, 8, generator)
        scores = torch.rand(3, 150, generator=generator)
        args = (features, scores, 20, 0.5, 8, "bipartite")
    else:
        args = torch.randn(3 if op == "cls_attention" else 2, 2, 70, 3, 16, generator=generator)
    got = getattr(operators_of("triton"), op)(*args)
    outputs = got if isinstance(got, tuple) else (got,)
    before = [x.clone() for x in outputs]
    for _ in range(2):
        for x in outputs:
            x.zero_()
        for arguments, meta in launches:
            run(*arguments, **meta)
        for x, expected in zip(outputs, before, strict=True):
            assert_same_bits(x, expected)


def test_small_cases_reach_all_searches_and_rounds(monkeypatch, sizes):
    """Short lists, whole lists, full rows, late rounds, and removals that are undone."""
    reached = set()

    def watch(module, name):
        function = getattr(module, name)

        def call(*args):
            # The whole list of 16, or the short one.
            whole = name == "_nearest_listed" and "16" in str(args[-1])
            reached.add((name, whole))
            return function(*args)

        monkeypatch.setattr(module, name, call)

    watch(neighbours, "_nearest_listed")
    watch(neighbours, "_nearest_in_row")
    watch(pairwise, "_bound_pairs")
    watch(rules, "_count_larger")
    for seed in range(4):
        for matching in ("bipartite", "pairwise"):
            sizes(SMALL=16, EAGER=1, NEIGHBOURS=16, SORTED=16)
            case = random_case(seed, matching=matching)
            generator = torch.Generator().manual_seed(seed)
            features = sample_features("clustered", 1, 90, 16, generator)
            args = (features, sample_scores("ties", 1, 90, generator), 12, *case[3:])
            assert_same_bits(operators.select(*args), reference.select(*args))
    names = ["_nearest_listed", "_nearest_in_row", "_bound_pairs", "_count_larger"]
    assert reached == {("_nearest_listed", True), *((name, False) for name in names)}


def test_lists_hold_the_nearest_tokens():
    """A list has NEIGHBOURS / 2 to NEIGHBOURS tokens in the order of the pairwise rule."""
    tokens = 208
    generator = torch.Generator().manual_seed(3)
    features = sample_features("clustered", 1, tokens, 24, generator)
    sim = reference.similarity(features[0]).fill_diagonal_(-torch.inf)
    keys = sim.view(torch.int32)
    keys = torch.where(keys >= 0, keys, keys ^ 0x7FFFFFFF)
    keys.fill_diagonal_(-(2**31))
    lists = torch.empty(tokens, 32, dtype=torch.int64)

    @triton.jit
    def list_kernel(sim_ptr, lists_ptr, N):
        for row in range(0, N, 16):
            neighbours.list_neighbours(sim_ptr, N, lists_ptr, N, row + tl.arange(0, 16), 32)

    launch.run(list_kernel, 1, keys, keys, lists, tokens)
    for token in range(tokens):
        listed = lists[token][lists[token] != -(2**63)]
        assert 16 <= len(listed) <= 32
        index = 0x7FFFFFFF - (listed & 0x7FFFFFFF)
        order = torch.sort(sim[token], descending=True, stable=True).indices
        assert index.tolist() == order[: len(listed)].tolist()
        assert torch.equal((listed >> 32).int(), keys[token][index])


def test_tags_are_random_and_do_not_use_the_callers_generator():
    random.seed(5)
    first = [launch.new_tag() for _ in range(100)]
    assert random.random() == random.Random(5).random()
    random.seed(5)
    assert len({*first, *(launch.new_tag() for _ in range(100))}) == 200
    # Triton takes every tag for an int64, and tag << 20 is positive.
    assert all(2**31 < tag and tag << 20 < 2**63 for tag in first)


def test_too_many_programs_raise():
    with pytest.raises(ValueError, match="needs 2147483648 programs, expected at most 2147483647"):
        launch.run(select._select_kernel, 2**31, torch.empty(1))


def test_triton_serves_cuda_and_cpu():
    assert _backends.SERVES["triton", "cuda"]
    assert _backends.SERVES["triton", "cpu"]


def test_on_amd_gpus_triton_serves_only_kernels_that_use_no_counter(monkeypatch):
    monkeypatch.setattr(_backends, "REQUESTED", "auto")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    owners = {
        op: _backends._owner(op, "cuda") for op, device in _backends.OWNERS if device == "cuda"
    }
    served = {op for op, owner in owners.items() if owner == "triton"}
    assert served == {"select", "prune", "select_varlen", "select_topk", "select_rows"}
    assert {owner for op, owner in owners.items() if op not in served} == {"reference"}
    assert _backends._owner("select", "cpu") == _backends.OWNERS["select", "cpu"]


def test_triton_for_amd_gpus_counts_as_installed(monkeypatch):
    def version(package):
        if package != "pytorch-triton-rocm":
            raise importlib.metadata.PackageNotFoundError(package)
        return "3.4.0+git1234"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert operators._reason() == ""
    monkeypatch.setattr(operators, "PACKAGES", ("triton",))
    assert "not installed" in operators._reason()


def test_a_cuda_call_without_triton_raises(monkeypatch):
    """There is no silent fallback."""
    monkeypatch.setattr(operators, "INSTALLED", False)
    monkeypatch.setattr(operators, "REASON", "Triton is not installed; pip install 'triton>=3.4'")
    operators._load.cache_clear()
    message = (
        "select_topk: no kernels for a cuda device: Triton is not installed; "
        "pip install 'triton>=3.4', or set VISPRUNER_KERNELS_BACKEND=reference"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        operators.select_topk(torch.rand(1, 3), 2)


def test_a_gpu_that_is_too_old_raises(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla V100")
    launch._check_device.cache_clear()
    with pytest.raises(
        RuntimeError, match=r"Tesla V100 has compute capability 7\.0.*BACKEND=reference"
    ):
        launch._check_device(0)


def test_compiled_kernels_are_cached_by_shape_class(monkeypatch):
    """A cached kernel must not serve arguments for which Triton would compile another one."""
    compiled, launched = [], []

    class Kernel:
        arg_names = ("x_ptr", "n", "scale", "tag", "BLOCK", "FLAG")
        do_not_specialize = ("tag",)

        def __getitem__(self, grid):
            def compile_and_launch(*args, **meta):
                compiled.append((grid, args, meta))

                class Compiled:
                    def __getitem__(self, grid):
                        return lambda *args: launched.append((grid, args))

                return Compiled()

            return compile_and_launch

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_COMPILED", {})
    monkeypatch.setattr(launch, "_check_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    like = types.SimpleNamespace(device=torch.device("cuda", 0))
    kernel, x = Kernel(), torch.zeros(64)
    meta = {"FLAG": True, "BLOCK": 16, "num_warps": 4}
    launch.run(kernel, 7, like, x, 32, 0.5, 16, **meta)
    launch.run(kernel, 9, like, x[16:], 48, 0.25, 1, **meta)
    assert compiled == [((7,), (x, 32, 0.5, 16), meta)]
    ((grid, args),) = launched
    assert grid == (9, 1, 1)
    assert args == (x[16:].data_ptr(), 48, 0.25, 1, 16, True)
    for other in (
        (x[1:], 32, 0.5, 16),
        (x.half(), 32, 0.5, 16),
        (x, 33, 0.5, 16),
        (x, 1, 0.5, 16),
        (x, 2**40, 0.5, 16),
        (x, 32, 0.5, 2**40),
    ):
        launch.run(kernel, 7, like, *other, **meta)
    launch.run(kernel, 7, like, x, 32, 0.5, 16, **{**meta, "num_warps": 8})
    assert len(compiled) == 8
    assert len(launched) == 1
    # On AMD GPUs storages of less than 2 GiB have kernels of their own, without maxnreg.
    monkeypatch.setattr(launch, "HIP", True)
    compiled.clear()
    launch.run(kernel, 7, like, x, 32, 0.5, 16, maxnreg=255, **meta)
    assert compiled == [((7,), (x, 32, 0.5, 16), meta)]
    size = types.SimpleNamespace(size=lambda: 2**31)
    monkeypatch.setattr(torch.Tensor, "untyped_storage", lambda self: size)
    launch.run(kernel, 7, like, x, 32, 0.5, 16, maxnreg=255, **meta)
    assert len(compiled) == 2
    assert len(launched) == 1
