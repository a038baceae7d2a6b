"""Train the tiny VLM: python -m benchmarks.tiny_vlm.train --out FOLDER

Five stages. After each the weights are in FOLDER/stage-N.pt, where a run that was broken off goes
on with --from; after the last the model is in FOLDER as transformers loads it.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from benchmarks.tiny_vlm import answers
from benchmarks.tiny_vlm import model as tiny
from benchmarks.tiny_vlm.scenes import (
    ASKED,
    COLOURS,
    KINDS,
    PATCH,
    SHAPES,
    SIDE,
    TRAINED,
    TYPES,
    Scene,
    scene,
)

NAMES = [*COLOURS]
SLOTS = sum(TRAINED.values())
# More than there are in a picture, and the number of no thing.
NOTHING = 10
# Colours by kind (of shapes, and frames), kinds of shapes, digits.
TAGS = len(COLOURS) * (len(SHAPES) + 1) + len(SHAPES) + 10


@dataclass(frozen=True)
class Stage:
    """Part of the training.

    Attributes:
        steps, batch: optimiser steps, and pictures of each.
        rate: the learning rate, which falls to 0 on a cosine.
        whole: the whole model learns, or the language model and the projector alone; these see the
            features of `cached` pictures, made once.
        parts: share of steps in which the language model sees a part of the visual tokens.
        fewest, most: bounds of such a part.
        pointing: weight of the loss that says where to look.
    """

    steps: int
    batch: int
    rate: float
    whole: bool = True
    cached: int = 0
    parts: float = 0.0
    fewest: int = 32
    most: int = tiny.PATCHES
    pointing: float = 0.0


STAGES = (
    Stage(6700, 64, 2e-3),
    Stage(600, 24, 1.5e-3, whole=False, cached=2000, parts=1.0, fewest=64, most=160, pointing=0.6),
    Stage(500, 16, 1.5e-3, whole=False, cached=2000, parts=0.7, fewest=32, most=192, pointing=0.3),
    Stage(400, 16, 1.5e-3, whole=False, cached=2000, parts=0.4, fewest=32, most=192, pointing=0.1),
    Stage(330, 16, 1.2e-3, whole=False, cached=2000, parts=0.3, fewest=32, most=192, pointing=0.1),
)


class Sample(NamedTuple):
    """A picture and all that is known of it; N = 576 patches, Q = SLOTS questions.

    Attributes:
        pixels: `[192, 192, 3]` uint8.
        ids, labels: `[Q * SLOT]`, of `tiny.pack`.
        types: `[Q]`, of the questions.
        patches: `[N, 7]`, kind, colour and digit of what a patch shows, and the kinds of what is
            left, right, above and below of that; each from 1, or 0.
        things: `[N]`, which of the scene's things that is, or NOTHING.
        tags: `[TAGS]`, what a caption of the picture could name.
        seen, then: `[Q, NOTHING + 1]` bool, things that a question names, and its answer's.
    """

    pixels: Tensor
    ids: Tensor
    labels: Tensor
    types: Tensor
    patches: Tensor
    things: Tensor
    tags: Tensor
    seen: Tensor
    then: Tensor


def sample_of(s: Scene) -> Sample:
    patches = torch.zeros(SIDE, SIDE, 7, dtype=torch.long)
    things = torch.full((SIDE, SIDE), NOTHING)
    tags = torch.zeros(TAGS)
    centres = np.arange(SIDE) * PATCH + PATCH / 2
    by_colour = len(SHAPES) + 1
    at = {thing.place: KINDS.index(thing.kind) for thing in s.things}
    for i, thing in enumerate(s.things):
        rows = np.flatnonzero((centres > thing.top) & (centres < thing.bottom))
        columns = np.flatnonzero((centres > thing.left) & (centres < thing.right))
        kind = KINDS.index(thing.kind)
        colour = NAMES.index(thing.colour) if thing.colour else -1
        things[np.ix_(rows, columns)] = i
        row, column = thing.place
        near = [(row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)]
        kinds = [at.get(place, -1) for place in near]
        for column in columns:
            right = len(thing.digits) > 1 and centres[column] > (thing.left + thing.right) / 2
            digit = thing.digits[int(right)] if thing.digits else -1
            patches[rows, column] = 1 + torch.tensor([kind, colour, digit, *kinds])
        if thing.colour:
            tags[colour * by_colour + min(kind, len(SHAPES))] = 1
        if thing.kind in SHAPES:
            tags[len(COLOURS) * by_colour + kind] = 1
        tags[[TAGS - 10 + digit for digit in thing.digits]] = 1
    seen, then = torch.zeros(2, SLOTS, NOTHING + 1, dtype=torch.bool)
    for i, question in enumerate(s.questions):
        seen[i, list(question.seen)] = True
        then[i, question.then] = question.then >= 0
    types = [TYPES.index(question.type) for question in s.questions]
    return Sample(
        torch.from_numpy(s.pixels),
        *tiny.pack(s.questions, SLOTS),
        torch.tensor(types + [0] * (SLOTS - len(types))),
        patches.flatten(0, 1),
        things.flatten(),
        tags,
        seen,
        then,
    )


class Scenes(Dataset[Sample]):
    """So many training pictures from that number on."""

    def __init__(self, first: int, count: int, seed: int) -> None:
        self.first, self.count, self.seed = first, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return sample_of(scene("train", self.first + index, self.seed))


class Heads(nn.Module):
    """What is read in training, and then dropped: from each visual token, before and after the
    projector, what it shows and where it is; from CLS what a caption would name."""

    def __init__(self, width: int, projected: int) -> None:
        super().__init__()
        self.sizes = [len(KINDS) + 1, len(COLOURS), 10, SIDE, SIDE, *4 * [len(KINDS) + 1]]
        self.feature = nn.Linear(width, sum(self.sizes))
        self.visual = nn.Linear(projected, sum(self.sizes))
        self.cls = nn.Linear(width, TAGS)

    def tags(self, cls: Tensor, s: Sample) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.cls(cls).float(), s.tags)

    def patches(self, read: Tensor, s: Sample) -> Tensor:
        words = read.float().flatten(0, 1).split(self.sizes, -1)
        kind, colour, digit, *near = s.patches.flatten(0, 1).unbind(-1)
        at = torch.arange(SIDE, device=kind.device)
        row, column = at.repeat_interleave(SIDE), at.repeat(SIDE)
        # Most patches show nothing.
        weight = torch.ones(self.sizes[0], device=kind.device)
        weight[0] = 0.2
        sides = [
            F.cross_entropy(said, torch.where(kind > 0, side, -1), ignore_index=-1)
            for said, side in zip(words[5:], near, strict=True)
        ]
        return (
            F.cross_entropy(words[0], kind, weight)
            + F.cross_entropy(words[1], colour - 1, ignore_index=-1)
            + F.cross_entropy(words[2], digit - 1, ignore_index=-1)
            + 0.2 * F.cross_entropy(words[3], row.repeat(len(read)))
            + 0.2 * F.cross_entropy(words[4], column.repeat(len(read)))
            + 0.5 * torch.stack(sides).mean()
        )


def part(features: Tensor, count: int) -> Tensor:
    """`[B, count]`: a random part of the tokens, of random composition: along a random direction of
    the features, more of one end, and by a random amount."""
    x = torch.einsum("bnc,bc->bn", features, torch.randn_like(features[:, 0]))
    x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)
    x = 3 * torch.rand_like(x[:, :1]) * x - torch.empty_like(x).exponential_().log()
    return x.topk(count).indices.sort(1).values


def strides(positions: Tensor, visual: int, batch: int) -> Tensor:
    """`[B, S]`: visual tokens closer together, 1 to 12 at a position, as if there were fewer."""
    stride = 0.08 ** torch.rand(batch, 1, device=positions.device)
    picture = (positions[:, : 1 + visual] * stride).ceil()
    text = positions[:, 1 + visual :] - visual + (visual * stride).ceil()
    return torch.cat([picture, text], 1).long()


class Watch:
    """Attention of a language model's layers: what they saw in the last forward pass."""

    def __init__(self, llama: Any, layers: tuple[int, ...]) -> None:
        self.llama = llama
        self.seen: dict[int, tuple[Tensor, Any]] = {}
        self.hooks = [
            llama.layers[i].register_forward_pre_hook(self._keep(i), with_kwargs=True)
            for i in layers
        ]

    def _keep(self, layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            self.seen[layer] = args[0], kwargs["position_embeddings"]

        return hook

    def surprise(self, layer: int, rows: Tensor, wanted: Tensor) -> Tensor:
        """`[B, Q]`: minus the log of the share of its attention to START and the picture that the
        first head of a layer, at `rows` `[B, Q]`, gives to the tokens `wanted` `[B, Q, T]`."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        block, (hidden, rope) = self.llama.layers[layer], self.seen[layer]
        size = block.self_attn.head_dim
        normed = block.input_layernorm(hidden)
        q, k = (
            F.linear(normed, projection.weight[:size])[:, None]
            for projection in (block.self_attn.q_proj, block.self_attn.k_proj)
        )
        q, k = (x[:, 0].float() for x in apply_rotary_pos_emb(q, k, *rope))
        q = q.gather(1, rows[..., None].expand(-1, -1, size))
        logits = q @ k[:, : 1 + wanted.shape[-1]].mT * size**-0.5
        return -logits.log_softmax(-1)[..., 1:].masked_fill(~wanted, -1e9).logsumexp(-1)


def pointing(watch: Watch, s: Sample, things: Tensor) -> Tensor:
    """At the end of a question, and at the last word before END, the second layer looks at what is
    asked about; at the end of a question about a relation the third at what is there."""
    count = things.shape[1]
    spoken = (s.labels >= 0).unflatten(-1, (SLOTS, -1))
    begin = spoken.int().argmax(-1)
    slots = 1 + count + torch.arange(SLOTS, device=begin.device) * tiny.SLOT
    which = things[:, None].expand(-1, SLOTS, -1)
    seen, then = s.seen.gather(2, which), s.then.gather(2, which)
    last = (begin + spoken.sum(-1) - 2).clamp_min(0)
    losses = [
        watch.surprise(layer, slots + place, wanted)[wanted.any(-1)].mean()
        for layer, place, wanted in ((1, begin, seen), (1, last, seen), (2, begin, then))
    ]
    return torch.stack(losses).nan_to_num().sum()


def language_loss(
    model: Any, visual: Tensor, s: Sample, kept: Tensor | None, watch: Watch | None
) -> tuple[Tensor, Tensor]:
    """The loss of answers by type, and of where to look."""
    visual = answers.gather(visual, kept)
    count = visual.shape[1]
    _, positions = tiny.mask_and_positions(count, SLOTS, visual.device)
    logits = tiny.logits(model, visual, s.ids, strides(positions, count, len(visual)))
    words = F.cross_entropy(logits.float().mT, s.labels, ignore_index=-100, reduction="none")
    spoken = (s.labels >= 0).unflatten(-1, (SLOTS, -1))
    words = words.unflatten(-1, (SLOTS, -1))
    types = [spoken & (s.types == i)[..., None] for i in range(len(TYPES))]
    losses = torch.stack([words[of].mean() for of in types]).nan_to_num()
    if watch is None:
        return losses, losses.new_zeros(())
    return losses, pointing(watch, s, s.things if kept is None else s.things.gather(1, kept))


def batches(
    stage: Stage, first: int, model: Any, options: argparse.Namespace
) -> Iterator[tuple[Sample, Tensor | None]]:
    """Samples on the device, and their features where they are cached."""
    device = torch.device(options.device)
    count = stage.cached or stage.steps * stage.batch
    loader = DataLoader(
        Scenes(first, count, options.seed), stage.batch, num_workers=options.workers
    )
    if not stage.cached:
        for s in loader:
            yield Sample(*(x.to(device, non_blocking=True) for x in s)), None
        return
    made = []
    for s in tqdm(loader, desc="features", unit="batch"):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            features, _ = see(model, s.pixels.to(device))
        s = s._replace(pixels=s.pixels[:, :0])
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


def run(stage: Stage, number: int, model: Any, heads: Heads, options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    language = [model.model.language_model, model.model.multi_modal_projector]
    modules = [model, heads] if stage.whole else [*language, heads.visual]
    parameters = [x for module in modules for x in module.parameters()]
    groups = [
        {"params": [x for x in parameters if x.ndim > 1], "weight_decay": 0.05},
        {"params": [x for x in parameters if x.ndim < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98))
    warm = max(1, min(300, stage.steps // 10))

    def rate(step: int) -> float:
        return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / stage.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    watch = Watch(model.model.language_model, (1, 2)) if stage.pointing else None
    # Stages have pictures of their own.
    data = batches(stage, number * 1_000_000, model, options)
    bar = tqdm(data, desc=f"stage {number}", total=stage.steps, unit="step", smoothing=0.05)
    mean = torch.zeros(len(TYPES))
    # As often as they are asked.
    share = torch.tensor([ASKED.count(name) / len(ASKED) for name in TYPES], device=device)
    for step, (s, features) in enumerate(bar):
        count = tiny.PATCHES
        if int((step + 1) * stage.parts) > int(step * stage.parts):
            count = int(stage.fewest * (stage.most / stage.fewest) ** torch.rand(()).item())
        with torch.autocast(device.type, torch.bfloat16):
            told = torch.zeros((), device=device)
            if features is None:
                features, cls = see(model, s.pixels)
                told = heads.patches(heads.feature(features), s) + 3 * heads.tags(cls, s)
            kept = part(features.detach().float(), count) if count < tiny.PATCHES else None
            visual = model.model.multi_modal_projector(features)
            told = told + heads.patches(heads.visual(visual), s)
            losses, looks = language_loss(model, visual, s, kept, watch)
        optimiser.zero_grad(set_to_none=True)
        (losses @ share + told + stage.pointing * looks).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if step % 20 == 0:
            mean += (0.2 if step else 1.0) * (losses.detach().cpu() - mean)
            shown = {name: f"{x:.2f}" for name, x in zip(TYPES, mean.tolist(), strict=True)}
            bar.set_postfix(shown, refresh=False)
    if watch:
        for hook in watch.hooks:
            hook.remove()


@torch.no_grad()
def score(model: Any, pictures: int = 200) -> str:
    """Share of right answers about the first test pictures, by type."""
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
    usage.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2))
    usage.add_argument("--from", type=Path, dest="state", metavar="FILE", help="a stage-N.pt")
    usage.add_argument("--shrink", type=int, default=1, help="so many times fewer steps, for a try")
    options = usage.parse_args(argv)
    if options.shrink < 1:
        usage.error(f"--shrink is {options.shrink}, expected at least 1")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    model = tiny.make().to(options.device).train()
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
            cached = stage.cached and max(stage.batch, stage.cached // options.shrink)
            stage = replace(stage, steps=max(1, stage.steps // options.shrink), cached=cached)
        run(stage, number, model, heads, options)
        state = {"model": model.state_dict(), "heads": heads.state_dict(), "stage": number}
        torch.save(state, options.out / f"stage-{number}.pt")
        print(f"stage {number}: {score(model)}", flush=True)
    tiny.save(model.cpu(), options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
