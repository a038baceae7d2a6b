"""What pruning in vLLM is told, and the counts that follow; needs no vLLM."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

import vlms
from vlms import TILE, picture, prompts

from vispruner_kernels import methods
from vispruner_kernels.integrations import _vllm_settings, vllm
from vispruner_kernels.integrations._visual import NEWLINE
from vispruner_kernels.integrations._vllm_settings import Settings
from vispruner_kernels.integrations.transformers import prune_inputs
from vispruner_kernels.methods import FasterVLM, FoPru, Random, VisPruner

# Height and width: of each shape of tiles, cut by unpadding or not, and the thinnest.
SIZES = [(100, 80), (80, 100), (56, 56), (112, 112), (300, 200), (200, 301), (31, 500), (300, 1)]


def config(family: str = "llava", **given):
    """A model's configuration with what hf_overrides gave."""
    found = vlms.make(family).config
    found.vispruner = dict(method="vispruner", keep=4) | given
    return found


@pytest.mark.parametrize(
    ("given", "method"),
    [
        (dict(method="vispruner", keep=4), VisPruner(4)),
        (
            dict(
                method="vispruner", keep=0.5, important_ratio=0.25, step=4, matching="pairwise",
                scores="received",
            ),
            VisPruner(0.5, 0.25, 4, "pairwise", "received"),
        ),
        (dict(method="fastervlm", keep=4, scores="received"), FasterVLM(4, "received")),
        (dict(method="fopru", keep=8, strategy="row", width=4), FoPru(8, "row", 4)),
        (dict(method="random", keep=3, seed=5), Random(3, 5)),
    ],
)  # fmt: skip
def test_methods(given, method):
    settings = Settings.of(config(**given))
    assert settings.method == method
    assert (settings.budget, settings.newlines, settings.small) == ("image", "keep", "error")
    assert len({settings.identity(m) for m in (method, VisPruner(5))}) == 2


def test_every_method_has_a_name():
    found = {cls for cls in vars(methods).values() if isinstance(cls, type)}
    known = {cls for cls in found if issubclass(cls, methods.Method)} - {methods.Method}
    assert set(methods.METHODS.values()) == known


@pytest.mark.parametrize("size", SIZES)
def test_a_layout_is_the_packing_of_the_model(size):
    model = vlms.shared("llava-next")
    settings = Settings.of(config("llava-next"))
    tiles = settings.tiles(size)
    rows = torch.arange(tiles * 16, dtype=torch.float64).view(tiles, 16, 1)
    packed, _ = model.model.pack_image_features(
        [rows], [list(size)], "default", image_newline=torch.tensor([float(NEWLINE)]).double()
    )
    assert torch.equal(settings.layout(size), packed[0][:, 0].long())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "given",
    [
        dict(keep=9),
        dict(keep=0.3),
        dict(keep=0.3, budget="tile"),
        dict(method="fastervlm", keep=3, newlines="drop"),
        dict(method="fopru", keep=0.5, strategy="row", budget="tile"),
        dict(keep=60, small="keep"),
        dict(keep=13, small="keep", budget="tile"),
        dict(method="fopru", keep=10, strategy="row", small="keep", budget="tile"),
        dict(method="fopru", keep=60, strategy="row", small="keep"),
    ],
    ids=str,
)
def test_counts_are_those_of_the_integration_in_transformers(size, given):
    settings = Settings.of(config("llava-next", **given))
    inputs = prompts("llava-next", [3, picture("llava-next", 1, size), 5])
    options = dict(budget=settings.budget, newlines=settings.newlines, small=settings.small)

    def prompt() -> int:
        model = vlms.shared("llava-next")
        with torch.no_grad():
            pruned = prune_inputs(model, inputs, settings.method, **options)
        return pruned["inputs_embeds"].shape[1]

    counted, error = None, ""
    try:
        counted = settings.count(size)
    except ValueError as caught:
        error = str(caught)
    if counted is not None:
        assert prompt() == 1 + 3 + counted + 5
        return
    words = f"an image of {size[0]} x {size[1]} pixels"
    assert error.startswith(words)
    rest = re.escape(error.removeprefix(words)).replace(":", "( of the batch)?:")
    with pytest.raises(ValueError, match="^image 0" + rest):
        prompt()


