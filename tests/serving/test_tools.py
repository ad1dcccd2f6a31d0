"""Tools and thoughts over the API, with what a model says given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from served import Scripted, listening, tiny_tokenizer

from zili.data.chat import ChatTemplate
from zili.serving.api import Served

ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
SAID = '<think>They want a sum.</think>I add.<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ASKED: Any = [{"role": "user", "content": "1 + 1?"}]


@pytest.fixture(scope="module", params=["telechat2", "telechat3"])
def scripted(request: pytest.FixtureRequest) -> Iterator[tuple[Scripted, openai.OpenAI, str]]:
    tokenizer = tiny_tokenizer()
    engine = Scripted(tokenizer)
    served = Served(engine, tokenizer, ChatTemplate.named(request.param), "tiny")  # type: ignore[arg-type]
    with listening(served) as url:
        # A prompt of TeleChat3's ends with <think>.
        engine.text = SAID.removeprefix("<think>") if request.param == "telechat3" else SAID
        yield engine, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), request.param


def test_a_call_and_what_comes_after_it(scripted: tuple[Scripted, openai.OpenAI, str]) -> None:
    engine, client, _ = scripted
    answer = client.chat.completions.create(model="tiny", messages=ASKED, tools=[ADD])
    message = answer.choices[0].message
    assert '"name": "add"' in engine.prompts[-1] and answer.choices[0].finish_reason == "tool_calls"
    assert message.content == "I add." and message.reasoning_content == "They want a sum."  # type: ignore[attr-defined]
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "add", {"a": 1})
    # As clients do: what came goes back, with the result.
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "2"}
    again: Any = [*ASKED, message.model_dump(exclude_none=True), result]
    client.chat.completions.create(model="tiny", messages=again, tools=[ADD])
    assert "<tool_call>" in engine.prompts[-1] and "<tool_response>" in engine.prompts[-1]


def test_streamed(scripted: tuple[Scripted, openai.OpenAI, str]) -> None:
    _, client, _ = scripted
    deltas, finish = [], None
    for part in client.chat.completions.create(model="tiny", messages=ASKED, tools=[ADD], stream=True):
        deltas.append(part.choices[0].delta)
        finish = part.choices[0].finish_reason or finish
    assert "".join(delta.content or "" for delta in deltas) == "I add."
    assert "".join(getattr(delta, "reasoning_content", "") or "" for delta in deltas) == "They want a sum."
    (call,) = [call for delta in deltas for call in delta.tool_calls or []]
    assert call.index == 0 and call.function is not None and call.function.name == "add" and finish == "tool_calls"


def test_without_tools_it_is_text(scripted: tuple[Scripted, openai.OpenAI, str]) -> None:
    engine, client, _ = scripted
    for options in ({}, {"tools": [ADD], "tool_choice": "none"}):
        answer = client.chat.completions.create(model="tiny", messages=ASKED, **options)
        message = answer.choices[0].message
        assert message.tool_calls is None and "<tool_call>" in (message.content or "")
        assert answer.choices[0].finish_reason == "stop" and "add" not in engine.prompts[-1].split("1 + 1?")[0]


def test_a_tool_s_name_is_a_name(scripted: tuple[Scripted, openai.OpenAI, str]) -> None:
    _, client, _ = scripted
    bad: Any = {"type": "function", "function": {"name": "a b"}}
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="tiny", messages=ASKED, tools=[bad])
