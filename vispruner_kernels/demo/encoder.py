"""A small vision encoder whose weights follow rules, for running the demo without a download.

It is not CLIP and knows nothing about the world. What it has is the shape of CLIP-L/336: a CLS
token and 24 x 24 patches of 14 pixels, features of 1024 channels, queries and keys of 16 heads with
64 dimensions. Each patch is described by its colours, its contrast and its edges, and by how it
differs from its surroundings. The CLS token looks for patches with contrast or edges whose colour
is rare in the picture or differs from what is around them. The position of a patch is nowhere in
it: nothing prefers the middle, and where the subject moves, the scores move.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GRID = 24
PATCH = 14
CHANNELS = 1024
HEADS = 16
HEAD_DIM = 64

# Sides, in patches, of the three surroundings that a patch is compared with.
_SURROUNDS = (5, 9, 15)
_BINS = 8
# How strongly the CLS token, and a patch, prefer what they look for.
_CLS_SHARPNESS = 1.5
_PATCH_SHARPNESS = 3.0
# Small beside the length of a description, which is 2 to 7 in a photograph.
_COMMON = 0.25
# A spread below this is noise of a flat picture, and is not blown up to unit variance.
_MIN_SPREAD = 1e-3


@dataclass(frozen=True)
class Encoded:
    """What an encoder hands to the pruning methods.

    Attributes:
        features: `[1, side * side, C]` float32, the patch features that a projector would read.
        q: `[1, 1 + side * side, H, D]` float32, queries of the layer that made them, CLS first.
        k: keys of that layer, shaped as `q`.
        side: patches along one side of the picture.
        label: what the encoder is, for people.
    """

    features: Tensor
    q: Tensor
    k: Tensor
    side: int
    label: str


def encode(image: Tensor) -> Encoded:
    """Encode a picture with the rule-made encoder.

    Args:
        image: `[3, 336, 336]`, RGB between 0 and 1.

    Returns:
        Features, queries and keys of 576 patches; the same bits for the same picture.
    """
    size = GRID * PATCH
    if tuple(image.shape) != (3, size, size):
        raise ValueError(f"image: got the shape {list(image.shape)}, want [3, {size}, {size}]")
    content, conspicuity = _describe(image.double())
    features = content @ _rotation(CHANNELS)[: content.shape[1]]
    q, k = _queries_and_keys(content, conspicuity)
    return Encoded(
        features=features.float()[None],
        q=q.float()[None],
        k=k.float()[None],
        side=GRID,
        label="rule-made encoder, not CLIP",
    )


def _describe(image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """`[576, 63]` description of every patch, and the named maps `[576]` that CLS looks at."""
    red, green, blue = image
    opponent = torch.stack(
        [(red + green + blue) / 3, red - green, blue - (red + green) / 2]
    )  # luminance, red-green, blue-yellow

    mean = _pool(opponent, PATCH)
    contrast = (_pool(opponent**2, PATCH) - mean**2).clamp_min(0).sqrt()
    quarters = F.pixel_unshuffle(_pool(opponent, PATCH // 2), 2)
    fine = _orientations(opponent[0], PATCH)
    coarse = _orientations(_pool(opponent[:1], 2)[0], PATCH // 2)
    surround = torch.stack([mean - _blur(mean, side) for side in _SURROUNDS])
    distinct = (mean - mean.mean((1, 2), keepdim=True)).abs()

    groups = [
        (2.0, mean),
        (1.5, quarters),
        (1.0, contrast),
        (1.0, fine),
        (1.0, coarse),
        (0.7, _blur(mean, 3)),
        (0.7, _blur(contrast, 3)),
        (0.7, _blur(fine, 3)),
        (1.0, surround.flatten(0, 1)),
        (1.0, distinct),
    ]
    # A group weighs the same however many maps it has.
    content = torch.cat([w / math.sqrt(len(m)) * _standard(m) for w, m in groups]).flatten(1).T
    # What all patches share: it makes the patches of a flat picture equal rather than nothing.
    content = F.pad(content, (0, 1), value=_COMMON)
    content = F.pad(content, (0, HEAD_DIM - 1 - content.shape[1]))

    lum, redness, blueness = surround.abs().unbind(1)
    edges = fine.sum(0)
    conspicuity = {
        "contrast": contrast[0],
        "edges": edges,
        "distinct colour": _standard(distinct).mean(0),
        "luminance against surround": _standard(lum).mean(0),
        "colour against surround": (_standard(redness) + _standard(blueness)).mean(0),
    }
    return content, {name: _standard(m[None])[0].flatten() for name, m in conspicuity.items()}


def _queries_and_keys(content: Tensor, conspicuity: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`[577, 16, 64]` each. Dimension 0 carries what CLS looks for, the others the content."""
    details = ("contrast", "edges")
    contexts = ("distinct colour", "luminance against surround", "colour against surround")
    pairs = [(a, b) for a in details for b in contexts]
    pairs += [(a, "distinct colour") for a in details]
    q = content.new_zeros(1 + len(content), HEADS, HEAD_DIM)
    k = torch.zeros_like(q)
    unit = F.normalize(content, dim=-1)
    temperature = math.sqrt(HEAD_DIM)
    for head in range(HEADS):
        detail, context = pairs[head % len(pairs)]
        # Every second set of heads is twice as sharp.
        sharpness = _CLS_SHARPNESS * (1 + head // len(pairs))
        k[1:, head, 0] = (conspicuity[detail] + conspicuity[context]) / math.sqrt(2)
        q[0, head, 0] = sharpness * temperature
        # A patch looks for patches like itself, and a little for what CLS looks for.
        q[1:, head, 0] = temperature / 2
        q[1:, head, 1:] = _PATCH_SHARPNESS * temperature * unit
        k[1:, head, 1:] = unit
    # The same rotation of both leaves every logit alone and fills all dimensions.
    rotation = _rotation(HEAD_DIM)
    return q @ rotation, k @ rotation


def _orientations(plane: Tensor, patch: int) -> Tensor:
    """`[8, 24, 24]` edge energy of a plane `[h, w]`, by the direction of the edge."""
    padded = F.pad(plane[None], (1, 1, 1, 1), mode="replicate")[0]
    dx = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2
    dy = (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
    position = torch.atan2(dy, dx).remainder(math.pi) * (_BINS / math.pi)
    centres = torch.arange(_BINS, dtype=plane.dtype)[:, None, None]
    distance = (position - centres).abs()
    distance = torch.minimum(distance, _BINS - distance)
    return _pool(torch.hypot(dx, dy) * (1 - distance).clamp_min(0), patch)


def _pool(maps: Tensor, side: int) -> Tensor:
    return F.avg_pool2d(maps, side)


def _blur(maps: Tensor, side: int) -> Tensor:
    """Mean over `side` x `side` patches; at the border over those of them that exist."""
    return F.avg_pool2d(maps, side, 1, side // 2, count_include_pad=False)


def _standard(maps: Tensor) -> Tensor:
    """Every map `[m, h, w]` with mean 0 and, unless it is flat, variance 1 over the picture."""
    centred = maps - maps.mean((1, 2), keepdim=True)
    spread = centred.square().mean((1, 2), keepdim=True).sqrt()
    return centred / spread.clamp_min(_MIN_SPREAD)


def _rotation(n: int) -> Tensor:
    """The orthonormal DCT-II matrix `[n, n]` in float64."""
    i = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / n * (i + 0.5) * i[:, None]) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix
