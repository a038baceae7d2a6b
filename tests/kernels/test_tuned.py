"""The table of the fastest variants (tuned.json) decides the variants that the launchers use."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
import variants

from vispruner_kernels import _checks, _tuned
from vispruner_kernels._native import cuda
from vispruner_kernels._triton import operators
from vispruner_kernels.testing import sample_features, sample_offsets, sample_scores

SMALL, LARGE, OTHER = ({"tile": n} for n in (48, 64, 32))
VARIANTS = (SMALL, LARGE)


def row(images, tokens, variant, matching="bipartite", capability="9.0"):
    sizes = {"images": images, "tokens": tokens}
    return {"capability": capability, "matching": matching, **sizes, "variant": variant}


@pytest.fixture
def rows(monkeypatch):
    """Sets the rows of all backends, on a GPU of compute capability 9.0."""

    def replace(*found):
        monkeypatch.setattr(_tuned, "ROWS", {"native": [*found], "triton": [*found]})
        cuda._tuned_variant.cache_clear()

    monkeypatch.setattr(_tuned, "capability", lambda device: "9.0")
    replace()
    yield replace
    cuda._tuned_variant.cache_clear()


def number(images, tokens, matching="bipartite"):
    return _tuned.number("native", VARIANTS, 0, images, tokens, matching)


def test_the_nearest_row_that_is_at_least_as_large_decides(rows):
    rows(
        row(64, 576, LARGE),
        row(1, 2880, LARGE),
        row(1, 576, SMALL),
        row(5, 576, None),
        row(1, 576, LARGE, "pairwise"),
        row(1, 576, LARGE, capability="8.0"),
        row(2, 576, LARGE, "pairwise", "8.0"),
    )
    assert number(1, 576) == number(1, 1) == 1
    # null: the launcher's choice was the fastest.
    assert number(2, 576) == number(5, 100) == 0
    assert number(6, 576) == number(64, 576) == 2
    assert number(1, 577) == 2
    assert number(1, 576, "pairwise") == 2
    # No row is large enough in both sizes.
    assert number(2, 577) == number(65, 1) == number(2, 1, "pairwise") == 0


def test_without_rows_the_launcher_chooses(rows):
    assert number(1, 576) == 0


def test_a_variant_that_the_build_lacks_is_a_warning(rows):
    rows(row(1, 576, OTHER))
    with pytest.warns(RuntimeWarning, match=r"native variant \{'tile': 32\}.*of 9\.0.*tune"):
        assert number(1, 576) == 0


def test_variants_of_the_committed_table_exist():
    """A change of csrc/cuda/variants.h can make rows useless."""
    native = variants.native()
    assert not cuda.VARIANTS or native == [*cuda.VARIANTS]
    known = {"native": native, "triton": [{"block_n": 32}, {"block_n": 64}]}
    assert _tuned.ROWS.keys() == known.keys()
    for backend, found in _tuned.ROWS.items():
        for each in found:
            assert each.keys() == row(1, 1, None).keys()
            assert re.fullmatch(r"\d+\.\d|gfx\w+", each["capability"])
            assert each["matching"] in _checks.MATCHINGS
            assert each["variant"] is None or each["variant"] in known[backend]


def test_the_capability_of_an_amd_gpu_is_its_architecture(monkeypatch):
    """PyTorch gives gfx942 the capability 9.4, and gfx90a that of an H200."""
    _tuned.capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert _tuned.capability(0) == "9.0"
    properties = SimpleNamespace(gcnArchName="gfx90a:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert _tuned.capability(1) == "gfx90a"
    _tuned.capability.cache_clear()
    assert _tuned.capability(-1) == "interpreter"


def calls(module, matching="bipartite"):
    """`select`, `prune` for 3 images of 40 tokens, `select_varlen` for 2 of 40 and 30."""
    generator = torch.Generator().manual_seed(0)
    features = sample_features("clustered", 3, 40, 16, generator)
    scores = sample_scores("softmax", 3, 40, generator)
    offsets = sample_offsets([40, 30]), sample_offsets([6, 6])
    packed = features.flatten(0, 1)[:70], scores.flatten()[:70]
    rule = 0.5, 8, matching
    module.select(features, scores, 6, *rule)
    module.prune(features, scores, 6, *rule)
    module.select_varlen(*packed, *offsets, 40, 12, *rule)


@pytest.mark.parametrize("forced", [None, 0, 1])
def test_the_cuda_launcher_passes_the_tuned_variant(forced, rows, monkeypatch):
    passed = []
    core = SimpleNamespace(
        cuda_select_scratch=lambda **sizes: 16,
        cuda_select=lambda call, device, stream: passed.append(call["variant"]),
    )
    monkeypatch.setattr(cuda, "_C", core)
    monkeypatch.setattr(cuda, "VARIANTS", VARIANTS)
    monkeypatch.setattr(cuda, "VARIANT", forced)
    monkeypatch.setattr(cuda, "_device_and_stream", lambda tensor: (0, 0))
    cuda._scratch_bytes.cache_clear()
    rows(row(1, 40, LARGE), row(2, 40, SMALL), row(3, 40, LARGE))
    calls(cuda)
    cuda._scratch_bytes.cache_clear()
    # Three images of one length, and two of up to 40 tokens.
    assert passed == ([2, 2, 1] if forced is None else [forced] * 3)


@pytest.mark.skipif(not operators.INSTALLED, reason="Triton is not installed")
@pytest.mark.parametrize("forced", [None, 0, 1, 2])
def test_the_triton_launcher_uses_the_tuned_tiles(forced, rows, monkeypatch):
    from vispruner_kernels._triton import launch, select

    blocks = []
    monkeypatch.setattr(launch, "run", lambda *args, **meta: blocks.append(meta["BLOCK_N"]))
    monkeypatch.setattr(select, "VARIANT", forced)
    select._tuned_variant.cache_clear()
    small, large = select.VARIANTS
    rows(row(1, 40, large), row(2, 40, small), row(3, 40, large))
    calls(select)
    select._tuned_variant.cache_clear()
    own = [32] * 3
    assert blocks == {None: [64, 64, 32], 0: own, 1: own, 2: [64] * 3}[forced]
    assert [each["block_n"] for each in select.VARIANTS] == [32, 64]


@pytest.mark.skipif(not operators.INSTALLED, reason="Triton is not installed")
def test_features_that_are_not_aligned_get_small_tiles(monkeypatch):
    """Larger tiles spill there, and no benchmark measures them."""
    from vispruner_kernels._triton import launch, select

    blocks = []
    monkeypatch.setattr(launch, "run", lambda *args, **meta: blocks.append(meta["BLOCK_N"]))
    monkeypatch.setattr(select, "VARIANT", 2)
    generator = torch.Generator().manual_seed(0)
    features = sample_features("clustered", 1, 40, 15, generator)
    select.select(features, sample_scores("softmax", 1, 40, generator), 6, 0.5, 8, "pairwise")
    assert blocks == [32]
