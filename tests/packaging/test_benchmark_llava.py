"""`python -m benchmarks.llava`: its counts, its checks and its tables."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")

import vlms

from benchmarks import llava


@pytest.fixture(scope="module", params=["llava-1.5-7b", "video-llava-7b"])
def bench(request):
    case = llava.CASES[request.param]
    model = llava.build(case, True, "cpu", torch.float32)
    # PyTorch counts the products of eager attention.
    model.set_attn_implementation("eager")
    tower = getattr(model.model, "video_tower", getattr(model.model, "vision_tower", None))
    return llava.Bench(case, model, tower, 64)


def counted(run) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_flops_equal_those_that_pytorch_counts(bench):
    with torch.no_grad():
        way, ours = bench.unpruned(), bench.ours()
    parts = llava.flops(bench.model.config, bench.case.grids, way.visual_tokens, way.projected)
    for stage, flops in parts.items():
        # The positions of rotary embeddings may need a product too.
        assert counted(way.stages[stage]) == pytest.approx(flops, rel=1e-4), stage
    parts = llava.flops(
        bench.model.config, bench.case.grids, ours.visual_tokens, ours.projected, unread=0
    )
    # In the layer that is read, attention is one operator, which PyTorch does not count.
    vision = bench.model.config.vision_config
    s = (vision.image_size // vision.patch_size) ** 2 + 1
    parts["tower"] -= bench.case.grids * 4 * s * s * vision.hidden_size
    for stage in parts:
        assert counted(ours.stages[stage]) == pytest.approx(parts[stage], rel=1e-4), stage


def test_cache_bytes_equal_those_of_a_cache(bench):
    visual = torch.zeros(64, bench.model.config.text_config.hidden_size)
    with torch.no_grad():
        out = bench.model.model.language_model(
            inputs_embeds=torch.cat([visual, torch.zeros(llava.TEXT, visual.shape[1])])[None],
            use_cache=True,
        )
    cache = vlms.cache_of(out)
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    held = sum(x.nbytes for layer in layers for x in layer)
    assert held == llava.cache_bytes(bench.model.config, 64, 4)


def test_full_size_has_the_parameters_of_the_published_model():
    """LLaVA-1.5-7B has 7.06 billion parameters."""
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava.config_of(llava.CASES["llava-1.5-7b"]))
    assert f"{model.num_parameters() / 1e9:.2f}" == "7.06"


@pytest.mark.parametrize(
    ("name", "keep", "tokens"),
    [
        ("llava-1.5-7b", 64, 64),
        pytest.param("llava-next-7b", 160, 160, marks=pytest.mark.slow),
        pytest.param("video-llava-7b", 256, 264, marks=pytest.mark.slow),
    ],
)
def test_command_writes_times_and_costs_of_each_way(name, keep, tokens, tmp_path, capsys):
    file = tmp_path / "out.json"
    argv = f"--model {name} --keep {keep} --tiny --rounds 1 --device cpu --json {file}"
    assert llava.main(argv.split()) == 0
    printed = capsys.readouterr().out
    assert f"scaled down: {name}, " in printed
    assert f"full size, counted: {name}, " in printed
    result = json.loads(file.read_text())
    assert result["scaled down"]
    none = result["times"][0]
    assert [row["by"] for row in result["times"]] == [*llava.WAYS]
    for row in result["times"]:
        stages = [row[f"{stage} ms"] for stage in llava.STAGES]
        assert row["ms [p10, p90]"]["p50"] > 0
        assert [stage is None for stage in stages] == [False, row is none, False, False]
    costs = result["costs"]
    assert costs[2]["visual tokens"] == costs[1]["visual tokens"] == tokens
    assert costs[2]["projector GFLOP"] < costs[1]["projector GFLOP"]
    assert costs[2]["language model GFLOP"] < costs[0]["language model GFLOP"] / 2


@pytest.mark.parametrize("what", ["selection", "prompt"])
def test_the_check_finds_a_wrong_selection_or_prompt(what, bench, monkeypatch, capsys):
    if what == "selection":
        select = llava._visual.select

        def other(*args, **kwargs):
            rows, counts = select(*args, **kwargs)
            rows = rows.clone()
            rows[0] += 1 if rows[1] > rows[0] + 1 else -1
            return rows, counts

        monkeypatch.setattr(llava._visual, "select", other)
    else:
        prune = llava.prune_inputs

        def prune_inputs(*args, **kwargs):
            pruned = prune(*args, **kwargs)
            pruned["inputs_embeds"] = pruned["inputs_embeds"].flip(1)
            return pruned

        monkeypatch.setattr(llava, "prune_inputs", prune_inputs)
    with torch.no_grad():
        assert bench.ours().check() == "WRONG"
    monkeypatch.undo()
    with torch.no_grad():
        assert bench.ours().check() == ""


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--model llava-2", "invalid choice"),
        ("--keep 577 --model llava-1.5-7b", "--keep is 577, expected a multiple of 1 up to 576"),
        ("--keep 33 --model llava-next-7b", "--keep is 33, expected a multiple of 5"),
        ("--keep 4 --model video-llava-7b", "--keep is 4, expected a multiple of 8"),
    ],
)
def test_bad_options_are_errors(argv, words, capsys):
    with pytest.raises(SystemExit):
        llava.main([*argv.split(), "--device", "cpu"])
    assert words in capsys.readouterr().err
