"""The settings of a server with pruning in vLLM, and the counts that follow; needs no vLLM."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re

import pytest
import torch

pytest.importorskip("transformers")

import vlms
from vllm_models import settings_config as config
from vlms import TILE, picture, prompts

from vispruner_kernels import methods
from vispruner_kernels.integrations import _vllm_settings, vllm
from vispruner_kernels.integrations._visual import NEWLINE
from vispruner_kernels.integrations._vllm_settings import Settings
from vispruner_kernels.integrations.transformers import prune_inputs
from vispruner_kernels.methods import FasterVLM, FoPru, Random, VisPruner

# Heights and widths: every shape of tiles, with and without unpadding, and very thin images.
SIZES = [(100, 80), (80, 100), (56, 56), (112, 112), (300, 200), (200, 301), (31, 500), (300, 1)]


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
def test_settings_make_the_method(given, method):
    settings = Settings.of(config(**given))
    assert settings.method == method
    assert (settings.budget, settings.newlines, settings.small) == ("image", "keep", "error")
    assert len({settings.identity(m) for m in (method, VisPruner(5))}) == 2


def test_every_method_has_a_name():
    found = {cls for cls in vars(methods).values() if isinstance(cls, type)}
    known = {cls for cls in found if issubclass(cls, methods.Method)} - {methods.Method}
    assert set(methods.METHODS.values()) == known


@pytest.mark.parametrize("size", SIZES)
def test_a_layout_equals_the_packing_of_the_model(size):
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
def test_counts_match_the_integration_in_transformers(size, given):
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
    # Three tiles in a column have more rows, so more newlines.
    assert settings.most == settings.count((3 * TILE, TILE)) == 5 + 12
    assert max(settings.count(size) for size in SIZES) <= settings.most
    dropped = Settings.of(config("llava-next", keep=5, newlines="drop"))
    assert dropped.most == 5


def test_a_keep_above_the_tokens_of_small_images_refuses_only_those():
    settings = Settings.of(config("llava-next", keep=70))
    settings.check()
    assert settings.most == 70 + 8
    with pytest.raises(ValueError, match=r"an image of 56 x 56 pixels: keep is 70, expected 1 <="):
        settings.count((56, 56))
    assert settings.count_of_request(20, (56, 56)) == 20 + 4
    with pytest.raises(ValueError, match="vispruner_keep: an image of 56 x 56 pixels: keep is 71"):
        settings.count_of_request(71, (56, 56))


def test_small_keep_keeps_all_tokens_of_a_small_image():
    """A count above its tokens keeps them; a request never gets more than the server's count."""
    settings = Settings.of(config("llava-next", keep=70, small="keep"))
    settings.check()
    refusing = dataclasses.replace(settings, small="error")
    assert settings.identity(settings.method) != refusing.identity(settings.method)
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
        assert settings.count_of_request(keep, size) == count
    with pytest.raises(ValueError, match="vispruner_keep is 71, expected at most the server's"):
        settings.count_of_request(71, (112, 112))
    # The server's fraction keeps 16 of the 32 patches; a count of 1000 would keep all of them.
    fraction = Settings.of(config("llava-next", keep=0.5, small="keep"))
    assert fraction.count_of_request(16, (56, 56)) == fraction.count((56, 56)) == 16 + 4
    with pytest.raises(ValueError, match="vispruner_keep is 1000, expected at most the server's"):
        fraction.count_of_request(1000, (56, 56))


def test_small_keep_still_needs_whole_rows_of_larger_images():
    given = dict(method="fopru", strategy="row", keep=10, small="keep")
    assert Settings.of(config("llava", **given | dict(keep=17))).count((9, 9)) == 16
    with pytest.raises(ValueError, match="keep is 10, expected a multiple of the grid width 4"):
        Settings.of(config("llava", **given)).check()
    # Tiles with at most 10 tokens after unpadding are kept whole; larger ones are refused.
    settings = Settings.of(config("llava-next", **given, budget="tile"))
    with pytest.raises(ValueError, match=r"keep is 10, expected a multiple of the grid width \d"):
        settings.check()


