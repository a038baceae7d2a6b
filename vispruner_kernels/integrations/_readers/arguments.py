"""Read and check the arguments of a call: pixels, sizes, options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos")
# Layouts of pixels.
IMAGES = "[images, channels, height, width]"
VIDEOS = "[videos, frames, channels, height, width]"
PATCHES = "[patches, channels * pixels]"
# Options for the vision tower, and the core models that pass them on to it.
TOWER_OPTIONS = ("interpolate_pos_encoding",)
_PASS_ON_OPTIONS = ("LlavaModel",)


def tower_options(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the call for the vision tower. Raises ValueError if the model ignores them."""
    options = {name: inputs[name] for name in TOWER_OPTIONS if inputs.get(name)}
    if options and not set(_PASS_ON_OPTIONS) & set(class_names(model.model)):
        raise ValueError(
            f"{next(iter(options))} is given, but a {type(model.model).__name__} does not pass it "
            "on to its vision tower: leave it out"
        )
    return options


def given_pixels(inputs: Mapping[str, Any], name: str) -> bool:
    """Whether the call has pixels of that name; a processor may return an empty tensor."""
    pixels = inputs.get(name)
    if pixels is not None and not (isinstance(pixels, Tensor) and pixels.dim()):
        raise TypeError(
            f"{name} is a {type(pixels).__name__}, expected a tensor as the processor returns it "
            "with return_tensors='pt'"
        )
    return pixels is not None and len(pixels) > 0


def pixels_of(inputs: Mapping[str, Any], name: str, layout: str) -> Tensor:
    """The pixels of that name. Raises ValueError if they do not have the layout."""
    if inputs[name].dim() != layout.count(",") + 1:
        raise ValueError(f"{name} has shape {list(inputs[name].shape)}, expected {layout}")
    return inputs[name]


def setting(model: Any, inputs: Mapping[str, Any], name: str) -> Any:
    """A setting of the call, or that of the config if the call has none."""
    value = inputs.get(name)
    return getattr(model.config, name) if value is None else value


def needed(inputs: Mapping[str, Any], name: str) -> Any:
    """An argument that the reader cannot do without."""
    if inputs.get(name) is None:
        raise ValueError(f"{name} is missing: pass on what the processor returned")
    return inputs[name]


def class_names(model: Any) -> list[str]:
    """Names of the class of a model and of its bases."""
    return [cls.__name__ for cls in type(model).__mro__]
