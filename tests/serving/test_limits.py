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
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from served import Place, serve_a_tiny_model, slowed, tiny_shape, tiny_tokenizer
from waiting import until

from zili.models.decoder import Decoder
from zili.release.native import write_native
from zili.release.tensors import HeldTensors
from zili.serving.http.gate import Limits
from zili.serving.http.keys import Keys

LIMITS = Limits(body_bytes=2000, body_seconds=0.5, answer_seconds=1.0)
FOREVER = {"prompt": "snow", "max_tokens": 3900, "ignore_eos": True}


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    yield from serve_a_tiny_model(Keys(), context=4000, limits=LIMITS)


a_place = contextmanager(serve_a_tiny_model)


def idle(place: Place) -> None:
    until(lambda: place.served.engine.load == (0, 0), seconds=20)


def address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def wire(url: str) -> socket.socket:
    return socket.create_connection(address(url), timeout=60)


def request(path: str, body: bytes, more: str = "", length: int | None = None) -> bytes:
    """`length`: what it is said to have, where that is not so."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body


def test_too_large(place: Place) -> None:
    status, answer = place.post("/tokenize", {"prompt": "x" * 3000})
    assert status == 413 and "2,000 bytes" in answer["error"]["message"]
    with wire(place.url) as line:  # without a length
        line.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        line.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n" + b"7d0\r\n" + b"x" * 2000 + b"\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 413")


def test_too_slow_to_ask(place: Place) -> None:
    with wire(place.url) as line:
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


def test_too_many() -> None:
    body = json.dumps({**FOREVER, "stream": True}).encode()
    with a_place(Keys(), context=4000, limits=Limits(waiting=3)) as place:
        with slowed(place.served.engine), ExitStack() as open_until_then:
            lines = [open_until_then.enter_context(wire(place.url)) for _ in range(8)]
            for line in lines[:7]:  # 4 slots, 3 wait
                line.sendall(request("/v1/completions", body))
            until(lambda: place.served.engine.load == (4, 3))
            lines[7].sendall(request("/v1/completions", body))
            refused = lines[7].recv(1000).decode()
        assert refused.startswith("HTTP/1.1 503") and "retry-after: 1" in refused.lower()
        idle(place)
        status, answer = place.post("/v1/completions", {"prompt": ["a"] * 5, "max_tokens": 1})
        assert status == 400 and "5 answers" in answer["error"]["message"]


def test_nowhere_and_the_wrong_way(place: Place) -> None:
    assert place.post("/v1/nothing", {})[0] == 404
    status, answer = place.post("/v1/models", {})
    assert status == 405 and answer["error"]["message"] == "Method Not Allowed"


def who_takes_little(place: Place, fits: int = 4096) -> socket.socket:
    """The end of a client that asked, and into which little fits (in bytes)."""
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, fits)
    line.settimeout(60)
    line.connect(address(place.url))
    body = json.dumps({**FOREVER, "stream": True}).encode()
    line.sendall(request("/v1/completions", body, "Connection: close\r\n"))
    return line


def metrics(place: Place) -> str:
    with urllib.request.urlopen(f"{place.url}/metrics", timeout=60) as told:
        text: str = told.read().decode()
    return text


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system cannot tell")
def test_who_takes_nothing_is_hung_up_on() -> None:
    with a_place(Keys(), context=4000, limits=Limits(silent_seconds=0.3)) as place, who_takes_little(place) as line:
        until(lambda: 'finished_reason="abort",model_name="tiny"} 1.0' in metrics(place))
        idle(place)
        with pytest.raises(ConnectionResetError):
            while line.recv(65536):
                pass


def test_who_takes_slowly_is_waited_for() -> None:
    silence, pieces = 2.0, 0
    limits = Limits(silent_seconds=silence)
    with a_place(Keys(), context=4000, limits=limits) as place, who_takes_little(place, fits=1 << 16) as line:
        answer = b""
        while piece := line.recv(1 << 14):
            answer += piece
            pieces += 1
            time.sleep(silence / 20)
    assert b"data: [DONE]" in answer and pieces > 30, "it took longer than it may be silent"


def test_who_asks_nothing_is_hung_up_on() -> None:
    with (
        a_place(Keys(), limits=Limits(body_seconds=1.0)) as place,
        wire(place.url) as silent,
        wire(place.url) as stuck,
        wire(place.url) as again,
    ):
        again.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        stuck.sendall(b"GET /health HTTP/1.1\r\nHost:")
        answer = b""
        while b"ok" not in answer:
            answer += again.recv(1000)
        again.sendall(b"GET /hea")
        for line in (silent, stuck, again):
            with suppress(ConnectionResetError):
                assert line.recv(100) == b""  # its end


def test_a_server_that_ends_says_so() -> None:
    with a_place(Keys(), context=4000) as place, slowed(place.served.engine), wire(place.url) as line:
        body = json.dumps({**FOREVER, "stream": True}).encode()
        line.sendall(request("/v1/completions", body, "Connection: close\r\n"))
        answer = b""
        while b"finish_reason" not in answer:
            answer += line.recv(1000)
        place.served.engine.close()
        while piece := line.recv(65536):
            answer += piece
    assert b"the server ends" in answer and b"[DONE]" not in answer, "what was cut short is no whole answer"


def write_tiny(folder: Path) -> None:
    config = tiny_shape(4000)
    write_native(folder, config, None, HeldTensors(Decoder(config).state_dict()), 10**9)
    tiny_tokenizer().save(folder)


@contextmanager
def a_server(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`zili serve` with a tiny model: where it is reached, and its process."""
    write_tiny(folder)
    command = [sys.executable, "-c", "from zili.cli import main; main()", "serve", str(folder), "--port", "0", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        assert server.stdout is not None
        where = next(line for line in server.stdout if "/v1" in line)  # after what it takes of memory
        yield where.split(": ", 1)[1].split("/v1")[0], server
    finally:
        server.kill()
        server.wait()


def test_the_end_lets_answers_finish(tmp_path: Path) -> None:
    with a_server(tmp_path) as (url, server):
        body = json.dumps({**FOREVER, "max_tokens": 1000, "stream": True}).encode()
        asked = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert answer.readline().startswith(b"data: ")
            server.send_signal(signal.SIGTERM)
            rest = answer.read().decode()
        assert '"finish_reason": "length"' in rest and rest.endswith("data: [DONE]\n\n")
        assert server.wait(30) in (0, -signal.SIGTERM)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
@pytest.mark.skipif(os.cpu_count() == 1, reason="one CPU has no helpers")
def test_nothing_multiplies_in_the_main_thread(tmp_path: Path) -> None:
    """OpenMP's helpers of a second thread cost a server a third of its speed: `zili.serving.place.prepared`."""
    write_tiny(tmp_path)
    code = (
        "import os, uvicorn\n"
        "def run(self, sockets):\n"
        "    import torch\n"
        "    before = len(os.listdir('/proc/self/task'))\n"
        "    torch.ones(1 << 20).exp_()\n"
        "    print(len(os.listdir('/proc/self/task')) - before, torch.get_num_threads() - 1)\n"
        "uvicorn.Server.run = run\n"
        "from zili.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, "serve", str(tmp_path), "--port", "0"]
    variables = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=600)
    just_now, helpers = done.stdout.split()[-2:]
    assert just_now == helpers != "0"


def memory(process: int) -> float:
    """MB that it holds."""
    text = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def busy(url: str) -> bool:
    """Whether anything is answered, or waits."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    counts = [line for line in lines if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))]
    assert len(counts) == 2
    return any(float(line.rpartition(" ")[2]) for line in counts)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
@pytest.mark.parametrize("seconds", [float(os.environ.get("ZILI_LOAD_SECONDS", "120"))])
def test_sixty_four_streams_that_come_and_go(seconds: float, tmp_path: Path) -> None:
    """Random hang-ups, requests that are too large and that are none: nothing leaks, nothing hangs."""
    with a_server(tmp_path, "--slots", "4", "--context", "512", "--queue", "64") as (url, server):
        told: list[tuple[str, str]] = []
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=visit, args=(url, number, end, told)) for number in range(64)]
        for thread in threads:
            thread.start()
        held = []
        for _ in range(8):
            time.sleep(seconds / 8)
            held.append(memory(server.pid))
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "a stream is stuck"
        end = time.monotonic() + 20
        while busy(url):
            assert time.monotonic() < end, "a slot is still taken"
            time.sleep(0.1)
        print(Counter(told), "MB, at each eighth of the time:", *(f"{one:.0f}" for one in held))
        assert not [(kind, status) for kind, status in told if status not in EXPECTED[kind]]
        assert held[-1] - held[3] < 15, "memory grows"
        body = json.dumps({"prompt": "snow", "max_tokens": 3}).encode()
        asked = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        assert urllib.request.urlopen(asked, timeout=10).status == 200


EXPECTED = {
    "whole": ("200", "503"),
    "gone": ("hung up",),
    "large": ("413",),
    "malformed": ("400",),
}


def visit(url: str, number: int, end: float, told: list[tuple[str, str]]) -> None:
    """Ask until `end`."""
    draw = random.Random(number)
    while time.monotonic() < end:
        told.append(act(url, draw))


def act(url: str, draw: random.Random) -> tuple[str, str]:
    """One request and what came of it."""
    kind = draw.choices(list(EXPECTED), (6, 3, 1, 1))[0]
    body: Any = {"prompt": "snow " * draw.randint(1, 20), "max_tokens": draw.randint(1, 150), "stream": True}
    data = json.dumps({**body, "seed": draw.randint(0, 99), "ignore_eos": True}).encode()
    if kind == "malformed":
        data = data[:-9]
    with wire(url) as line:
        line.settimeout(60)
        length = 5_000_000 if kind == "large" else None
        line.sendall(request("/v1/completions", data, "Connection: close\r\n", length))
        if kind == "gone":
            if draw.random() < 0.7:
                line.recv(draw.randint(1, 2000))
            return kind, "hung up"
        answer = b""
        while piece := line.recv(65536):
            answer += piece
    status = answer[9:12].decode()
    return kind, status if status != "200" or b"data: [DONE]" in answer else f"cut short: {answer[-300:]!r}"