def test_a_tile_without_tokens_after_unpadding_has_no_budget():
    settings = Settings.of(config("llava-next", keep=5, small="keep", budget="tile"))
    size = (300, 1)
    layout = settings.layout(size)
    left = layout[layout != NEWLINE]
    counts = (left // 16).bincount(minlength=settings.tiles(size))
    assert 0 in counts
    newlines = int((layout == NEWLINE).sum())
    assert settings.count(size) == sum(min(5, n) for n in counts.tolist()) + newlines


@pytest.mark.parametrize("small", ["error", "keep"])
def test_no_image_gets_more_placeholders_than_vllm_reserves(small):
    """The method refuses images that fill the tallest tiles, because 12 does not divide their 80
    patches. It accepts images that unpadding cuts to 72 patches."""
    found = config("llava-next", method="fopru", strategy="row", width=12, keep=12, small=small)
    found.image_grid_pinpoints = [[TILE, 5 * TILE], [4 * TILE, TILE]]
    settings = Settings.of(found)
    settings.check()
    assert settings.count((TILE, 5 * TILE)) == 12 + 4
    with pytest.raises(ValueError, match="width is 12, expected a divisor of the image's 80"):
        settings.count((4 * TILE, TILE))
    assert settings.count((140, 40)) == 12 + 14 <= settings.most


def test_no_request_gets_more_placeholders_than_vllm_reserves():
    """This holds also for images to which the server's own keep cannot apply."""
    settings = Settings.of(
        config("llava-next", method="fopru", strategy="row", keep=8, budget="tile")
    )
    assert settings.most == 8 * 5 + 8
    sizes = [(height, width) for height in range(20, 240, 7) for width in range(20, 240, 9)]
    given = 0
    for size in sizes:
        for keep in (4, 6, 8, 12, 16, 0.5, 1.0):
            try:
                count = settings.count_of_request(keep, size)
            except ValueError as error:
                assert str(error).startswith("vispruner_keep")  # noqa: PT017
            else:
                assert count <= settings.most
                given += 1
    assert given > 1000


def test_llava_has_one_tile_without_cls_or_newlines():
    settings = Settings.of(config())
    assert (settings.tokens, settings.tower_tokens, settings.tiles((7, 9))) == (16, 17, 1)
    assert settings.count((7, 9)) == settings.most == 4
    assert settings.count((7, 9), VisPruner(0.5)) == 8
    siglip = Settings.of(config("llava-siglip", scores="received"))
    assert (siglip.tokens, siglip.tower_tokens) == (16, 16)


@pytest.mark.parametrize(("keep", "count"), [(4, 4), (1, 1), (0.25, 4), (0.01, 1), (None, 4)])
def test_a_request_can_lower_the_budget(keep, count):
    settings = Settings.of(config())
    assert settings.count_of_request(keep, (9, 9)) == count
    assert settings.method_of_request(keep) == VisPruner(4 if keep is None else keep)


def test_a_count_of_one_differs_from_a_fraction_of_one():
    """1 == 1.0 in Python, so methods with these budgets are equal."""
    settings = Settings.of(config(keep=1.0))
    for keep, count in ((1.0, 16), (1, 1), (1.0, 16), (None, 16)):
        assert settings.count_of_request(keep, (9, 9)) == count
    settings = Settings.of(config(keep=1))
    assert settings.most == settings.count_of_request(None, (9, 9)) == 1
    with pytest.raises(ValueError, match=r"vispruner_keep is 1\.0, expected at most the server's"):
        settings.count_of_request(1.0, (9, 9))


def test_a_tower_of_one_patch_is_refused_if_the_model_drops_it():
    found = config("llava-siglip", scores="received", keep=0.5)
    vars(found.vision_config)["image_size"] = 14
    assert Settings.of(found).count((9, 9)) == 1
    found.vision_feature_select_strategy = "default"
    with pytest.raises(ValueError, match=r"vision_config\.image_size is 14, expected at least 2"):
        Settings.of(found)


def test_siglip_ignores_pixels_beyond_whole_patches():
    """SigLIP so400m at 384 pixels is such a model. CLIP in vLLM needs whole patches."""
    found = config("llava-siglip", scores="received")
    vars(found.vision_config)["image_size"] = 4 * 14 + 6
    settings = Settings.of(found)
    assert (settings.side, settings.pixels, settings.tokens) == (4, 62, 16)


def test_the_largest_configuration_starts_soon():
    """The most pinpoints and the most tiles that are accepted."""
    found = config("llava-next", budget="tile")
    vars(found.vision_config)["image_size"] = 64 * 14
    sides = [[h, w] for h in range(1, 32) for w in range(1, 32) if h * w < 32]
    found.image_grid_pinpoints = [[h * 896, w * 896] for h, w in sides * 3][:256]
    assert len(found.image_grid_pinpoints) == 256
    settings = Settings.of(found)
    settings.check()
    assert settings.most >= 31 * 4


def test_the_commands_of_the_pages_are_accepted():
    """Their architectures exist, and the table of settings has every option with its default."""
    from pages import ROOT, page

    text = page(ROOT / "docs" / "vllm.md")
    pattern = re.compile(r"--hf-overrides '(\{.*?\})'$", re.DOTALL | re.MULTILINE)
    commands = pattern.findall(text)
    assert len(commands) == 2
    commands += pattern.findall(page(ROOT / "README.md"))
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


def test_the_package_has_the_plugin_and_does_not_depend_on_vllm():
    """A dependency on vLLM could replace the user's build of it."""
    try:
        package = importlib.metadata.distribution("vispruner_kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed")
    (entry,) = package.entry_points.select(group="vllm.general_plugins")
    assert entry.load() is vllm.register
    assert not [line for line in package.requires or [] if line.startswith("vllm")]
