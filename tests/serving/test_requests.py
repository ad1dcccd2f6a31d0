"""Every field that OpenAI's and vLLM's documents name: what is absent, what is done, what is refused."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from email.message import Message
from typing import Any

import openai
import pytest
import tokenizers
import torch
from served import KEY, KEYS, Place, Scripted, listening, serve_a_tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from zili.data.dialect import Dialect
from zili.serving.http.api import Served
from zili.serving.http.protocol import BaseModel, ChatRequest, CompletionRequest, TokenizeRequest

ASKED: list[Any] = [{"role": "user", "content": "snow?"}]
BODIES: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (ChatRequest, {"messages": ASKED}),
    (CompletionRequest, {"prompt": "snow"}),
    (TokenizeRequest, {"prompt": "snow"}),
]


@pytest.mark.parametrize(("model", "body"), BODIES)
def test_null_is_absent(model: type[BaseModel], body: dict[str, Any]) -> None:
    plain = model.model_validate(body)
    names = {field.alias or name for name, field in model.model_fields.items() if not field.is_required()}
    assert model.model_validate({**body, **dict.fromkeys(names)}) == plain
    described = model.model_json_schema()["properties"]
    assert all({"type": "null"} in described[name]["anyOf"] for name in names)


def test_null_is_absent_inside() -> None:
    tool: Any = {"type": None, "function": {"name": "add", "description": None, "strict": None}}
    asked = ChatRequest.model_validate(
        {
            "messages": [{"role": "assistant", "content": None, "tool_calls": None, "name": None}],
            "stream_options": {"include_usage": None},
            "response_format": {"type": "json_object", "json_schema": None},
            "structured_outputs": {"regex": None, "json": {"const": None}, "choice": None},
            "tools": [tool],
            "chat_template_kwargs": {"enable_thinking": None},
        }
    )
    assert not asked.with_usage and not asked.chat_template_kwargs
    assert asked.offered == [{"type": "function", "function": {"name": "add"}}]
    assert asked.structured_outputs is not None and asked.structured_outputs.json_ == {"const": None}


# ---- what is done


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    yield from serve_a_tiny_model(KEYS)


def said(place: Place, **more: Any) -> tuple[str, str]:
    """Text and end of a greedy completion."""
    status, answer = place.post("/v1/completions", {"prompt": "snow", "max_tokens": 12, "temperature": 0, **more})
    assert status == 200, answer
    return answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]


def greedy(place: Place, change: Callable[[Tensor, list[int]], Tensor]) -> list[int]:
    """Twelve ids, each the likeliest once the logits `[V]` are changed by what was said before."""
    ids, count = place.served.tokenizer.encode("snow").tolist(), place.served.tokenizer.vocab_size
    start = len(ids)
    for _ in range(12):
        with torch.no_grad():
            logits = place.model(torch.tensor([ids]))[0, -1, :count]
        ids.append(int(change(logits, ids[start:]).argmax()))
    return ids[start:]


def test_frequency_and_presence(place: Place) -> None:
    def lowered(logits: Tensor, before: list[int]) -> Tensor:
        counts = torch.bincount(torch.tensor(before, dtype=torch.int64), minlength=len(logits))
        return logits - 0.5 * counts - 1.5 * (counts > 0)

    expected = place.served.tokenizer.decode(greedy(place, lowered))
    more = {"frequency_penalty": 0.5, "presence_penalty": 1.5, "ignore_eos": True}
    assert said(place, **more) == (expected, "length")
    assert said(place, ignore_eos=True)[0] != expected


def test_stops_by_id_and_not_too_soon(place: Place) -> None:
    ids = greedy(place, lambda logits, before: logits)
    decode = place.served.tokenizer.decode
    third = {"stop_token_ids": [ids[2]], "ignore_eos": True}
    before = ids[: ids.index(ids[2])]
    assert said(place, **third) == (decode(before), "stop")
    text, end = said(place, **third, min_tokens=5)
    assert end == "length" or len(place.served.tokenizer.encode(text)) >= 5
    assert text != decode(before)
    first = decode(ids[:1])
    assert said(place, stop=first, ignore_eos=True) == ("", "stop")
    assert said(place, stop=first, ignore_eos=True, min_tokens=1)[0].startswith(first)


def test_a_share_of_the_likeliest(place: Place) -> None:
    drawn = {said(place, temperature=2, min_p=1, seed=seed, ignore_eos=True)[0] for seed in range(3)}
    assert drawn == {said(place, ignore_eos=True)[0]}


def test_an_answer_goes_on(place: Place) -> None:
    asked = [*ASKED, {"role": "assistant", "content": "It is wh"}]
    body: dict[str, Any] = {"messages": asked, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    status, answer = place.post("/v1/chat/completions", {**body, "continue_final_message": True})
    dialect, tokenizer = place.served.dialect, place.served.tokenizer
    assert status == 200 and dialect is not None
    open_turn = dialect.render(ASKED, add_generation_prompt=True).ids
    ids = [*open_turn, *tokenizer.encode("It is wh").tolist()]
    _, plain = place.post("/v1/completions", {**body, "messages": None, "prompt": ids})
    assert answer["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    assert answer["usage"]["prompt_tokens"] == len(ids)
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert place.post("/v1/chat/completions", {**body, **both})[0] == 400
    _, closed = place.post("/v1/chat/completions", {**body, "messages": ASKED, "add_generation_prompt": False})
    assert closed["usage"]["prompt_tokens"] == len(dialect.render(ASKED).ids)


def test_tokens_by_their_names(place: Place) -> None:
    special = place.served.tokenizer.special_tokens["<_user>"]
    more = {"logit_bias": {str(special): 100}, "max_tokens": 2}
    assert said(place, **more, skip_special_tokens=False, ignore_eos=True)[0] == "<_user><_user>"
    assert said(place, **more, ignore_eos=True)[0] == ""


def test_marks_in_a_prompt_are_tokens_and_in_a_message_text(place: Place) -> None:
    """As transformers and vLLM encode a prompt."""
    tokenizer, text = place.served.tokenizer, "<_user>snow?<_bot>"
    reference = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.definition))
    expected = reference.encode(text)
    assert expected[0] == tokenizer.special_id("<_user>") and expected[-1] == tokenizer.special_id("<_bot>")
    _, told = place.post("/tokenize", {"prompt": text})
    assert told["tokens"] == expected
    _, answer = place.post("/v1/completions", {"prompt": text, "max_tokens": 3, "temperature": 0})
    _, same = place.post("/v1/completions", {"prompt": expected, "max_tokens": 3, "temperature": 0})
    assert answer["choices"] == same["choices"] and answer["usage"]["prompt_tokens"] == len(expected)
    said = [{"role": "user", "content": text}]
    _, chat = place.post("/v1/chat/completions", {"messages": said, "max_tokens": 1})
    assert chat["usage"]["prompt_tokens"] > len(expected) + 5


# ---- what is refused

UNSERVED: dict[str, Any] = {
    "best_of": 3,
    "suffix": "x",
    "use_beam_search": True,
    "length_penalty": 0.5,
    "include_stop_str_in_output": True,
    "truncate_prompt_tokens": 5,
    "prompt_logprobs": 1,
    "prompt_embeds": "x",
    "allowed_token_ids": [1],
    "bad_words": ["x"],
    "return_token_ids": True,
    "priority": 1,
    "cache_salt": "x",
    "guided_json": {},
    "watermarking": True,
    "ec_transfer_params": {"a": 1},
    "thinking_token_budget": 5,
    "routed_experts_prompt_start": 1,
    "guided_regex": "a",
    "service_tier": "flex",
    "min_tokens": 30,
    "stop_token_ids": [100_000],
    "min_p": 2,
    "frequency_penalty": 3,
}
UNSERVED_CHAT: dict[str, Any] = {
    "audio": {"voice": "x"},
    "modalities": ["text", "audio"],
    "functions": [{"name": "x"}],
    "function_call": {"name": "x"},
    "store": True,
    "verbosity": "low",
    "reasoning_effort": "high",
    "web_search_options": {},
    "documents": [{"text": "x"}],
    "chat_template": "x",
    "echo": True,
    "return_prompt_text": True,
    "include_reasoning": False,
    "top_logprobs": 2,
    "tool_choice": {"type": "allowed_tools", "allowed_tools": {}},
}


@pytest.mark.parametrize("name", [*UNSERVED, *UNSERVED_CHAT])
def test_fields_that_are_not_served(place: Place, name: str) -> None:
    chat = name in UNSERVED_CHAT
    body: dict[str, Any] = {"messages": ASKED} if chat else {"prompt": "snow"}
    value = UNSERVED_CHAT[name] if chat else UNSERVED[name]
    path = "/v1/chat/completions" if chat else "/v1/completions"
    status, answer = place.post(path, {**body, "max_tokens": 2, name: value})
    error = answer["error"]
    assert status == 400 and (error["param"] == name or name in error["message"]), error


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"stop": ["a", 5]}, "stop.1"),
        ({"messages": [*ASKED, {"role": "user", "content": [{"text": "a"}]}]}, "messages.1.content.0.type"),
        ({"tool_choice": {"function": {}}}, "tool_choice.function.name"),
        ({"structured_outputs": {"json": [1]}}, "structured_outputs.json"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"logit_bias": {"5": True}}, "logit_bias.5"),
        ({"temperature": "hot"}, "temperature"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"function": {"name": "f"}}}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        *(
            ({"chat_template_kwargs": {name: "x"}}, "chat_template_kwargs")
            for name in ("messages", "bos_token", "self")
        ),
        ({"top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_what_is_wrong_is_named_as_it_was_sent(place: Place, more: dict[str, Any], param: str) -> None:
    status, answer = place.post("/v1/chat/completions", {"messages": ASKED, **more})
    assert (status, answer["error"]["param"]) == (400, param) and answer["error"]["message"].startswith(f"{param}: ")


def test_a_form_that_is_wrong_is_named_as_it_was_asked_for(place: Place) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("structured_outputs", {"structured_outputs": {"json": {"not": {}}}}),
        ("structured_outputs", {"structured_outputs": {"grammar": "x"}}),
        ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}),
        ("tools", {"tools": [tool], "tool_choice": "required"}),
    ]
    for param, more in asked:
        status, answer = place.post("/v1/chat/completions", {"messages": ASKED, "max_tokens": 1, **more})
        assert (status, answer["error"]["param"]) == (400, param) and "cpp" not in answer["error"]["message"], answer
    assert said(place, structured_outputs={"regex": "^$"}) == ("", "stop")


def test_parts_that_are_no_text(place: Place) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "data:image/png,"}}]
    status, answer = place.post("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]})
    assert status == 400 and answer["error"]["param"] == "messages"
    assert answer["error"]["message"] == "messages: a part is of type 'image_url'; this model reads text"


def test_a_beginning_is_put_before_a_prompt_unless_it_is_not_asked_for() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.begin_ids = (tokenizer.special_id("<_start>"),)
    engine = Scripted(tokenizer)
    served = Served(engine, tokenizer, Dialect.named("telechat1", tokenizer), "tiny")  # type: ignore[arg-type]
    with listening(served) as url:
        place = Place(url, served, None)  # type: ignore[arg-type]
        for more in ({}, {"add_special_tokens": False}):
            assert place.post("/v1/completions", {"prompt": "snow", **more})[0] == 200
            _, told = place.post("/tokenize", {"prompt": "snow", **more})
            assert tokenizer.decode(told["tokens"]) == engine.prompts[-1]
    assert engine.prompts == ["<_start>snow", "snow"]


def test_fields_that_change_nothing(place: Place) -> None:
    more = {
        "logit_bias": {"5": None},
        "n": 2,
        "best_of": 2,
        "suffix": "",
        "use_beam_search": False,
        "length_penalty": 1,
        "priority": 0,
    }
    assert place.post("/v1/completions", {"prompt": "snow", "max_tokens": 2, **more, "top_k": -1})[0] == 200
    chat = {"modalities": ["text"], "functions": [], "store": False, "verbosity": "medium", "user": "x", "metadata": {}}
    status, answer = place.post(
        "/v1/chat/completions", {"messages": ASKED, "max_tokens": 2, **chat, "request_id": "a1"}
    )
    assert status == 200 and answer["id"] == "chatcmpl-a1"


def test_tools_that_a_template_cannot_tell() -> None:
    tokenizer = tiny_tokenizer()
    served = Served(Scripted(tokenizer), tokenizer, Dialect.named("telechat1", tokenizer), "tiny")  # type: ignore[arg-type]
    tool = {"type": "function", "function": {"name": "add"}}
    with listening(served) as url:
        place = Place(url, served, None)  # type: ignore[arg-type]
        status, answer = place.post("/v1/chat/completions", {"messages": ASKED, "tools": [tool]})
        assert status == 400 and answer["error"]["param"] == "tools"
        assert place.post("/v1/chat/completions", {"messages": ASKED, "tools": [tool], "tool_choice": "none"})[0] == 200


# ---- what stands around a request


def ask(url: str, method: str, headers: dict[str, str], body: Any = None) -> tuple[int, Message, str]:
    """Status, headers and text."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=60) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def test_a_model_by_its_name(place: Place) -> None:
    client = place.client()
    (listed,) = client.models.list().data
    assert client.models.retrieve(listed.id) == listed
    for name in ("other", "a/b"):
        with pytest.raises(openai.NotFoundError, match="not served"):
            client.models.retrieve(name)


