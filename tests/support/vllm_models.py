"""Tiny models for the tests of the vLLM plugin.

`save` writes a folder that vLLM can load, like those of published checkpoints: weights, a tokenizer
and a processor. The words of the tokenizer are w3 to w79. `settings_config` needs no vLLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import vlms
from PIL import Image
from safetensors.torch import save_file

# A tile: patches in a row, pixels along its side, patches.
SIDE = 8
TILE = SIDE * vlms.PATCH
N = SIDE * SIDE
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE], [3 * TILE, TILE]]
# The attention of vLLM on a CPU needs heads of 32 channels, and two ranks need two heads.
TEXT = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=2)
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }} "
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)
# Prefixes of the names of weights. transformers writes the former today, but vLLM cannot read them;
# published checkpoints have the latter.
PUBLISHED = {
    "model.vision_tower.vision_model.": "vision_tower.vision_model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.language_model.": "language_model.model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
    "lm_head.": "language_model.lm_head.",
}


def settings_config(family: str = "llava", **given: Any) -> Any:
    """A model's configuration with `vispruner` settings as `hf_overrides` add them. Its tiles have
    the size of vlms.py."""
    found = vlms.make(family).config
    found.vispruner = dict(method="vispruner", keep=4) | given
    return found


def save(family: str, folder: Path, **changes: Any) -> Any:
    """Write the model to the folder and return the model of transformers."""
    import transformers as tf
    from tokenizers import Tokenizer, models, pre_tokenizers

    if family == "llava-next":
        changes = {"image_grid_pinpoints": PINPOINTS, **changes}
    model = vlms.make(family, SIDE, text=TEXT, **changes)
    weights = {}
    for name, weight in model.state_dict().items():
        prefix = next(prefix for prefix in PUBLISHED if name.startswith(prefix))
        weights[PUBLISHED[prefix] + name.removeprefix(prefix)] = weight.contiguous()
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    # vLLM reads the token that ends a sequence from this file.
    tf.GenerationConfig(bos_token_id=1, pad_token_id=vlms.PAD).save_pretrained(folder)

    words = {f"w{i}": i for i in range(vlms.TEXT["vocab_size"])}
    for word, number in (("<pad>", vlms.PAD), ("<s>", 1), ("<unk>", 2), ("<image>", vlms.IMAGE)):
        del words[f"w{number}"]
        words[word] = number
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        extra_special_tokens=["<image>"],
    )
    tokens.chat_template = TEMPLATE
    siglip = family == "llava-siglip"
    options: dict[str, Any] = dict(
        patch_size=vlms.PATCH,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        image_token="<image>",
        num_additional_image_tokens=0 if siglip else 1,
    )
    sizes = dict(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE})
    if family == "llava-next":
        images = tf.LlavaNextImageProcessor(
            **sizes, image_grid_pinpoints=model.config.image_grid_pinpoints
        )
        processor = tf.LlavaNextProcessor(images, tokens, chat_template=TEMPLATE, **options)
    else:
        if siglip:
            images = tf.SiglipImageProcessor(size={"height": TILE, "width": TILE})
        else:
            images = tf.CLIPImageProcessor(**sizes)
        processor = tf.LlavaProcessor(images, tokens, chat_template=TEMPLATE, **options)
    processor.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return model


def picture(seed: int, height: int = 60, width: int = 60) -> Image.Image:
    """Smooth noise, which resizing does not average out."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def words(*numbers: int) -> str:
    """The words of these numbers, as text."""
    return " ".join(f"w{number}" for number in numbers)


def inputs(folder: Path, text: str, *pictures: Image.Image) -> dict[str, torch.Tensor]:
    """The inputs that the processor of transformers makes, with placeholders for all tokens."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    return dict(processor(images=[*pictures], text=text, return_tensors="pt"))