def test_the_largest_image_is_not_the_one_with_the_most_placeholders():
    settings = Settings.of(config("llava-next", keep=5))
    assert settings.largest == (2 * TILE, 2 * TILE)
    assert settings.count(settings.largest) == 5 + 8
    # Three tiles upon each other have more rows, which end in newlines.
    assert settings.most == settings.count((3 * TILE, TILE)) == 5 + 12
    assert max(settings.count(size) for size in SIZES) <= settings.most
    dropped = Settings.of(config("llava-next", keep=5, newlines="drop"))
    assert dropped.most == 5


def test_a_keep_that_only_large_images_have():
    settings = Settings.of(config("llava-next", keep=70))
    settings.check()
    assert settings.most == 70 + 8
    with pytest.raises(ValueError, match=r"an image of 56 x 56 pixels: keep is 70, expected 1 <="):
        settings.count((56, 56))
    assert settings.requested(20, (56, 56)) == 20 + 4
    with pytest.raises(ValueError, match="vispruner_keep: an image of 56 x 56 pixels: keep is 71"):
        settings.requested(71, (56, 56))


def test_all_of_a_small_image():
    """A count above its tokens keeps them; a request never gets more than the server's count."""
    settings = Settings.of(config("llava-next", keep=70, small="keep"))
    settings.check()
    refuses = dataclasses.replace(settings, small="error")
    assert settings.identity(settings.method) != refuses.identity(settings.method)
    assert settings.most == 70 + 8
    assert settings.count((112, 112)) == 70 + 8
    small = settings.count((56, 56))
    assert small == 16 + 4 * 4 + 4
    for keep, size, count in (
        (None, (56, 56), small),
        (20, (56, 56), 20 + 4),
        (70, (56, 56), small),
        (1000, (56, 56), small),
        (1.0, (56, 56), small),
        (70, (112, 112), 70 + 8),
    ):
        assert settings.requested(keep, size) == count
    with pytest.raises(ValueError, match="vispruner_keep is 71, expected at most the server's"):
        settings.requested(71, (112, 112))
    # More tokens than the server's fraction keeps.
    fraction = Settings.of(config("llava-next", keep=0.5, small="keep"))
    assert fraction.requested(16, (56, 56)) == fraction.count((56, 56)) == 16 + 4
    with pytest.raises(ValueError, match="vispruner_keep is 1000, expected at most the server's"):
        fraction.requested(1000, (56, 56))


def test_rows_of_a_large_image_stay_an_error():
    given = dict(method="fopru", strategy="row", keep=10, small="keep")
    assert Settings.of(config("llava", **given | dict(keep=17))).count((9, 9)) == 16
    with pytest.raises(ValueError, match="keep is 10, expected a multiple of the grid width 4"):
        Settings.of(config("llava", **given)).check()
    # Of tiles that are cut, those of no more than 10 tokens are whole.
    settings = Settings.of(config("llava-next", **given, budget="tile"))
    with pytest.raises(ValueError, match=r"keep is 10, expected a multiple of the grid width \d"):
        settings.check()


