"""Compiled kernels of every target obey the rules of aot_rules.py; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aot_rules import QUICK_TARGETS, RULES, SELECT_ALL, TARGETS, Result, faults, table

import vispruner_kernels
from vispruner_kernels import _schemas
from vispruner_kernels._triton import operators

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not operators.INSTALLED, reason=operators.REASON),
]

SUPPORT = Path(__file__).parents[1] / "support"


def compile_variants(folder: Path, *options: str) -> dict[str, Any]:
    """Run aot.py in another process, because this one may use Triton's interpreter."""
    ours = ("VISPRUNER_KERNELS_", "TRITON_INTERPRET")
    environment = {n: v for n, v in os.environ.items() if not n.startswith(ours)}
    path = [str(Path(vispruner_kernels.__file__).parent.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    environment["VISPRUNER_KERNELS_BACKEND"] = "auto"
    file = folder / "report.json"
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "aot.py"), "--json", str(file), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert file.exists(), done.stderr
    report: dict[str, Any] = json.loads(file.read_text())
    report["results"] = [Result(**result) for result in report["results"]]
    return report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compile_variants(tmp_path_factory.mktemp("aot"))


@pytest.mark.parametrize("rule", RULES)
def test_every_variant_obeys_the_rule(report, rule):
    wrong = {
        f"{r.target} {r.kernel} {'/'.join(r.ops)} {r.label}": fault
        for r in report["results"]
        if (fault := RULES[rule](r))
    }
    assert not wrong, "\n".join(f"{variant}: {fault}" for variant, fault in wrong.items())


def test_every_operator_kernel_and_target_is_compiled(report, capsys):
    assert report["errors"] == {}
    for target in set(TARGETS) - set(report["unavailable"]):
        results = [r for r in report["results"] if r.target == target]
        assert {op for r in results for op in r.ops} == set(_schemas.SCHEMAS), target
        assert {r.kernel for r in results} == set(report["kernels"]), target
        for op in SELECT_ALL:
            assert any(op in r.ops and not r.module.endswith(".topk") for r in results), target
    with capsys.disabled():
        print(f"\n{table(report['results'])}")
    # A target that could not be compiled is reported as a skip, not as a pass.
    if report["unavailable"]:
        pytest.skip(str(report["unavailable"]))


# A kernel for each fault that a rule catches.
PROBE = r"""
import torch
import triton
import triton.language as tl

from vispruner_kernels._triton import launch


@triton.jit
def _right_kernel(x_ptr, out_ptr, ratio_bits, tag, BLOCK: tl.constexpr):
    # tf32, div.full
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs[:, None] * BLOCK + offs[None, :])
    byte = x.to(tl.int8)
    gram = tl.dot(byte, tl.trans(byte), out_dtype=tl.int32).to(tl.float32)
    ratio = ratio_bits.to(tl.int64).to(tl.float64, bitcast=True)
    count = (tl.program_id(0).to(tl.float64) * ratio).to(tl.int32)
    exact = tl.div_rn(gram, tl.sqrt_rn(x)) * x + count
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], exact)


@triton.jit
def _wrong_kernel(x_ptr, y_ptr, out_ptr, ratio, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    offs = offs[:, None] * BLOCK + offs[None, :]
    x = tl.load(x_ptr + offs)
    if WHAT == "dot":
        x = tl.dot(x, x)
    elif WHAT == "ieee":
        x = tl.dot(x, x, input_precision="ieee")
    elif WHAT == "divide":
        x = x / tl.load(y_ptr + offs)
    elif WHAT == "sqrt":
        x = tl.sqrt(x)
    elif WHAT == "fuse":
        x = x * x + tl.load(y_ptr + offs)
    elif WHAT == "count":
        x = x + (tl.program_id(0) * ratio).to(tl.int32)
    elif WHAT == "stop":
        tl.static_assert(False)
    elif WHAT == "turn":
        x = tl.trans(x)
    tl.store(out_ptr + offs, x)


@triton.jit
def _waiting_kernel(x_ptr, y_ptr, out_ptr, n, sign, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    offs = offs[:, None] * BLOCK + offs[None, :]
    # A computed operand comes from registers.
    x = (tl.load(x_ptr + offs).to(tl.float32) * sign).to(tl.float16)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for _ in range(n):
        y = tl.load(y_ptr + offs)
        weight = tl.exp2(tl.dot(x, tl.trans(y)))
        acc = tl.dot(weight.to(tl.float16), y, acc * 0.5)
        y_ptr += BLOCK * BLOCK
    tl.store(out_ptr + offs, acc)


@triton.jit
def _tag_kernel(out_ptr, tag):
    tl.store(out_ptr, tag)


def right(bits):
    x = torch.empty(64, 64)
    launch.run(_right_kernel, 1, x, x, x, bits, 7, BLOCK=64, num_warps=4, enable_fp_fusion=False)


def wrong(what, block=64, **meta):
    x = torch.empty(block, block)
    args = (x, torch.empty_like(x), torch.empty_like(x), 0.5)
    launch.run(_wrong_kernel, 1, x, *args, WHAT=what, BLOCK=block, **meta)


def tag():
    out = torch.empty(1, dtype=torch.int64)
    launch.run(_tag_kernel, 1, out, out, launch.new_tag(), enable_fp_fusion=False)


def waiting():
    x = torch.empty(128, 128, dtype=torch.float16)
    args = (x, x, torch.empty(128, 128), 7, 0.5)
    meta = {"BLOCK": 64, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
    launch.run(_waiting_kernel, 1, x, *args, **meta)


def case(name, op, what, **meta):
    def call():
        wrong(what, **{"enable_fp_fusion": False, **meta})

    call.__name__ = name
    return op, call, ()


CALLS = [
    ("select_varlen", right, (2**62 + 1,)),
    ("cls_attention", tag, ()),
    ("cls_scores", waiting, ()),
    case("tf32", "cls_scores", "dot"),
    case("ieee", "cls_scores", "ieee", block=16),
    case("divide", "select_topk", "divide"),
    case("sqrt", "select_topk", "sqrt"),
    case("fuse", "select_rows", "fuse", enable_fp_fusion=True),
    case("unsaid", "received_scores", "divide", enable_fp_fusion=None),
    case("no int8", "prune", "turn"),
    case("float32", "select_varlen", "count"),
    case("error", "received_scores", "stop"),
    case("shared", "received_scores", "turn", block=256, num_warps=32),
    case("spill", "received_scores", "ieee"),
]
"""


def test_each_rule_catches_its_fault(tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    # sm_100, because Blackwell's tensor cores have other instructions.
    targets = (*QUICK_TARGETS, "sm_100")
    report = compile_variants(tmp_path, "--target", *targets, "--calls", str(probe))
    assert list(report["errors"]) == ["cls_attention"]
    assert "random" in report["errors"]["cls_attention"]
    found = {(r.target, r.label): faults(r) for r in report["results"]}
    print(table(report["results"]))
    for target in targets:
        wrong = {label: set(faults) for (at, label), faults in found.items() if at == target}
        assert wrong == {
            "right": set(),
            "tag": set(),
            "waiting": {"keeps tensor cores busy"} if target == "sm_90" else set(),
            "tf32": {"has no tf32"},
            "ieee": set(),
            "divide": {"rounds correctly"},
            "sqrt": {"rounds correctly"},
            "fuse": {"rounds correctly"},
            "unsaid": {"states enable_fp_fusion"},
            "no int8": {"multiplies int8 on tensor cores"},
            "float32": {"multiplies int8 on tensor cores", "counts in float64"},
            "error": {"compiles"},
            "shared": {"fits shared memory"},
            "spill": {"does not spill"} if target in QUICK_TARGETS else set(),
        }
