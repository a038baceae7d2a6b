"""Train the tiny VLM: python -m benchmarks.tiny_vlm.train --out FOLDER

First the vision tower learns, from what there is to see; then the projector and the language model,
from its features. After each of the stages the weights are in FOLDER/stage-N.pt, where a run that
was broken off goes on with --from; after the last the model is in FOLDER as transformers loads it.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from benchmarks.tiny_vlm import answers
from benchmarks.tiny_vlm import model as tiny
from benchmarks.tiny_vlm.attention import Watch, attention, look_around, pointing
from benchmarks.tiny_vlm.scenes import ASKED, TYPES, scene, sheet
from benchmarks.tiny_vlm.supervision import SLOTS, Heads, Pictures, Sample


@dataclass(frozen=True)
class Stage:
    """Part of the training: of the vision tower, from sheets, or of the projector and the language
    model, from the tower's features of scenes.

    Attributes:
        steps, batch: optimiser steps, and pictures of each.
        rate: the learning rate of matrices in layers (Muon's); that of all else (AdamW's) is
            `ADAM` of it. Both fall to 0 on a cosine.
        scenes: the number of scenes, whose features are made once; 0: the tower learns.
        parts, full: shares of steps in which the language model sees a part of the visual tokens,
            and one that has the middle of every thing; in the rest it sees all.
        sizes, full_sizes: bounds of such parts.
        pointing: weight of the loss that says where to look.
    """

    steps: int
    batch: int
    rate: float
    scenes: int = 0
    parts: float = 0.0
    full: float = 0.0
    sizes: tuple[int, int] = (64, 160)
    full_sizes: tuple[int, int] = (200, 200)
    pointing: float = 0.0


ADAM = 0.15
LAST = Stage(
    2400,
    16,
    12e-3,
    scenes=4000,
    parts=0.25,
    full=0.4,
    sizes=(32, 256),
    full_sizes=(32, 400),
    pointing=0.8,
)
STAGES = (
    Stage(2200, 16, 15e-3),
    Stage(1300, 16, 15e-3, scenes=3000, parts=0.5, full=0.5, pointing=0.6),
    LAST,
    # More of all tokens, slowly.
    replace(LAST, steps=450, rate=5e-3, scenes=3000, parts=0.15, full=0.3),
)


def between(bounds: tuple[int, int], share: float) -> int:
    fewest, most = bounds
    return int(fewest * (most / fewest) ** share)


def part(features: Tensor, count: int, first: Tensor | None = None) -> Tensor:
    """`[B, count]`: a random part of the tokens; those with more in `first` `[B, N]` before others,
    or of random composition: along a random direction of the features, more of one end, and by a
    random amount."""
    if first is None:
        x = torch.einsum("bnc,bc->bn", features, torch.randn_like(features[:, 0]))
        x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)
        x = 3 * torch.rand_like(x[:, :1]) * x
    else:
        x = 100 * first
    x = x - torch.empty_like(x).exponential_().log()
    return x.topk(count).indices.sort(1).values


def language_loss(
    model: Any,
    visual: Tensor,
    s: Sample,
    kept: Tensor | None,
    whole: bool,
    watch: Watch,
) -> tuple[Tensor, Tensor]:
    """The loss of answers by type, and of where to look; `whole` if all middles are kept."""
    visual = answers.gather(visual, kept)
    logits = tiny.logits(model, visual, s.ids)
    words = F.cross_entropy(logits.float().mT, s.labels, ignore_index=-100, reduction="none")
    spoken = (s.labels >= 0).unflatten(-1, (SLOTS, -1))
    words = words.unflatten(-1, (SLOTS, -1))
    types = [spoken & (s.types == i)[..., None] for i in range(len(TYPES))]
    losses = torch.stack([words[of].mean() for of in types]).nan_to_num()
    things, middle = s.things, s.patches[..., -1] > 0
    if kept is not None:
        things, middle = things.gather(1, kept), middle.gather(1, kept)
    return losses, pointing(watch, s, things, middle if whole else None)


def batches(
    stage: Stage, first: int, model: Any, options: argparse.Namespace
) -> Iterator[tuple[Sample, Tensor | None]]:
    """Samples on the device; those of scenes with their features."""
    device = torch.device(options.device)
    scenes = functools.partial(scene, "train", seed=options.seed)
    make = scenes if stage.scenes else functools.partial(sheet, seed=options.seed)
    pictures = Pictures(make, first, stage.scenes or stage.steps * stage.batch)
    loader = DataLoader(pictures, stage.batch, num_workers=options.workers)
    if not stage.scenes:
        for s in loader:
            yield Sample(*(x.to(device, non_blocking=True) for x in s)), None
        return
    made = []
    for s in tqdm(loader, desc="features", unit="batch"):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            features, _ = see(model, s.pixels.to(device))
        # Copies: of what workers shared a file would stay open each. No pixels.
        s = Sample(features.new_empty(len(features), 0).cpu(), *(x.clone() for x in s[1:]))
        made += zip(zip(*s, strict=True), features.half().cpu(), strict=True)
    for _ in range(stage.steps):
        chosen = [made[i] for i in torch.randint(len(made), (stage.batch,))]
        s = Sample(*default_collate([sample for sample, _ in chosen]))
        features = torch.stack([features for _, features in chosen]).float()
        yield Sample(*(x.to(device) for x in s)), features.to(device)


def see(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features of the patches, of the last layer but one, and CLS of the last."""
    tower = model.model.vision_tower(tiny.pixel_values(pixels), output_hidden_states=True)
    return tower.hidden_states[-2][:, 1:], tower.pooler_output


