"""A CLIP vision tower, loaded by transformers."""

from __future__ import annotations

import os
from typing import Any

import torch
from PIL.Image import Image
from transformers import AutoConfig, CLIPVisionModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vispruner_kernels.demo import InputError
from vispruner_kernels.demo.encoder import Encoded, read
from vispruner_kernels.demo.picture import to_tensor


def encode(photo: Image, name: str) -> Encoded:
    """Encode a square photograph with a CLIP tower: a folder, or a name on the Hugging Face hub."""
    try:
        tower, settings = _load(name)
    except InputError:
        raise
    # Broken folders and downloads raise many types.
    except Exception as error:
        raise InputError(f"--model {name} cannot be loaded: {str(error) or repr(error)}") from None
    mean = torch.tensor(settings.get("image_mean") or OPENAI_CLIP_MEAN).reshape(3, 1, 1)
    std = torch.tensor(settings.get("image_std") or OPENAI_CLIP_STD).reshape(3, 1, 1)
    pixels = (to_tensor(photo, tower.config.image_size) - mean) / std
    side = tower.config.image_size // tower.config.patch_size
    label = f"CLIP vision tower, {os.path.basename(os.path.abspath(name))}"
    return Encoded(*read(tower, pixels[None]), side, label)


def _load(name: str) -> tuple[Any, dict[str, Any]]:
    """The tower in float32, and the settings of its image processor, if it has any."""
    # Any: transformers' own types do not know of `output_loading_info`.
    load: Any = CLIPVisionModel.from_pretrained
    config = AutoConfig.from_pretrained(name)
    if config.model_type not in ("clip", "clip_vision_model"):
        raise InputError(f"--model {name} is of the type {config.model_type!r}, not a CLIP tower")
    config = getattr(config, "vision_config", config)
    if config.num_hidden_layers < 2:
        raise InputError(f"--model {name} has one layer, want at least two")
    tower, info = load(name, config=config, output_loading_info=True)
    # transformers fills missing weights with random numbers.
    missing = [key for key in info["missing_keys"] if not key.endswith("position_ids")]
    if missing:
        raise InputError(f"--model {name} lacks {len(missing)} weights, {missing[0]} among them")
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        settings = {}
    return tower.float().eval(), settings
