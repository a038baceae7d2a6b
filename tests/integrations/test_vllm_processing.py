"""The plugin without an engine: registration, refusals, token counts and hashes of images."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import vllm_models
import vlms
from vllm_engine import ARCHITECTURES, options
from vllm_models import PINPOINTS, SIDE, TILE, N, picture, words

from vispruner_kernels.integrations import vllm as plugin

pytestmark = pytest.mark.filterwarnings("default")

TEXT = f"{words(5, 6)} <image> {words(7)}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for family in ("llava", "llava-siglip", "llava-next"):
        vllm_models.save(family, root / family)
    return root


def configuration(folder, given, **more):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return EngineArgs(**options(folder, given, **more)).create_engine_config()


def processor(folder, given, **more):
    from vllm.multimodal import MULTIMODAL_REGISTRY

    return MULTIMODAL_REGISTRY.create_processor(configuration(folder, given, **more).model_config)


def processed(made, *pictures, name=None, **kwargs):
    items = made.info.parse_mm_data({"image": [*pictures]})
    names = None if name is None else {"image": [name] * len(pictures)}
    return made(TEXT, items, names, kwargs)


# ---- registration ----


def test_vllm_finds_the_entry_point():
    (entry,) = (
        entry
        for entry in importlib.metadata.entry_points(group="vllm.general_plugins")
        if entry.name == "vispruner"
    )
    assert entry.load() is plugin.register


def test_import_and_registration_import_no_model():
    """The import of the plugin does not even import vLLM."""
    code = (
        "import sys\n"
        "from vispruner_kernels.integrations.vllm import register\n"
        "assert 'vllm' not in sys.modules\n"
        "register(); register()\n"
        "assert 'vllm.model_executor.models.llava' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_second_registration_changes_nothing():
    from vllm import ModelRegistry

    plugin.register()
    before = {name: ModelRegistry.models[name] for name in ARCHITECTURES}
    plugin.register()
    assert all(ModelRegistry.models[name] is before[name] for name in ARCHITECTURES)


def test_overridden_methods_have_the_parameters_of_vllm():
    """A vLLM that renamed a method or a parameter would not call the method of the plugin."""
    from vispruner_kernels.integrations import _vllm_models, _vllm_processing

    pairs = [
        (_vllm_processing._Info, _vllm_processing.LlavaProcessingInfo),
        (_vllm_processing._Info, _vllm_processing.LlavaNextProcessingInfo),
        (_vllm_processing._Processor, _vllm_processing.LlavaMultiModalProcessor),
        (_vllm_processing._Processor, _vllm_processing.LlavaNextMultiModalProcessor),
        (_vllm_models._Pruned, _vllm_models.LlavaForConditionalGeneration),
        (_vllm_models._Pruned, _vllm_models.LlavaNextForConditionalGeneration),
    ]
    not_overridden = {"_check_pixels", "_sizes", "_parts", "_project"}
    not_overridden |= {"_prune", "_encode", "_capture_scores"}
    compared = 0
    for ours, theirs in pairs:
        for name, function in vars(ours).items():
            if inspect.isfunction(function) and name not in not_overridden:
                expected = inspect.signature(getattr(theirs, name)).parameters
                assert [*inspect.signature(function).parameters] == [*expected], name
                compared += 1
        for flag in ("supports_tower_connector_lora", "supports_encoder_tp_data"):
            assert not hasattr(ours, flag) or hasattr(theirs, flag)
    assert compared == 2 * (3 + 5 + 2)


# ---- refusals ----


REFUSED = [
    ("llava", dict(method="prumerge", keep=4), {}, "method is 'prumerge', expected one of"),
    ("llava", dict(method="vispruner", keep=65), {}, "keep is 65, expected 1 <= keep <= 64, the"),
    ("llava-siglip", dict(method="fastervlm", keep=9), {}, "fastervlm needs the attention of a"),
    ("llava", {}, {}, 'vispruner is {}, expected in hf_overrides: "vispruner": {"method"'),
    (
        "llava",
        dict(method="vispruner", keep=20),
        dict(mm_processor_kwargs={"vispruner_keep": 8}),
        "mm_processor_kwargs of the server has vispruner_keep: give 'keep'",
    ),
    (
        "llava",
        dict(method="vispruner", keep=20),
        dict(mm_processor_kwargs={"images_kwargs": {"vispruner_keep": 8}}),
        "mm_processor_kwargs of the server has vispruner_keep: give 'keep'",
    ),
    ("llava", dict(method="vispruner", keep=20, small=True), {}, "small is True, expected 'error'"),
    ("llava", dict(method="vispruner", keep=20, smal="keep"), {}, "smal is no option of vispruner"),
    ("llava", dict(method="vispruner", keep=10**40), {}, "keep is 1"),
    (
        "llava",
        dict(method="vispruner", keep=20),
        dict(enable_lora=True, enable_tower_connector_lora=True),
        "enable_tower_connector_lora is not supported with pruning",
    ),
]


@pytest.mark.parametrize(("family", "given", "more", "words"), REFUSED)
def test_the_server_refuses_to_start_with(family, given, more, words, folders):
    with pytest.raises((TypeError, ValueError)) as caught:
        configuration(folders / family, given, **more)
    (line,) = (line for line in str(caught.value).splitlines() if words in line)
    assert line


@pytest.mark.parametrize("family", ["llava", "llava-next"])
def test_settings_without_the_architecture_are_refused(family, folders):
    """vLLM's own model would ignore them and serve without pruning."""
    stock = ARCHITECTURES[family == "llava-next"].removeprefix("VisPruner")
    overrides = dict(architectures=[stock], vispruner=dict(method="vispruner", keep=20))
    words = f"hf_overrides has 'vispruner', but the architecture is {stock}, expected"
    with pytest.raises(ValueError, match=words):
        configuration(folders / family, None, hf_overrides=overrides)


