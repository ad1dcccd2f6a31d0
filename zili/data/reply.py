"""The parts of an answer (thoughts, text, calls of tools): how they are written, and how they are read as they come.

A template says none of this in words. Its `Dialect` knows which of these a model uses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic_core import from_json

THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"
KEY, KEY_END = "<param_key>", "</param_key>"
VALUE, VALUE_END = "<param_value>", "</param_value>"
ANSWER_TAGS = (THINK, THOUGHT, CALL, CALLED, KEY, KEY_END, VALUE, VALUE_END)
"""Marks that a model writes inside its answer, even where a tokenizer has them as special tokens."""
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
    """How a template has calls written. A new style is one of these in `CALL_STYLES`, and a way to read it."""

    name: str
    begin: Callable[[str], str]
    """What stands before the arguments, from the tool's name."""
    end: str
    tagged: bool
    """Whether each argument stands between tags of its own, a text without quotes; else all are one JSON object."""
    vllm_parser: str | None
    """vLLM's name for it."""


HERMES = CallStyle(
    "hermes",
    lambda tool: f'{CALL}\n{{"name": {json.dumps(tool)}, "arguments": ',
    f"}}\n{CALLED}",
    tagged=False,
    vllm_parser="hermes",
)
TAGGED = CallStyle("tagged", lambda tool: f"{CALL}{tool}", CALLED, tagged=True, vllm_parser=None)
"""TeleChat3-Coder's."""
CALL_STYLES = {style.name: style for style in (HERMES, TAGGED)}


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

    def __init__(self, *, thinking: bool = False, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        """`thinking`: the prompt has opened its thoughts already. `tools`: those that it may call, as OpenAI has them;
        without any, what looks like a call is text."""
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
            parts.content += (CALL if self._state == "calling" else "") + self._held
        self._held = ""
        return parts

    def _advance(self, parts: Parts) -> bool:
        """One step; False where more text is needed."""
        if self._state == "begin":
            start = self._held.lstrip()
            if not start or (len(start) < len(THINK) and THINK.startswith(start)):
                return False
            thinks = start.startswith(THINK)
            self._held = start.removeprefix(THINK) if thinks else self._held
            self._state = "thinking" if thinks else "content"
            return True
        if self._state == "thinking":
            return self._up_to(THOUGHT, parts, "reasoning", "content")
        if self._state == "content":
            if self._schemas:
                return self._up_to(CALL, parts, "content", "calling")
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
        end = self._held.find(CALLED, self._looked)
        if end < 0:
            self._looked = max(0, len(self._held) - len(CALLED) + 1)
            return False
        inside, after, self._looked = self._held[:end], self._held[end + len(CALLED) :], 0
        call = read_call(inside, self._schemas)
        if call is None:
            parts.content += CALL + inside + CALLED
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


def split_thoughts(text: str) -> tuple[str, str] | None:
    """Thoughts and answer of a text that begins with `<think>...</think>`; None where it does not."""
    start = text.lstrip()
    inside, closed, answer = start.removeprefix(THINK).partition(THOUGHT)
    if not start.startswith(THINK) or not closed:
        return None
    return inside.removeprefix("\n").removesuffix("\n"), answer.lstrip("\n")


def read_call(text: str, schemas: Mapping[str, Any] | None = None) -> Call | None:
    """What stands between `<tool_call>` and `</tool_call>`, in any of `CALL_STYLES`. None: in none. Takes linear time.

    `schemas`: of the parameters of tools, by name. Between tags a text has no quotes and may look like a number: the
    schema says whether it is one.
    """
    called = _json(text)
    if called is _NO_JSON:
        return _read_tagged(text, schemas or {})
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


def _read_tagged(text: str, schemas: Mapping[str, Any]) -> Call | None:
    end = text.find(KEY)
    name = (text if end < 0 else text[:end]).strip()
    if not _NAME.fullmatch(name):
        return None
    arguments = {}
    for parameter in _parameters(text, end):
        if parameter is None:
            return None
        key, said = parameter
        properties = schemas.get(name, {}).get("properties")
        arguments[key] = _argument(said, properties.get(key) if isinstance(properties, dict) else None)
    return Call(name, json.dumps(arguments, ensure_ascii=False))


def _parameters(text: str, place: int) -> Iterator[tuple[str, str] | None]:
    """Names and values from `place` on; None where something else stands there."""
    while 0 <= place < len(text):
        key = _inside(text, place, KEY, KEY_END)
        value = key and _inside(text, key[1], VALUE, VALUE_END)
        yield (key[0], value[0]) if key and value else None
        place = _after_space(text, value[1]) if value else -1


def _inside(text: str, place: int, begin: str, end: str) -> tuple[str, int] | None:
    """What stands between two tags, the first at `place` after white space, and where it goes on."""
    place = _after_space(text, place)
    close = text.find(end, place)
    if close < 0 or not text.startswith(begin, place):
        return None
    return text[place + len(begin) : close], close + len(end)


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
