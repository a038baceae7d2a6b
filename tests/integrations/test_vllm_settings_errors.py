"""Settings, models, budgets and versions of vLLM that the plugin refuses; needs no vLLM."""

from __future__ import annotations

import math
import re
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from vllm_models import settings_config as config

from vispruner_kernels.integrations import _vllm_settings, vllm
from vispruner_kernels.integrations._vllm_settings import Settings


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (5, "vispruner_keep is 5, expected at most the server's keep, 4"),
        (0.5, "vispruner_keep is 0.5, expected at most the server's keep, 4"),
        (0, "vispruner_keep: keep is 0, expected at least 1"),
        (17, "vispruner_keep: an image of 9 x 9 pixels: keep is 17, expected 1 <= keep <= 16"),
        (1.5, "vispruner_keep: keep is 1.5, expected a fraction"),
        (10**40, "vispruner_keep: keep is "),
        (-1, "vispruner_keep: keep is -1, expected at least 1"),
        (-0.5, "vispruner_keep: keep is -0.5, expected a fraction"),
        (math.inf, "vispruner_keep: keep is inf, expected a fraction"),
        ({}, "vispruner_keep: keep is {}, expected an int or a float"),
        (
            10**400,
            "vispruner_keep: keep is an int of 1329 bits, expected at least 1 and below 2**63",
        ),
        (math.nan, "vispruner_keep: keep is nan, expected a fraction"),
        ("4", "vispruner_keep: keep is '4', expected an int or a float"),
        (True, "vispruner_keep: keep is True, expected an int or a float"),
        ([4], "vispruner_keep: keep is [4], expected an int or a float"),
    ],
)
def test_a_bad_budget_of_a_request_is_refused(keep, words):
    with pytest.raises(ValueError, match="^" + re.escape(words)) as caught:
        Settings.of(config()).count_of_request(keep, (9, 9))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [10**40, True, "4", math.nan, [4], 0])
def test_a_bad_budget_is_refused_with_small_keep(keep):
    with pytest.raises(ValueError, match=r"^vispruner_keep: keep is "):
        Settings.of(config(small="keep")).count_of_request(keep, (9, 9))


BAD = [
    (dict(method="prumerge"), "method is 'prumerge', expected one of vispruner, fastervlm, fopru"),
    (dict(kep=3), "kep is no option of vispruner, expected one of keep, important_ratio, step"),
    (dict(matching="greedy"), "VisPruner: matching is 'greedy', expected"),
    (dict(keep=17), "an image of 56 x 56 pixels: keep is 17, expected 1 <= keep <= 16"),
    (dict(keep=0), "keep is 0, expected at least 1"),
    (dict(keep="64"), "keep is '64', expected an int or a float"),
    (
        dict(method="fopru", strategy="row", keep=6),
        "an image of 56 x 56 pixels: keep is 6, expected a multiple of the grid",
    ),
    (dict(step=8.5), "step is 8.5, expected an int"),
    (dict(step="8"), "step is '8', expected an int"),
    (dict(important_ratio="x"), "important_ratio is 'x', expected a number"),
    (dict(important_ratio=None), "important_ratio is None, expected a number"),
    (dict(important_ratio=True), "important_ratio is True, expected a number"),
    (dict(method="random", seed="a"), "seed is 'a', expected an int"),
    (dict(method="random", seed=2**70), "seed is 1180591620717411303424, expected 0 <= seed"),
    (dict(method=["vispruner"]), "method is ['vispruner'], expected one of vispruner"),
    (dict(budget="crop"), "budget is 'crop', expected 'image' or 'tile'"),
    (dict(newlines="no"), "newlines is 'no', expected 'keep' or 'drop'"),
    (dict(newlines=["keep"]), "newlines is ['keep'], expected 'keep' or 'drop'"),
    (dict(small="all"), "small is 'all', expected 'error' or 'keep'"),
    (dict(small=True), "small is True, expected 'error' or 'keep'"),
    (dict(budget=None), "budget is None, expected 'image' or 'tile'"),
    ({3: 4}, "vispruner has the option 3, expected a string"),
    (dict(keep=True), "keep is True, expected an int or a float"),
    (dict(keep=10**40, small="keep"), "keep is "),
    (dict(keep=10**400), "keep is "),
    (dict(keep=math.nan), "keep is nan, expected a fraction"),
    (dict(keep=[64]), "keep is [64], expected an int or a float"),
    (dict(keep=None), "keep is None, expected an int or a float"),
    (dict(step=True), "step is True, expected an int"),
    (dict(important_ratio=math.nan), "VisPruner: important_ratio is nan, expected"),
    (dict(method="random", seed=True), "seed is True, expected an int"),
]


@pytest.mark.parametrize(("given", "words"), BAD, ids=[str(given) for given, _ in BAD])
def test_bad_settings_are_refused(given, words):
    found = config()
    found.vispruner |= given
    with pytest.raises((TypeError, ValueError)) as caught:
        Settings.of(found).check()
    assert str(caught.value).startswith(words), str(caught.value)
    assert "\n" not in str(caught.value)