def test_pixtral_is_refused(folders, tmp_path):
    """vLLM serves Pixtral checkpoints of transformers with the architecture of LLaVA too."""
    import json
    import shutil

    folder = tmp_path / "llava"
    shutil.copytree(folders / "llava", folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] = dict(model_type="pixtral", image_size=TILE, patch_size=vlms.PATCH)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"vision_config\.model_type is 'pixtral', expected one of"
    ):
        configuration(folder, dict(method="vispruner", keep=20))


BROKEN = [
    ("llava", "image_size", 0),
    ("llava", "image_size", 10**9),
    ("llava", "patch_size", "14"),
    ("llava", "patch_size", 15),
    ("llava", "num_attention_heads", 0),
    ("llava", "hidden_size", 30),
    ("llava-next", "image_size", None),
    ("llava-next", "image_grid_pinpoints", []),
    ("llava-next", "image_grid_pinpoints", [[TILE, 0]]),
    ("llava-next", "image_grid_pinpoints", [[TILE * 10**9, TILE]]),
]


@pytest.mark.parametrize(("family", "name", "value"), BROKEN)
def test_the_error_names_the_broken_setting(family, name, value, folders):
    """The error is one line. The test changes a configuration that vLLM has read, because vLLM or
    transformers may refuse to read the broken one."""
    config = configuration(folders / family, dict(method="vispruner", keep=20)).model_config
    target = config.hf_config if "pinpoints" in name else config.hf_config.vision_config
    vars(target)[name] = value
    with pytest.raises(ValueError, match=f"^[a-z_.]*{name} (is|has) .*expected") as caught:
        plugin.CheckPruned.verify_and_update_config(
            SimpleNamespace(model_config=config, lora_config=None)
        )
    assert "\n" not in str(caught.value)


def test_another_version_serves_only_unpruned_models(folders, monkeypatch):
    monkeypatch.setattr(plugin, "SUPPORTED", ((0, 7),))
    words = r"vLLM is 0\.\d+\.\d+, expected 0.7: pip install 'vllm==0.7.\*'"
    with pytest.raises(ImportError, match=words):
        configuration(folders / "llava", dict(method="vispruner", keep=20))
    configuration(folders / "llava", None)


def test_lora_of_the_language_model_is_accepted(folders):
    given = dict(method="vispruner", keep=20)
    assert configuration(folders / "llava", given, enable_lora=True).lora_config


