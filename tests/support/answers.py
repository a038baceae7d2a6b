"""Answers and report of the package in a new interpreter, which reads its environment variables."""

from __future__ import annotations

import functools
import json

from fresh import python

import vispruner_kernels

OPERATORS = vispruner_kernels.__all__
SELECTIONS = [op for op in OPERATORS if op.startswith(("select", "prune"))]

# Prints one JSON object: digests of the operators' results, and the report.
ANSWER = """
import contextlib, hashlib, io, json, runpy
import torch
import vispruner_kernels as vk
from vispruner_kernels import _native, testing

generator = torch.Generator().manual_seed(0)
features = testing.sample_features("clustered", 2, 100, 33, generator)
scores = testing.sample_scores("ties", 2, 100, generator)
lengths, keep = testing.sample_offsets([60, 0, 40]), testing.sample_offsets([20, 0, 11])
q, k, v = testing.sample_qkv(2, 40, 3, 16, torch.float32, 0)
calls = {
    "select": (features, scores, 30),
    "prune": (features, scores, 30, 0.3, 5, "pairwise"),
    "select_varlen": (features[0], scores[0], lengths, keep, 60, 31),
    "select_topk": (scores, 30),
    "select_rows": (scores, 10, 3),
    "cls_attention": (q, k, v),
    "cls_scores": (q, k, 0.3, 5),
    "received_scores": (q, k),
    "received_scores_varlen": (q[0], k[0], testing.sample_offsets([25, 0, 15]), 25),
}

def digest(op):
    answer = getattr(vk, op)(*calls[op])
    answer = answer if isinstance(answer, tuple) else (answer,)
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in answer)).hexdigest()

def report():
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runpy.run_module("vispruner_kernels", run_name="__main__")
    return out.getvalue()

def answer():
    digests = {op: digest(op) for op in calls}
    simd = _native._C.simd() if _native.INSTALLED else None
    print(json.dumps({"digests": digests, "report": report(), "simd": simd}))
"""

REMEDY = (
    "install a C++17 compiler and reinstall: VISPRUNER_KERNELS_NATIVE=1 "
    "pip install --no-cache-dir --force-reinstall --no-deps ."
)

# Makes the import of the C++ core fail, as if it had not been built.
WITHOUT_CORE = "import sys; sys.modules['vispruner_kernels._C'] = None\n"


def answers(code: str = ANSWER, **environment: str) -> dict[str, object]:
    """The object that ANSWER prints."""
    done = python(code + "\nanswer()", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@functools.cache
def default_answers() -> dict[str, object]:
    return answers()


@functools.cache
def reference_answers() -> dict[str, object]:
    return answers(VISPRUNER_KERNELS_BACKEND="reference")


def owners(report: str) -> dict[str, tuple[str, str]]:
    """The owners of each operator on a CPU and on a CUDA device, from the report."""
    rows = (line.split() for line in report.splitlines())
    return {row[0]: (row[1], row[2]) for row in rows if row and row[0] in OPERATORS}
