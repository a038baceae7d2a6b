"""The kernels have no races that races.py detects; test_race_detector.py tests races.py itself."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from calls import ATTENTION, CLS, SCORES, SELECT_ALL, leaves

pytest.importorskip("triton")

import races
import triton.language as tl

from vispruner_kernels import _checks, reference
from vispruner_kernels._triton import operators
from vispruner_kernels.testing import (
    DTYPES,
    FEATURE_KINDS,
    SCORE_KINDS,
    assert_matches,
    assert_same_bits,
    sample_features,
    sample_offsets,
    sample_qkv,
    sample_scores,
)

pytestmark = [
    pytest.mark.skipif(not operators.INTERPRETED, reason="Triton compiles here: make test-gpu"),
    pytest.mark.skipif(bool(races.MISSING), reason=f"another interpreter: {races.MISSING}"),
]
if operators.INTERPRETED:
    from vispruner_kernels._triton import (
        bipartite,
        cls_attention,
        cls_row,
        cls_scores,
        neighbours,
        offsets,
        pairwise,
        received_scores,
        rules,
        select,
    )

# Operators, and the argument that selects their code path.
ATTENTION_CASES = [
    *((op, "") for op in CLS),
    *((op, lse) for op in ("received_scores", "received_scores_varlen") for lse in ("lse", "")),
]
CASES = [
    *((op, way) for op in SELECT_ALL for way in (*_checks.MATCHINGS, "scores alone")),
    *((op, "") for op in SCORES),
    *ATTENTION_CASES,
]
# The cases in which a program reads stores of another one.
ATOMIC = [*((op, "bipartite") for op in SELECT_ALL), *ATTENTION_CASES]
# Here a sweep of `_select_kernel` has 16 tokens and a program 16 threads; a real launch has 256.
SWEEP = 16


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give small inputs several blocks, chunks, sweeps and steps of heads."""
    caches = (cls_scores._plan, cls_attention._plan, received_scores._plan)
    for name, value in {"BLOCK_N": 16, "NEIGHBOURS": 8, "SMALL": 16, "EAGER": 1}.items():
        monkeypatch.setattr(select, name, value)
    for module in (select, bipartite, pairwise):
        monkeypatch.setattr(module, "SWEEP", tl.constexpr(SWEEP))
    for name, value in {"BLOCK_SHORT": SWEEP, "BLOCK_LIST": 8, "SHORT": 4, "CHUNK": 32}.items():
        monkeypatch.setattr(neighbours, name, tl.constexpr(value))
    # A program has 16 threads, and twice as many keys are sorted in blocks.
    for module in (rules, bipartite, pairwise):
        monkeypatch.setattr(module, "SORTED", tl.constexpr(16))
    for name, value in {"CHUNK": 32, "BLOCK_H": 2, "BLOCK_S": 16}.items():
        monkeypatch.setattr(cls_row, name, value)
    for name, value in {"OFFSETS": 2, "ZEROS": SWEEP}.items():
        monkeypatch.setattr(offsets, name, tl.constexpr(value))
    monkeypatch.setattr(received_scores, "BLOCK_H", tl.constexpr(2))
    monkeypatch.setattr(received_scores, "ADDED", 1)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def arguments(op: str, way: str, seed: int, images: int = 2, tokens: int = 33) -> tuple[Any, ...]:
    """Three or more blocks of tokens per image; three or more images in packed batches."""
    generator = torch.Generator().manual_seed(seed)
    if op in ATTENTION:
        q, k, v = sample_qkv(2, 70, 3, 8, torch.float32, seed)
        lse = 8.0 + torch.randn(2, 3, 70, generator=generator) if way else None
        if op == "received_scores_varlen":
            lse = None if lse is None else lse.movedim(1, 0).flatten(1)
            lengths = [33, 0, 70, 37]
            return (
                *(q.flatten(0, 1), k.flatten(0, 1), sample_offsets(lengths), max(lengths)),
                *(None, lse),
            )
        tail = {
            "cls_attention": (v, None, 1),
            "cls_scores": (None, 1),
            "received_scores": (None, 0, lse),
        }
        return (q, k, *tail[op])
    features = sample_features(FEATURE_KINDS[seed], images, tokens, 3, generator)
    features = features.to(DTYPES[seed % len(DTYPES)])
    scores = sample_scores(SCORE_KINDS[seed], images, tokens, generator)
    if op == "select_topk":
        return scores, 9
    if op == "select_rows":
        return scores, 3, 4
    rule = (1.0, 8, "bipartite") if way == "scores alone" else (0.25, 4, way)
    if op == "select_varlen":
        lengths, keep = [tokens, 0, 17, 6], [12, 0, 5, 6]
        packed = (x.flatten(0, 1)[: sum(lengths)] for x in (features, scores))
        return (*packed, *map(sample_offsets, (lengths, keep)), tokens, sum(keep), *rule)
    return features, scores, tokens // 3, *rule


