"""Bodies that are made to hurt: the loop goes on, and memory stays what it was."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from served import Place, serve_a_tiny_model

from zili.serving.intake import written
from zili.serving.keys import Keys

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
    gc.collect()
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
    """As many items as fit into 3.9 MB."""
    return f"{before}{','.join([item] * (3_900_000 // (len(item) + 1)))}{after}".encode()


def chat(**more: Any) -> bytes:
    return json.dumps({"messages": ASKED, "max_tokens": 1, **more}).encode()


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WRONG: dict[str, tuple[str, bytes, str]] = {
    "messages that are numbers": (CHAT, many('{"messages":[', "1", "]}"), "messages"),
    "messages that are objects": (CHAT, many('{"messages":[', "{}", "]}"), "65,536"),
    "messages without number": (CHAT, many('{"messages":[', '{"role":"user","content":"a"}', "]}"), "65,536"),
    "parts": (CHAT, many('{"messages":[{"role":"user","content":[', "1", "]}]}"), "content"),
    "lists in lists": (CHAT, many('{"messages":', "[" * 1_900_000, "}"), "65,536"),
    "nested deep": (CHAT, b'{"messages":' + b"[" * 60_000, "recursion"),
    "keys": (CHAT, many('{"messages":[', '{"a":1,"b":2,"c":3}', "]}"), "65,536"),
    "prompts that are objects": (TEXT, many('{"prompt":[', "{}", "]}"), "65,536"),
    "prompts without number": (TEXT, many('{"prompt":[', '"a"', "]}"), "prompt"),
    "prompts that wait": (TEXT, json.dumps({"prompt": ["a " * 200] * 8000}).encode(), "8000 answers"),
    "tokens": (TEXT, many('{"prompt":[', "7", "]}"), "prompt"),
    "many tokens": (TEXT, json.dumps({"prompt": [7] * 1_000_000}).encode(), "context holds 4000"),
    "a long prompt": (TEXT, json.dumps({"prompt": "snow is white " * 270_000}).encode(), "context holds 4000"),
    "a long word": (TEXT, json.dumps({"prompt": "a" * 3_900_000}).encode(), "context holds 4000"),
    "a long message": (CHAT, chat(messages=[{"role": "user", "content": "<_end>" * 600_000}]), "context holds 4000"),
    "a long tool": (
        CHAT,
        chat(tools=[{"function": {"name": "f", "description": "snow " * 700_000}}]),
        "context holds 4000",
    ),
    "biases": (TEXT, json.dumps({"prompt": "a", "logit_bias": {str(n): 1 for n in range(60_000)}}).encode(), "beyond"),
    "biases that are none": (TEXT, many('{"prompt":"a","logit_bias":{', '"a":[]', "}}"), "65,536"),
    "a model of another name": (TEXT, json.dumps({"prompt": "a", "model": "x" * 3_900_000}).encode(), "not served"),
    "stops": (TEXT, json.dumps({"prompt": "a", "stop": ["a" * 200_000] * 16}).encode(), "stop"),
    "NaN": (TEXT, b'{"prompt":"a","temperature":NaN}', "JSON"),
    "half of a pair": (TEXT, b'{"prompt":"\\ud800"}', "JSON"),
    "quotes": (TEXT, b'{"prompt":"' + b'[\\"' * 1_000_000, "JSON"),
    "detokenizing": ("/detokenize", many('{"tokens":[', "-1", "]}"), "tokens"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_refused_and_keeps_nobody_waiting(place: Place, what: str) -> None:
    path, body, said = WRONG[what]
    with longest_turn() as longest:
        status, answer = ask(place, path, body)
    assert status in (400, 404) and said in json.loads(answer)["error"]["message"], answer[:300]
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


@pytest.mark.parametrize(
    "value",
    [[], {}, [[]], {"a": [], "b": {}}, [{"a": '"天\n'}] * 600, [1.5, None, True] * 100, {'"': [list(range(700))]}],
)
def test_json_is_written_in_pieces(value: Any) -> None:
    pieces = list(written(value))
    assert json.loads(b"".join(pieces)) == value and all(len(piece) < 10_000 for piece in pieces)
