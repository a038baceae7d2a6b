"""Visual token pruning in vLLM, as a plugin: nothing to import, nothing to patch.

    vllm serve llava-hf/llava-1.5-7b-hf --hf-overrides '{
      "architectures": ["VisPrunerLlavaForConditionalGeneration"],
      "vispruner": {"method": "vispruner", "keep": 64}}'

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). The models are
imported only where their architecture is chosen. docs/vllm.md has settings, requests and limits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

# What the models override is no public interface: other versions may not call it.
SUPPORTED = ((0, 32),)
ARCHITECTURES = (
    "VisPrunerLlavaForConditionalGeneration",
    "VisPrunerLlavaNextForConditionalGeneration",
)


def register() -> None:
    """Make the architectures known to vLLM; again and again without effect."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES:
        if name not in known:
            module = "vispruner_kernels.integrations._vllm_models"
            ModelRegistry.register_model(name, f"{module}:{name}")
    # Nothing here may stop a vLLM that is asked for other models.
    with suppress(ImportError):
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        MODELS_CONFIG_MAP.update(dict.fromkeys(ARCHITECTURES, Check))
        if is_supported():
            for name in ARCHITECTURES:
                MODELS_CONFIG_MAP.setdefault(name.removeprefix("VisPruner"), Forgotten)


def is_supported() -> bool:
    """Whether this vLLM is of a version that is."""
    import vllm

    number = vllm.__version__.split(".")[:2]
    return number in [[*map(str, version)] for version in SUPPORTED]


def check_version() -> None:
    """ImportError for a vLLM that is not supported."""
    import vllm

    if not is_supported():
        versions = " or ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
        raise ImportError(
            f"vLLM is {vllm.__version__}, expected {versions}: pip install 'vllm=={versions}.*', "
            "or a version of vispruner_kernels that supports it"
        )


def names_of(kwargs: Mapping[str, Any]) -> Iterator[str]:
    """Of options, also of those within scopes such as `images_kwargs`."""
    for name, value in kwargs.items():
        for own in (name, *(value if isinstance(value, Mapping) else ())):
            yield str(own)


class Check:
    """What vLLM asks before it starts anything; an error here is why it does not start."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Before the rest is known."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Of the whole configuration."""
        check_version()
        from vispruner_kernels.integrations._vllm_settings import Settings

        model = vllm_config.model_config
        settings = Settings.of(model.hf_config)
        multimodal = model.multimodal_config
        for name in names_of((multimodal and multimodal.mm_processor_kwargs) or {}):
            if name.startswith("vispruner"):
                raise ValueError(
                    f"mm_processor_kwargs of the server has {name}: give 'keep' in 'vispruner' of "
                    "hf_overrides; vispruner_keep is for requests"
                )
        lora = vllm_config.lora_config
        if lora is not None and lora.enable_tower_connector_lora:
            raise ValueError(
                "enable_tower_connector_lora is not supported with pruning, which runs the tower "
                "in parts: leave it out (LoRA of the language model works)"
            )
        settings.check()


class Forgotten:
    """The same of the models that do not prune: settings without the architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Before the rest is known."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Of the whole configuration."""
        model = vllm_config.model_config
        if hasattr(model.hf_config, "vispruner"):
            raise ValueError(
                f"hf_overrides has 'vispruner', but the architecture is {model.architecture}, "
                f'expected "architectures": ["VisPruner{model.architecture}"]'
            )
