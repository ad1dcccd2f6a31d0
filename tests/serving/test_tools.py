"""Tools and thoughts over the API, with what a model says given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from served import Scripted, listening, tiny_tokenizer

from zili.data.chat import ChatTemplate
from zili.data.dialect import Dialect
from zili.serving.http.api import Served

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
    served = Served(engine, tokenizer, Dialect.named(request.param, tokenizer), "tiny")  # type: ignore[arg-type]
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


CALLED: Any = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "x\\ny"}'}}
RESULT: Any = {"role": "tool", "tool_call_id": "c1", "content": "2"}
TOLD: Any = [*ASKED, {"role": "assistant", "tool_calls": [CALLED]}, RESULT]
KEEPS = "{% for m in messages %}<_user>{{ m.content }}{{ (m.tool_calls or '') | string }}{% endfor %}<_bot>"
FORGETS = "{% for m in messages if m.role != 'system' %}<_user>{{ m.content }}{{ m.name }}{% endfor %}<_bot>"


def prompt_of(template: str, messages: Any) -> str:
    """What a model is asked. Raises BadRequestError."""
    tokenizer = tiny_tokenizer()
    engine = Scripted(tokenizer)
    made = Dialect(ChatTemplate(template), tokenizer) if "{" in template else Dialect.named(template, tokenizer)
    with listening(Served(engine, tokenizer, made, "tiny")) as url:  # type: ignore[arg-type]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        client.chat.completions.create(model="tiny", messages=messages)
    return engine.prompts[-1]


@pytest.mark.parametrize("template", ["telechat1", "chatml", "smollm2"])
def test_calls_of_a_conversation_are_dropped_by_a_template_that_writes_none(template: str) -> None:
    """As vLLM has it: the results are told, and whoever begins with `tools` was answered 400."""
    assert "add" not in prompt_of(template, [*TOLD[:2], *ASKED])


def test_what_others_said_is_not_lost() -> None:
    assert "add" in prompt_of(KEEPS, TOLD)
    asked: Any = [{"role": "system", "content": "Be brief."}, *ASKED]
    with pytest.raises(openai.BadRequestError, match="leaves out of turn 1: 'Be brief"):
        prompt_of(FORGETS, asked)
    # What it says in another order is said.
    assert prompt_of("{% for m in messages | reverse %}<_user>{{ m.content }}{% endfor %}<_bot>", asked)


def test_the_past_in_other_words_is_not_lost() -> None:
    calls: Any = [*ASKED, {"role": "assistant", "content": None, "function_call": CALLED["function"]}]
    assert '"name": "add"' in prompt_of("telechat2", [*calls, {"role": "function", "name": "add", "content": "2"}])
    thinks: Any = [*ASKED, {"role": "assistant", "reasoning": "one and one", "tool_calls": [CALLED]}, RESULT]
    assert "one and one" in prompt_of("telechat3-coder", thinks)
    refuses: Any = [*ASKED, {"role": "assistant", "content": None, "refusal": "I do not add."}, *ASKED]
    assert "I do not add." in prompt_of("telechat2", refuses)
    with pytest.raises(openai.BadRequestError, match="audio"):
        prompt_of("telechat2", [*ASKED, {"role": "assistant", "audio": {"id": "a"}}])
