"""Find the reader of a model.

A reader runs the vision tower once for each kind of input (images, videos). It returns the
features, the attention scores of the layer that outputs them, and the position of each token in the
prompt, as one `Visual` for each kind, or two if the model interpolates only some images.
`_readers/` has one file for each family of models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from vispruner_kernels.integrations._readers import (
    llava,
    llava_next,
    llava_onevision,
    qwen2_5_vl,
    video_llava,
)
from vispruner_kernels.integrations._readers.arguments import PIXELS, class_names, given_pixels
from vispruner_kernels.integrations._visual import Visual
from vispruner_kernels.methods import Method

Reader: TypeAlias = Callable[[Any, Mapping[str, Any], Method], list[Visual]]

READERS: dict[str, Reader] = {
    "LlavaForConditionalGeneration": llava.read,
    "LlavaNextForConditionalGeneration": llava_next.read,
    "LlavaOnevisionForConditionalGeneration": llava_onevision.read,
    "Qwen2_5_VLForConditionalGeneration": qwen2_5_vl.read,
    "VideoLlavaForConditionalGeneration": video_llava.read,
}


class CoreAlone:
    """A core model (`model.model`) in the form of a whole model, for readers."""

    generation_config = None

    def __init__(self, core: Any) -> None:
        self.model, self.config = core, core.config
        self.get_input_embeddings = core.get_input_embeddings


def asks_for_pruning(inputs: Mapping[str, Any]) -> bool:
    """Whether the call has pixels."""
    features = inputs.get("mm_encoder_outputs") or {}
    if any(value is not None for value in features.values()):
        raise ValueError(
            "mm_encoder_outputs: they hold no scores, so they cannot be pruned; pass pixel_values "
            "(if the model is attached, to its generate or forward)"
        )
    return any(given_pixels(inputs, name) for name in PIXELS)


def reader(model: Any) -> Reader:
    """The reader for the class of the model or for one of its bases.

    Raises TypeError for other models. For a wrapped model the error says what to pass.
    """
    inner, path = model, "model"
    while True:
        name = next((name for name in class_names(inner) if name in READERS), None)
        if name is not None and inner is model:
            return READERS[name]
        if name is not None:
            raise TypeError(
                f"model is a {type(model).__name__} around a {type(inner).__name__}, expected the "
                f"inner model: pass {path}"
            )
        step = next((step for step in _UNWRAP if hasattr(inner, step)), None)
        if step is None:
            break
        inner, path = getattr(inner, step), f"{path}.{_UNWRAP[step]}"
        inner = inner() if _UNWRAP[step].endswith("()") else inner
    raise TypeError(f"model is a {type(model).__name__}, expected one of {', '.join(READERS)}")


# Attributes that lead from a wrapper to the wrapped model: of peft, of DataParallel,
# DistributedDataParallel and FSDP, of torch.compile.
_UNWRAP = {"get_base_model": "get_base_model()", "module": "module", "_orig_mod": "_orig_mod"}
