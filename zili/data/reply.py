"""The parts of an answer (thoughts, text, calls of tools): how they are written, and how they are read as they come.

A template says none of this in words. Its `Dialect` knows which of these a model uses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from pydantic_core import from_json


class Tags(NamedTuple):
    """What stands before a part of an answer, and after it."""

    begin: str
    end: str


THINK = Tags("<think>", "</think>")
_CALL, _KEY, _VALUE = (Tags(f"<{name}>", f"</{name}>") for name in ("tool_call", "param_key", "param_value"))
_NAME = re.compile(r"[\w.-]{1,256}")
_DEEPEST = 8
"""Levels of a schema that are looked at for the types of an argument."""


@dataclass(frozen=True)
class Call:
    """A call of a tool."""

    name: str
    arguments: str
    """A JSON object."""


@dataclass(frozen=True)
class CallStyle:
    """How a template has calls written: the name and an object of the arguments in JSON, or each argument between tags
    of its own, a text without quotes."""

    tagged: bool = False
    """Whether arguments have tags of their own."""
    gap: str = ""
    """White space between a tag and what follows: JSON, or another tag."""
    call: Tags = _CALL
    key: Tags = _KEY
    value: Tags = _VALUE

    def begin(self, tool: str) -> str:
        """What stands before the arguments of a call of `tool`."""
        if self.tagged:
            return f"{self.call.begin}{tool}{self.gap}"
        return f'{self.call.begin}{self.gap}{{"name": {json.dumps(tool)}, "arguments": '

    @property
    def end(self) -> str:
        """What stands after them."""
        return self.call.end if self.tagged else f"}}{self.gap}{self.call.end}"


HERMES = CallStyle(gap="\n")
"""TeleChat2's and TeleChat3's, and of most other models."""
TAGGED = CallStyle(tagged=True)
"""TeleChat3-Coder's."""


@dataclass(slots=True)
class Parts:
    """What has come anew."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)

    def __add__(self, other: Parts) -> Parts:
        return Parts(self.reasoning + other.reasoning, self.content + other.content, self.calls + other.calls)


class Reply:
    """Takes a text apart. Tags that are not whole yet are held back; a call that cannot be read stays text."""

    def __init__(
        self,
        *,
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        think: Tags = THINK,
        calls: CallStyle = HERMES,
    ) -> None:
        """`thinking`: the prompt has opened its thoughts already. `tools`: those that it may call, as OpenAI has them;
        without any, what looks like a call is text. `think`: tags of the thoughts. `calls`: how calls are written."""
        self._think, self._style = think, calls
        self._state: Literal["begin", "thinking", "content", "calling"] = "thinking" if thinking else "begin"
        functions = [tool["function"] for tool in tools]
        self._schemas = {function["name"]: function.get("parameters") or {} for function in functions}
        self._held = ""
        self._looked = 0
        """Characters of `_held` in which no call ends: a long one is not looked through again with each piece."""
        self.calls = 0
        """Calls of tools so far."""

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
            parts.content += (self._style.call.begin if self._state == "calling" else "") + self._held
        self._held = ""
        return parts

    def _advance(self, parts: Parts) -> bool:
        """One step; False where more text is needed."""
        if self._state == "begin":
            start, tag = self._held.lstrip(), self._think.begin
            if not start or (len(start) < len(tag) and tag.startswith(start)):
                return False
            thinks = start.startswith(tag)
            self._held = start.removeprefix(tag) if thinks else self._held
            self._state = "thinking" if thinks else "content"
            return True
        if self._state == "thinking":
            return self._up_to(self._think.end, parts, "reasoning", "content")
        if self._state == "content":
            if self._schemas:
                return self._up_to(self._style.call.begin, parts, "content", "calling")
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
        called = self._style.call.end
        end = self._held.find(called, self._looked)
        if end < 0:
            self._looked = max(0, len(self._held) - len(called) + 1)
            return False
        inside, after, self._looked = self._held[:end], self._held[end + len(called) :], 0
        call = read_call(inside, self._schemas, self._style)
        if call is None:
            parts.content += self._style.call.begin + inside + called
        else:
            parts.calls.append(call)
            self.calls += 1
        self._held, self._state = after, "content"
        return True


def overlap(text: str, tag: str) -> int:
    """Length of the longest beginning of `tag`, a short one, short of all of it, that `text` ends with."""
    longest = min(len(tag) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(tag[:size])), 0)


# ---- thoughts and calls, read


def split_thoughts(text: str, think: Tags = THINK) -> tuple[str, str] | None:
    """Thoughts and answer of a text that begins with thoughts between tags; None where it does not."""
    start = text.lstrip()
    inside, closed, answer = start.removeprefix(think.begin).partition(think.end)
    if not start.startswith(think.begin) or not closed:
        return None
    return inside.removeprefix("\n").removesuffix("\n"), answer.lstrip("\n")


def read_call(text: str, schemas: Mapping[str, Any] | None = None, style: CallStyle = HERMES) -> Call | None:
    """What stands between the tags of a call, in JSON or in the tags that `style` has for arguments; None: in neither.
    Takes linear time.

    `schemas`: of the parameters of tools, by name. Between tags a text has no quotes and may look like a number: the
    schema says whether it is one.
    """
    called = _json(text)
    if called is _NO_JSON:
        return _read_tagged(text, schemas or {}, style)
    if not isinstance(called, dict) or not isinstance(called.get("name"), str):
        return None
    arguments = read_arguments(called.get("arguments"))
    return None if arguments is None else Call(called["name"], json.dumps(arguments, ensure_ascii=False))


def read_arguments(given: Any) -> dict[str, Any] | None:
    """A call's arguments, given as an object, as its text, or not at all. None: they are none."""
    if isinstance(given, str):
        given = _json(given) if given.strip() else {}
    elif given is None:
        given = {}
    return given if isinstance(given, dict) and _is_json(given) else None


