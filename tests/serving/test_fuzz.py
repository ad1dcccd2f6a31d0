"""Bodies that nobody would send: no defect of the server's, nobody kept waiting, no memory kept."""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from served import Place, serve_a_tiny_model
from test_attacks import WRONG, ask, longest_turn
from test_limits import a_server, memory
from waiting import until

from zili.serving.http.keys import Keys
from zili.serving.http.protocol import ChatRequest, CompletionRequest

PATHS = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}
NUMBERS = [0, 1, -1, 2, 16, 1.0, 0.5, 1e308, -0.0, 2**31, 2**63, 2**64, 10**400]
NAMES = "auto required none user assistant tool system text json_object"
MARKS = ["", "\ud800", "<tool_call>", "</think>", "<_end>", "[" * 300, "(" * 300, "(a*)*", 'root ::= "a" root']
KEYS = "type function name parameters properties items anyOf $ref role content text regex json choice grammar schema"
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from([*NAMES.split(), *MARKS]),
)
WORDS = st.sampled_from([*KEYS.split(), "json_schema", "arguments", "include_usage", "enum", "pattern", "minLength"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=5),
    max_leaves=12,
)
TURN: dict[str, Any] = {"role": "user", "content": "snow?"}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SOUND: dict[str, Any] = {
    "messages": [TURN],
    "prompt": "snow",
    "tools": [TOOL],
    "tool_choice": "required",
    "structured_outputs": {"regex": "a+"},
    "response_format": {"type": "json_object"},
    "logit_bias": {"5": -100},
    "stop": ["a"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "logprobs": True,
    "n": 2,
}


@st.composite
def bodies(draw: st.DrawFn, path: str) -> bytes:
    """Fields of a request, some sound and some not, a few bytes of them changed at times."""
    fields = draw(st.lists(st.sampled_from([*PATHS[path].model_fields, "unknown"]), max_size=6, unique=True))
    needed = "messages" if "chat" in path else "prompt"
    body = {"max_tokens": draw(st.integers(0, 8)), needed: SOUND[needed]}
    for field in fields:
        sound = [st.just(SOUND[field])] * 2 if field in SOUND else []
        body[field] = draw(st.one_of(VALUES, *sound))
    if isinstance(body["max_tokens"], int):
        body["max_tokens"] = min(body["max_tokens"], 64)
    data = bytearray(json.dumps(body).encode())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        place = draw(st.integers(0, len(data) - 1))
        data[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(data)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    yield from serve_a_tiny_model(Keys(), context=256)


ANY = st.sampled_from([*PATHS]).flatmap(lambda path: st.tuples(st.just(path), bodies(path)))
EXPECTED = (200, 400, 404, 503)
QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink]
)


def test_any_body_is_answered_or_refused(place: Place) -> None:
    @QUICK
    @given(asked=ANY)
    def fuzz(asked: tuple[str, bytes]) -> None:
        status, answer = ask(place, *asked)
        assert status in EXPECTED, answer[:500]
        assert status == 200 or json.loads(answer)["error"]["message"]
        assert longest[-1] < 0.05

    with longest_turn() as longest:
        fuzz()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_ten_minutes_of_any_body_leave_memory_as_it_was(tmp_path: Path) -> None:
    seconds = float(os.environ.get("ZILI_FUZZ_SECONDS", "600"))
    with a_server(tmp_path, "--slots", "4", "--context", "256") as (url, server):
        for body in ({"prompt": "snow"}, {"prompt": "snow", "structured_outputs": {"regex": "a{3}"}}):
            assert post(url, "/v1/completions", json.dumps(body).encode())[0] == 200
        idle, end = memory(server.pid), time.monotonic() + seconds
        waits: list[float] = []
        watch = threading.Thread(target=look, args=(url, end, waits))
        watch.start()

        @settings(QUICK, max_examples=10**9, phases=[Phase.generate])
        @given(asked=ANY)
        def fuzz(asked: tuple[str, bytes]) -> None:
            if time.monotonic() > end:
                raise KeyboardInterrupt  # hypothesis knows of no other end
            status, answer = post(url, *asked)
            assert status in EXPECTED, (asked, answer[:500])

        with pytest.raises(KeyboardInterrupt):
            fuzz()
        for path, body, _ in WRONG.values():
            assert post(url, path, body)[0] in EXPECTED
        watch.join()
        until(lambda: post(url, "/v1/completions", b'{"prompt": "snow"}')[0] == 200, seconds=60)
        now = memory(server.pid)
        print(f"{idle:.0f} MB idle, {now:.0f} after; /health waited {max(waits):.3f} s at most of {len(waits)} times")
        assert now < 1.2 * idle


def look(url: str, end: float, waits: list[float]) -> None:
    """How long `/health` takes."""
    while time.monotonic() < end:
        began = time.monotonic()
        with urllib.request.urlopen(f"{url}/health", timeout=60) as answer:
            assert answer.status == 200
        waits.append(time.monotonic() - began)
        time.sleep(0.05)


def post(url: str, path: str, body: bytes) -> tuple[int, bytes]:
    asked = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
