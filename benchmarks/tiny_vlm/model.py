"""The model as classes of transformers, its vocabulary, and the packing of many questions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.tiny_vlm.scenes import COLOURS, PATCH, SHAPES, SIDE, SIZE, Question

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

PATCHES = SIDE**2
PAD, IMAGE, START, END = SPECIAL = ("<pad>", "<image>", "<start>", "<end>")
WORDS = (
    *SPECIAL,
    *map(str, range(10)),
    *COLOURS,
    *SHAPES,
    *"what is the number ? which digit in frame colour where left right of above below".split(),
    *"how many shapes are there top bottom half side on".split(),
)
# Tokens of a slot, which holds a question with its answer, without END. The longest pair has 8 + 1
# words, so one token is spare.
SLOT = 10


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, PAD))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        additional_special_tokens=[IMAGE],
        padding_side="left",
    )


def make() -> LlavaForConditionalGeneration:
    """The untrained model: 24 x 24 patches and CLS, features of the last layer but one."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="gelu",
        initializer_range=0.02,
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=WORDS.index(START),
        eos_token_id=WORDS.index(END),
        pad_token_id=WORDS.index(PAD),
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=WORDS.index(IMAGE),
        image_seq_length=PATCHES,
        tie_word_embeddings=True,
        pad_token_id=WORDS.index(PAD),
    )
    return LlavaForConditionalGeneration(config)


def save(model: Any, folder: Path) -> None:
    """Write the model in float16, its tokenizer and its processor. Weights have the names of
    published checkpoints: transformers 5.3 cannot read the names that 5.23 would write."""
    from safetensors.torch import save_file
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    names = {
        "model.vision_tower.vision_model.": "vision_tower.vision_model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.language_model.": "language_model.model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    weights = {}
    for name, weight in model.state_dict().items():
        # lm_head shares its weights with the embeddings.
        if name != "lm_head.weight":
            prefix = next(prefix for prefix in names if name.startswith(prefix))
            published = names[prefix] + name.removeprefix(prefix)
            weights[published] = weight.detach().half().contiguous()
    file = folder / "model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)
    copy.deepcopy(model.config).save_pretrained(folder)
    model.generation_config.save_pretrained(folder)

    size = {"height": SIZE, "width": SIZE}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = CLIPImageProcessorPil(size=size, do_center_crop=False, **half)
    words = tokenizer()
    words.save_pretrained(folder)
    LlavaProcessor(
        images,
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def pixel_values(pixels: Tensor) -> Tensor:
    """`[B, 192, 192, 3]` uint8 to `[B, 3, 192, 192]` float32 from -1 to 1."""
    return pixels.movedim(-1, 1).float() / 127.5 - 1


class Packed(NamedTuple):
    """All questions about one picture with their answers, each in a slot of SLOT tokens.

    Attributes:
        ids: `[Q * SLOT]` int64.
        labels: `[Q * SLOT]` int64, the next token if it is END or part of an answer, else -100.
    """

    ids: Tensor
    labels: Tensor


def pack(questions: list[Question], slots: int) -> Packed:
    ids = torch.full((slots, SLOT), WORDS.index(PAD))
    labels = torch.full((slots, SLOT), -100)
    for row, question in enumerate(questions):
        asked = [WORDS.index(word) for word in question.text.split()]
        answer = [WORDS.index(word) for word in question.answer.split()]
        both = asked + answer
        ids[row, : len(both)] = torch.tensor(both)
        labels[row, len(asked) - 1 : len(both)] = torch.tensor([*answer, WORDS.index(END)])
    return Packed(ids.flatten(), labels.flatten())


def mask_and_positions(
    visual: int, questions: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Mask and positions of START, `visual` visual tokens and the slots of the questions.

    Returns:
        `[1, 1, S, S]` bool, True where a token may attend to another: a question sees the picture
        and itself, but no other question. And `[1, S]` int64: the positions of each question begin
        after the picture, as if it were the only question.
    """
    slot = torch.arange(questions, device=device).repeat_interleave(SLOT)
    owner = torch.cat([torch.full((1 + visual,), -1, device=device), slot])
    order = torch.arange(len(owner), device=device)
    sees = (owner[None] == -1) | (owner[None] == owner[:, None])
    sees = sees & (order[None] <= order[:, None])
    # Fused attention needs rows that begin at multiples of 8.
    sees = torch.nn.functional.pad(sees, (0, -len(owner) % 8))[:, : len(owner)]
    inside = torch.arange(SLOT, device=device).repeat(questions)
    positions = torch.cat([torch.arange(1 + visual, device=device), 1 + visual + inside])
    return sees[None, None], positions[None]


def packed(model: Any, visual: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the language model: embeddings `[B, S, D]`, mask and positions."""
    embed = model.get_input_embeddings()
    text = embed(ids)
    start = embed.weight[WORDS.index(START)].expand(len(ids), 1, -1)
    embeddings = torch.cat([start.to(text.dtype), visual.to(text.dtype), text], 1)
    return embeddings, *mask_and_positions(visual.shape[1], ids.shape[1] // SLOT, visual.device)


def logits(model: Any, visual: Tensor, ids: Tensor) -> Tensor:
    """Logits of the slots.

    Args:
        model: a LlavaForConditionalGeneration.
        visual: `[B, T, D]`, projected features.
        ids: `[B, Q * SLOT]`.

    Returns:
        `[B, Q * SLOT, words]`.
    """
    embeddings, mask, positions = packed(model, visual, ids)
    out = model.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=mask.expand(len(ids), -1, -1, -1),
        position_ids=positions,
        use_cache=False,
    )
    return model.lm_head(out.last_hidden_state[:, -ids.shape[1] :])
