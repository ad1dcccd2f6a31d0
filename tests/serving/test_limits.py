"""A server that many want too much of."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Place, serve_a_tiny_model, tiny_tokenizer

from zili.config.model import ModelConfig
from zili.models.decoder import Decoder
from zili.release.native import write_native
from zili.release.tensors import HeldTensors
from zili.serving.gate import Limits
from zili.serving.keys import Keys

LIMITS = Limits(body_bytes=2000, body_seconds=0.5, waiting=3, answer_seconds=1.0)
FOREVER = {"prompt": "snow", "max_tokens": 3900, "ignore_eos": True}


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    yield from serve_a_tiny_model(Keys(), context=4000, limits=LIMITS)


def idle(place: Place) -> None:
    end = time.monotonic() + 20
    while place.served.engine.load != (0, 0):
        assert time.monotonic() < end, "a slot is still taken"
        time.sleep(0.02)


def wire(place: Place) -> socket.socket:
    host, port = place.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def request(path: str, body: bytes, more: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def test_too_large(place: Place) -> None:
    status, answer = place.post("/tokenize", {"prompt": "x" * 3000})
    assert status == 413 and "2,000 bytes" in answer["error"]["message"]
    with wire(place) as line:  # without a length
        line.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        line.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n" + b"7d0\r\n" + b"x" * 2000 + b"\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 413")


def test_too_slow_to_ask(place: Place) -> None:
    with wire(place) as line:
        line.sendall(request("/tokenize", b'{"prompt": "x"}')[:-4])
        assert line.recv(100).startswith(b"HTTP/1.1 408")


def test_too_long_to_answer(place: Place) -> None:
    status, answer = place.post("/v1/completions", FOREVER)
    assert status == 504 and answer["error"]["code"] == "timeout"
    body = json.dumps({**FOREVER, "stream": True}).encode()
    with urllib.request.urlopen(
        urllib.request.Request(f"{place.url}/v1/completions", body, {"Content-Type": "application/json"}), timeout=20
    ) as told:
        lines = [line for line in told.read().decode().splitlines() if line]
    assert len(lines) > 3 and json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    idle(place)


def test_too_many(place: Place) -> None:
    body = json.dumps({**FOREVER, "stream": True}).encode()
    lines = [wire(place) for _ in range(7)]  # 4 slots, 3 wait
    try:
        for line in lines:
            line.sendall(request("/v1/completions", body))
        end = time.monotonic() + 5
        while place.served.engine.load != (4, 3):
            assert time.monotonic() < end, place.served.engine.load
            time.sleep(0.01)
        with wire(place) as line:
            line.sendall(request("/v1/completions", body))
            refused = line.recv(1000).decode()
        assert refused.startswith("HTTP/1.1 503") and "retry-after: 1" in refused.lower()
    finally:
        for line in lines:
            line.close()
    idle(place)
    status, answer = place.post("/v1/completions", {"prompt": ["a"] * 5, "max_tokens": 1})
    assert status == 400 and "5 answers" in answer["error"]["message"]


def test_nowhere_and_the_wrong_way(place: Place) -> None:
    assert place.post("/v1/nothing", {})[0] == 404
    status, answer = place.post("/v1/models", {})
    assert status == 405 and answer["error"]["message"] == "Method Not Allowed"


def test_the_end_lets_answers_finish(tmp_path: Path) -> None:
    config = ModelConfig(
        vocab_size=320, hidden_size=32, layers=2, heads=2, kv_heads=2, head_dim=16, ffn_hidden_size=48, max_length=4000
    )
    write_native(tmp_path, config, None, HeldTensors(Decoder(config).state_dict()), 10**9)
    tiny_tokenizer().save(tmp_path)
    command = [sys.executable, "-c", "from zili.cli import main; main()", "serve", str(tmp_path), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split(": ", 1)[1].split("/v1")[0]
        body = json.dumps({**FOREVER, "max_tokens": 1000, "stream": True}).encode()
        asked = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert answer.readline().startswith(b"data: ")
            server.send_signal(signal.SIGTERM)
            rest = answer.read().decode()
        assert '"finish_reason": "length"' in rest and rest.endswith("data: [DONE]\n\n")
        assert server.wait(30) in (0, -signal.SIGTERM)
    finally:
        server.kill()
        server.wait()


def memory() -> float:
    """MB that this process holds."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
@pytest.mark.parametrize("seconds", [float(os.environ.get("ZILI_LOAD_SECONDS", "120"))])
def test_sixty_four_streams_that_come_and_go(seconds: float) -> None:
    """Random hang-ups, requests that are too large and that are none: nothing leaks, nothing hangs."""
    for place in serve_a_tiny_model(Keys(), context=512, limits=Limits(body_bytes=20_000, waiting=64)):
        told: list[tuple[str, str]] = []
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=visit, args=(place, number, end, told)) for number in range(64)]
        for thread in threads:
            thread.start()
        time.sleep(seconds / 4)
        early = memory()
        for thread in threads:
            thread.join(seconds + 60)
        assert not any(thread.is_alive() for thread in threads), "a stream is stuck"
        idle(place)
        print(Counter(told), f"{early:.0f} MB after a quarter, {memory():.0f} MB at the end")
        assert not [(kind, status) for kind, status in told if status not in EXPECTED[kind]]
        assert memory() - early < 50, "memory grows"
        assert place.post("/v1/completions", {"prompt": "snow", "max_tokens": 3})[0] == 200


EXPECTED = {
    "whole": ("200", "503"),
    "gone": ("hung up",),
    "large": ("413",),
    "malformed": ("400",),
}


def visit(place: Place, number: int, end: float, told: list[tuple[str, str]]) -> None:
    """Ask until `end`."""
    draw = random.Random(number)
    while time.monotonic() < end:
        told.append(act(place, draw))


def act(place: Place, draw: random.Random) -> tuple[str, str]:
    """One request and what came of it."""
    kind = draw.choices(list(EXPECTED), (6, 3, 1, 1))[0]
    body: Any = {"prompt": "snow " * draw.randint(1, 20), "max_tokens": draw.randint(1, 150), "stream": True}
    data = json.dumps({**body, "seed": draw.randint(0, 99), "ignore_eos": True}).encode()
    data = {"large": b"x" * 30_000, "malformed": data[:-9]}.get(kind, data)
    with wire(place) as line:
        line.settimeout(60)
        line.sendall(request("/v1/completions", data, "Connection: close\r\n"))
        if kind == "gone":
            if draw.random() < 0.7:
                line.recv(draw.randint(1, 2000))
            return kind, "hung up"
        answer = b""
        while piece := line.recv(65536):
            answer += piece
    status = answer[9:12].decode()
    return kind, status if status != "200" or b"data: [DONE]" in answer else "cut short"
