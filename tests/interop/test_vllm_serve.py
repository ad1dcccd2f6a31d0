"""`zili serve --engine vllm`, with vLLM itself: what it answers over HTTP is what our engine does."""

from __future__ import annotations

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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not here: `make test-interop` installs it")
from small_models import STEPS, made, prompts

from zili.release import export_model
from zili.serving.generate.engine import Engine
from zili.serving.generate.generation import Ask, Sampling

SECONDS_TO_START = 300


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    here = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{here}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    command = [sys.executable, "-m", "zili", "serve", str(folder), "--engine", "vllm", "--port", str(port)]
    command += ["--context", "128", "--slots", "4", "--chip", "cpu", "--name", "small"]
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS_TO_START
        while True:
            assert server.poll() is None and time.monotonic() < end, "vLLM did not come up"
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def asked(url: str, body: dict[str, Any]) -> Any:
    data = json.dumps({"model": "small", **body}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


@pytest.mark.skipif(sys.platform == "win32", reason="vLLM is not for Windows")
def test_the_same_answers(tmp_path: Path) -> None:
    decoder = made(tmp_path / "zili", "telechat2")
    export_model(tmp_path / "zili", tmp_path / "out", layout="telechat2")
    with Engine(decoder, slots=4) as engine:
        answers = [engine.submit(Ask(prompt, STEPS, Sampling(temperature=0))) for prompt in prompts()]
        ours = [[token.id for token in answer.wait(60)] for answer in answers]
    body = {"max_tokens": STEPS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with serving(tmp_path / "out") as url:
        theirs = [asked(url, {"prompt": prompt, **body})["choices"][0]["token_ids"] for prompt in prompts()]
    assert theirs == ours