_NO_JSON = object()


def _json(text: str) -> Any:
    """What a text is in JSON, or `_NO_JSON`; what Python reads beyond JSON (NaN, 1e999) is none."""
    try:
        # Not by `json`: it takes half of a surrogate pair, which cannot be sent, and recurses as deep as the text does.
        value = from_json(text, allow_inf_nan=False)
    except ValueError:
        return _NO_JSON
    return value if _is_json(value) else _NO_JSON


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def _read_tagged(text: str, schemas: Mapping[str, Any], style: CallStyle) -> Call | None:
    end = text.find(style.key.begin)
    name = (text if end < 0 else text[:end]).strip()
    if not _NAME.fullmatch(name):
        return None
    arguments = {}
    for parameter in _parameters(text, end, style):
        if parameter is None:
            return None
        key, said = parameter
        properties = schemas.get(name, {}).get("properties")
        arguments[key] = _argument(said, properties.get(key) if isinstance(properties, dict) else None)
    return Call(name, json.dumps(arguments, ensure_ascii=False))


def _parameters(text: str, place: int, style: CallStyle) -> Iterator[tuple[str, str] | None]:
    """Names and values from `place` on; None where something else stands there."""
    while 0 <= place < len(text):
        key = _inside(text, place, style.key)
        value = key and _inside(text, key[1], style.value)
        yield (key[0], value[0]) if key and value else None
        place = _after_space(text, value[1]) if value else -1


def _inside(text: str, place: int, tags: Tags) -> tuple[str, int] | None:
    """What stands between tags, the first at `place` after white space, and where it goes on."""
    place = _after_space(text, place)
    close = text.find(tags.end, place)
    if close < 0 or not text.startswith(tags.begin, place):
        return None
    return text[place + len(tags.begin) : close], close + len(tags.end)


def _after_space(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def _argument(text: str, schema: Any) -> Any:
    """What an argument is that stands between tags: what the text is in JSON, or the text itself."""
    value = _json(text)
    value = text if value is _NO_JSON else value
    types = _types(schema)
    if "string" not in types:
        return value
    fits = any(
        isinstance(value, _TYPES[type_]) and isinstance(value, bool) == (type_ == "boolean")
        for type_ in types - {"string"}
    )
    # Where only texts may be, quotes are part of one.
    return value if fits or (isinstance(value, str) and types != {"string"}) else text


_TYPES: dict[str, tuple[type, ...]] = {
    "null": (type(None),),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "array": (list,),
    "object": (dict,),
}


def _types(schema: Any, depth: int = 0) -> set[str]:
    """Types that a schema names, where it says so easily; none: any."""
    if not isinstance(schema, dict) or depth > _DEEPEST:
        return set()
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if "type" not in schema and isinstance(values, list) and values and all(isinstance(one, str) for one in values):
        return {"string"}
    if arms := next((schema[word] for word in ("anyOf", "oneOf", "allOf") if isinstance(schema.get(word), list)), None):
        of_arms = [_types(arm, depth + 1) for arm in arms]
        return set().union(*of_arms) if all(of_arms) else set()
    given = schema.get("type", [])
    named = {one for one in (given if isinstance(given, list) else [given]) if isinstance(one, str)}
    return named if named <= {"string", *_TYPES} else set()
