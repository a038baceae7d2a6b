"""Two tensor-parallel ranks of vLLM, which are processes of their own.

    python vllm_ranks.py FOLDER MODE SETTINGS OUT

loads the model in FOLDER with `mm_encoder_tp_mode` MODE and the `vispruner` SETTINGS (JSON),
answers two prompts, and writes the answers and the recorded tensors of each rank to OUT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def watch(model: Any) -> None:
    """Begin to record, for the life of the process."""
    from vllm_engine import watching

    model.vispruner_watched = watching(model)
    model.vispruner_seen = model.vispruner_watched.__enter__()


def seen(model: Any) -> dict[str, Any]:
    """The recorded tensors."""
    return vars(model.vispruner_seen)


def main(folder: str, mode: str, given: str, out: str) -> None:
    from vllm_engine import ask, engine, prompt
    from vllm_models import picture, words

    more = dict(tensor_parallel_size=2, mm_encoder_tp_mode=mode)
    more |= dict(distributed_executor_backend="mp", enable_prefix_caching=False)
    with engine(Path(folder), json.loads(given), **more) as llm:
        llm.apply_model(watch)
        pictures = [picture(i, 100, 60 + 20 * i) for i in range(3)]
        text = f"{words(5)} <image> <image> {words(7)} <image>"
        answers = ask(llm, prompt(text, *pictures), prompt(words(3, 4)))
        ranks = llm.apply_model(seen)
    torch.save(dict(ranks=ranks, answers=[vars(answer) for answer in answers]), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
