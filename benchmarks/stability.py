"""How many kept tokens rounding changes, and how well they cover the image, for both matchings.

"changed" is the share of kept tokens that are replaced by others when the features are rounded to
bfloat16. "coverage" is the mean over all tokens of the largest cosine to a kept token. The features
are clustered random ones (see vispruner_kernels.testing), and those of the demo's picture in the
tiny VLM's vision tower.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import harness
from vispruner_kernels import cls_scores, select
from vispruner_kernels.demo import encoder
from vispruner_kernels.testing import sample_features, sample_scores

KEEPS = (32, 64, 128, 192)
SEEDS = range(6)


def clustered(seed: int) -> tuple[Tensor, Tensor]:
    """Random features and scores with the sizes of CLIP-L/336."""
    generator = torch.Generator().manual_seed(seed)
    features = sample_features("clustered", 1, 576, 1024, generator)
    return features, sample_scores("softmax", 1, 576, generator)


def pictured() -> tuple[Tensor, Tensor]:
    """Features and scores of the demo's picture."""
    # It needs matplotlib and Pillow.
    from vispruner_kernels.demo import picture

    photo = picture.load_photo(picture.SAMPLE)
    encoded = encoder.encode(picture.to_tensor(photo, encoder.SIZE))
    return encoded.features, cls_scores(encoded.q, encoded.k)


def measure(images: list[tuple[Tensor, Tensor]], keep: int, matching: str) -> dict[str, float]:
    """Change and coverage, as means over the images."""
    changed, coverage = [], []
    for features, scores in images:
        kept = select(features, scores, keep, matching=matching)[0]
        rounded = select(features.bfloat16(), scores, keep, matching=matching)[0]
        changed.append(1.0 - len(set(kept.tolist()) & set(rounded.tolist())) / keep)
        unit = normalize(features[0], dim=-1)
        coverage.append(float((unit @ unit[kept].T).amax(1).mean()))
    return {
        "changed %": 100.0 * sum(changed) / len(images),
        "coverage": sum(coverage) / len(images),
    }


def main(argv: list[str] | None = None) -> int:
    """The command."""
    usage = harness.parser(__doc__.splitlines()[0])
    options = usage.parse_args(argv)
    harness.check(options, usage)
    torch.set_num_threads(options.threads)
    sources = {"clustered": [clustered(seed) for seed in SEEDS], "picture": [pictured()]}
    rows: list[dict[str, Any]] = [
        {"features": name, "images": len(images), "keep": keep, "matching": matching}
        | measure(images, keep, matching)
        for name, images in sources.items()
        for keep in harness.progress(KEEPS)
        for matching in ("bipartite", "pairwise")
    ]
    harness.report(harness.header(options.threads), {"rows": rows}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