def watched(
    op: str, args: tuple[Any, ...], seed: int, change: Any = None
) -> tuple[Any, set[races.Hazard]]:
    """The result of an operator and the hazards of its launches, in the context `change`."""
    with (
        races.watch(args, seed, SWEEP if op in SELECT_ALL else None) as hazards,
        change or contextlib.nullcontext(),
    ):
        got = getattr(operators, op)(*args)
    if op in CLS:
        # Rows of logits are loaded to the end of a vector; the values after the row are not used.
        unset = "load of a cell without a value"
        return got, {hazard for hazard in hazards if hazard.what != unset}
    return got, set(hazards)


# `prune` is `select` and a gather, so they have one seed each.
SEEDS = {"select": [1], "prune": [2]}
AGAIN = pytest.mark.kernels


@pytest.mark.parametrize(
    ("op", "way", "seed"),
    [
        pytest.param(*case, seed, marks=AGAIN if turn else ())
        for case in CASES
        for turn, seed in enumerate(SEEDS.get(case[0], [1, 2]))
    ],
)
def test_operators_have_no_hazards(op, way, seed):
    args = arguments(op, way, seed)
    got, hazards = watched(op, args, seed)
    assert not hazards
    assert_matches(op, got, getattr(reference, op)(*args), args, {})


@pytest.mark.parametrize("way", _checks.MATCHINGS)
@pytest.mark.parametrize("op", SELECT_ALL)
def test_three_launches_have_no_hazards(op, way, monkeypatch):
    monkeypatch.setattr(select, "FUSED", False)
    args = arguments(op, way, 1)
    got, hazards = watched(op, args, 1)
    assert not hazards
    assert_matches(op, got, getattr(reference, op)(*args), args, {})


@pytest.mark.parametrize("way", _checks.MATCHINGS)
def test_several_blocks_of_sorted_keys_have_no_hazards(way):
    args = arguments("select", way, 1, images=1, tokens=90)
    got, hazards = watched("select", args, 1)
    assert not hazards
    assert_same_bits(got, reference.select(*args))


@pytest.mark.kernels
@pytest.mark.parametrize(("op", "way"), ATTENTION_CASES)
def test_neither_order_nor_scratch_changes_a_bit(op, way):
    args = arguments(op, way, 0)
    first, *others = (leaves(watched(op, args, seed)[0]) for seed in range(3))
    for other in others:
        for x, y in zip(first, other, strict=True):
            assert_same_bits(x, y)


def barriers() -> set[str]:
    lines = set()
    for path in Path(select.__file__).parent.glob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.strip() == "tl.debug_barrier()":
                lines.add(f"{path.name}:{number}")
    return lines


@pytest.mark.kernels
def test_every_barrier_is_needed(monkeypatch):
    """Removing any one barrier causes a hazard, so the cases reach all barriers."""
    missing = ""
    reached = set()

    def barrier() -> None:
        frame = sys._getframe(1)
        line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        reached.add(line)
        if line != missing:
            races.interpreter_builder.create_barrier()

    monkeypatch.setattr(tl, "debug_barrier", barrier)
    needed: set[str] = set()
    for case in [
        ("prune", "scores alone"),
        ("cls_scores", ""),
        ("prune", "pairwise"),
        ("prune", "bipartite"),
    ]:
        args = arguments(*case, 1, images=1, tokens=32)
        reached.clear()
        watched(case[0], args, 1)
        for missing in sorted(reached - needed):
            if watched(case[0], args, 1)[1]:
                needed.add(missing)
        missing = ""
    assert needed == barriers()


@pytest.mark.kernels
@pytest.mark.parametrize(("op", "way"), ATOMIC)
def test_without_barriers_programs_load_too_early(op, way, monkeypatch):
    monkeypatch.setattr(tl, "debug_barrier", lambda: None)
    _, hazards = watched(op, arguments(op, way, 1), 1)
    assert "programs: load after store" in {hazard.what for hazard in hazards}


@contextlib.contextmanager
def weaker_atomics(semantic: Any) -> Iterator[None]:
    """Replace acquire-release atomics by atomics of `semantic`."""
    strong = races.MEM_SEMANTIC.ACQUIRE_RELEASE

    def weaker(name: str) -> Callable[..., Any]:
        call = getattr(races.interpreter_builder, name)
        return lambda *args: call(
            *args[:-2], semantic if args[-2] == strong else args[-2], args[-1]
        )

    names = ("create_atomic_rmw", "create_atomic_cas")
    changed = {name: weaker(name) for name in names}
    with mock.patch.multiple(races.interpreter_builder, **changed):
        yield


@pytest.mark.kernels
@pytest.mark.parametrize("semantic", ["RELAXED", "ACQUIRE", "RELEASE"])
@pytest.mark.parametrize(("op", "way"), [case for case in ATOMIC if case[0] != "prune"])
def test_with_weaker_atomics_programs_load_too_early(op, way, semantic):
    change = weaker_atomics(getattr(races.MEM_SEMANTIC, semantic))
    _, hazards = watched(op, arguments(op, way, 1), 1, change)
    assert "programs: load after store" in {hazard.what for hazard in hazards}
