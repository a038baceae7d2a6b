"""Train the tiny VLM: python -m benchmarks.tiny_vlm.train --out FOLDER

First the vision tower learns to predict the content of each patch. Then the projector and the
language model learn from its features. After stage N the weights are in FOLDER/stage-N.pt, from
which --from continues an interrupted run. After the last stage FOLDER holds the model as
transformers loads it.
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
from benchmarks.tiny_vlm.attention import (
    Recorder,
    attend_to_neighbours,
    attention_loss,
    explicit_attention,
)
from benchmarks.tiny_vlm.scenes import ASKED, TYPES, scene, sheet
from benchmarks.tiny_vlm.supervision import SLOTS, Heads, Pictures, Sample


@dataclass(frozen=True)
class Stage:
    """One stage of the training: of the vision tower from sheets, or of the projector and the
    language model from the tower's features of scenes.

    Attributes:
        steps, batch: the number of optimiser steps, and of pictures in each.
        rate: the learning rate of the matrices in layers (Muon). The learning rate of all other
            parameters (AdamW) is `ADAM` times this one. Both fall to 0 on a cosine.
        scenes: the number of scenes, whose features are computed once; 0 where the tower learns.
        parts, full: the share of steps in which the language model sees a random part of the visual
            tokens, and the share in which its part has the middle of every thing. In all other
            steps it sees all visual tokens.
        sizes, full_sizes: bounds of the sizes of these two kinds of parts.
        attention: the weight of the loss on attention.
    """

    steps: int
    batch: int
    rate: float
    scenes: int = 0
    parts: float = 0.0
    full: float = 0.0
    sizes: tuple[int, int] = (64, 160)
    full_sizes: tuple[int, int] = (200, 200)
    attention: float = 0.0


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
    attention=0.8,
)
STAGES = (
    Stage(2200, 16, 15e-3),
    Stage(1300, 16, 15e-3, scenes=3000, parts=0.5, full=0.5, attention=0.6),
    LAST,
    # More steps with all tokens, at a lower learning rate.
    replace(LAST, steps=450, rate=5e-3, scenes=3000, parts=0.15, full=0.3),
)


def between(bounds: tuple[int, int], share: float) -> int:
    """A number between bounds, at this share of the way on a logarithmic scale."""
    fewest, most = bounds
    return int(fewest * (most / fewest) ** share)


def part(features: Tensor, count: int, first: Tensor | None = None) -> Tensor:
    """Choose a random part of the tokens, `[B, count]`.

    Tokens with a larger value in `first` `[B, N]` come before others. Without `first` the
    composition is random: tokens towards one end of a random direction of the features are
    preferred, by a random amount.
    """
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
    recorder: Recorder,
) -> tuple[Tensor, Tensor]:
    """The loss of the answers by type, and the loss on attention.

    `whole` says that the middles of all things are kept.
    """
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
    return losses, attention_loss(recorder, s, things, middle if whole else None)


def batches(
    stage: Stage, first: int, model: Any, options: argparse.Namespace
) -> Iterator[tuple[Sample, Tensor | None]]:
    """Batches of samples on the device; those of scenes have the tower's features."""
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
            features, _ = encode(model, s.pixels.to(device))
        # Tensors shared by a worker keep a file open each: copy them. Pixels are not needed again.
        s = Sample(features.new_empty(len(features), 0).cpu(), *(x.clone() for x in s[1:]))
        made += zip(zip(*s, strict=True), features.half().cpu(), strict=True)
    for _ in range(stage.steps):
        chosen = [made[i] for i in torch.randint(len(made), (stage.batch,))]
        s = Sample(*default_collate([sample for sample, _ in chosen]))
        features = torch.stack([features for _, features in chosen]).float()
        yield Sample(*(x.to(device) for x in s)), features.to(device)


def encode(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features of the patches from the last layer but one, and CLS from the last layer."""
    tower = model.model.vision_tower(tiny.pixel_values(pixels), output_hidden_states=True)
    return tower.hidden_states[-2][:, 1:], tower.pooler_output


def optimisers(modules: list[nn.Module], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices in layers, AdamW for all other parameters."""
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
    recorder = Recorder(model.model.language_model, (1, 2))
    # No two stages have the same pictures.
    data = batches(stage, number * 1_000_000, model, options)
    bar = tqdm(data, desc=f"stage {number}", total=stage.steps, unit="step", smoothing=0.05)
    mean = None
    # Each type weighs as much as its share of the questions about a test picture.
    weights = torch.tensor([ASKED.count(name) / len(ASKED) for name in TYPES], device=device)
    for step, (s, features) in enumerate(bar):
        with torch.autocast(device.type, torch.bfloat16):
            if features is None:
                features, cls = encode(model, s.pixels)
                shown = {"patches": heads.patches(heads.feature(features), s)}
                shown["tags"] = heads.tags(cls, s)
                loss = shown["patches"] + 3 * shown["tags"]
            else:
                kind, size = torch.rand(2).tolist()
                kept = None
                if kind < stage.parts:
                    kept = part(features, between(stage.sizes, size))
                elif kind < stage.parts + stage.full:
                    # Middles of things first, then other patches that show a thing.
                    first = (s.patches[..., 0] > 0).float() + s.patches[..., -1]
                    kept = part(features, between(stage.full_sizes, size), first)
                visual = model.model.multi_modal_projector(features)
                read = heads.patches(heads.visual(visual), s)
                whole = kind >= stage.parts
                losses, attended = language_loss(model, visual, s, kept, whole, recorder)
                shown = dict(zip(TYPES, losses, strict=True))
                loss = losses @ weights + read + stage.attention * attended
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for stepper in steppers:
            stepper.step()
        if step % 20 == 0:
            now = torch.stack([*shown.values()]).detach().cpu()
            mean = now if mean is None else mean + 0.2 * (now - mean)
            text = {name: f"{x:.2f}" for name, x in zip(shown, mean.tolist(), strict=True)}
            bar.set_postfix(text, refresh=False)
    for hook in recorder.hooks:
        hook.remove()


@torch.no_grad()
def score(model: Any, pictures: int = 200) -> str:
    """A line with the shares of right answers about the first test pictures, by question."""
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
    usage.add_argument(
        "--from",
        type=Path,
        dest="state",
        metavar="FILE",
        help="continue after stage N, from its stage-N.pt",
    )
    usage.add_argument(
        "--shrink", type=int, default=1, help="divide the numbers of steps and scenes by this"
    )
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
    attend_to_neighbours(model.model.vision_tower)
    if options.device == "cpu":
        AttentionInterface.register("explicit", explicit_attention)
        model.set_attn_implementation("explicit")
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
