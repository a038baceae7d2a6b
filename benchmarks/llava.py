"""Prefill of LLaVA models end to end: vision tower, selection, projector and language model.

The weights are random, because latency does not depend on them. One run times three ways to the
first token:

    no pruning   every visual token is projected and read by the language model
    published    the vision tower with eager attention and `output_attentions`, the published loop,
                 every token projected, then dropped
    ours         prune_inputs and model.forward, as a user calls them

Every way is checked before it is timed. "ours" must keep the tokens of the reference, and its
logits must agree with those after dropping tokens by hand. "no pruning" must agree with the model
that keeps every token. "published" must keep the right number of tokens.

Each stage is timed alone and the total as a whole; "rest" is the total less the stages. FLOPs are
counted by the formulas of docs/transformers.md, two for a multiply-add, without the selection.
Without a GPU the models are scaled down to a few narrow layers; they keep their numbers of tokens.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import harness, limits
from benchmarks.harness import Timing
from benchmarks.llava_costs import (
    CASES,
    IMAGE,
    TEXT,
    VIDEO,
    Case,
    cache_bytes,
    config_of,
    counted,
    flops,
)
from vispruner_kernels import reference
from vispruner_kernels.integrations import _vision, _visual
from vispruner_kernels.integrations.transformers import prune_inputs
from vispruner_kernels.methods import FasterVLM, VisPruner
from vispruner_kernels.published import select_published

OPS = ("cls_attention", "select", "select_varlen")
STAGES = ("tower", "selection", "projector", "language model")
WAYS = ("no pruning", "published", "ours")
RATIO = 0.5


def build(case: Case, tiny: bool, device: str, dtype: torch.dtype) -> Any:
    """The model, with random weights."""
    import transformers as tf

    config = config_of(case, tiny)
    cls = getattr(tf, type(config).__name__.removesuffix("Config") + "ForConditionalGeneration")
    torch.manual_seed(0)
    with limits.target(device):
        return cls._from_config(config, dtype=dtype).eval()


def inputs_of(case: Case, model: Any) -> dict[str, Any]:
    """One prompt with one image or video, as the processor returns it."""
    device, dtype = model.device, model.dtype
    side = model.config.vision_config.image_size
    pixels = torch.randn(1, case.grids, 3, side, side, device=device, dtype=dtype)
    tokens, token, inputs = case.grids * (side // 14) ** 2, IMAGE, {}
    if case.model == "video-llava-7b":
        inputs["pixel_values_videos"] = pixels
        tokens, token = tokens + case.grids, VIDEO
    elif case.model == "llava-next-7b":
        inputs["pixel_values"] = pixels
        inputs["image_sizes"] = torch.tensor([[2 * side, 2 * side]])
        # A newline ends each row of the four tiles.
        tokens += 2 * side // 14
    else:
        inputs["pixel_values"] = pixels[0]
    ids = torch.full((1, tokens + TEXT), 100, device=device)
    ids[0, TEXT // 2 : TEXT // 2 + tokens] = token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}


class Way(NamedTuple):
    """One way to the first token. `check` returns "" if its answer is right, else WRONG."""

    total: Callable[[], Tensor]
    stages: dict[str, Callable[[], Any]]
    visual_tokens: int
    projected: int
    check: Callable[[], str]


class Bench:
    """The three ways for one model and one budget."""

    def __init__(self, case: Case, model: Any, eager: Any, keep: int) -> None:
        self.case, self.model, self.eager, self.keep = case, model, eager, keep
        self.inputs = inputs_of(case, model)
        video = case.model == "video-llava-7b"
        self.tower = model.model.video_tower if video else model.model.vision_tower
        self.pixels = self.inputs["pixel_values_videos" if video else "pixel_values"].flatten(0, -4)
        # The language model of Video-LLaVA also reads the [CLS] token of each frame.
        self.cls = 1 if video else 0
        self.method = VisPruner(keep // case.grids, RATIO)

    def language_model(self, visual: Tensor) -> Tensor:
        """Logits of the last token after a prompt with these embeddings [K, D] in its middle."""
        half = self.inputs["input_ids"][:, : TEXT // 2]
        text = self.model.get_input_embeddings()(half)
        embeds = torch.cat([text, visual[None], text], 1)
        hidden = self.model.model.language_model(inputs_embeds=embeds, use_cache=True)[0]
        return self.model.lm_head(hidden[:, -1])

    def project(self, features: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector(features)

    def order(self, kept: Tensor) -> Tensor | None:
        """The order of kept patches [G, T] in the prompt of LLaVA-NeXT: first the overview, then
        the picture row by row, where each row crosses two tiles. None for other models."""
        if "image_sizes" not in self.inputs:
            return None
        grids = torch.arange(self.case.grids, device=kept.device)[:, None]
        side, tile = self.pixels.shape[-1] // 14, grids - 1
        y = (tile // 2) * side + kept // side
        x = (tile % 2) * side + kept % side
        place = torch.where(grids == 0, kept - side * side, y * 2 * side + x)
        return place.flatten().argsort()

    def unpruned(self) -> Way:
        def tower() -> Tensor:
            return self.tower(self.pixels, output_hidden_states=True).hidden_states[-2]

        def project(hidden: Tensor) -> Tensor:
            visual = self.project(hidden[:, 1 - self.cls :]).flatten(0, 1)
            return visual if order is None else visual[order]

        def total() -> Tensor:
            return self.language_model(project(tower()))

        def check() -> str:
            inputs = self.inputs
            if "image_sizes" in inputs:
                # Without newline tokens, as in all three ways.
                inputs = prune_inputs(self.model, inputs, FasterVLM(1.0), newlines="drop")
            expected = self.model(**inputs, logits_to_keep=1).logits[:, 0]
            return "" if _near(total(), expected) else "WRONG"

        side = self.pixels.shape[-1] // 14
        every = torch.arange(side * side, device=self.pixels.device).expand(self.case.grids, -1)
        order = self.order(every)
        features = tower()
        visual = project(features)
        stages = {
            "tower": tower,
            "projector": lambda: project(features),
            "language model": lambda: self.language_model(visual),
        }
        return Way(total, stages, len(visual), len(visual), check)

    def published(self) -> Way:
        def tower() -> tuple[Tensor, Tensor]:
            out = self.eager(self.pixels, output_hidden_states=True, output_attentions=True)
            return out.hidden_states[-2], out.attentions[-2]

        def choose(hidden: Tensor, attention: Tensor) -> Tensor:
            scores = attention[:, :, 0, 1:].mean(1)
            return select_published(hidden[:, 1:], scores, self.method.keep, RATIO)

        def project(hidden: Tensor, kept: Tensor) -> Tensor:
            visual = self.project(hidden[:, 1 - self.cls :])
            patches = visual[:, self.cls :]
            rows = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1]))
            return torch.cat([visual[:, : self.cls], rows], 1).flatten(0, 1)

        def total() -> Tensor:
            hidden, attention = tower()
            return self.language_model(project(hidden, choose(hidden, attention)))

        def check() -> str:
            count = self.case.grids * (self.method.keep + self.cls)
            return "" if len(visual) == count else f"WRONG: {len(visual)} tokens"

        hidden, attention = tower()
        kept = choose(hidden, attention)
        visual = project(hidden, kept)
        stages = {
            "tower": tower,
            "selection": lambda: choose(hidden, attention),
            "projector": lambda: project(hidden, kept),
            "language model": lambda: self.language_model(visual),
        }
        every = hidden[:, 1 - self.cls :, 0].numel()
        return Way(total, stages, len(visual), every, check)

    def ours(self) -> Way:
        read = _vision.reader(self.model)

        def tower() -> _visual.Visual:
            return read(self.model, self.inputs, self.method)[0]

        def total() -> Tensor:
            pruned = prune_inputs(
                self.model, self.inputs, self.method, budget="tile", newlines="drop"
            )
            return self.model(**pruned, use_cache=True, logits_to_keep=1).logits[:, 0]

        def check() -> str:
            patches = seen.source[:, seen.first :].cpu()
            expected = reference.select(patches, seen.scores.cpu(), self.method.keep, RATIO)
            right = torch.equal(kept.cpu(), expected) and _near(total(), by_hand())
            return "" if right else "WRONG"

        def by_hand() -> Tensor:
            grids = torch.arange(self.case.grids, device=kept.device)[:, None]
            hidden = seen.source[grids, kept + seen.first]
            visual = self.project(torch.cat([seen.source[:, : seen.first], hidden], 1))
            visual, order = visual.flatten(0, 1), self.order(kept)
            return self.language_model(visual if order is None else visual[order])

        seen = tower()
        tokens = seen.source.shape[1]
        rows, _ = _visual.select(seen, self.method, per_grid=True)
        kept = rows.view(self.case.grids, -1) % tokens - seen.first
        cls = torch.arange(self.case.grids * seen.first, device=rows.device) * tokens
        rows = torch.cat([rows, cls])
        visual = seen.embed(rows)
        stages = {
            "tower": tower,
            "selection": lambda: _visual.select(seen, self.method, per_grid=True),
            "projector": lambda: seen.embed(rows),
            "language model": lambda: self.language_model(visual),
        }
        return Way(total, stages, len(visual), len(visual), check)


def _near(a: Tensor, b: Tensor) -> bool:
    """Whether logits agree, except for the order in which sums were added."""
    bound = 1e-4 if a.dtype == torch.float32 else 0.03
    return bool(torch.isfinite(a).all()) and bool((a - b).abs().max() <= bound * b.abs().max())


def rows_of(bench: Bench, options: argparse.Namespace) -> tuple[harness.Rows, harness.Rows]:
    """Check the ways, then time them in turns, whole and by stage. Return a row of times and a row
    of costs for each way."""
    ways = dict(zip(WAYS, (bench.unpruned(), bench.published(), bench.ours()), strict=True))
    clocks: dict[tuple[str, str], Callable[[], float]] = {}
    wrong = {name: way.check() for name, way in ways.items()}
    for name, way in ways.items():
        if not wrong[name]:
            for stage, run in {"total": way.total, **way.stages}.items():
                clocks[name, stage] = limits.Wall(run, nullcontext, (), options.device)
    seconds = 2 * harness.CASE_SECONDS[options.device]
    samples = harness.interleaved(clocks, options.rounds, seconds)
    times, costs = [], []
    for name, way in ways.items():
        timing = {
            stage: Timing(samples[name, stage], 1e3)
            for stage in ("total", *STAGES)
            if (name, stage) in samples
        }
        keep = None if name == "no pruning" else bench.keep
        case = {"model": bench.case.model, "keep": keep, "by": name}
        staged = sum(timing[stage].seconds for stage in STAGES if stage in timing)
        times.append(
            {
                **case,
                "ms [p10, p90]": wrong[name] or timing["total"],
                **{f"{stage} ms": timing.get(stage) for stage in STAGES},
                "rest ms": None if wrong[name] else (timing["total"].seconds - staged) * 1e3,
            }
        )
        config = bench.model.config
        unread = 0 if name == "ours" else 1
        parts = flops(config, bench.case.grids, way.visual_tokens, way.projected, unread)
        cache = cache_bytes(config, way.visual_tokens, bench.model.dtype.itemsize)
        costs.append(
            {
                **case,
                "visual tokens": way.visual_tokens,
                "GFLOP": sum(parts.values()) / 1e9,
                **{f"{stage} GFLOP": value / 1e9 for stage, value in parts.items()},
                "KV cache MiB": cache / 2**20,
            }
        )
    return times, costs


def saved(times: harness.Rows, costs: harness.Rows, prefix: str) -> list[str]:
    """Lines on the time and the FLOPs to the first token that pruning saves."""
    lines = []
    for i in range(0, len(times), len(WAYS)):
        none, _, ours = costs[i : i + len(WAYS)]
        total = [row["ms [p10, p90]"] for row in times[i : i + len(WAYS)]]
        if not all(isinstance(time, Timing) for time in total):
            continue

        def less(name: str, none: Any = none, ours: Any = ours) -> str:
            return f"{1 - ours[name] / none[name]:.1%}"

        latency, published = (f"{1 - time.seconds / total[0].seconds:.1%}" for time in total[:0:-1])
        lines.append(
            f"{prefix}{ours['model']}, {none['visual tokens']} -> {ours['visual tokens']} visual "
            f"tokens, first token: FLOPs {less('GFLOP')} less (language model "
            f"{less('language model GFLOP')}), latency {latency} less (published {published}), "
            f"KV cache {less('KV cache MiB')} less"
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    """The command."""
    usage = harness.parser(__doc__.splitlines()[0], ("cpu", "cuda"))
    usage.add_argument("--model", nargs="+", choices=[*CASES], default=[*CASES])
    usage.add_argument(
        "--keep", nargs="+", type=int, help="visual tokens to keep, in all tiles or frames together"
    )
    usage.add_argument(
        "--tiny", action="store_true", help="scale the models down, as is done without a GPU"
    )
    usage.add_argument("--commit", help="the commit for the header, where git does not know it")
    options = usage.parse_args(argv)
    harness.check(options, usage)
    if options.device == "cpu" and not options.tiny:
        print("no GPU is used: the models are scaled down (--tiny)\n")
        options.tiny = True
    cases = [CASES[name] for name in options.model]
    for case in cases:
        for keep in options.keep or ():
            n = 256 if case.model == "video-llava-7b" else 576
            if keep % case.grids or not case.grids <= keep <= case.grids * n:
                usage.error(
                    f"--keep is {keep}, expected a multiple of {case.grids} up to "
                    f"{case.grids * n} for {case.model}"
                )
    torch.set_num_threads(options.threads)
    dtype = torch.float16 if options.device == "cuda" else torch.float32
    head = harness.header(options.threads, options.device, OPS, options.commit)
    import transformers

    head["transformers"] = transformers.__version__
    head["weights"] = "random, " + str(dtype).removeprefix("torch.")
    head["prompt"] = f"{TEXT} words and one image or video"
    if options.tiny:
        head["scaled down"] = (
            "towers of 12 and language models of 8 narrow layers; the numbers of tokens are real"
        )
    times: harness.Rows = []
    costs: harness.Rows = []
    with torch.no_grad():
        for case in cases:
            model = build(case, options.tiny, options.device, dtype)
            video = case.model == "video-llava-7b"
            eager = copy.deepcopy(model.model.video_tower if video else model.model.vision_tower)
            eager.set_attn_implementation("eager")
            for keep in harness.progress(options.keep or case.keeps):
                rows = rows_of(Bench(case, model, eager, keep), options)
                times += rows[0]
                costs += rows[1]
            del model, eager
    harness.report(head, {"times": times, "costs": costs}, options.json)
    print()
    print("\n".join(saved(times, costs, "scaled down: " if options.tiny else "")))
    if options.tiny:
        print()
        print(
            *(counted(case, keep) for case in cases for keep in options.keep or case.keeps),
            sep="\n",
        )
    return harness.status({"times": times})


if __name__ == "__main__":
    sys.exit(main())
