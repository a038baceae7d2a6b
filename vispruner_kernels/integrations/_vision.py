"""What the models of transformers see: features, scores and layout of the visual tokens of a call.

A reader runs the vision tower once per kind of input (images, videos), with the scores of the layer
whose output is the feature, and says where the tokens stand in the prompt. `READERS` has one for
each class of models.
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
    """The core of a model (`model.model`), as readers want a whole one."""

    generation_config = None

    def __init__(self, core: Any) -> None:
        self.model, self.config = core, core.config
        self.get_input_embeddings = core.get_input_embeddings


def asks_for_pruning(inputs: Mapping[str, Any]) -> bool:
    """Whether there is anything to prune."""
    features = inputs.get("mm_encoder_outputs") or {}
    if any(value is not None for value in features.values()):
        raise ValueError(
            "mm_encoder_outputs: there are no scores to prune by; give pixel_values, to the model "
            "that was attached"
        )
    return any(given_pixels(inputs, name) for name in PIXELS)


def reader(model: Any) -> Reader:
    """The reader of the model's class, or of a class it inherits from."""
    inner, path = model, "model"
    while True:
        name = next((name for name in class_names(inner) if name in READERS), None)
        if name is not None and inner is model:
            return READERS[name]
        if name is not None:
            raise TypeError(
                f"model is a {type(model).__name__} around a {type(inner).__name__}, expected what "
                f"is inside: pass {path}"
            )
        step = next((step for step in _UNWRAP if hasattr(inner, step)), None)
        if step is None:
            break
        inner, path = getattr(inner, step), f"{path}.{_UNWRAP[step]}"
        inner = inner() if _UNWRAP[step].endswith("()") else inner
    raise TypeError(f"model is a {type(model).__name__}, expected one of {', '.join(READERS)}")


# What leads out of a wrapper: peft; DataParallel, DistributedDataParallel, FSDP; torch.compile.
_UNWRAP = {"get_base_model": "get_base_model()", "module": "module", "_orig_mod": "_orig_mod"}
