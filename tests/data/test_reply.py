"""Thoughts, words and calls of tools, however the text is cut."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zili.data.reply import Call, CallStyle, Reply, Tags, read_call

HERMES = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "天"}}\n</tool_call>'
CODER = "<tool_call>add<param_key>a</param_key><param_value>1</param_value><param_key>b</param_key><param_value>天</param_value></tool_call>"  # noqa: E501
ADD = Call("add", json.dumps({"a": 1, "b": "天"}, ensure_ascii=False))
TOOLS = [{"function": {"name": "any"}}]
SEED = {"think": Tags("<seed:think>", "</seed:think>"), "calls": CallStyle(call=Tags("<seed:call>", "</seed:call>"))}
GLM_TAGS = {"key": Tags("<arg_key>", "</arg_key>"), "value": Tags("<arg_value>", "</arg_value>")}
GLM = {"calls": CallStyle(tagged=True, gap="\n", **GLM_TAGS), "tools": TOOLS}
OTHERS = CODER.replace("param", "arg").replace("><", ">\n<")
CASES = [
    ("hello", {}, "", "hello", []),
    ("<think>hm</think>hello", {}, "hm", "hello", []),
    ("  <think>hm", {}, "hm", "", []),
    ("hm</think>hello", {"thinking": True}, "hm", "hello", []),
    ("</think>hello", {"thinking": True}, "", "hello", []),
    ("say <think> and </think>", {}, "", "say <think> and </think>", []),
    (f"Let me see. {HERMES}", {"tools": TOOLS}, "", "Let me see. ", [ADD]),
    (f"{CODER}{HERMES} done", {"tools": TOOLS}, "", " done", [ADD, ADD]),
    (HERMES, {}, "", HERMES, []),
    ("<tool_call>what?</tool_call>x", {"tools": TOOLS}, "", "<tool_call>what?</tool_call>x", []),
    ('<tool_call>{"name": "add"', {"tools": TOOLS}, "", '<tool_call>{"name": "add"', []),
    ("a < b <tool", {"tools": TOOLS}, "", "a < b <tool", []),
    (OTHERS, GLM, "", "", [ADD]),
    (f"{CODER}hm", GLM, "", f"{CODER}hm", []),
    ("<seed:think>hm</think></seed:think>hello", SEED, "hm</think>", "hello", []),
    ("<think>hm", SEED, "", "<think>hm", []),
    (HERMES.replace("tool_", "seed:"), {**SEED, "tools": TOOLS}, "", "", [ADD]),
    (f"hm {HERMES}</think>{HERMES}", {"thinking": True, "tools": TOOLS}, f"hm {HERMES}", "", [ADD]),
]


@pytest.mark.parametrize(("text", "options", "reasoning", "content", "calls"), CASES)
@given(cuts=st.lists(st.integers(1, 9), max_size=60))
@settings(max_examples=40)
def test_parts_do_not_depend_on_where_it_is_cut(
    text: str, options: dict[str, Any], reasoning: str, content: str, calls: list[Call], cuts: list[int]
) -> None:
    reply = Reply(**options)
    found, rest = [], text
    for cut in cuts:
        found.append(reply.push(rest[:cut]))
        rest = rest[cut:]
    found += [reply.push(rest), reply.finish()]
    assert "".join(parts.reasoning for parts in found) == reasoning
    assert "".join(parts.content for parts in found) == content
    assert [call for parts in found for call in parts.calls] == calls and reply.calls == len(calls)


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ('{"name": "f"}', Call("f", "{}")),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', Call("f", '{"a": 1}')),
        ('{"name": "f", "arguments": [1]}', None),
        ('{"name": 3, "arguments": {}}', None),
        ("[]", None),
        ("f", Call("f", "{}")),
        ("f g", None),
        ("f <param_key>a</param_key> <param_value>[1, NaN]</param_value>\n", Call("f", '{"a": "[1, NaN]"}')),
        ("f<param_key>a</param_key>", None),
        ("f<param_key>a</param_key><param_value>b</param_value>c", None),
        ('{"name": "f", "arguments": {"a": 1e999}}', None),  # Infinity is no JSON
        ('{"name": "f", "arguments": {"a": "\\ud800"}}', None),  # half of a pair, which cannot be sent
        ("[" * 100_000, None),
        ('{"name": "f", "arguments": "' + "[" * 100_000 + '"}', None),
        (f"f<param_key>a</param_key><param_value>{'[' * 9999}</param_value>", Call("f", '{"a": "' + "[" * 9999 + '"}')),
    ],
)
def test_calls_that_can_be_read_and_not(text: str, call: Call | None) -> None:
    assert read_call(text) == call


CHAIN = "f" + "<param_key>a</param_key><param_value>b</param_value>" * 2000
HOSTILE = [
    CHAIN + "!",
    CHAIN + "<param_key>",
    "f" + "<param_key>" * 5000,
    " " * 50_000 + "!",
    "f" + "\n" * 50_000 + "<",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_reading_a_call_takes_time_in_proportion(text: str) -> None:
    """Twenty-two of these parameters took minutes."""
    began = time.thread_time()
    assert read_call(text) is None
    reply = Reply(tools=TOOLS)
    for place in range(0, len(text), 4):
        reply.push(("<tool_call>" if place == 0 else "") + text[place : place + 4])
    assert reply.finish().content.startswith("<tool_call>")
    assert time.thread_time() - began < 1.5


TEXT, MAYBE = {"type": "string"}, {"anyOf": [{"type": "string", "minLength": 2}, {"type": "null"}]}
READ: list[tuple[Any, str, Any]] = [
    (TEXT, "5", "5"),
    (TEXT, "null", "null"),
    (TEXT, '"so"', '"so"'),
    ({"enum": ["1", "2"]}, "1", "1"),
    ({"allOf": [TEXT]}, "true", "true"),
    (MAYBE, "null", None),
    (MAYBE, "12", "12"),
    (MAYBE, '"so"', "so"),
    ({"type": ["string", "integer"]}, "5", 5),
    ({"type": ["string", "integer"]}, "true", "true"),
    ({"type": "integer"}, "5", 5),
    ({}, "5", 5),
    ({"type": "object"}, "{", "{"),
    ({"$ref": "#"}, "[1]", [1]),
    (None, "so", "so"),
]


@pytest.mark.parametrize(("schema", "text", "value"), READ)
def test_a_text_between_tags_is_one_though_it_looks_like_a_number(schema: Any, text: str, value: Any) -> None:
    tool = {"function": {"name": "f", "parameters": {"properties": {"a": schema}}}}
    reply = Reply(tools=[tool])
    parts = reply.push(f"<tool_call>f<param_key>a</param_key><param_value>{text}</param_value></tool_call>")
    assert json.loads(parts.calls[0].arguments) == {"a": value}
