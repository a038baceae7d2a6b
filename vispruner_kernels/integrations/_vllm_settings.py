"""The settings of a server, and the number of tokens that each image keeps.

vLLM needs the counts before it encodes an image. They come from the same `Visual` and `budgets` as
the selection later; these need sizes only, no data. This module does not need vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, TypeGuard

import torch
from torch import Tensor

from vispruner_kernels._checks import MAX_CHANNELS, MAX_HEAD_DIM, MAX_TOKENS, shown
from vispruner_kernels.integrations._visual import NEWLINE, Visual, budgets, grids_of
from vispruner_kernels.methods import Method, Random, by_name

# Prefix tokens ([CLS]) of the vision towers, by `model_type`.
TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0}
# The option of a request, in its `mm_processor_kwargs`.
KEEP = "vispruner_keep"
# The largest count: the model gets counts as float64, which holds integers up to this one exactly.
MAX_COUNT = 2**53
# Models with tiles: the most pinpoints, and the most patches of one image over all its tiles. Both
# bound the memory of the caches of `_layout` and `_count`.
MAX_PINPOINTS, MAX_TILED = 256, 8 * MAX_TOKENS

# Height and width, in pixels.
Size = tuple[int, int]


@dataclass(frozen=True)
class Settings:
    """The settings of a server, from `hf_overrides` and the configuration of the model."""

    method: Method
    # The options of `prune_inputs` in the integration in transformers.
    budget: str
    newlines: str
    small: str
    # Tokens before the patches in the tower, and leading tokens of the tower that the model drops.
    prefix: int
    dropped: int
    # Patches and pixels along the side of a tile.
    side: int
    pixels: int
    # The sizes to which an image may be resized before it is cut into tiles. Without any, an image
    # is one tile.
    pinpoints: tuple[Size, ...]

    @staticmethod
    def of(config: Any) -> Settings:
        """Read the settings from a model's configuration, which includes `hf_overrides`."""
        given = getattr(config, "vispruner", None)
        if not isinstance(given, dict) or "method" not in given:
            raise ValueError(
                f"vispruner is {given!r}, expected in hf_overrides: "
                '"vispruner": {"method": "vispruner", "keep": 64}'
            )
        options = dict(given)
        for name in options:
            if not isinstance(name, str):
                raise ValueError(f"vispruner has the option {shown(name)}, expected a string")
        budget = _choice(options, "budget", "image", "tile")
        newlines = _choice(options, "newlines", "keep", "drop")
        small = _choice(options, "small", "error", "keep")
        method = _with_count(by_name(**options))

        vision = getattr(config, "vision_config", None)
        tower = getattr(vision, "model_type", None)
        if not isinstance(tower, str) or tower not in TOWERS:
            raise ValueError(
                f"vision_config.model_type is {shown(tower)}, expected one of {', '.join(TOWERS)}"
            )
        prefix = TOWERS[tower]
        if method.needs == "cls" and not prefix:
            name = given["method"]
            raise ValueError(
                f"{name} needs the attention of a [CLS] token, which a {tower} does "
                'not have: add "scores": "received", or use fopru'
            )
        hidden, heads = _size(vision, "hidden_size"), _size(vision, "num_attention_heads")
        if hidden % heads:
            raise ValueError(
                f"vision_config.hidden_size is {hidden}, expected a multiple of "
                f"num_attention_heads, {heads}"
            )
        if hidden // heads > MAX_HEAD_DIM and method.needs:
            raise ValueError(
                f"the heads of the vision tower have {hidden // heads} channels, expected at most "
                f"{MAX_HEAD_DIM}: see vision_config.num_attention_heads"
            )
        layers = _size(vision, "num_hidden_layers")
        layer = getattr(config, "vision_feature_layer", None)
        if not _is_int(layer) or not (1 <= layer <= layers or -layers <= layer <= -1):
            raise ValueError(
                f"vision_feature_layer is {shown(layer)}, expected one layer of the vision tower: "
                f"1 to {layers}, or -{layers} to -1"
            )
        strategy = getattr(config, "vision_feature_select_strategy", None)
        if strategy not in ("default", "full"):
            raise ValueError(
                f"vision_feature_select_strategy is {shown(strategy)}, expected 'default' or 'full'"
            )
        dropped = 1 if strategy == "default" else 0
        if dropped < prefix:
            raise ValueError(
                "vision_feature_select_strategy is 'full', expected 'default': 'full' keeps the "
                "[CLS] token, which has no score"
            )
        side, pixels = _side(vision), _size(vision, "image_size")
        if prefix + side * side == dropped:
            raise ValueError(
                f"vision_config.image_size is {pixels}, expected at least 2 patches in a row: "
                "vision_feature_select_strategy 'default' drops the only one"
            )
        pinpoints = _pinpoints(config, pixels, side * side)
        if pinpoints and dropped != prefix:
            raise ValueError(
                "vision_feature_select_strategy is 'default', expected 'full': 'default' drops a "
                "patch of each tile"
            )
        return Settings(
            method=method,
            budget=budget,
            newlines=newlines,
            small=small,
            prefix=prefix,
            dropped=dropped,
            side=side,
            pixels=pixels,
            pinpoints=pinpoints,
        )

    def check(self) -> None:
        """Raise ValueError if the settings cannot prune the largest image."""
        patches = self.tokens if self.budget == "tile" else self.tokens * self.tiles(self.largest)
        if patches > MAX_TOKENS and self.method.needs:
            raise ValueError(
                f"an image has up to {patches} patches, expected at most {MAX_TOKENS}: "
                'use "budget": "tile"'
            )
        self.count(self.largest)

    # ---- tiles and layouts ----

    @property
    def tokens(self) -> int:
        """Tokens of a tile that the model gets from the tower."""
        return self.prefix + self.side * self.side - self.dropped

    @property
    def tower_tokens(self) -> int:
        """Tokens of a tile in the tower."""
        return self.prefix + self.side * self.side

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes of images that fill their tiles."""
        return self.pinpoints or ((self.pixels, self.pixels),)

    @cached_property
    def largest(self) -> Size:
        """The size that has the most tokens before pruning."""
        return max(self.sizes, key=lambda size: len(self.layout(size)))

    def tiles(self, size: Size) -> int:
        """The number of tiles of an image of that size."""
        if not self.pinpoints:
            return 1
        rows, columns = _shape(self, size)
        return 1 + rows * columns

    def layout(self, size: Size) -> Tensor:
        """int64 [tokens]: for each token of the prompt without pruning, its row in the features of
        all tiles, or NEWLINE."""
        return _layout(self, size)

    def visual(
        self,
        sizes: Sequence[Size],
        source: Tensor,
        scores: Tensor | None = None,
        embed: Callable[[Tensor], Tensor] = lambda rows: rows,
        newline: Tensor | None = None,
    ) -> Visual:
        """The visual tokens of images of these sizes, from features [G, tokens, C] and scores
        [G, tokens]; G counts the tiles of all images."""
        layouts, start = [], 0
        for size in sizes:
            layout = self.layout(size)
            layouts.append(torch.where(layout == NEWLINE, layout, layout + start))
            start += self.tiles(size) * self.tokens
        square = self.tokens == self.side * self.side
        grid, column = grids_of(len(source), self.tokens, 0, self.side if square else 0)
        return Visual(
            kind="image",
            source=source,
            scores=scores,
            first=0,
            layouts=layouts,
            numbers=[*range(len(layouts))],
            grid=grid,
            column=column,
            embed=embed,
            newline=newline,
        )

    # ---- counts ----

    def count(self, size: Size, method: Method | None = None) -> int:
        """The placeholders of an image of that size, pruned by this method or the server's."""
        method = method or self.method
        return _count(self, size, method, method.keep)

    @property
    def most(self) -> int:
        """The most placeholders that any image can have. The image with this count need not be
        the largest one, because newlines are kept in addition to the budget."""
        return max(map(self._bound, self.sizes))

    def _bound(self, size: Size) -> int:
        """The most placeholders of the images that are resized to that size."""
        try:
            return self.count(size)
        except ValueError:
            # The method refuses an image of exactly this size. It may accept an image that
            # unpadding cuts to fewer patches.
            keep = 1.0 if isinstance(self.method.keep, float) else self.method.keep
            return replace(self, small="keep").count(size, Random(keep))

    def method_of_request(self, keep: Any) -> Method:
        """The server's method, with the budget of a request if it has one."""
        if keep is None:
            return self.method
        try:
            return _with_count(replace(self.method, keep=keep))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{KEEP}: {error}") from None

    def count_of_request(self, keep: Any, size: Size) -> int:
        """The placeholders of an image of that size in a request with this budget."""
        method = self.method_of_request(keep)
        if keep is None:
            return self.count(size)
        try:
            count = self.count(size, method)
        except ValueError as error:
            raise ValueError(f"{KEEP}: {error}") from None
        try:
            most = self.count(size)
        except ValueError:
            # The server's own keep exceeds the tokens of the image, or is no multiple of its row.
            most = self.most
        if count > most:
            raise ValueError(
                f"{KEEP} is {keep}, expected at most the server's keep, {self.method.keep}"
            )
        return count

    def identity(self, method: Method) -> str:
        """A string of all settings that decide which tokens of an image are kept."""
        return f"{method} {self.budget} {self.newlines} {self.small}"


