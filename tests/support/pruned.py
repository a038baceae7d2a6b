"""Methods, prompts, expected tokens and comparisons for tests of pruned transformers models."""

from __future__ import annotations

from typing import Any

import torch
import vlm_oracle
from torch import Tensor
from vlms import CLS_FAMILIES, picture, prompts

from vispruner_kernels.integrations.transformers import prune_inputs
from vispruner_kernels.methods import FasterVLM, FoPru, Method, Random, VisPruner

NEW = 5
GREEDY = dict(max_new_tokens=NEW, do_sample=False)


def methods(family: str, keep: float = 5) -> list[Method]:
    """Every method that a family supports."""
    received = [
        VisPruner(keep, scores="received"),
        FasterVLM(keep, scores="received"),
        FoPru(keep),
        Random(keep, seed=3),
    ]
    if family not in CLS_FAMILIES:
        return received
    return [VisPruner(keep), VisPruner(keep, matching="pairwise"), FasterVLM(keep), *received]


def scores_of(family: str) -> str:
    return "cls" if family in CLS_FAMILIES else "received"


def several(family: str, padding: str = "left", extra: int = 0) -> dict[str, Tensor]:
    """Three prompts of different lengths: one image, two images, none."""
    a, b, c = (picture(family, seed) for seed in (1, 2, 3))
    return prompts(family, [3, a, 5], [2, b, 4, c, 9], [6], padding=padding, extra=extra)


def real_logits(model, inputs: dict) -> list[Tensor]:
    """Logits of each prompt, without padding."""
    with torch.no_grad():
        logits = model(**inputs).logits
    mask = inputs.get("attention_mask", torch.ones(logits.shape[:2]))
    return [row[keep.bool()] for row, keep in zip(logits, mask, strict=True)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Check equality within float32 accuracy; logits are of the order of 10."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


class Recording(VisPruner):
    """Record the features, scores and kept indices of each call of `select`."""

    def select(self, features, scores):
        kept = super().select(features, scores)
        self.calls.append((features, scores, kept))
        return kept


def recording(keep: int, **settings) -> Recording:
    method = Recording(keep, **settings)
    object.__setattr__(method, "calls", [])
    return method


def method_of(family: str, keep: float = 4) -> Method:
    return VisPruner(keep, scores=scores_of(family))


def expected_tokens(model: Any, inputs: dict[str, Tensor], method: Method) -> Tensor:
    """New tokens of greedy decoding by the oracle, prompt by prompt and without a cache."""
    kept = prune_inputs(model, inputs, method).kept
    return torch.stack(vlm_oracle.logits(vlm_oracle.eager(model), inputs, kept, NEW))


# Prompts before pruning. The prompts of the last two batches have equal lengths, and pruning makes
# them unequal; in the last batch, the longest prompt afterwards is one without an image.
BATCHES = {
    "padded": lambda f: several(f),
    "one": lambda f: prompts(f, [3, picture(f, 1), 5]),
    "made unequal": lambda f: _filled(
        f, [20, picture(f, 1), 5], [2, picture(f, 2), 4, picture(f, 3)]
    ),
    "longest without": lambda f: _filled(f, [3, picture(f, 1), 5], []),
}


def _filled(family: str, *rows: list) -> dict[str, Tensor]:
    """Prompts of equal length: words are appended to the shorter ones."""
    lengths = [int(x.sum()) for x in prompts(family, *rows)["attention_mask"]]
    return prompts(
        family, *([*row, max(lengths) - n] for row, n in zip(rows, lengths, strict=True))
    )