# The sizes in the configuration of the vision tower, and values that are no size.
SIZES_OF_THE_TOWER = [
    "image_size", "patch_size", "hidden_size", "num_attention_heads", "num_hidden_layers",
]  # fmt: skip
NO_SIZES = [
    0, -4, 10**9, 10**40, 10**5000, math.inf, math.nan, 4.0, True, "4", None, [4, 4], {},
]  # fmt: skip
LAYER, STRATEGY = "vision_feature_layer", "vision_feature_select_strategy"
TOWER, PINPOINTS = "vision_config__", "image_grid_pinpoints"
MODEL_TYPE = "vision_config.model_type is "
MODELS = [
    ("llava-siglip", {}, "vispruner needs the attention of a [CLS] token, which a siglip"),
    *(
        ("llava", {LAYER: layer}, f"{LAYER} is {layer!r}, expected one layer of the vision tower")
        for layer in ([-2, -1], 0, -4, 4, True, -2.0, None, "-2", 10**30)
    ),
    (
        "llava",
        {STRATEGY: "full"},
        f"{STRATEGY} is 'full', expected 'default': 'full' keeps the [CLS]",
    ),
    ("llava", {STRATEGY: "cls"}, f"{STRATEGY} is 'cls', expected 'default' or 'full'"),
    ("llava", {STRATEGY: None}, f"{STRATEGY} is None, expected 'default' or 'full'"),
    ("llava", dict(vision_config=None), MODEL_TYPE + "None, expected one of"),
    ("llava", dict(vision_config={}), MODEL_TYPE + "None, expected one of"),
    ("llava", {TOWER + "model_type": "pixtral"}, MODEL_TYPE + "'pixtral', expected one"),
    ("llava", {TOWER + "model_type": []}, MODEL_TYPE + "[], expected one of"),
    *(
        (family, {TOWER + name: value}, f"vision_config.{name} is ")
        for family in ("llava", "llava-next")
        for name in SIZES_OF_THE_TOWER
        for value in NO_SIZES
    ),
    (
        "llava",
        {TOWER + "hidden_size": 30},
        "vision_config.hidden_size is 30, expected a multiple of num_attention_heads, 4",
    ),
    (
        "llava",
        {TOWER + "hidden_size": 2048},
        "the heads of the vision tower have 512 channels, expected at most 256",
    ),
    *(
        (
            "llava",
            {TOWER + "patch_size": patch},
            f"vision_config.patch_size is {patch}, expected a divisor of image_size, 56",
        )
        for patch in (15, 57, 112)
    ),
    (
        "llava",
        {TOWER + "image_size": 14 * 129},
        "vision_config.image_size is 1806, 129 x 129 patches of patch_size 14, expected at most",
    ),
    ("llava", {TOWER + "image_size": 65536, TOWER + "patch_size": 1}, "vision_config.image_size"),
    *(
        ("llava-next", {PINPOINTS: given}, f"{PINPOINTS} is ")
        for given in (None, [], {}, {"56": 56}, "56", 56, True, [[56, 56]] * 257)
    ),
    *(
        ("llava-next", {PINPOINTS: [[56, 112], size]}, f"{PINPOINTS} has ")
        for size in (
            [], [56], [56, 112, 56], 56, "56", ["56", "56"], [0, 56], [-56, 56], [56, 57], [28, 28],
            [56.0, 112.0], [math.inf, 56], [math.nan, 56], [True, 56], [None, 56], None,
            {"height": 56, "width": 112}, [[56, 112]], [56 * 10**9, 56], [56 * 10**30] * 2,
            [56 * 128, 56 * 64],
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "words"), MODELS)
def test_unsupported_models_are_refused(family, changes, words):
    found = config(family)
    for name, value in changes.items():
        *parts, last = name.split("__")
        target = found
        for part in parts:
            target = getattr(target, part)
        # Through `vars`, because transformers checks some attributes when they are set.
        vars(target)[last] = value
    with pytest.raises(ValueError, match="^" + re.escape(words)) as caught:
        Settings.of(found)
    assert re.search("expected|add", str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*SIZES_OF_THE_TOWER, "model_type", LAYER, STRATEGY])
def test_a_missing_setting_of_the_model_is_named(name):
    full = config()
    names = [*SIZES_OF_THE_TOWER, "model_type"]
    vision = SimpleNamespace(**{each: getattr(full.vision_config, each) for each in names})
    found = SimpleNamespace(
        vispruner=full.vispruner,
        vision_config=vision,
        **{each: getattr(full, each) for each in (LAYER, STRATEGY)},
    )
    Settings.of(found).check()
    delattr(vision if name in names else found, name)
    with pytest.raises(ValueError, match=f"^(vision_config.)?{name} is None, expected"):
        Settings.of(found)


def test_a_missing_keep_or_method_is_named():
    found = config()
    del found.vispruner["keep"]
    with pytest.raises(ValueError, match="keep is missing"):
        Settings.of(found)
    for nothing in ({}, None, "vispruner", {"keep": 4}):
        found.vispruner = nothing
        with pytest.raises(ValueError, match=r'expected in hf_overrides: "vispruner": \{"method"'):
            Settings.of(found)
    del found.vispruner
    with pytest.raises(ValueError, match="vispruner is None, expected in hf_overrides"):
        Settings.of(found)


def test_an_image_with_more_patches_than_an_operator_takes_is_refused(monkeypatch):
    monkeypatch.setattr(_vllm_settings, "MAX_TOKENS", 79)
    with pytest.raises(ValueError, match="an image has up to 80 patches, expected at most 79"):
        Settings.of(config("llava-next")).check()
    Settings.of(config("llava-next", budget="tile")).check()
    Settings.of(config("llava-next", method="random")).check()


@pytest.mark.parametrize("version", ["0.31.4", "0.33.0rc1", "1.0.0", "0.3.2", "0.1.dev1+g0"])
def test_other_versions_of_vllm_are_refused(version, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
    with pytest.raises(
        ImportError, match=re.escape(f"vLLM is {version}, expected 0.32: pip install")
    ):
        vllm.check_version()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1rc2.dev3+g0"])
def test_a_supported_version_is_accepted(version, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
    vllm.check_version()