def test_who_may_ask_from_another_page() -> None:
    tokenizer = tiny_tokenizer()
    page = "https://chat.example.org"
    served = Served(Scripted(tokenizer), tokenizer, Dialect.named("telechat2", tokenizer), "tiny", KEYS, origins=[page])  # type: ignore[arg-type]
    with listening(served) as url:
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
        for origin, may in ((page, True), ("https://evil.example", False)):
            status, headers, _ = ask(f"{url}/v1/chat/completions", "OPTIONS", {"Origin": origin, **asks})
            assert (status == 200) == may
            assert headers.get("access-control-allow-origin") == (page if may else None)
        status, headers, _ = ask(f"{url}/v1/chat/completions", "POST", {"Origin": page}, {})
        assert status == 401 and headers["access-control-allow-origin"] == page


def test_proxies_are_asked_to_keep_nothing_back(place: Place) -> None:
    body = {"prompt": "snow", "max_tokens": 2, "stream": True}
    _, headers, text = ask(f"{place.url}/v1/completions", "POST", {"Authorization": f"Bearer {KEY}"}, body)
    assert headers["x-accel-buffering"] == "no" and text.endswith("data: [DONE]\n\n")


def test_of_a_key_that_is_given_twice_the_last_counts(place: Place) -> None:
    """As OpenAI's server and vLLM have it."""
    status, answer = place.post(
        "/v1/completions", b'{"prompt": "a", "max_tokens": 9, "max_tokens": 1, "max_tokens": 2}'
    )
    assert status == 200 and answer["usage"]["completion_tokens"] <= 2


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_usage_so_far(place: Place, path: str) -> None:
    asked = {"messages": ASKED} if "chat" in path else {"prompt": "snow"}
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**asked, "max_tokens": 5, "ignore_eos": True, "stream": True, "stream_options": options}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(place.url + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    counts = [json.loads(line[6:])["usage"]["completion_tokens"] for line in lines if line.startswith("data: {")]
    assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == 5
