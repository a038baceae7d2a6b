"""Methods, prompts and comparisons for tests of pruned models of transformers."""

from __future__ import annotations

import torch
from torch import Tensor
from vlms import CLS_FAMILIES, picture, prompts

from vispruner_kernels.methods import FasterVLM, FoPru, Method, Random, VisPruner


def methods(family: str, keep: float = 5) -> list[Method]:
    """Every method that makes sense for a family."""
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
    """By prompt, without padding."""
    with torch.no_grad():
        logits = model(**inputs).logits
    mask = inputs.get("attention_mask", torch.ones(logits.shape[:2]))
    return [row[keep.bool()] for row, keep in zip(logits, mask, strict=True)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Equal to float32 accuracy; logits are of the order of 10."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


class Recording(VisPruner):
    """Notes what it is given."""

    def select(self, features, scores):
        kept = super().select(features, scores)
        self.calls.append((features, scores, kept))
        return kept


def recording(keep: int, **settings) -> Recording:
    method = Recording(keep, **settings)
    object.__setattr__(method, "calls", [])
    return method
