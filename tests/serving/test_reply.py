"""Thoughts, words and calls of tools, however the text is cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zili.serving.reply import Call, Reply, read_call

HERMES = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "天"}}\n</tool_call>'
CODER = "<tool_call>add<param_key>a</param_key><param_value>1</param_value><param_key>b</param_key><param_value>天</param_value></tool_call>"  # noqa: E501
ADD = Call("add", json.dumps({"a": 1, "b": "天"}, ensure_ascii=False))
CASES = [
    ("hello", {}, "", "hello", []),
    ("<think>hm</think>hello", {}, "hm", "hello", []),
    ("  <think>hm", {}, "hm", "", []),
    ("hm</think>hello", {"thinking": True}, "hm", "hello", []),
    ("</think>hello", {"thinking": True}, "", "hello", []),
    ("say <think> and </think>", {}, "", "say <think> and </think>", []),
    (f"Let me see. {HERMES}", {"tools": True}, "", "Let me see. ", [ADD]),
    (f"{CODER}{HERMES} done", {"tools": True}, "", " done", [ADD, ADD]),
    (HERMES, {}, "", HERMES, []),
    ("<tool_call>what?</tool_call>x", {"tools": True}, "", "<tool_call>what?</tool_call>x", []),
    ('<tool_call>{"name": "add"', {"tools": True}, "", '<tool_call>{"name": "add"', []),
    ("a < b <tool", {"tools": True}, "", "a < b <tool", []),
    (f"hm {HERMES}</think>{HERMES}", {"thinking": True, "tools": True}, f"hm {HERMES}", "", [ADD]),
]


@pytest.mark.parametrize(("text", "options", "reasoning", "content", "calls"), CASES)
@given(cuts=st.lists(st.integers(1, 9), max_size=60))
@settings(max_examples=40)
def test_parts_do_not_depend_on_where_it_is_cut(
    text: str, options: dict[str, bool], reasoning: str, content: str, calls: list[Call], cuts: list[int]
) -> None:
    reply = Reply(**{"thinking": False, "tools": False, **options})
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
    ],
)
def test_calls_that_can_be_read_and_not(text: str, call: Call | None) -> None:
    assert read_call(text) == call
