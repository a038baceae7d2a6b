"""Methods, prompts and comparisons for tests of pruned models of transformers."""

from __future__ import annotations

from typing import Any

import torch
import vlm_oracle
import vlms
from torch import Tensor
from vlms import CLS_FAMILIES, picture, prompts

from vispruner_kernels.integrations.transformers import prune_inputs
from vispruner_kernels.methods import FasterVLM, FoPru, Method, Random, VisPruner

NEW = 5
GREEDY = dict(max_new_tokens=NEW, do_sample=False)


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


def method_of(family: str, keep: float = 4) -> Method:
    return VisPruner(keep, scores=scores_of(family))


def expected_tokens(model: Any, inputs: dict[str, Tensor], method: Method) -> Tensor:
    """Greedy decoding without a cache, prompt by prompt, of tokens dropped by hand."""
    kept = prune_inputs(model, inputs, method).kept
    return torch.stack(vlm_oracle.logits(vlm_oracle.eager(model), inputs, kept, NEW))


# As the caller sees them: padded, and not padded though pruning makes them so, also where the
# longest prompt loses nothing.
BATCHES = {
    "padded": lambda f: several(f),
    "one": lambda f: prompts(f, [3, picture(f, 1), 5]),
    "made unequal": lambda f: _filled(f, [20, picture(f, 1), 5], [2, picture(f, 2), 4, _more(f)]),
    "longest without": lambda f: _filled(f, [3, picture(f, 1), 5], []),
}


def _more(family: str) -> vlms.Picture:
    return picture(family, 3)


def _filled(family: str, *rows: list) -> dict[str, Tensor]:
    """Prompts as long as each other, by words at their end."""
    lengths = [int(x.sum()) for x in prompts(family, *rows)["attention_mask"]]
    return prompts(
        family, *([*row, max(lengths) - n] for row, n in zip(rows, lengths, strict=True))
    )
