"""Run code in a new interpreter that has imported PyTorch and nothing else.

One process imports PyTorch and forks for each call, because the import takes longer than the tests.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import vispruner_kernels

# For each line that it reads, the server runs one piece of code and prints its exit status.
SERVER = """
import json, os, signal, sys, traceback
import torch

for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if not child:
        status = 1
        signal.alarm(300)
        for number, path in enumerate(task["outputs"], 1):
            os.dup2(os.open(path, os.O_WRONLY), number)
        os.environ.clear()
        os.environ.update(task["environment"])
        try:
            exec(compile(task["code"], "<string>", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as error:
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def _environment() -> dict[str, str]:
    """The environment of this process, without the variables of the package."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith("VISPRUNER_KERNELS_")}
    path = [str(Path(vispruner_kernels.__file__).parent.parent), kept.get("PYTHONPATH", "")]
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


@functools.cache
def _server(options: tuple[str, ...]) -> subprocess.Popen[str]:
    command = [sys.executable, *options, "-c", SERVER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, env=_environment(), **pipes)
    atexit.register(process.kill)
    return process


def python(code: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code with these options of Python and these environment variables of the package."""
    server = _server(options)
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        task = {
            "code": code,
            "environment": _environment() | environment,
            "outputs": [out.name, err.name],
        }
        assert server.stdin
        assert server.stdout
        print(json.dumps(task), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(code, status, out.read(), err.read())
