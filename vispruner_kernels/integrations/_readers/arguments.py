"""Arguments of a call that readers use: pixels, sizes, options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos")
# Of pixels.
IMAGES = "[images, channels, height, width]"
VIDEOS = "[videos, frames, channels, height, width]"
PATCHES = "[patches, channels * pixels]"
# Options of a call for the vision tower, and the core models that hand them on to it.
TOWER_OPTIONS = ("interpolate_pos_encoding",)
_HAND_ON_OPTIONS = ("LlavaModel",)


def tower_options(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: inputs[name] for name in TOWER_OPTIONS if inputs.get(name)}
    if options and not set(_HAND_ON_OPTIONS) & set(class_names(model.model)):
        raise ValueError(
            f"{next(iter(options))} is given, but a {type(model.model).__name__} does not hand it "
            "on to its vision tower: leave it out"
        )
    return options


def given_pixels(inputs: Mapping[str, Any], name: str) -> bool:
    """Whether there are any; processors may return none, of no images."""
    pixels = inputs.get(name)
    if pixels is not None and not (isinstance(pixels, Tensor) and pixels.dim()):
        raise TypeError(
            f"{name} is a {type(pixels).__name__}, expected a tensor as the processor returns it "
            "with return_tensors='pt'"
        )
    return pixels is not None and len(pixels) > 0


def pixels_of(inputs: Mapping[str, Any], name: str, layout: str) -> Tensor:
    """Those of that name, which have a layout."""
    if inputs[name].dim() != layout.count(",") + 1:
        raise ValueError(f"{name} has shape {list(inputs[name].shape)}, expected {layout}")
    return inputs[name]


def setting(model: Any, inputs: Mapping[str, Any], name: str) -> Any:
    """What transformers lets a call override in the config."""
    value = inputs.get(name)
    return getattr(model.config, name) if value is None else value


def needed(inputs: Mapping[str, Any], name: str) -> Any:
    if inputs.get(name) is None:
        raise ValueError(f"{name} is missing: pass on what the processor returned")
    return inputs[name]


def class_names(model: Any) -> list[str]:
    return [cls.__name__ for cls in type(model).__mro__]
