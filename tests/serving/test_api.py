"""The API as OpenAI's own client and plain HTTP see it."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from served import KEY, KEYS, Place, serve_a_tiny_model, slowed
from waiting import until

from zili.errors import ConfigError
from zili.serving.generate.generation import Ask, Sampling, generate
from zili.serving.generate.text_stream import AnswerText, StopText
from zili.serving.http.answers import Stream
from zili.serving.http.keys import Holder, Key, Keys, TooMuch


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    yield from serve_a_tiny_model(KEYS)


ASKED: list[Any] = [{"role": "user", "content": "What is the colour of snow?"}]


def greedy(place: Place, ids: list[int], count: int) -> list[int]:
    vocabulary = place.served.tokenizer.vocab_size
    sampling = Sampling(temperature=0)
    return list(generate(place.model, ids, max_new_tokens=count, sampling=sampling, vocabulary=vocabulary))


def prompt_of(place: Place, messages: list[Any]) -> list[int]:
    assert place.served.dialect is not None
    return place.served.dialect.render(messages, add_generation_prompt=True).ids


def test_chat_says_what_the_model_says(place: Place) -> None:
    ids = prompt_of(place, ASKED)
    expected = place.served.tokenizer.decode(greedy(place, ids, 12))
    answer = place.client().chat.completions.create(
        model="tiny", messages=ASKED, temperature=0, max_tokens=12, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length" and answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
    parts = list(
        place.client().chat.completions.create(
            model="tiny",
            messages=ASKED,
            temperature=0,
            max_completion_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == expected
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-2].choices[0].finish_reason == "length"
    assert parts[-1].choices == [] and parts[-1].usage is not None and parts[-1].usage.completion_tokens == 12
    # The prompt was there already, but for its last token.
    assert parts[-1].usage.prompt_tokens_details is not None
    assert parts[-1].usage.prompt_tokens_details.cached_tokens == len(ids) - 1


def test_log_probabilities_and_choices(place: Place) -> None:
    answer = place.client().chat.completions.create(
        model="tiny", messages=ASKED, seed=3, n=3, max_tokens=5, logprobs=True, top_logprobs=2, temperature=1
    )
    again = place.client().chat.completions.create(
        model="tiny", messages=ASKED, seed=3, n=3, max_tokens=5, logprobs=True, top_logprobs=2, temperature=1
    )
    said = [choice.message.content for choice in answer.choices]
    assert said == [choice.message.content for choice in again.choices] and len(set(said)) > 1
    for choice in answer.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        for token in choice.logprobs.content:
            assert len(token.top_logprobs) == 2 and token.logprob <= token.top_logprobs[0].logprob + 1e-6


def test_a_prompt_of_ids_is_scored(place: Place) -> None:
    """As lm-eval asks: echo, logprobs, nothing new."""
    ids = place.served.tokenizer.encode("What is the colour of snow? white").tolist()
    status, answer = place.post(
        "/v1/completions", {"prompt": [ids, ids[:5]], "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    )
    assert status == 200
    with torch.no_grad():
        vocabulary = place.served.tokenizer.vocab_size
        expected = place.model(torch.tensor([ids[:-1]]))[0, :, :vocabulary].log_softmax(-1)
    for choice, count in zip(answer["choices"], (len(ids), 5), strict=True):
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is None and len(told["tokens"]) == count
        wanted = [float(row[id_]) for row, id_ in zip(expected, ids[1:count], strict=False)]
        assert told["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-4)
        assert "".join(told["tokens"]) == choice["text"]
    assert answer["usage"]["completion_tokens"] == 0


def test_stops_biases_and_streams_of_text(place: Place) -> None:
    client = place.client()
    whole = client.completions.create(model="tiny", prompt="snow", temperature=0, max_tokens=30).choices[0].text
    stop = whole[8:11]
    cut = client.completions.create(model="tiny", prompt="snow", temperature=0, max_tokens=30, stop=[stop, "\x00"])
    assert cut.choices[0].text == whole[: whole.index(stop)] and cut.choices[0].finish_reason == "stop"
    parts = list(
        client.completions.create(model="tiny", prompt="snow", temperature=0, max_tokens=30, stop=stop, stream=True)
    )
    assert "".join(part.choices[0].text for part in parts) == cut.choices[0].text
    id_ = place.served.tokenizer.encode("w").tolist()[0]
    pushed = client.completions.create(
        model="tiny", prompt=["a", "b"], max_tokens=3, temperature=0, logit_bias={str(id_): 100}
    )
    assert [choice.text for choice in pushed.choices] == ["www", "www"]


BAD: list[tuple[str, Any, int, str]] = [
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {"messages": "hello"}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages"),
    ("/v1/chat/completions", {"messages": ASKED, "temperature": 9}, 400, "temperature"),
    ("/v1/chat/completions", {"messages": ASKED, "n": 1000}, 400, "n"),
    ("/v1/chat/completions", {"messages": ASKED, "model": "gpt-9"}, 404, "there is 'tiny'"),
    ("/v1/chat/completions", {"messages": ASKED, "max_tokens": 1000}, 400, "the context holds 256"),
    ("/v1/chat/completions", {"messages": ASKED * 1000}, 400, "the context holds 256"),
    ("/v1/chat/completions", {"messages": ASKED, "logit_bias": {"x": 1}}, 400, "ids of tokens"),
    ("/v1/completions", {"prompt": [999999]}, 400, "token 999999"),
    ("/v1/completions", {"prompt": []}, 400, "prompt"),
    ("/v1/completions", {}, 400, "prompt"),
    ("/v1/completions", b"{", 400, "JSON"),
    ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "status", "said"), BAD)
def test_refusals_have_a_status_and_a_reason(place: Place, path: str, body: Any, status: int, said: str) -> None:
    found, answer = place.post(path, body)
    assert found == status and said in answer["error"]["message"], answer
    assert place.served.engine.load == (0, 0)


def test_keys(place: Place) -> None:
    status, answer = place.post("/v1/completions", {"prompt": "x"}, key="sk-wrong")
    assert status == 401 and answer["error"]["code"] == "invalid_api_key"
    assert place.post("/v1/completions", {"prompt": "x", "max_tokens": 1}, key="sk-seldom")[0] == 200
    with urllib.request.urlopen(f"{place.url}/health", timeout=10) as answer_of_health:
        assert json.load(answer_of_health) == {"status": "ok"}
    assert [model.id for model in place.client().models.list()] == ["tiny"]


def test_tokens_there_and_back(place: Place) -> None:
    _, ids = place.post("/tokenize", {"prompt": "Himmel 天"})
    assert place.post("/detokenize", {"tokens": ids["tokens"]})[1] == {"prompt": "Himmel 天"}
    assert ids["count"] == len(ids["tokens"]) and ids["max_model_len"] == 256


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_the_slot(place: Place, stream: bool) -> None:
    body = json.dumps({"prompt": "snow", "max_tokens": 250, "stream": stream, "ignore_eos": True, "n": 4}).encode()
    host, port = place.url.removeprefix("http://").split(":")
    engine = place.served.engine
    with slowed(engine), socket.create_connection((host, int(port)), timeout=60) as wire:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        wire.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        if stream:
            assert wire.recv(100)
        until(lambda: engine.load == (4, 0))
        wire.close()
        until(lambda: engine.load == (0, 0), seconds=10)  # not the 25 that the answers would take


def test_what_might_become_a_stop_is_held_back() -> None:
    stop = StopText(["STOP", "\n\n"])
    assert [stop.push(piece) for piece in ("ab", "c\n", "dS", "TO", "x", "\n", "\nrest")] == [
        *("ab", "c", "\nd", "", "STOx", "", "")
    ]
    assert stop.stopped and stop.finish() == ""
    open_end = StopText(["STOP"])
    assert open_end.push("an ST") == "an " and open_end.finish() == "ST"


def test_a_key_has_a_rate_and_a_quota(place: Place) -> None:
    body = {"prompt": "snow and more of it", "max_tokens": 5}
    assert place.post("/v1/completions", body, key="sk-little")[0] == 200
    with pytest.raises(openai.RateLimitError) as refused:
        place.client("sk-little").completions.create(model="tiny", **body)
    assert "10 tokens a day" in str(refused.value)
    assert 86_000 < int(refused.value.response.headers["retry-after"]) <= 86_400


def test_answers_under_way_count_for_a_quota(place: Place) -> None:
    """Fifty at once had what one may have."""
    holder = KEYS.find("sk-hundred")
    assert holder is not None
    body = {"prompt": "x", "max_tokens": 29, "ignore_eos": True}
    told: list[int] = []
    threads = [
        threading.Thread(target=lambda: told.append(place.post("/v1/completions", body, key="sk-hundred")[0]))
        for _ in range(20)
    ]
    with slowed(place.served.engine):
        for thread in threads:
            thread.start()
        until(lambda: len(told) == 17)
        assert set(told) == {429} and holder.free() == 10 and holder.tokens == 0
        status, answer = place.post("/v1/completions", {**body, "max_tokens": 10}, key="sk-hundred")
        assert status == 429 and "90 of answers under way" in answer["error"]["message"]
    for thread in threads:
        thread.join()
    assert told.count(200) == 3 and holder.tokens == 90 and holder.free() == 10
    status, answer = place.post("/v1/completions", body, key="sk-hundred")
    assert status == 429 and "of 100 tokens a day 10 are left" in answer["error"]["message"]


def test_an_answer_of_no_stated_length_has_what_the_quota_has_room_for(place: Place) -> None:
    status, answer = place.post("/v1/chat/completions", {"messages": ASKED, "ignore_eos": True}, key="sk-two-hundred")
    assert status == 200 and answer["usage"]["total_tokens"] == 200
    assert answer["choices"][0]["finish_reason"] == "length"


def test_what_was_promised_and_not_used_is_given_back(place: Place) -> None:
    now = [0.0]
    holder = Holder("x", Key(key="sk-12345", tokens_per_day=100), lambda: now[0])
    holder.promise(60)
    with pytest.raises(TooMuch, match="100 tokens a day 100 are left, and this may take 60 beside 60") as refused:
        holder.promise(60)
    assert refused.value.retry_after == 1
    holder.used(10, 60)
    with pytest.raises(TooMuch, match="90 are left, and this may take 91") as refused:
        holder.promise(91)
    assert refused.value.retry_after == 86_400
    holder.promise(90)
    now[0] = 90_000.0
    assert holder.free() == 10, "what is under way is used tomorrow"
    with pytest.raises(TooMuch):
        holder.promise(11)
    holder.used(90, 90)
    assert holder.free() == 10


def test_who_is_gone_before_the_answer_begins_leaves_nothing_promised(place: Place) -> None:
    async def asked() -> None:
        text = AnswerText(place.served.tokenizer)
        Stream(place.served.engine, Ask([1], 20), text, asyncio.Event(), holder=holder)

    holder = Holder("x", Key(key="sk-12345", tokens_per_day=100))
    asyncio.run(asked())
    gc.collect()
    assert (holder.free() or 0) >= 78
    until(lambda: place.served.engine.load == (0, 0))


def test_rates_fill_up_again() -> None:
    now = [-5000.0]
    holder = Holder("x", Key(key="sk-12345", requests_per_minute=2, tokens_per_day=100), lambda: now[0])
    now[0] = 0.0  # a day begins with the first request
    holder.ask()
    holder.ask()
    with pytest.raises(TooMuch, match="2 requests a minute") as refused:
        holder.ask()
    assert refused.value.retry_after == 30
    now[0] = 30.0
    holder.ask()
    holder.used(100)
    now[0] = 1000.0
    with pytest.raises(TooMuch, match="100 tokens a day"):
        holder.ask()
    now[0] = 86_399.0
    with pytest.raises(TooMuch):
        holder.ask()
    now[0] = 86_400.0
    holder.ask()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no keys"),
        ("[a", "cannot be read"),
        ("[a]\nkey = 'short'", "a table|key: String should have at least 8"),
        ("[a]\nkey = 'sk-12345678'\nrate = 3", "rate: Extra inputs"),
        ("[a]\nkey = 'sk-12345678'\n[b]\nkey = 'sk-12345678'", "the same key"),
    ],
)
def test_a_file_of_keys(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="chmod 600"):
        Keys.read(file)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match=said) as refused:
        Keys.read(file)
    assert "12345678" not in str(refused.value)
    file.write_text("[a]\nkey = 'sk-12345678'\n", encoding="utf-8")
    keys = Keys.read(file)
    assert keys.find("sk-12345678") is keys.holders[0] and keys.find("") is None and keys.find("sk-1234567") is None


def test_metrics_have_vllm_s_names(place: Place) -> None:
    before = metrics(place)
    place.post("/v1/completions", {"prompt": "snow is white", "max_tokens": 7, "ignore_eos": True})
    after = metrics(place)
    assert after["vllm:generation_tokens_total"] - before.get("vllm:generation_tokens_total", 0) == 7
    assert after["vllm:e2e_request_latency_seconds_count"] - before["vllm:e2e_request_latency_seconds_count"] == 1
    assert (
        after["vllm:num_requests_running"]
        == after["vllm:num_requests_waiting"]
        == after["vllm:kv_cache_usage_perc"]
        == 0
    )


def metrics(place: Place) -> dict[str, float]:
    with urllib.request.urlopen(f"{place.url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    rows = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name.split("{")[0]: float(value) for name, _, value in rows}


def test_the_page_comes_along_and_may_load_nothing_else(place: Place) -> None:
    with urllib.request.urlopen(f"{place.url}/", timeout=10) as answer:
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        html = answer.read().decode()
    for name in re.findall(r'(?:src|href)="(page/[^"]+)"', html):
        with urllib.request.urlopen(f"{place.url}/{name}", timeout=10) as answer:
            assert answer.status == 200 and answer.read()