# ---- counts ----


def test_layouts_have_the_token_counts_of_vllm(folders):
    """For many sizes: the count of vLLM before pruning is the length of the plugin's layout."""
    from vllm.model_executor.models.llava_next import LlavaNextProcessingInfo

    info = processor(folders / "llava-next", dict(method="vispruner", keep=20)).info
    own = LlavaNextProcessingInfo(info.ctx)
    generator = np.random.default_rng(0)
    sizes = np.exp(generator.uniform(np.log(5), np.log(800), (400, 2))).astype(int).tolist()
    for height, width in [*sizes, *PINPOINTS, [1, 500], [500, 1]]:
        expected = own.get_num_image_tokens(image_height=height, image_width=width)
        assert len(info.settings.layout((height, width))) == expected, (height, width)


def test_profiling_uses_the_largest_image_and_the_most_placeholders(folders):
    """The largest image has the most tokens in the tower; another may have more placeholders."""
    info = processor(folders / "llava-next", dict(method="vispruner", keep=20)).info
    size = info.get_image_size_with_most_features()
    assert (size.height, size.width) == (2 * TILE, 2 * TILE)
    assert info.get_mm_max_tokens_per_item(640, {"image": 1}) == {"image": 20 + 3 * SIDE}
    assert info.get_num_image_tokens(image_height=size.height, image_width=size.width) == 20 + 16
    # Embeddings from the client are not pruned.
    more = dict(enable_mm_embeds=True)
    info = processor(folders / "llava-next", dict(method="vispruner", keep=20), **more).info
    everything = 5 * N + 2 * SIDE
    assert info.get_mm_max_tokens_per_item(640, {"image": 1}) == {"image": everything}


SIZE = dict(height=60, width=60)
MISFITS = [
    ("llava", dict(do_resize=False, do_center_crop=False)),
    ("llava", dict(size=SIZE, crop_size=SIZE)),
    ("llava", dict(images_kwargs=dict(size=SIZE, crop_size=SIZE))),
    ("llava", dict(return_tensors="np")),
    ("llava-next", dict(size=SIZE, crop_size=SIZE)),
]


@pytest.mark.parametrize(("family", "kwargs"), MISFITS, ids=str)
def test_pixels_of_a_wrong_shape_are_refused(family, kwargs, folders):
    """In the model they would fail all other requests too."""
    made = processor(folders / family, dict(method="vispruner", keep=20))
    with pytest.raises(ValueError, match=r"the processor made pixel_values .*, expected \["):
        processed(made, picture(1, 100, 80), **kwargs)
    assert processed(made, picture(1, 100, 80))["mm_placeholders"]["image"][0].length >= 20


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(vispruner_kep=8),
        dict(images_kwargs=dict(vispruner_keep=8)),
        dict(images_kwargs={3: 4}, vispruner_kep=8),
    ],
    ids=str,
)
def test_a_budget_with_another_name_or_place_is_refused(kwargs, folders):
    made = processor(folders / "llava", dict(method="vispruner", keep=20))
    words = r"mm_processor_kwargs has vispruner_ke?e?p, expected vispruner_keep, not nested"
    with pytest.raises(ValueError, match=words):
        processed(made, picture(1), **kwargs)


@pytest.mark.parametrize("shape", [(60, 100, 3), (3, 60, 100), (3, 50, 3), (3, 40, 1), (50, 3, 3)])
def test_the_count_of_an_array_uses_the_size_that_the_model_gets(shape, folders):
    made = processor(folders / "llava-next", dict(method="vispruner", keep=0.5))
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    out = processed(made, array)
    height, width = out["mm_kwargs"]["image"][0]["image_sizes"].data.tolist()
    (place,) = out["mm_placeholders"]["image"]
    assert place.length == made.info.settings.count((height, width))


