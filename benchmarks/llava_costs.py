"""The LLaVA models of benchmarks/llava.py, and the counted cost of their first token.

docs/transformers.md has the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Text tokens of the prompt, beside the visual tokens.
TEXT = 64
IMAGE, VIDEO = 32000, 32001


@dataclass(frozen=True)
class Case:
    """An architecture, the number of grids (tiles or frames) that its vision tower encodes, and the
    budgets of the papers."""

    model: str
    grids: int
    keeps: tuple[int, ...]

    def __str__(self) -> str:
        return self.model


# Budgets are for all grids together: 2880 -> 160 is the headline of VisPruner's paper.
CASES = {
    "llava-1.5-7b": Case("llava-1.5-7b", 1, (192, 128, 64, 32)),
    "llava-next-7b": Case("llava-next-7b", 5, (640, 320, 160)),
    "video-llava-7b": Case("video-llava-7b", 8, (512, 256)),
}


def config_of(case: Case, tiny: bool = False) -> Any:
    """The sizes of the published configuration, or narrow and shallow ones."""
    import transformers as tf

    video = case.model == "video-llava-7b"
    size = dict(image_size=224 if video else 336, patch_size=14)
    if tiny:
        vision = dict(hidden_size=128, intermediate_size=512, num_attention_heads=2)
        text = dict(hidden_size=128, intermediate_size=344, num_attention_heads=2)
        layers = 12, 8
    else:
        vision = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16)
        text = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
        layers = 24, 32
    configs = dict(
        vision_config=tf.CLIPVisionConfig(**size, **vision, num_hidden_layers=layers[0]),
        text_config=tf.LlamaConfig(
            **text, num_hidden_layers=layers[1], vocab_size=32064, max_position_embeddings=4096
        ),
        image_token_id=IMAGE,
    )
    if video:
        return tf.VideoLlavaConfig(**configs, video_token_id=VIDEO)
    return (tf.LlavaNextConfig if case.model == "llava-next-7b" else tf.LlavaConfig)(**configs)


def flops(
    config: Any, grids: int, visual_tokens: int, projected: int, unread: int = 1
) -> dict[str, float]:
    """FLOPs of the first token by stage, two for a multiply-add (docs/transformers.md).

    Features come from the last layer but one. `unread` is the number of later layers that run
    although their output is not used: 1, or 0 for "ours"."""
    vision, text = config.vision_config, config.text_config
    c, f, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    s = (vision.image_size // patch) ** 2 + 1
    layer = 2 * s * (4 * c * c + 2 * c * f) + 4 * s * s * c
    tower = (vision.num_hidden_layers - 1 + unread) * layer + 2 * (s - 1) * 3 * patch * patch * c
    d, m, n = text.hidden_size, text.intermediate_size, visual_tokens + TEXT
    kv = d * text.num_key_value_heads // text.num_attention_heads
    decoder = 2 * n * (2 * d * d + 2 * d * kv + 3 * d * m) + 4 * n * n * d
    return {
        "tower": grids * tower,
        "projector": 2 * projected * (c * d + d * d),
        "language model": text.num_hidden_layers * decoder + 2 * d * text.vocab_size,
    }


def cache_bytes(config: Any, visual_tokens: int, itemsize: int) -> int:
    """Size of the keys and values of the prompt."""
    text = config.text_config
    width = text.hidden_size * text.num_key_value_heads // text.num_attention_heads
    return 2 * text.num_hidden_layers * width * (visual_tokens + TEXT) * itemsize


def counted(case: Case, keep: int) -> str:
    """A line on the FLOPs and the cache that pruning saves at full size, counted, in float16."""
    config = config_of(case)
    side = config.vision_config.image_size // config.vision_config.patch_size
    cls = case.grids if case.model == "video-llava-7b" else 0
    every, kept = case.grids * side * side + cls, keep + cls
    before = flops(config, case.grids, every, every)
    after = flops(config, case.grids, kept, kept, unread=0)
    tera = [sum(x.values()) / 1e12 for x in (before, after)]
    models = [x["language model"] / 1e12 for x in (before, after)]
    cache = [cache_bytes(config, n, 2) / 2**20 for n in (every, kept)]
    return (
        f"full size, counted: {case.model}, {every} -> {kept} visual tokens, first token: "
        f"{tera[0]:.2f} -> {tera[1]:.2f} TFLOP, {1 - tera[1] / tera[0]:.1%} less (language model "
        f"{models[0]:.2f} -> {models[1]:.2f}, {1 - models[1] / models[0]:.1%}), KV cache "
        f"{cache[0]:.0f} -> {cache[1]:.0f} MiB"
    )
