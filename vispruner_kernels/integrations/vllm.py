"""Visual token pruning in vLLM, as a plugin: nothing to import, nothing to patch.

    vllm serve llava-hf/llava-1.5-7b-hf --hf-overrides '{
      "architectures": ["VisPrunerLlavaForConditionalGeneration"],
      "vispruner": {"method": "vispruner", "keep": 64}}'

docs/vllm.md has the settings, the requests and the limits. From the start of a server to an answer:

1. vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). It registers
   the two architectures by name; their module is imported only when a server chooses one.
2. At the start of a server, vLLM calls `CheckPruned`, which reads the settings from `hf_overrides`
   (`Settings.of` in _vllm_settings.py) and raises an error for settings that cannot work.
3. For each request, the processor in _vllm_processing.py reads the budget of the request, counts
   the tokens that each image keeps (`Settings.count_of_request`), puts that many placeholders into
   the prompt, and adds the settings and the budget to the hash of each image. The scheduler and the
   KV cache therefore handle kept tokens only. The budget is passed to the model with the pixels.
4. The model in _vllm_models.py runs the vision tower, computes scores from the attention of its
   last layer, selects tokens (`keep` in _visual.py, as in the integration in transformers), and
   projects the kept tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

# Versions (major, minor). The models override methods that are not a public interface of vLLM, so
# other versions may not call them.
SUPPORTED = ((0, 32),)
ARCHITECTURES = (
    "VisPrunerLlavaForConditionalGeneration",
    "VisPrunerLlavaNextForConditionalGeneration",
)


def register() -> None:
    """Register the architectures in vLLM; further calls have no effect."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES:
        if name not in known:
            module = "vispruner_kernels.integrations._vllm_models"
            ModelRegistry.register_model(name, f"{module}:{name}")
    # An error here must not stop a server that serves other models.
    with suppress(ImportError):
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        MODELS_CONFIG_MAP.update(dict.fromkeys(ARCHITECTURES, CheckPruned))
        if is_supported():
            for name in ARCHITECTURES:
                MODELS_CONFIG_MAP.setdefault(name.removeprefix("VisPruner"), CheckUnpruned)


def is_supported() -> bool:
    """Whether the installed version of vLLM is one of `SUPPORTED`."""
    import vllm

    number = vllm.__version__.split(".")[:2]
    return number in [[*map(str, version)] for version in SUPPORTED]


def check_version() -> None:
    """Raise ImportError unless the installed version of vLLM is supported."""
    import vllm

    if not is_supported():
        versions = " or ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
        raise ImportError(
            f"vLLM is {vllm.__version__}, expected {versions}: pip install 'vllm=={versions}.*', "
            "or a version of vispruner_kernels that supports it"
        )


def option_names(kwargs: Mapping[str, Any]) -> Iterator[str]:
    """The names of options, and of the options nested in them (such as `images_kwargs`)."""
    for name, value in kwargs.items():
        for each in (name, *(value if isinstance(value, Mapping) else ())):
            yield str(each)


class CheckPruned:
    """Checks a server with a pruned architecture; an error here stops the start of the server."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Required by vLLM; does nothing, because the check needs the whole configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Check the version of vLLM, the settings, and the options that exclude pruning."""
        check_version()
        from vispruner_kernels.integrations._vllm_settings import Settings

        model = vllm_config.model_config
        settings = Settings.of(model.hf_config)
        multimodal = model.multimodal_config
        for name in option_names((multimodal and multimodal.mm_processor_kwargs) or {}):
            if name.startswith("vispruner"):
                raise ValueError(
                    f"mm_processor_kwargs of the server has {name}: give 'keep' in 'vispruner' of "
                    "hf_overrides; vispruner_keep is for requests"
                )
        lora = vllm_config.lora_config
        if lora is not None and lora.enable_tower_connector_lora:
            raise ValueError(
                "enable_tower_connector_lora is not supported with pruning, which runs the tower "
                "in parts: leave it out (LoRA of the language model is accepted)"
            )
        settings.check()


class CheckUnpruned:
    """Checks a server with vLLM's own architecture: it must have no settings for pruning, which it
    would ignore."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Required by vLLM; does nothing, because the check needs the whole configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Raise ValueError if `hf_overrides` has 'vispruner'."""
        model = vllm_config.model_config
        if hasattr(model.hf_config, "vispruner"):
            raise ValueError(
                f"hf_overrides has 'vispruner', but the architecture is {model.architecture}, "
                f'expected "architectures": ["VisPruner{model.architecture}"]'
            )