def test_small_keep_keeps_all_tokens_of_a_small_image(folders):
    """In requests with a budget too; no request gets more than the server's count."""
    given = dict(method="vispruner", keep=200, newlines="drop")
    made = processor(folders / "llava-next", given | dict(small="keep"))

    def count(*size, **kwargs):
        (place,) = processed(made, picture(1, *size), **kwargs)["mm_placeholders"]["image"]
        return place.length

    assert count(2 * TILE, 2 * TILE) == 200
    # One tile of the whole image, and two tiles of which unpadding removes half.
    assert count(TILE, TILE) == count(TILE, TILE, vispruner_keep=1000) == 2 * N
    assert count(TILE, TILE, vispruner_keep=2 * N - 1) == 2 * N - 1
    assert count(2 * TILE, 2 * TILE, vispruner_keep=150) == 150
    with pytest.raises(ValueError, match="vispruner_keep is 201, expected at most the server's"):
        count(2 * TILE, 2 * TILE, vispruner_keep=201)
    assert made.info.get_mm_max_tokens_per_item(640, {"image": 1}) == {"image": 200}
    made = processor(folders / "llava-next", given)
    with pytest.raises(ValueError, match=r"keep is 200, .* use a fraction, .* or small=\"keep\""):
        count(TILE, TILE)


# ---- hashes ----


def test_the_hash_of_an_image_depends_on_every_setting(folders):
    """With and without a name from the client; two processors with the same settings agree."""
    settings = [
        dict(method="vispruner", keep=20),
        dict(method="vispruner", keep=21),
        dict(method="vispruner", keep=20, matching="pairwise"),
        dict(method="vispruner", keep=20, important_ratio=0.25),
        dict(method="vispruner", keep=20, step=4),
        dict(method="vispruner", keep=20, scores="received"),
        dict(method="vispruner", keep=20, budget="tile"),
        dict(method="vispruner", keep=20, newlines="drop"),
        dict(method="vispruner", keep=20, small="keep"),
        dict(method="fastervlm", keep=20),
        dict(method="fopru", keep=16),
        dict(method="fopru", keep=16, strategy="row"),
        dict(method="random", keep=20),
        dict(method="random", keep=20, seed=1),
    ]
    for name in (None, "mine"):
        found = []
        for given in settings:
            (identity,) = processed(processor(folders / "llava", given), picture(1), name=name)[
                "mm_hashes"
            ]["image"]
            found.append(identity)
        assert len(set(found)) == len(settings)
        (again,) = processed(processor(folders / "llava", settings[0]), picture(1), name=name)[
            "mm_hashes"
        ]["image"]
        assert again == found[0]


def test_the_hash_of_an_image_depends_on_the_budget(folders):
    made = processor(folders / "llava", dict(method="vispruner", keep=20))
    for name in (None, "mine"):

        def of(seed=1, name=name, **kwargs):
            out = processed(made, picture(seed), name=name, **kwargs)
            (place,) = out["mm_placeholders"]["image"]
            return out["mm_hashes"]["image"][0], place.length, place.get_num_embeds()

        assert of()[1:] == (20, 20)
        assert of(vispruner_keep=8)[1:] == (8, 8)
        assert len({of()[0], of(vispruner_keep=8)[0], of(vispruner_keep=9)[0]}) == 3
        # A request for the server's own budget has the hash of a request without a budget.
        assert of(vispruner_keep=20) == of()
        # Other options still change the hash.
        assert of(do_rescale=False)[0] != of()[0]
        assert (of(seed=2)[0] == of()[0]) == (name is not None)


def test_pixels_stay_on_the_host(folders):
    """The scheduler counts kept tokens and admits many images; the model copies them in parts."""
    out = processed(processor(folders / "llava", dict(method="random", keep=1)), picture(1))
    fields = out["mm_kwargs"]["image"][0]
    assert sorted(fields) == ["pixel_values", "vispruner_keep"]
    assert fields["vispruner_keep"].data.dtype == torch.float64
    assert all(element.field.keep_on_cpu for element in fields.values())


def test_the_field_holds_any_budget_exactly():
    from vispruner_kernels.integrations._vllm_processing import from_field, to_field

    for keep in (1, 64, 16384, 1.0, 0.25, 0.1, 5e-324):
        back = from_field(float(np.float64(to_field(keep))))
        assert (type(back), back) == (type(keep), keep)