def test_tiles_of_which_unpadding_leaves_nothing():
    """Have no budget; the rest has."""
    settings = Settings.of(config("llava-next", keep=5, small="keep", budget="tile"))
    size = (300, 1)
    layout = settings.layout(size)
    left = layout[layout != NEWLINE]
    counts = (left // 16).bincount(minlength=settings.tiles(size))
    assert 0 in counts
    newlines = int((layout == NEWLINE).sum())
    assert settings.count(size) == sum(min(5, n) for n in counts.tolist()) + newlines


@pytest.mark.parametrize("small", ["error", "keep"])
def test_no_image_gets_more_than_the_most(small):
    """Also where those that fill the tallest tiles are refused, for 12 does not divide their 80
    patches, and those that unpadding cuts to 72 are not."""
    found = config("llava-next", method="fopru", strategy="row", width=12, keep=12, small=small)
    vars(found)[PINPOINTS] = [[TILE, 5 * TILE], [4 * TILE, TILE]]
    settings = Settings.of(found)
    settings.check()
    assert settings.count((TILE, 5 * TILE)) == 12 + 4
    with pytest.raises(ValueError, match="width is 12, expected a divisor of the image's 80"):
        settings.count((4 * TILE, TILE))
    assert settings.count((140, 40)) == 12 + 14 <= settings.most


def test_no_request_gets_more_than_the_most():
    """Also of an image that the server's own keep does not divide."""
    settings = Settings.of(
        config("llava-next", method="fopru", strategy="row", keep=8, budget="tile")
    )
    assert settings.most == 8 * 5 + 8
    sizes = [(height, width) for height in range(20, 240, 7) for width in range(20, 240, 9)]
    given = 0
    for size in sizes:
        for keep in (4, 6, 8, 12, 16, 0.5, 1.0):
            try:
                count = settings.requested(keep, size)
            except ValueError as error:
                assert str(error).startswith("vispruner_keep")  # noqa: PT017
            else:
                assert count <= settings.most
                given += 1
    assert given > 1000


def test_llava():
    settings = Settings.of(config())
    assert (settings.tokens, settings.tower_tokens, settings.tiles((7, 9))) == (16, 17, 1)
    assert settings.count((7, 9)) == settings.most == 4
    assert settings.count((7, 9), VisPruner(0.5)) == 8
    siglip = Settings.of(config("llava-siglip", scores="received"))
    assert (siglip.tokens, siglip.tower_tokens) == (16, 16)


@pytest.mark.parametrize(("keep", "count"), [(4, 4), (1, 1), (0.25, 4), (0.01, 1), (None, 4)])
def test_the_budget_of_a_request(keep, count):
    settings = Settings.of(config())
    assert settings.requested(keep, (9, 9)) == count
    assert settings.asked(keep) == VisPruner(4 if keep is None else keep)


def test_one_token_is_not_all_of_them():
    """1 and 1.0 are equal, and so are methods that have them."""
    settings = Settings.of(config(keep=1.0))
    for keep, count in ((1.0, 16), (1, 1), (1.0, 16), (None, 16)):
        assert settings.requested(keep, (9, 9)) == count
    settings = Settings.of(config(keep=1))
    assert settings.most == settings.requested(None, (9, 9)) == 1
    with pytest.raises(ValueError, match=r"vispruner_keep is 1\.0, expected at most the server's"):
        settings.requested(1.0, (9, 9))


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
def test_a_bad_budget_of_a_request(keep, words):
    with pytest.raises(ValueError, match="^" + re.escape(words)) as caught:
        Settings.of(config()).requested(keep, (9, 9))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [10**40, True, "4", math.nan, [4], 0])
def test_a_bad_budget_of_a_request_where_small_images_are_whole(keep):
    with pytest.raises(ValueError, match=r"^vispruner_keep: keep is "):
        Settings.of(config(small="keep")).requested(keep, (9, 9))


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
def test_bad_settings(given, words):
    found = config()
    found.vispruner |= given
    with pytest.raises((TypeError, ValueError)) as caught:
        Settings.of(found).check()
    assert str(caught.value).startswith(words), str(caught.value)
    assert "\n" not in str(caught.value)


# Of any size of the vision tower.
SIZES_OF_THE_TOWER = [
    "image_size", "patch_size", "hidden_size", "num_attention_heads", "num_hidden_layers",
]  # fmt: skip
NO_SIZES = [
    0, -4, 10**9, 10**40, 10**5000, math.inf, math.nan, 4.0, True, "4", None, [4, 4], {},
]  # fmt: skip
LAYER, STRATEGY = "vision_feature_layer", "vision_feature_select_strategy"
TOWER, PINPOINTS = "vision_config__", "image_grid_pinpoints"
MODELS = [
    ("llava-siglip", {}, "vispruner needs the attention of a [CLS] token, which a siglip"),
    *(
        ("llava", {LAYER: layer}, f"{LAYER} is {layer!r}, expected one layer of the vision tower")
        for layer in ([-2, -1], 0, -4, 4, True, -2.0, None, "-2", 10**30)
    ),
    ("llava", {STRATEGY: "full"}, f"{STRATEGY} is 'full', expected 'default': it keeps the [CLS]"),
    ("llava", {STRATEGY: "cls"}, f"{STRATEGY} is 'cls', expected 'default' or 'full'"),
    ("llava", {STRATEGY: None}, f"{STRATEGY} is None, expected 'default' or 'full'"),
    ("llava", dict(vision_config=None), "the vision tower is a None, expected one of clip_vision"),
    ("llava", dict(vision_config={}), "the vision tower is a None, expected one of clip_vision_m"),
    ("llava", {TOWER + "model_type": "pixtral"}, "the vision tower is a pixtral, expected one of"),
    ("llava", {TOWER + "model_type": []}, "the vision tower is a [], expected one of clip_vision"),
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
def test_models_that_are_not_supported(family, changes, words):
    found = config(family)
    for name, value in changes.items():
        *parts, last = name.split("__")
        target = found
        for part in parts:
            target = getattr(target, part)
        # Past what transformers checks by itself.
        vars(target)[last] = value
    with pytest.raises(ValueError, match="^" + re.escape(words)) as caught:
        Settings.of(found)
    assert re.search("expected|add", str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*SIZES_OF_THE_TOWER, "model_type", LAYER, STRATEGY])