def optimisers(modules: list[nn.Module], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of layers, AdamW for all else."""
    named = [item for module in modules for item in module.named_parameters()]
    matrices = [x for name, x in named if "layers." in name and x.ndim == 2]
    rest = [x for name, x in named if "layers." not in name or x.ndim != 2]
    groups = [
        {"params": [x for x in rest if x.ndim > 1], "weight_decay": 0.05},
        {"params": [x for x in rest if x.ndim < 2], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=ADAM * rate, betas=(0.9, 0.98)),
    ]


def run(stage: Stage, number: int, model: Any, heads: Heads, options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    modules = (
        [model.model.language_model, model.model.multi_modal_projector, heads.visual]
        if stage.scenes
        else [model.model.vision_tower, heads.feature, heads.cls]
    )
    parameters = [x for module in modules for x in module.parameters()]
    warm = max(1, min(100, stage.steps // 10))

    def rate(step: int) -> float:
        return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / stage.steps))

    steppers: list[Any] = [*optimisers(modules, stage.rate)]
    steppers += [torch.optim.lr_scheduler.LambdaLR(x, rate) for x in steppers]
    watch = Watch(model.model.language_model, (1, 2))
    # Stages have pictures of their own.
    data = batches(stage, number * 1_000_000, model, options)
    bar = tqdm(data, desc=f"stage {number}", total=stage.steps, unit="step", smoothing=0.05)
    mean = None
    # As often as they are asked.
    share = torch.tensor([ASKED.count(name) / len(ASKED) for name in TYPES], device=device)
    for step, (s, features) in enumerate(bar):
        with torch.autocast(device.type, torch.bfloat16):
            if features is None:
                features, cls = see(model, s.pixels)
                told = {"patches": heads.patches(heads.feature(features), s)}
                told["tags"] = heads.tags(cls, s)
                loss = told["patches"] + 3 * told["tags"]
            else:
                kind, size = torch.rand(2).tolist()
                kept = None
                if kind < stage.parts:
                    kept = part(features, between(stage.sizes, size))
                elif kind < stage.parts + stage.full:
                    # The middles before all else that shows something.
                    first = (s.patches[..., 0] > 0).float() + s.patches[..., -1]
                    kept = part(features, between(stage.full_sizes, size), first)
                visual = model.model.multi_modal_projector(features)
                read = heads.patches(heads.visual(visual), s)
                whole = kind >= stage.parts
                losses, looks = language_loss(model, visual, s, kept, whole, watch)
                told = dict(zip(TYPES, losses, strict=True))
                loss = losses @ share + read + stage.pointing * looks
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for stepper in steppers:
            stepper.step()
        if step % 20 == 0:
            now = torch.stack([*told.values()]).detach().cpu()
            mean = now if mean is None else mean + 0.2 * (now - mean)
            shown = {name: f"{x:.2f}" for name, x in zip(told, mean.tolist(), strict=True)}
            bar.set_postfix(shown, refresh=False)
    for hook in watch.hooks:
        hook.remove()


@torch.no_grad()
def score(model: Any, pictures: int = 200) -> str:
    """Share of right answers about the first test pictures, by question."""
    hits = []
    for start in range(0, pictures, 25):
        batch = answers.encode(model, [scene("test", i) for i in range(start, start + 25)])
        hits.append(answers.right(model, batch, None).float().cpu())
    mean = torch.cat(hits).mean(0).tolist()
    types = ", ".join(f"{name} {share:.0%}" for name, share in zip(ASKED, mean, strict=True))
    return f"{sum(mean) / len(mean):.1%} of the answers about {pictures} test pictures: {types}"


def main(argv: list[str] | None = None) -> int:
    """The command."""
    usage = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usage.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    usage.add_argument("--seed", type=int, default=0)
    usage.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    usage.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2))
    usage.add_argument("--from", type=Path, dest="state", metavar="FILE", help="a stage-N.pt")
    usage.add_argument("--shrink", type=int, default=1, help="so many times fewer steps and scenes")
    options = usage.parse_args(argv)
    if not hasattr(torch.optim, "Muon"):
        usage.error(f"training needs PyTorch 2.9 or later, with Muon; this is {torch.__version__}")
    if options.shrink < 1:
        usage.error(f"--shrink is {options.shrink}, expected at least 1")
    try:
        from transformers import AttentionInterface, CLIPImageProcessorPil  # noqa: F401
    except ImportError as error:
        usage.error(f"training needs transformers 5.6 or later: {error}")

    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    model = tiny.make()
    look_around(model.model.vision_tower)
    if options.device == "cpu":
        AttentionInterface.register("in the open", attention)
        model.set_attn_implementation("in the open")
    model = model.to(options.device).train()
    widths = (x.hidden_size for x in (model.config.vision_config, model.config.text_config))
    heads = Heads(*widths).to(options.device)
    done = 0
    if options.state:
        state = torch.load(options.state, map_location=options.device, weights_only=True)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        done = state["stage"]
    for number, stage in enumerate(STAGES, 1):
        if number <= done:
            continue
        torch.manual_seed(options.seed + number)
        if options.shrink > 1:
            scenes = stage.scenes and max(stage.batch, stage.scenes // options.shrink)
            stage = replace(stage, steps=max(1, stage.steps // options.shrink), scenes=scenes)
        run(stage, number, model, heads, options)
        state = {"model": model.state_dict(), "heads": heads.state_dict(), "stage": number}
        torch.save(state, options.out / f"stage-{number}.pt")
        if stage.scenes:
            print(f"stage {number}: {score(model)}", flush=True)
    tiny.save(model.cpu(), options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
