"""What an assistant's text is made of: thoughts, what it says, and calls of tools, told apart as they come."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Literal

_THINK, _THOUGHT = "<think>", "</think>"
_CALL, _CALLED = "<tool_call>", "</tool_call>"
_NAMED = re.compile(
    r"\s*([\w.-]+)\s*((?:<param_key>.*?</param_key>\s*<param_value>.*?</param_value>\s*)*)\s*", re.DOTALL
)
_PARAMETER = re.compile(r"<param_key>(.*?)</param_key>\s*<param_value>(.*?)</param_value>", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """Of a tool."""

    name: str
    arguments: str
    """A JSON object."""


@dataclass
class Parts:
    """What has come anew."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)

    def __add__(self, other: Parts) -> Parts:
        return Parts(self.reasoning + other.reasoning, self.content + other.content, self.calls + other.calls)


class Reply:
    """Takes a text apart. Tags that are not whole yet are held back; a call that cannot be read stays text."""

    def __init__(self, *, thinking: bool, tools: bool) -> None:
        """`thinking`: the prompt has opened its thoughts already. `tools`: there are some, so that it may call them."""
        self._state: Literal["begin", "thinking", "content", "calling"] = "thinking" if thinking else "begin"
        self._tools = tools
        self._held = ""
        self.calls = 0
        """Of tools, so far."""

    def push(self, text: str) -> Parts:
        self._held += text
        parts = Parts()
        while self._advance(parts):
            pass
        return parts

    def finish(self) -> Parts:
        """What was held back, as it is."""
        parts = self.push("")
        if self._state == "thinking":
            parts.reasoning += self._held
        else:
            parts.content += (_CALL if self._state == "calling" else "") + self._held
        self._held = ""
        return parts

    def _advance(self, parts: Parts) -> bool:
        """One step; False where more text is needed."""
        if self._state == "begin":
            start = self._held.lstrip()
            if not start or (len(start) < len(_THINK) and _THINK.startswith(start)):
                return False
            thinks = start.startswith(_THINK)
            self._held = start.removeprefix(_THINK) if thinks else self._held
            self._state = "thinking" if thinks else "content"
            return True
        if self._state == "thinking":
            return self._up_to(_THOUGHT, parts, "reasoning", "content")
        if self._state == "content":
            if self._tools:
                return self._up_to(_CALL, parts, "content", "calling")
            parts.content, self._held = parts.content + self._held, ""
            return False
        return self._call(parts)

    def _up_to(self, tag: str, parts: Parts, kind: str, following: Literal["content", "calling"]) -> bool:
        before, found, after = self._held.partition(tag)
        if found:
            self._held, self._state = after, following
        else:
            kept = overlap(before, tag)
            before, self._held = before[: len(before) - kept], before[len(before) - kept :]
        setattr(parts, kind, getattr(parts, kind) + before)
        return bool(found)

    def _call(self, parts: Parts) -> bool:
        inside, found, after = self._held.partition(_CALLED)
        if not found:
            return False
        call = read_call(inside)
        if call is None:
            parts.content += _CALL + inside + _CALLED
        else:
            parts.calls.append(call)
            self.calls += 1
        self._held, self._state = after, "content"
        return True


def read_call(text: str) -> Call | None:
    """What stands between the tags: Hermes' JSON, or TeleChat3-Coder's names and values. None: neither."""
    try:
        called = json.loads(text)
    except ValueError:
        return _read_named(text)
    if not isinstance(called, dict) or not isinstance(called.get("name"), str):
        return None
    arguments = called.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    return Call(called["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def _read_named(text: str) -> Call | None:
    found = _NAMED.fullmatch(text)
    if found is None:
        return None
    arguments = {}
    for key, value in _PARAMETER.findall(found[2]):
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value  # a text is written without quotes
    return Call(found[1], json.dumps(arguments, ensure_ascii=False))


def overlap(text: str, tag: str) -> int:
    """Length of the longest beginning of `tag`, short of all of it, that `text` ends with."""
    longest = min(len(tag) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(tag[:size])), 0)
