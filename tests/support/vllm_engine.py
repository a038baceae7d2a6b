"""Engines of vLLM in this process, and hooks that record how the model processes images."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: make test-vllm", allow_module_level=True)

# vLLM reads these variables when it is imported. One process, so that hooks can read tensors; one
# thread, for the reason in conftest.py.
os.environ.update(
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
)

ARCHITECTURES = (
    "VisPrunerLlavaForConditionalGeneration",
    "VisPrunerLlavaNextForConditionalGeneration",
)


def options(folder: Path, vispruner: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """The arguments of an engine; without settings, those of vLLM's own model."""
    architecture = ARCHITECTURES["next" in folder.name]
    overrides: dict[str, Any] = {"architectures": [architecture], "vispruner": vispruner}
    if vispruner is None:
        overrides = {"architectures": [architecture.removeprefix("VisPruner")]}
    return {
        "model": str(folder),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 640,
        "max_num_seqs": 8,
        "block_size": 32,
        "kv_cache_memory_bytes": 2**25,
        "num_gpu_blocks_override": 256,
        "limit_mm_per_prompt": {"image": 8},
        "hf_overrides": overrides,
        **more,
    }


@contextmanager
def engine(folder: Path, vispruner: dict[str, Any] | None, **more: Any) -> Iterator[Any]:
    """An engine of vLLM; only one can exist at a time."""
    from vllm import LLM

    # vLLM collects garbage eight times, which takes most of the time of a start.
    with mock.patch("gc.collect"):
        llm = LLM(**options(folder, vispruner, **more))
    try:
        yield llm
    finally:
        with mock.patch("gc.collect"):
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def prompt(text: str, *pictures: Any, **kwargs: Any) -> dict[str, Any]:
    """A prompt for `LLM.generate`, with one picture for each <image> of the text."""
    found: dict[str, Any] = {"prompt": text}
    if pictures:
        found["multi_modal_data"] = {"image": [*pictures]}
    if kwargs:
        found["mm_processor_kwargs"] = kwargs
    return found


@dataclass
class Answer:
    """The answer to one prompt."""

    # Tokens of the prompt.
    length: int
    # Generated tokens, and their log-probabilities.
    tokens: list[int]
    logprobs: list[float]
    # Tokens of the prompt that were in the prefix cache.
    cached: int


def ask(llm: Any, *prompts: dict[str, Any], tokens: int = 6) -> list[Answer]:
    """Answer prompts by greedy decoding."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, ignore_eos=True)
    answers = []
    for result in llm.generate([*prompts], sampling, use_tqdm=False):
        output = result.outputs[0]
        probabilities = [
            step[token].logprob
            for step, token in zip(output.logprobs, output.token_ids, strict=True)
        ]
        answers.append(
            Answer(
                len(result.prompt_token_ids),
                list(output.token_ids),
                probabilities,
                result.num_cached_tokens or 0,
            )
        )
    return answers


@dataclass
class Seen:
    """The tensors of each call while the model processes images."""

    # Of each call of the tower: the features [G, tokens, C], and q and k [G, S, H, D] of its last
    # layer.
    features: list[Tensor] = field(default_factory=list)
    q: list[Tensor] = field(default_factory=list)
    k: list[Tensor] = field(default_factory=list)
    # The input [K, C] of each call of the projector.
    rows: list[Tensor] = field(default_factory=list)
    # The embeddings [tokens, D] of each image.
    embeds: list[Tensor] = field(default_factory=list)


def model_of(llm: Any) -> Any:
    return llm.apply_model(lambda model: model)[0]


@contextmanager
def watching(model: Any) -> Iterator[Seen]:
    """Record the calls of the modules of vLLM."""
    seen, original = Seen(), model.embed_multimodal
    attention = model.vision_tower.vision_model.encoder.layers[-1].self_attn.attn

    def attended(module: Any, args: Any) -> None:
        shape = (module.num_heads, module.head_size)
        seen.q.append(args[0].unflatten(-1, shape).clone())
        seen.k.append(args[1].unflatten(-1, shape).clone())

    def embed(**kwargs: Any) -> Any:
        out = original(**kwargs)
        seen.embeds += [embeds.clone() for embeds in out]
        return out

    hooks = [
        attention.register_forward_pre_hook(attended),
        model.vision_tower.register_forward_hook(
            lambda module, args, out: seen.features.append(out.clone())
        ),
        model.multi_modal_projector.register_forward_pre_hook(
            lambda module, args: seen.rows.append(args[0].clone())
        ),
    ]
    model.embed_multimodal = embed
    try:
        yield seen
    finally:
        del model.embed_multimodal
        for hook in hooks:
            hook.remove()