# ---- reading the settings and the configuration ----


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _choice(options: dict[str, Any], name: str, *values: str) -> str:
    """Remove an option and return its value; the first of `values` is the default."""
    value = options.pop(name, values[0])
    if value not in values:
        raise ValueError(f"{name} is {shown(value)}, expected {' or '.join(map(repr, values))}")
    return value


def _with_count(method: Method) -> Method:
    """Return the method, or raise ValueError if a float64 cannot hold its count."""
    if method.keep > MAX_COUNT:
        raise ValueError(f"keep is {shown(method.keep)}, expected at most {MAX_COUNT}")
    return method


def _size(vision: Any, name: str) -> int:
    """A size from the configuration of the vision tower."""
    value = getattr(vision, name, None)
    if not _is_int(value) or not 1 <= value <= MAX_CHANNELS:
        raise ValueError(
            f"vision_config.{name} is {shown(value)}, expected an int from 1 to {MAX_CHANNELS}"
        )
    return value


def _side(vision: Any) -> int:
    """The number of patches in a row of a tile."""
    pixels, patch = _size(vision, "image_size"), _size(vision, "patch_size")
    # CLIP in vLLM needs image_size to be a multiple of patch_size; SigLIP ignores the remainder.
    if patch > pixels or (vision.model_type == "clip_vision_model" and pixels % patch):
        raise ValueError(
            f"vision_config.patch_size is {patch}, expected a divisor of image_size, {pixels}"
        )
    side = pixels // patch
    if side * side > MAX_TOKENS:
        raise ValueError(
            f"vision_config.image_size is {pixels}, {side} x {side} patches of patch_size {patch}, "
            f"expected at most {MAX_TOKENS} patches"
        )
    return side


