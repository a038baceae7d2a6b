"""Two clusters of tokens, and tokens sorted by score: the CUDA kernels on a CPU, every variant."""

from __future__ import annotations

import subprocess
import sys

import pytest
from test_cuda_on_cpu import SHARED, SUPPORT, library, pytestmark, shared_folder  # noqa: F401

PROGRAM = """
import sys
import emulated as e
import torch

library, kind, shared = sys.argv[1], sys.argv[2], int(sys.argv[3])
memory = e.load(library, 5, shared)
calls = []
for tokens, channels, keep in ((576, 24, 64), (1700, 12, 120), (333, 16, 50)):
    generator = torch.Generator().manual_seed(tokens)
    features = e.sample_features("clustered", 1, tokens, channels, generator)
    if "clusters" in kind:
        centres = torch.randn(2, channels, generator=generator)
        features = centres[torch.randint(2, (1, tokens), generator=generator)]
        features = features + 0.05 * torch.randn(1, tokens, channels, generator=generator)
    scores = e.sample_scores("softmax", 1, tokens, generator)
    for turned in (False, True):
        if "sorted" in kind:
            scores = scores.sort(descending=turned).values
        elif turned:
            continue
        for matching in ("bipartite", "pairwise"):
            calls.append(("prune", (features.half(), scores, keep, 0.5, 8, matching)))
print(e.compare(calls, memory, 7))
"""
# The kind, and how many calls it has.
KINDS = {"two clusters": 42, "sorted scores": 84, "two clusters, sorted scores": 84}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_gives_the_bits_of_the_core(library, kind):  # noqa: F811
    command = [sys.executable, "-c", PROGRAM, library, kind, str(SHARED["most"])]
    done = subprocess.run(
        command, cwd=SUPPORT, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == [str(KINDS[kind])]
