"""What an assistant's text is made of: thoughts, what it says, and calls of tools, told apart as they come."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic_core import from_json

_THINK, _THOUGHT = "<think>", "</think>"
_CALL, _CALLED = "<tool_call>", "</tool_call>"
_KEY, _VALUE = ("<param_key>", "</param_key>"), ("<param_value>", "</param_value>")


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
        self._looked = 0
        """Characters of `_held` in which a call does not end, so that a long one is not looked through again and again."""
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
        end = self._held.find(_CALLED, self._looked)
        if end < 0:
            self._looked = max(0, len(self._held) - len(_CALLED) + 1)
            return False
        inside, after, self._looked = self._held[:end], self._held[end + len(_CALLED) :], 0
        call = read_call(inside)
        if call is None:
            parts.content += _CALL + inside + _CALLED
        else:
            parts.calls.append(call)
            self.calls += 1
        self._held, self._state = after, "content"
        return True


def read_call(text: str) -> Call | None:
    """What stands between the tags: Hermes' JSON, or TeleChat3-Coder's names and values. None: neither.

    It takes time in proportion to the text, whatever a model was made to say.
    """
    try:
        called = _json(text)
    except ValueError:
        return _read_named(text)
    if not isinstance(called, dict) or not isinstance(called.get("name"), str):
        return None
    arguments = called.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = _json(arguments)
        except ValueError:
            return None
    return _call_of(called["name"], arguments) if isinstance(arguments, dict) else None


def _read_named(text: str) -> Call | None:
    """A name, and then `<param_key>a</param_key><param_value>1</param_value>` any number of times."""
    first = text.find(_KEY[0])
    name, rest = (text, "") if first < 0 else (text[:first], text[first:])
    name = name.strip()
    if not all(letter.isalnum() or letter in "_.-" for letter in name) or not name:
        return None
    arguments: dict[str, Any] = {}
    place = 0
    while place < len(rest):
        key = _between(rest, place, _KEY)
        value = key and _between(rest, key[1], _VALUE)
        if not key or not value:
            return None
        place = value[1]
        try:
            arguments[key[0]] = _json(value[0])
        except ValueError:
            arguments[key[0]] = value[0]  # a text is written without quotes
    return _call_of(name, arguments)


def _between(text: str, start: int, tags: tuple[str, str]) -> tuple[str, int] | None:
    """What stands between two tags, of which the first is at `start`, and where what follows begins."""
    opening, closing = tags
    end = text.find(closing, start) if text.startswith(opening, start) else -1
    if end < 0:
        return None
    after = end + len(closing)
    while after < len(text) and text[after].isspace():
        after += 1
    return text[start + len(opening) : end], after


def _json(text: str) -> Any:
    # `json` fails for what is nested deep with another error than ValueError, and takes half of a surrogate pair.
    return from_json(text, allow_inf_nan=False)


def _call_of(name: str, arguments: dict[str, Any]) -> Call | None:
    try:
        return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except ValueError:  # 1e999
        return None


def overlap(text: str, tag: str) -> int:
    """Length of the longest beginning of `tag`, a short one, short of all of it, that `text` ends with."""
    longest = min(len(tag) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(tag[:size])), 0)