def _pinpoints(config: Any, pixels: int, patches: int) -> tuple[Size, ...]:
    """`image_grid_pinpoints` of the configuration; empty for models without tiles."""
    given = getattr(config, "image_grid_pinpoints", None)
    if given is None and getattr(config, "model_type", None) != "llava_next":
        return ()
    if not isinstance(given, list | tuple) or not 1 <= len(given) <= MAX_PINPOINTS:
        raise ValueError(
            f"image_grid_pinpoints is {shown(given)}, expected a list of 1 to {MAX_PINPOINTS} "
            "sizes [height, width]"
        )
    for size in given:
        if (
            not isinstance(size, list | tuple)
            or len(size) != 2
            or any(not _is_int(x) or x < 1 or x % pixels for x in size)
        ):
            raise ValueError(
                f"image_grid_pinpoints has {shown(size)}, expected [height, width], multiples of "
                f"vision_config.image_size, {pixels}"
            )
        tiles = 1 + (size[0] // pixels) * (size[1] // pixels)
        if tiles * patches > MAX_TILED:
            raise ValueError(
                f"image_grid_pinpoints has {shown(size)}, more than {MAX_TILED} patches in tiles "
                f"of vision_config.image_size, {pixels}: expected smaller sizes"
            )
    return tuple((height, width) for height, width in given)


# ---- layouts and counts ----


def _shape(settings: Settings, size: Size) -> tuple[int, int]:
    """The rows and columns of tiles for an image of that size."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    return get_anyres_image_grid_shape(size, [*map(list, settings.pinpoints)], settings.pixels)


# The processor and the model need the layout of an image several times.
@lru_cache(1024)
def _layout(settings: Settings, size: Size) -> Tensor:
    """`Settings.layout`: the tokens of the whole image, then the rows of the unpadded tiles."""
    base = torch.arange(settings.tokens)
    if not settings.pinpoints:
        return base
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    rows, columns = _shape(settings, size)
    side = settings.side
    grid = torch.arange(rows * columns * side * side) + len(base)
    grid = grid.view(rows, columns, side, side).transpose(1, 2).reshape(rows * side, -1)
    grid = unpad_image(grid[None], size)[0]
    # Unpadding may leave no columns of a very thin image; its newlines remain.
    newline = grid.new_full((len(grid), 1), NEWLINE)
    return torch.cat([base, torch.cat([grid, newline], 1).flatten()])


# `keep` is an argument of its own because Method(1) == Method(1.0): one token, or all tokens. A
# typed cache tells the int from the float.
@lru_cache(4096, typed=True)
def _count(settings: Settings, size: Size, method: Method, keep: int | float) -> int:
    """`Settings.count`; errors name the size of the image."""
    source = torch.empty(settings.tiles(size), settings.tokens, 0)
    visual = settings.visual([size], source)
    try:
        found = budgets(visual, method, settings.budget == "tile", settings.small == "keep")
    except ValueError as error:
        height, width = size
        words = str(error).replace("image 0", f"an image of {height} x {width} pixels", 1)
        raise ValueError(words.replace(" of the batch", "", 1)) from None
    newlines = int((visual.layouts[0] == NEWLINE).sum())
    return found.counts[0] + (newlines if settings.newlines == "keep" else 0)