def test_a_setting_of_the_model_is_missing(name):
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
    name = "the vision tower" if name == "model_type" else name
    with pytest.raises(ValueError, match=f"^(vision_config.)?{name} is (a )?None, expected"):
        Settings.of(found)


def test_a_tower_of_one_patch():
    """SigLIP, of which the model drops the first."""
    found = config("llava-siglip", scores="received", keep=0.5)
    vars(found.vision_config)["image_size"] = 14
    assert Settings.of(found).count((9, 9)) == 1
    vars(found)[STRATEGY] = "default"
    with pytest.raises(ValueError, match=r"vision_config\.image_size is 14, expected at least 2"):
        Settings.of(found)


def test_siglip_leaves_pixels_over():
    """As so400m at 384 pixels; the CLIP of vLLM does not."""
    found = config("llava-siglip", scores="received")
    vars(found.vision_config)["image_size"] = 4 * 14 + 6
    settings = Settings.of(found)
    assert (settings.side, settings.pixels, settings.tokens) == (4, 62, 16)


def test_the_largest_configuration_starts_soon():
    """As many sizes of as many tiles as are accepted."""
    found = config("llava-next", budget="tile")
    vars(found.vision_config)["image_size"] = 64 * 14
    sides = [[h, w] for h in range(1, 32) for w in range(1, 32) if h * w < 32]
    vars(found)[PINPOINTS] = [[h * 896, w * 896] for h, w in sides * 3][:256]
    assert len(found.image_grid_pinpoints) == 256
    settings = Settings.of(found)
    settings.check()
    assert settings.most >= 31 * 4


def test_a_keep_is_missing():
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


def test_more_patches_than_an_operator_takes(monkeypatch):
    monkeypatch.setattr(_vllm_settings, "MAX_TOKENS", 79)
    with pytest.raises(ValueError, match="an image has up to 80 patches, expected at most 79"):
        Settings.of(config("llava-next")).check()
    Settings.of(config("llava-next", budget="tile")).check()
    Settings.of(config("llava-next", method="random")).check()


@pytest.mark.parametrize("version", ["0.31.4", "0.33.0rc1", "1.0.0", "0.3.2", "0.1.dev1+g0"])
def test_versions_that_are_not_supported(version, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
    with pytest.raises(
        ImportError, match=re.escape(f"vLLM is {version}, expected 0.32: pip install")
    ):
        vllm.check_version()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1rc2.dev3+g0"])
def test_versions_that_are(version, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
    vllm.check_version()


def test_the_commands_of_the_page():
    """Their settings are accepted, and the names of the models are ours."""
    from pages import ROOT, page

    text = page(ROOT / "docs" / "vllm.md") + page(ROOT / "README.md")
    commands = re.findall(r"--hf-overrides '(\{.*?\})'$", text, re.DOTALL | re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        overrides = json.loads(command)
        (architecture,) = overrides.pop("architectures")
        assert architecture in vllm.ARCHITECTURES
        found = vlms.make("llava-next" if "Next" in architecture else "llava", side=24).config
        found.image_grid_pinpoints = [[672, 672]] if "Next" in architecture else None
        vars(found).update(overrides)
        Settings.of(found).check()
    (body,) = re.findall(r"-d '(\{.*?\})'$", text, re.DOTALL | re.MULTILINE)
    assert [*json.loads(body)["mm_processor_kwargs"]] == [_vllm_settings.KEEP]
    rows = re.findall(r"^\| (`\w+`) \| .*? \|(?: `(.*?)`)? \| .* \|$", text, re.MULTILINE)
    defaults = {name.strip("`"): default for name, default in rows}
    assert (defaults.pop("budget"), defaults.pop("newlines")) == ("image", "keep")
    assert defaults.pop("small") == "error"
    for cls in methods.METHODS.values():
        for field in dataclasses.fields(cls):
            default = "" if field.default in (dataclasses.MISSING, None) else str(field.default)
            assert defaults[field.name] == default, field.name


def test_the_package_brings_the_plugin_and_not_vllm():
    """An extra that depended on vLLM would replace a build of it."""
    try:
        package = importlib.metadata.distribution("vispruner_kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed")
    (entry,) = package.entry_points.select(group="vllm.general_plugins")
    assert entry.load() is vllm.register
    assert not [line for line in package.requires or [] if line.startswith("vllm")]
