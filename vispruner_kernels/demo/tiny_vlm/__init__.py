"""The bundled model: a small VLM that benchmarks/tiny_vlm trains. README.md is its model card."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vispruner_kernels.methods import Method

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent
SIDE, PATCH = 24, 8


@cache
def load() -> LlavaForConditionalGeneration:
    """The model, in float32 (its weights are stored in float16), for inference."""
    from transformers import LlavaForConditionalGeneration

    loaded: Any = LlavaForConditionalGeneration.from_pretrained(
        FOLDER, dtype=torch.float32, output_loading_info=True
    )
    model, report = loaded
    # transformers fills missing weights with random numbers.
    if missing := set(report["missing_keys"]) - {"lm_head.weight"}:
        raise RuntimeError(f"{FOLDER / 'model.safetensors'} has no {', '.join(sorted(missing))}")
    return model.eval()


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the model, with a token for each word."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(FOLDER)


def inputs(image: Tensor, question: str) -> dict[str, Tensor]:
    """Inputs of the model for a picture `[3, 192, 192]`, 0 to 1, and a question in its words.

    Raises:
        ValueError: the question is empty, or has a word that the model does not know.
    """
    words = tokenizer()
    known = set(words.get_vocab()) - set(words.all_special_tokens)
    unknown = [word for word in question.split() if word not in known]
    if unknown:
        raise ValueError(
            f"question: the model does not know {unknown[0]!r}; it knows {' '.join(sorted(known))}"
        )
    if not question.strip():
        raise ValueError("question: it is empty")
    image_token = load().config.image_token_id
    asked = words(question, return_tensors="pt", add_special_tokens=False).input_ids[0]
    visual = torch.full((SIDE * SIDE,), image_token)
    ids = torch.cat([torch.tensor([words.bos_token_id]), visual, asked])[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": (2 * image - 1)[None],
    }


@torch.no_grad()
def answer(given: dict[str, Tensor], method: Method | None = None) -> str:
    """The answer of the model from all visual tokens, or from those that a method keeps."""
    from vispruner_kernels.integrations.transformers import prune_inputs

    model: Any = load()
    length = given["input_ids"].shape[1]
    limits: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    if method is None:
        ids = model.generate(**given, **limits)[:, length:]
    else:
        ids = model.generate(**prune_inputs(model, given, method), **limits)
    return str(tokenizer().decode(ids[0], skip_special_tokens=True))
