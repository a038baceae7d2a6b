"""The limits of a launch of the CUDA kernels, with an emulated device."""

from __future__ import annotations

import json
import subprocess
import sys

from test_csrc import cuda_call
from test_cuda_on_cpu import SHARED, SUPPORT, library, pytestmark, shared_folder  # noqa: F401

PROGRAM = """
import json, sys
import emulated
library, call, shared = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
emulated.load(library, 0, shared)
try:
    emulated.cuda._C.cuda_select(call=call, device=0, stream=0)
except ValueError as error:
    print(error)
"""


def refused(library: str, **changes: int) -> str:  # noqa: F811
    call = json.dumps(cuda_call(changes.pop("images", 1)) | changes)
    command = [sys.executable, "-c", PROGRAM, library, call, str(SHARED["most"])]
    done = subprocess.run(command, cwd=SUPPORT, capture_output=True, text=True, check=True)
    return done.stdout


def test_refuses_a_grid_that_is_too_large(library):  # noqa: F811
    message = refused(library, images=2**16)
    assert "2155872256 blocks, expected at most 2147483647" in message


def test_refuses_a_variant_that_does_not_exist_or_fit(library):  # noqa: F811
    assert "variant 99 of select does not exist" in refused(library, variant=99)
    # All lists of 16384 tokens in shared memory.
    assert "16384 tokens do not fit" in refused(library, variant=1)
