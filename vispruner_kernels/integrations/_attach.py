"""The handle of `attach`: prune the arguments of a call, run the model, adapt its output.

`_switch.py` makes the model's `forward` and `generate` call `_forward` and `_generate` of the
handle, with the original method as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vispruner_kernels.integrations._cache import (
    HeldPrompt,
    cache_in,
    cache_of,
    held,
    hold,
    length_of,
    released,
)
from vispruner_kernels.integrations._prompt import given
from vispruner_kernels.integrations._switch import is_switched, switch, switch_back
from vispruner_kernels.integrations._vision import CoreAlone, asks_for_pruning

# Options of decoding that computes places in the cache from the length of the caller's prompt, or
# that fills the cache in parts.
_REFUSED = (
    "assistant_model",
    "assistant_early_exit",
    "prompt_lookup_num_tokens",
    "prefill_chunk_size",
)


class Handle:
    """The result of `attach`. As a context manager it calls `remove` at the end."""

    def __init__(self, model: Any, prune: Callable[..., Any]) -> None:
        """`prune(model, arguments, padding)` is `prune_inputs` with the settings of `attach`."""
        self._modules: tuple[Any, ...] = (model, model.model)
        self._prune = torch.compiler.disable(prune)
        if any(map(is_switched, self._modules)):
            raise RuntimeError("the model is already attached: call remove() of its handle first")
        for module in self._modules:
            switch(module, {"forward": self._forward, "generate": self._generate})

    def remove(self) -> None:
        """Restore `generate` and `forward`. A second call does nothing."""
        for module in self._modules:
            switch_back(module)
        self._modules = ()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _forward(self, module: Any, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """`forward` of the model, or of its core if a user calls that.

        The model itself calls its core with pruned arguments. They have no pixels, and `released`
        has removed the record of the cache, so the core runs its original method.
        """
        cache, name = cache_in(arguments, type(module))
        before = held(cache)
        if before is None and not asks_for_pruning(arguments):
            return original(**arguments)
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "the model prunes, and pruning cannot be exported: call remove() first"
            )
        if before is not None:
            before.translate(arguments, cache, name)
        with released(cache, before):
            if asks_for_pruning(arguments):
                return self._pruned(module, original, arguments, cache, before)
            return original(**arguments)

    # Only this function is not compiled; the functions that it calls may be.
    @torch.compiler.disable(recursive=False)
    def _pruned(
        self,
        module: Any,
        original: Callable[..., Any],
        arguments: dict[str, Any],
        cache: Any,
        before: HeldPrompt | None,
    ) -> Any:
        if arguments.get("shift_labels") is not None:
            raise ValueError("shift_labels have the length before pruning: pass labels instead")
        if isinstance(arguments.get("logits_to_keep"), Tensor):
            raise ValueError("logits_to_keep is a tensor of unpruned positions, expected an int")
        model = module if hasattr(module, "model") else CoreAlone(module)
        cached = length_of(cache)
        ids, embeds, positions = given(arguments, "input_ids", "inputs_embeds", "position_ids")
        prompt = embeds if ids is None else ids
        in_space = hasattr(model.model, "get_rope_index")
        if positions is None and not in_space and isinstance(prompt, Tensor) and prompt.dim() > 1:
            # The model's default before pruning. New padding must not shift these positions.
            columns = torch.arange(cached, cached + prompt.shape[1], device=prompt.device)
            arguments["position_ids"] = columns.expand(len(prompt), -1)
        as_dict = arguments.pop("return_dict", None)
        if as_dict is None:
            as_dict = getattr(model.config, "return_dict", True)
        pruned = self._prune(model, arguments, "same")
        out = original(**pruned, return_dict=True)
        filled = cache_of(out) if cache is None else cache
        if filled is not None:
            hold(filled, HeldPrompt.of(model.model, pruned, prompt.shape[1], cached, before))
        _add_features(out, pruned.features)
        if pruned.get("labels") is not None:
            # A plain attribute, because callers iterate over the fields of the output.
            out.labels = pruned["labels"]
        return out if as_dict else out.to_tuple()

    @torch.no_grad()
    def _generate(self, model: Any, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """`generate` of the model."""
        cache, name = cache_in(arguments, type(model), "generate")
        if held(cache) is not None:
            raise ValueError(
                f"{name} holds a pruned prompt: generate from the whole conversation without it, "
                "or continue with forward"
            )
        if arguments.get("inputs") is not None:
            if arguments.get("input_ids") is not None:
                raise ValueError("inputs and input_ids are given, expected one of them")
            arguments["input_ids"] = arguments.pop("inputs")
        if not asks_for_pruning(arguments):
            return original(**arguments)
        if length_of(cache):
            raise ValueError(
                f"{name} holds tokens, and the call has new images: generate from the whole "
                "conversation without it"
            )

        # In the order in which transformers resolves settings.
        configs = (arguments.get("generation_config"), model.generation_config)

        def setting(name: str) -> Any:
            values = (arguments.get(name), *(getattr(config, name, None) for config in configs))
            return next((value for value in values if value is not None), None)

        for option in _REFUSED:
            if setting(option) is not None:
                raise ValueError(f"{option} is given: not supported with a pruned prompt")
        ids = arguments.get("input_ids")
        if isinstance(ids, Tensor) and arguments.get("attention_mask") is None:
            arguments["attention_mask"] = _inferred_mask(ids, setting)
        pruned = self._prune(model, arguments, "left")
        embeds = pruned["inputs_embeds"]
        if pruned.get("attention_mask") is None:
            # Otherwise transformers makes a mask of the caller's length.
            pruned["attention_mask"] = torch.ones_like(embeds[..., 0], dtype=torch.int64)
        old, new = (arguments["inputs_embeds"] if ids is None else ids).shape[1], embeds.shape[1]
        if old != new:
            # If the ids and the embeddings differ in length, transformers subtracts the length of
            # the embeddings from max_length and min_length. The shift restores the caller's values.
            shift = new - old if ids is None else new
            for option in ("max_length", "min_length"):
                if setting(option) is not None:
                    pruned[option] = max(setting(option) + shift, 0)
        if ids is not None:
            # The caller's ids go with the pruned embeddings, so that sequences, logits processors,
            # stopping criteria and streamers get the caller's prompt.
            pruned["input_ids"] = ids
        out = original(**pruned)
        filled = cache_of(out) if cache is None else cache
        if filled is not None:
            copies = max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
            hold(filled, HeldPrompt.of(model.model, pruned, old, 0, copies=copies))
        return out


def _add_features(out: Any, features: Mapping[str, list[Tensor]]) -> None:
    """Add the projected features of kept tokens, in the fields where the model returns its own."""
    names = [field.name for field in fields(out)]
    for kind, images in features.items():
        if f"{kind}_outputs" in names:
            out[f"{kind}_outputs"] = BaseModelOutputWithPooling(pooler_output=images)  # type: ignore[arg-type]
        elif f"{kind}_hidden_states" in names:
            # Before transformers 5.24.
            out[f"{kind}_hidden_states"] = torch.cat(images)


def _inferred_mask(ids: Tensor, setting: Callable[[str], Any]) -> Tensor | None:
    """The mask that `generate` infers if it gets none."""
    pad, eos = setting("pad_token_id"), setting("eos_token_id")
    if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        return None
    return ids.ne(pad).long() if bool((ids == pad).any()) else None
