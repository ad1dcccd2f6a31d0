"""What is told of tokens is true of the text: its bytes, its places, each token by itself."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from served import KEY, KEYS, Place, listening, serve_a_tiny_model, slowed
from waiting import until

from zili.data.sentencepiece import Kind, Piece, definition
from zili.data.tokenizer import DecodeStream, Tokenizer, after_bos
from zili.serving.generate.generation import Token
from zili.serving.http.choices import Told
from zili.serving.http.gate import Limits

FOXES = {"structured_outputs": {"regex": "(\U0001f98a){3}"}, "temperature": 0, "max_tokens": 30}


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    yield from serve_a_tiny_model(KEYS)


def streamed(place: Place, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The choice of each event."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    data = json.dumps({**body, "stream": True}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{place.url}/v1/completions", data, headers)) as answer:
        events = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: {")]
    return [json.loads(event)["choices"][0] for event in events]


def test_parts_of_characters_in_a_chat(place: Place) -> None:
    asked = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 5}
    status, answer = place.post("/v1/chat/completions", {**asked, **FOXES})
    assert status == 200
    told = answer["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in told for byte in token["bytes"]).decode() == "\U0001f98a" * 3
    assert told[0]["token"] == "\\xf0" and told[0]["bytes"] == [0xF0]
    for token in told:
        assert len({json.dumps(one["bytes"]) for one in token["top_logprobs"]}) == 5


def test_tokens_that_share_a_text_are_told_apart(place: Place) -> None:
    asked = {"prompt": "x", "logprobs": 20, **FOXES}
    _, answer = place.post("/v1/completions", asked)
    told = answer["choices"][0]["logprobs"]
    assert told["tokens"][:4] == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\xa6", "bytes:\\x8a"]
    assert told["text_offset"] == [place for place in range(3) for _ in range(4)]
    assert all(len(top) >= 20 for top in told["top_logprobs"])
    token = Token(5, -1.0, {5: -1.0, 6: -2.0})
    twins = Tokenizer.train(["a b"], 300)
    twins.bytes_of = lambda id_: b"a"  # type: ignore[method-assign]
    assert Told(twins).completion([token])["top_logprobs"] == [{"a": -1.0, "token_id:6": -2.0}]


def test_a_stream_counts_on(place: Place) -> None:
    asked = {"prompt": "snow", "max_tokens": 9, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    _, whole = place.post("/v1/completions", asked)
    with slowed(place.served.engine):
        parts = streamed(place, asked)
    assert len(parts) > 2
    for name in ("tokens", "text_offset"):
        assert [one for part in parts for one in part["logprobs"][name]] == whole["choices"][0]["logprobs"][name]
    assert whole["choices"][0]["logprobs"]["text_offset"][-1] > 0


def test_an_echo_is_counted_with_its_prompt(place: Place) -> None:
    asked = {"prompt": "snow \U0001f98a", "echo": True, "logprobs": 1, **FOXES}
    _, answer = place.post("/v1/completions", asked)
    choice = answer["choices"][0]
    told = choice["logprobs"]
    assert choice["text"] == "snow " + "\U0001f98a" * 4
    assert told["text_offset"][-4:] == [8] * 4
    for text, offset in zip(told["tokens"], told["text_offset"], strict=True):
        assert text.startswith("bytes:") or choice["text"].startswith(text, offset)


@pytest.mark.parametrize("prompt", ["snow \U0001f98a", "<_user>snow", "", [7, 72]])
def test_an_echo_is_counted_as_it_is_written(place: Place, prompt: Any) -> None:
    """BOS is no part of it, special tokens that were asked for are, and those that are said are left out."""
    plain = place.served.tokenizer
    tokenizer = Tokenizer(after_bos(plain.definition, "<_system>"), end_token=plain.end_token)
    prompt = [plain.special_tokens["<_user>"], *prompt] if isinstance(prompt, list) else prompt
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 6, "ignore_eos": True, "temperature": 0}
    with listening(replace(place.served, tokenizer=tokenizer)) as url:
        bias = {"logit_bias": {str(plain.special_tokens["<_user>"]): 100, "72": 99}, "frequency_penalty": 2}
        _, answer = replace(place, url=url).post("/v1/completions", {**body, **bias})
    (choice,) = answer["choices"]
    told = choice["logprobs"]
    assert told["text_offset"][0] == 0 and "<_user>" in told["tokens"]
    for text, offset, after in zip(told["tokens"], told["text_offset"], [*told["text_offset"][1:], None], strict=True):
        assert text.startswith("bytes:") or choice["text"][offset:after] in (text, "")


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_sentencepiece_s_spaces(tmp_path: Path, dummy_prefix: bool) -> None:
    texts = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [Kind.UNKNOWN, Kind.CONTROL, *[Kind.BYTE] * 256]
    pieces = [Piece(text, 0.0, kind) for text, kind in zip(texts, kinds, strict=True)]
    words = ["\u2581", "i", "t", "s", "\u2581i", "\u2581it", "it", "\u2581is"]
    pieces += [Piece(text, float(-number), Kind.NORMAL) for number, text in enumerate(words)]
    tokenizer = Tokenizer(definition(pieces, dummy_prefix=dummy_prefix), end_token="</s>")
    text = "it is \U0001f98a"
    ids = tokenizer.encode(text).tolist()
    told = Told(tokenizer).completion([Token(id_, -1.0, {}) for id_ in ids])
    assert told["tokens"][:3] == ["it", " is", " "] and told["text_offset"] == [0, 2, 5, 6, 6, 6, 6]
    bytes_of = [one["bytes"] for one in Told(tokenizer).chat([Token(id_, -1.0, {}) for id_ in ids])["content"]]
    assert bytes(byte for one in bytes_of for byte in one).decode() == text == tokenizer.decode(ids)
    # What goes on with a text begins with its own space.
    end = tokenizer.end_id
    for before, begins in (([end, ids[0]], " is"), ([end], "is" if dummy_prefix else " is"), ([], None)):
        stream = DecodeStream(tokenizer, before=before)
        said = stream.push(ids[1])
        told = Told(tokenizer, before).completion([Token(ids[1], -1.0, {})])
        assert told["tokens"] == [said] and (begins is None or said == begins)
    half = DecodeStream(tokenizer, before=ids[:-1])
    assert half.push(ids[-1]) == "\U0001f98a"


def test_how_many_are_kept_has_a_bound(place: Place) -> None:
    limits = Limits(log_probabilities=2000)
    with listening(replace(place.served, limits=limits)) as url:
        near = replace(place, url=url)
        text: dict[str, Any] = {"prompt": "snow", "max_tokens": 50, "ignore_eos": True}
        status, answer = near.post("/v1/completions", {**text, "logprobs": 20, "n": 2})
        assert status == 400 and answer["error"]["param"] == "logprobs" and "2,000" in answer["error"]["message"]
        chat = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 20}
        assert near.post("/v1/chat/completions", chat)[0] == 400  # up to the end of the context
        assert near.post("/v1/completions", {**text, "logprobs": 20})[0] == 200
        some = {**text, "max_tokens": 10, "logprobs": 19, "n": 4}  # 800
        with slowed(place.served.engine):
            others = [threading.Thread(target=near.post, args=("/v1/completions", some)) for _ in range(2)]
            for other in others:
                other.start()
            until(lambda: sum(place.served.engine.load) == 8)
            status, answer = near.post("/v1/completions", some)
            assert status == 503 and "log-probabilities" in answer["error"]["message"]
            for other in others:
                other.join()
        assert near.post("/v1/completions", some)[0] == 200
