"""A real CLIP vision tower, through transformers."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor

from vispruner_kernels.demo.encoder import Encoded, read
from vispruner_kernels.demo.picture import InputError, to_tensor

if TYPE_CHECKING:
    from PIL.Image import Image

# What CLIP was trained with, for a folder that holds a model and no preprocessor.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def encode(photo: Image, name: str) -> Encoded:
    """Encode a square photograph with a CLIP vision tower, as LLaVA and VisPruner use it.

    Args:
        photo: RGB, square; resized to the size of the model.
        name: a local folder, or a name on the Hugging Face hub.

    Returns:
        float32 features, queries and keys; the grid is that of the model.

    Raises:
        InputError: there is no such model, or it is not CLIP.
    """
    name = os.path.expanduser(name)
    if _is_path(name) and not os.path.isdir(name):
        raise InputError(f"--model: there is no folder {name}")
    from tqdm import tqdm

    # Hidden unless stderr is a terminal.
    with tqdm(total=2, desc=f"loading {name}", leave=False, disable=None) as bar:
        try:
            model, mean, std = _load(name)
        except InputError:
            raise
        # A folder or a download can be broken in many ways, and every layer below has its errors.
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise InputError(f"--model {name} cannot be loaded: {reason}") from None
        bar.update()
        bar.set_description(f"encoding with {name}")
        pixels = (to_tensor(photo, model.config.image_size) - mean) / std
        features, q, k = read(model, pixels[None])
        bar.update()
    side = model.config.image_size // model.config.patch_size
    if features.shape[1] != side * side:
        raise InputError(f"--model {name}: {features.shape[1]} patches are not {side} x {side}")
    shown = os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name
    return Encoded(features, q, k, side, label=f"CLIP vision tower, {shown}")


def _is_path(name: str) -> bool:
    looks = name.startswith((".", os.sep)) or name.endswith(os.sep) or name.count("/") > 1
    return looks or os.path.exists(name)


def _unreachable() -> bool:
    """Whether the hub has no address here: then only its cache is asked, without any retries."""
    if getproxies():
        return False
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        socket.getaddrinfo(urlsplit(hub).hostname, None)
    except OSError:
        return True
    return False


def _load(name: str) -> tuple[Any, Tensor, Tensor]:
    """The tower in float32, and the mean and spread `[3, 1, 1]` that its pixels are scaled by."""
    import transformers

    library: Any = transformers
    where = {"local_files_only": os.path.isdir(name) or _unreachable()}
    config = library.AutoConfig.from_pretrained(name, **where)
    kind = getattr(config, "model_type", "")
    if kind not in ("clip", "clip_vision_model"):
        raise InputError(f"--model {name} is of the type {kind!r}, want a CLIP vision tower")
    config = getattr(config, "vision_config", config)
    if config.num_hidden_layers < 2:
        raise InputError(f"--model {name} has one layer, want at least two")
    model, info = library.CLIPVisionModel.from_pretrained(
        name, config=config, output_loading_info=True, **where
    )
    missing = [key for key in info["missing_keys"] if not key.endswith("position_ids")]
    if missing:
        raise InputError(f"--model {name} lacks {len(missing)} weights, {missing[0]} among them")
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name, **where)
    except OSError:
        settings = {}
    mean = torch.tensor(settings.get("image_mean") or _MEAN).reshape(3, 1, 1)
    std = torch.tensor(settings.get("image_std") or _STD).reshape(3, 1, 1)
    return model.float().eval(), mean, std
