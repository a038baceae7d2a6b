"""Run a CLIP or SigLIP tower and capture features and scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from vispruner_kernels.integrations._attention import (
    Capture,
    capture_output,
    capture_scores,
    has_user_code,
    replace_forward,
)
from vispruner_kernels.integrations._readers.arguments import setting, tower_options
from vispruner_kernels.integrations._visual import Visual, grids_of
from vispruner_kernels.methods import Method

# Number of prefix tokens ([CLS]) of each vision tower.
TOWERS = {"CLIPVisionModel": 1, "SiglipVisionModel": 0}


def _layers(tower: Any, index: Any) -> tuple[Any, Sequence[Any]]:
    """The layer that outputs `hidden_states[index]`, and the layers after it."""
    layers = getattr(tower, "vision_model", tower).encoder.layers
    count = len(layers)
    number = index if isinstance(index, int) and index >= 0 else 0
    if isinstance(index, int) and index < 0:
        number = count + 1 + index
    if not 1 <= number <= count:
        raise ValueError(
            f"vision_feature_layer is {index}, expected one layer of the vision tower: "
            f"1 to {count}, or -{count} to -1"
        )
    return layers[number - 1], layers[number:]


def _around_layers(tower: Any) -> list[Any]:
    """The tower and its modules, without the encoder layers."""
    layers = getattr(tower, "vision_model", tower).encoder.layers
    inside = {id(module) for module in layers.modules()}
    return [module for module in tower.modules() if id(module) not in inside]


def _prefix(tower: Any, method: Method) -> int:
    """Number of prefix tokens of the tower.

    Raises ValueError for an unknown tower, or if the method needs a [CLS] token and it has none.
    """
    names = [cls.__name__ for cls in type(tower).__mro__]
    name = next((name for name in names if name in TOWERS), None)
    if name is None:
        raise ValueError(
            f"the vision tower is a {names[0]}, expected one of {', '.join(sorted(TOWERS))}"
        )
    if TOWERS[name] == 0 and method.needs == "cls":
        raise no_cls_error(name, method)
    return TOWERS[name]


def no_cls_error(name: str, method: Method) -> ValueError:
    method_name = type(method).__name__
    return ValueError(
        f"{method_name} needs the attention of a [CLS] token, which {name} does not have: "
        f"use {method_name}(..., scores='received') or FoPru"
    )


def read_tower(
    model: Any,
    inputs: Mapping[str, Any],
    method: Method,
    tower: Any,
    pixels: Tensor,
    strategy: str | None = None,
) -> tuple[Tensor, Tensor | None, int]:
    """Run the tower; return features [G, S, C], scores [G, S - first] or None, and `first`.

    The features are the input that the model gives its projector. `first` is the number of leading
    tokens of a grid that are no patches.
    """
    prefix, options = _prefix(tower, method), tower_options(model, inputs)
    layer, unread = _layers(tower, setting(model, inputs, "vision_feature_layer"))
    # Layers after the captured one are skipped, unless user code may read or change the output.
    skipped = [module for later in unread for module in later.modules()]
    run_all = any(map(has_user_code, (*_around_layers(tower), *skipped)))
    if run_all:
        unread, options = (), options | {"output_hidden_states": True}
    strategy = strategy or setting(model, inputs, "vision_feature_select_strategy")
    if strategy not in ("default", "full"):
        raise ValueError(
            f"vision_feature_select_strategy is {strategy!r}, expected 'default' or 'full'"
        )
    result = Capture(method.needs, prefix)
    with (
        capture_scores(layer.self_attn, result),
        capture_output(layer, result),
        ExitStack() as stack,
    ):
        for later in unread:
            stack.enter_context(replace_forward(later, result, lambda hidden, *_, **__: hidden))
        out = tower(pixels, return_dict=True, **options)
    index = setting(model, inputs, "vision_feature_layer")
    hidden = out.hidden_states[index] if run_all else result.hidden
    # SigLIP's hidden states may keep the layout of its convolution, with channels outermost.
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    # "default" drops the first token, even of a tower without a [CLS] token.
    dropped = 1 if strategy == "default" else 0
    scores = result.scores[0][:, max(dropped - prefix, 0) :] if result.scores else None
    return hidden[:, dropped:], scores, max(prefix - dropped, 0)


def whole_images(
    model: Any,
    read: tuple[Tensor, Tensor | None, int],
    kind: str,
    grids_each: int = 1,
) -> Visual:
    """Images of `grids_each` grids; without pruning, the language model gets all their
    tokens, in order."""
    source, scores, first = read
    count, tokens = source.shape[:2]
    side = math.isqrt(tokens - first)
    grid, column = grids_of(count, tokens, first, side if side * side == tokens - first else 0)
    layouts = list(torch.arange(count * tokens).split(grids_each * tokens))
    project = model.model.multi_modal_projector
    return Visual(
        kind=kind,
        source=source,
        scores=scores,
        first=first,
        layouts=layouts,
        numbers=[*range(len(layouts))],
        grid=grid,
        column=column,
        # Two indices: `source.flatten(0, 1)` would copy, because `source` may be a slice.
        embed=lambda kept: project(source[kept // tokens, kept % tokens]),
    )
