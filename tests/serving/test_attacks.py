"""Bodies that are made to hurt: the loop goes on, and memory stays what it was."""

from __future__ import annotations

import asyncio
import gc
import gzip
import http.client
import json
import logging
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from served import KEY, KEYS, Place, listening, serve_a_tiny_model
from waiting import until

from zili.serving.http.gate import Limits, written
from zili.serving.http.keys import Keys

JSON = {"Content-Type": "application/json"}
ASKED: Any = [{"role": "user", "content": "snow?"}]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    yield from serve_a_tiny_model(Keys(), context=4000)


@contextmanager
def longest_turn() -> Iterator[list[float]]:
    """Seconds of its own CPU that the longest callback of a server's loop took, as the last of the list."""
    longest, run = [0.0], asyncio.Handle._run
    here = threading.get_ident()
    gc.freeze()  # as a server does at its start

    def timed(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        run(handle)
        if threading.get_ident() != here:
            longest.append(max(longest[-1], time.thread_time() - began))

    with mock.patch.object(asyncio.Handle, "_run", timed):
        yield longest
    gc.unfreeze()


def ask(place: Place, path: str, body: bytes, headers: dict[str, str] = JSON) -> tuple[int, bytes]:
    line = http.client.HTTPConnection(place.url.removeprefix("http://"), timeout=120)
    line.request("POST", path, body, headers)
    answer = line.getresponse()
    return answer.status, answer.read()


def many(before: str, item: str, after: str) -> bytes:
    """As many items as fit into 1.5 MB."""
    return f"{before}{','.join([item] * (1_500_000 // (len(item) + 1)))}{after}".encode()


def chat(**more: Any) -> bytes:
    return json.dumps({"messages": ASKED, "max_tokens": 1, **more}).encode()


DEEP = "[" * 30_000
NESTED: Any = {"type": "object"}
for _ in range(90):
    NESTED = {"type": "object", "properties": {"a": NESTED}}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WRONG: dict[str, tuple[str, bytes, str]] = {
    "messages that are numbers": (CHAT, many('{"messages":[', "1", "]}"), "messages"),
    "messages that are objects": (CHAT, many('{"messages":[', "{}", "]}"), "65,536"),
    "messages without number": (CHAT, many('{"messages":[', '{"role":"user","content":"a"}', "]}"), "65,536"),
    "parts": (CHAT, many('{"messages":[{"role":"user","content":[', "1", "]}]}"), "content"),
    "lists in lists": (CHAT, many('{"messages":', "[" * 1_000_000, "}"), "65,536"),
    "nested deep": (CHAT, b'{"messages":' + b"[" * 60_000, "recursion"),
    "keys": (CHAT, many('{"messages":[', '{"a":1,"b":2,"c":3}', "]}"), "65,536"),
    "prompts that are objects": (TEXT, many('{"prompt":[', "{}", "]}"), "65,536"),
    "prompts without number": (TEXT, many('{"prompt":[', '"a"', "]}"), "prompt"),
    "prompts that wait": (TEXT, json.dumps({"prompt": ["a " * 200] * 8000}).encode(), "8000 answers"),
    "tokens": (TEXT, many('{"prompt":[', "7", "]}"), "prompt"),
    "many tokens": (TEXT, json.dumps({"prompt": [7] * 400_000}).encode(), "context holds 4000"),
    "a long prompt": (TEXT, json.dumps({"prompt": "snow is white " * 100_000}).encode(), "context holds 4000"),
    "a long word": (TEXT, json.dumps({"prompt": "a" * 1_500_000}).encode(), "context holds 4000"),
    "a long message": (CHAT, chat(messages=[{"role": "user", "content": "<_end>" * 250_000}]), "context holds 4000"),
    "a long tool": (
        CHAT,
        chat(tools=[{"function": {"name": "f", "description": "snow " * 300_000}}]),
        "context holds 4000",
    ),
    "biases": (TEXT, json.dumps({"prompt": "a", "logit_bias": {str(n): 1 for n in range(60_000)}}).encode(), "beyond"),
    "biases that are none": (TEXT, many('{"prompt":"a","logit_bias":{', '"a":[]', "}}"), "65,536"),
    "a model of another name": (TEXT, json.dumps({"prompt": "a", "model": "x" * 1_500_000}).encode(), "not served"),
    "stops": (TEXT, json.dumps({"prompt": "a", "stop": ["a" * 200_000] * 16}).encode(), "stop"),
    "arguments nested deep": (
        CHAT,
        chat(messages=[*ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": DEEP}}]}]),
        "arguments",
    ),
    "a tool nested deep": (CHAT, chat(tools=[{"function": {"name": "f", "parameters": NESTED}}]), "deep"),
    "options nested deep": (CHAT, chat(chat_template_kwargs=NESTED), "deep"),
    "a tool of numbers": (
        CHAT,
        chat(tools=[{"function": {"name": "f", "parameters": {"enum": [1] * 400_000}}}]),
        "context holds 4000",
    ),
    "a tool of long numbers": (
        CHAT,
        chat(tools=[{"function": {"name": "f", "parameters": {"enum": [10**4000] * 300}}}]),
        "context holds 4000",
    ),
    "options of numbers": (CHAT, chat(chat_template_kwargs={"a": [1] * 400_000}), "context holds 4000"),
    "a form of numbers": (CHAT, chat(structured_outputs={"json": {"enum": [1] * 400_000}}), "longer than 65,536"),
    "numbers that nobody reads": (TEXT, b'{"prompt":"a","x":[' + b"1," * 1_200_000 + b"1]}", "1,114,112"),
    "an old form of numbers": (TEXT, json.dumps({"prompt": "a", "guided_json": [1] * 700_000}).encode(), "guided_json"),
    "a form nested deep": (CHAT, chat(structured_outputs={"json": DEEP}), "structured_outputs"),
    "a schema nested deep": (CHAT, chat(structured_outputs={"json": NESTED}), "deep"),
    "a pattern nested deep": (
        CHAT,
        chat(structured_outputs={"regex": "(" * 20_000 + ")" * 20_000}),
        "regex|pattern|deep",
    ),
    "a grammar nested deep": (TEXT, json.dumps({"prompt": "a", "structured_outputs": {"grammar": DEEP}}).encode(), ""),
    "NaN": (TEXT, b'{"prompt":"a","temperature":NaN}', "JSON"),
    "a number that is endless": (TEXT, b'{"prompt":"a","seed":' + b"9" * 1_000_000 + b"}", "JSON"),
    "half of a pair": (TEXT, b'{"prompt":"\\ud800"}', "JSON"),
    "quotes": (TEXT, b'{"prompt":"' + b'[\\"' * 1_000_000, "JSON"),
    "detokenizing": ("/detokenize", many('{"tokens":[', "-1", "]}"), "tokens"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_refused_and_keeps_nobody_waiting(place: Place, what: str) -> None:
    path, body, said = WRONG[what]
    with longest_turn() as longest:
        status, answer = ask(place, path, body)
    assert status in (400, 404) and re.search(said, json.loads(answer)["error"]["message"]), answer[:300]
    assert len(answer) < 3000 and longest[-1] < 0.05


LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "tokenizing": ("/tokenize", {"prompt": "snow is white " * 70_000}),
    "detokenizing": ("/detokenize", {"tokens": [7, 8] * 150_000}),
    "log-probabilities of all": (
        TEXT,
        {"prompt": "snow is white " * 200, "echo": True, "logprobs": 20, "max_tokens": 200, "ignore_eos": True},
    ),
    "a stream": (TEXT, {"prompt": "a", "logprobs": 20, "max_tokens": 300, "stream": True, "ignore_eos": True}),
    "stops that are nearly met": (
        TEXT,
        {"prompt": "a", "max_tokens": 200, "logit_bias": {"72": 100}, "stop": ["a" * 1000 + str(n) for n in range(16)]},
    ),
    "many answers": (TEXT, {"prompt": ["a"] * 64, "max_tokens": 3, "logit_bias": {str(n): 1 for n in range(300)}}),
}


@pytest.mark.parametrize("what", LARGE)
def test_what_is_large_keeps_nobody_waiting(place: Place, what: str) -> None:
    path, body = LARGE[what]
    with longest_turn() as longest:
        status, answer = ask(place, path, json.dumps(body).encode())
    assert status == 200 and b"error" not in answer and longest[-1] < 0.05


def test_a_body_in_chunks_of_a_byte(place: Place) -> None:
    body = b'{"prompt": "' + b"x" * 20_000 + b'"}'
    with longest_turn() as longest:
        chunks = b"".join(b"1\r\n" + body[place : place + 1] + b"\r\n" for place in range(len(body))) + b"0\r\n\r\n"
        line = http.client.HTTPConnection(place.url.removeprefix("http://"), timeout=120)
        line.putrequest("POST", "/tokenize")
        for name, value in {**JSON, "Transfer-Encoding": "chunked"}.items():
            line.putheader(name, value)
        line.endheaders()
        line.send(chunks)
        answer = line.getresponse()
        assert answer.status == 200 and json.load(answer)["count"]
    assert longest[-1] < 0.05


@pytest.mark.parametrize("kind", ["text/plain", "", "application/jsonp", "multipart/form-data"])
def test_what_is_not_said_to_be_json_is_not_read(place: Place, kind: str) -> None:
    """Any page that a browser shows can send it, without asking."""
    status, answer = ask(place, TEXT, b'{"prompt": "a", "max_tokens": 1}', {"Content-Type": kind} if kind else {})
    assert status == 400 and b"Content-Type" in answer


def test_what_is_coded_is_not_read(place: Place) -> None:
    body = gzip.compress(b'{"prompt": "a", "max_tokens": 1}')
    status, answer = ask(place, TEXT, body, {**JSON, "Content-Encoding": "gzip"})
    assert status == 400 and b"Content-Encoding" in answer
    told = {**JSON, "Content-Encoding": "Identity"}
    assert ask(place, TEXT, b'{"prompt": "a", "max_tokens": 1}', told)[0] == 200


def test_a_mark_of_byte_order_is_passed_over(place: Place) -> None:
    assert ask(place, TEXT, b'\xef\xbb\xbf{"prompt": "a", "max_tokens": 1}')[0] == 200


def test_bodies_together_have_a_bound(place: Place) -> None:
    with listening(replace(place.served, limits=Limits(bodies_bytes=40_000))) as url, ExitStack() as lines:
        near = replace(place, url=url)
        host, port = url.removeprefix("http://").split(":")
        for _ in range(2):  # they say no more, and hold what came
            line = lines.enter_context(socket.create_connection((host, int(port)), timeout=60))
            line.sendall(f"{HEAD}Content-Length: 20000\r\n\r\n".encode() + b" " * 10_000)
        until(lambda: ask(near, TEXT, b" " * 10_000)[0] == 503)
        assert ask(near, TEXT, b'{"prompt": "a", "max_tokens": 1}')[0] == 200
        lines.close()
        until(lambda: ask(near, TEXT, b" " * 10_000)[0] == 400)


def test_nothing_else_is_spoken(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """A door without a gate, and a traceback for each that knocked."""
    host, port = place.url.removeprefix("http://").split(":")
    asked = "Host: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    for path in ("/page/x", "/v1/models"):
        with socket.create_connection((host, int(port)), timeout=60) as line:
            line.sendall(f"GET {path} HTTP/1.1\r\n{asked}Sec-WebSocket-Key: MTIzNDU2Nzg5MDEyMzQ1Ng==\r\n\r\n".encode())
            assert line.recv(1000).startswith(b"HTTP/1.1 404" if path == "/page/x" else b"HTTP/1.1 200")
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize(
    "value",
    [[], {}, [[]], {"a": [], "b": {}}, [{"a": '"天\n'}] * 600, [1.5, None, True] * 100, {'"': [list(range(700))]}],
)
def test_json_is_written_in_pieces(value: Any) -> None:
    pieces = list(written(value))
    assert json.loads(b"".join(pieces)) == value and all(len(piece) < 10_000 for piece in pieces)


def test_what_is_made_as_it_is_written() -> None:
    made: list[int] = []

    def each() -> Iterator[dict[str, int]]:
        for number in range(3):
            made.append(number)
            yield {"a": number}

    pieces = written({"b": each(), "c": iter(())})
    assert not made
    assert json.loads(b"".join(pieces)) == {"b": [{"a": 0}, {"a": 1}, {"a": 2}], "c": []}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(
            (name, 200)
            for name in ("localhost", "LocalHost:8000", "127.0.0.1", "[::1]:8000", "10.1.2.3:80", "a.localhost")
        ),
        *(
            (name, 403)
            for name in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example")
        ),
        *((name, 403) for name in ("evil", "localhost:x", "[evil]", "xlocalhost", ":80")),
    ],
)
def test_names_that_may_be_anybodys_are_refused_without_keys(place: Place, host: str, status: int) -> None:
    """DNS rebinding: a page's own name, led to 127.0.0.1, makes its script one of this server's."""
    told, answer = ask(place, TEXT, b'{"prompt": "a", "max_tokens": 1}', {**JSON, "Host": host})
    assert told == status, answer


@pytest.mark.parametrize(
    ("host", "status"),
    [("chat.example", 200), ("Chat.Example.:8443", 200), ("localhost", 200), ("a.chat.example", 403), ("example", 403)],
)
def test_a_name_that_is_allowed_is_served(place: Place, host: str, status: int) -> None:
    """As behind a proxy on this machine."""
    with listening(replace(place.served, hosts=["chat.example"])) as url:
        told, answer = ask(replace(place, url=url), TEXT, b'{"prompt": "a", "max_tokens": 1}', {**JSON, "Host": host})
    assert told == status and (status == 200 or b"--allow-host" in answer)


def test_with_keys_any_name_is_served() -> None:
    for place in serve_a_tiny_model(KEYS):
        headers = {**JSON, "Host": "models.example", "Authorization": f"Bearer {KEY}"}
        assert ask(place, TEXT, b'{"prompt": "a", "max_tokens": 1}', headers)[0] == 200


HEAD = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"prompt": "a", "max_tokens": 500, "ignore_eos": True}).encode()
STREAM = json.dumps({"prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True, "n": 2}).encode()
FORMED = json.dumps({"prompt": "a", "structured_outputs": {"regex": "[a-z]{300}"}, "max_tokens": 400}).encode()


@pytest.mark.parametrize("abruptly", [True, False])
def test_whoever_hangs_up_leaves_no_traceback(
    place: Place, abruptly: bool, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    host, port = place.url.removeprefix("http://").split(":")
    caplog.set_level(logging.WARNING)
    for logger in ("uvicorn.error", "asyncio"):
        logging.getLogger(logger).addHandler(caplog.handler)
    for body in (BODY, STREAM, FORMED, BODY[:-1]):
        whole = f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body
        for cut, heard in ((20, 0), (len(whole) - 5, 0), (len(whole), 0), (len(whole), 1), (len(whole), 2000)):
            with socket.create_connection((host, int(port)), timeout=60) as line:
                if abruptly:
                    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                line.sendall(whole[:cut])
                if heard:
                    line.recv(heard)
    until(lambda: place.served.engine.load == (0, 0))
    assert ask(place, TEXT, BODY)[0] == 200
    gc.collect()  # asyncio tells of what nobody asked for when it goes
    told = [record.getMessage() for record in caplog.records if record.exc_info or "exception" in record.getMessage()]
    assert not told and "Traceback" not in capfd.readouterr().err
