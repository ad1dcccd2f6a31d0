"""How a chat template has a model speak: what ends a turn, how thoughts and calls of tools are told and read.

A template is a program that says none of this. What is here is guessed: small conversations are rendered, and what the
template wrote around them is looked at. Nothing outside this file guesses about a template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import from_json

from zili.data.tokenizer import DOCUMENT_ENDS, Tokenizer

CallStyle = Literal["hermes", "tagged", "other"]
ReadArgument = Callable[[str, str, str, Any], Any]
"""What an argument is: from the tool's name, its own, its text, and what that is in JSON (else the text)."""
Render = Callable[..., str]
"""A template: messages, tools, add_generation_prompt and options to text. Raises where it cannot say them."""

THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"
KEY, KEY_END = "<param_key>", "</param_key>"
VALUE, VALUE_END = "<param_value>", "</param_value>"
ANSWER_TAGS = (THINK, THOUGHT, CALL, CALLED, KEY, KEY_END, VALUE, VALUE_END)
"""What a model writes inside its answer, also where a tokenizer holds these for special tokens."""
_INSIDE = {*ANSWER_TAGS, *(f"{start}{name}>" for name in ("tools", "tool_response") for start in ("<", "</"))}
_BRACKETED = re.compile(r"<{1,2}[^\s<>]{1,64}>{1,2}|\[[|/]{0,2}\w{2,32}\|?\]")
_NAME = re.compile(r"[\w.-]{1,256}")


@dataclass(frozen=True)
class Call:
    """A call of a tool."""

    name: str
    arguments: str
    """A JSON object."""


@dataclass(frozen=True)
class Mark:
    """Text that a template writes where the turn changes."""

    text: str
    anywhere: bool = True
    """False: it is one only where a line begins, as `Human:` is."""

    def pattern(self) -> str:
        """An expression that finds it."""
        return re.escape(self.text) if self.anywhere else rf"(?:^|(?<=[\n\r]))[ \t]{{0,8}}{re.escape(self.text)}"


@dataclass(frozen=True)
class Manners:
    """The manners of one template; `ChatTemplate.manners` finds them."""

    ends: tuple[Mark, ...] = ()
    """Marks after which it is not the assistant's turn."""
    marks: tuple[Mark, ...] = ()
    """All marks of turns."""
    thinks: bool = False
    """Whether it writes the thoughts (`reasoning_content`) of an answer to learn."""
    reasons: bool = False
    """Whether its model thinks before it answers: it writes thoughts, opens them, or drops those of earlier answers."""
    calls: CallStyle | None = None
    """How it writes calls: Hermes' JSON, TeleChat3-Coder's names and values, or in a way that is not read back here."""
    tools: bool = False
    """Whether it tells the model which tools there are."""
    names_calls: bool = False
    """Whether it tells by an id which call a result is of."""

    def end_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Tokens that end an answer: those the model's own files name, and the template's."""
        named = [*DOCUMENT_ENDS, *(mark.text for mark in self.ends)]
        found = (tokenizer.token_id(text) for text in named)
        return tokenizer.end_ids | {number for number in found if number is not None}

    def end_texts(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        """Texts that end an answer, of a template whose marks are no tokens; empty where they are."""
        if any(tokenizer.token_id(mark.text) is not None for mark in self.ends):
            return ()
        return tuple(mark.text if mark.anywhere else f"\n{mark.text}" for mark in self.ends)

    def plain(self, tokenizer: Tokenizer) -> tuple[Mark, ...]:
        """Marks that no token sets apart from text: whoever writes one of these could speak for another."""
        return tuple(mark for mark in self.marks if mark.text not in tokenizer.added_tokens)

    @staticmethod
    def opening(prompt: str) -> str:
        """What of an answer's thoughts the end of a prompt has said already, such as `<think>\\n`; or nothing."""
        return prompt[prompt.rindex(THINK) :] if prompt.rstrip().endswith(THINK) else ""


def find_manners(render: Render) -> Manners:
    """The manners of a template. One that cannot say a small conversation has none that are known."""
    talk = _texts(render, _TALK) or _texts(render, _TALK[:2])
    if talk is None:
        return Manners()
    prompt = _texts(render, _TALK[:1], add_generation_prompt=True) or [""]
    system = _texts(render, [_SYSTEM, *_TALK[:2]]) or [""]
    # What stands before all may be a prompt of the template's own: of that only brackets are marks.
    marks = [mark for text in (*talk[1:], *prompt[1:], *system[1:2]) for mark in _marks(text)]
    used = [_TALK[0], {**_TALK[1], "tool_calls": [_CALLING]}, _RESULT, _TALK[3]]
    results = _texts(render, used, tools=[_TOOL])
    marks += [mark for text in (talk[0], system[0], *(results or ())[2:4]) for mark in _bracketed(text)]
    after = [mark for text in (talk[2], talk[-1]) for mark in _marks(text)[:2]]
    thinks = _says(render, [_TALK[0], {**_TALK[1], "reasoning_content": _THINKS}], _THINKS)
    return Manners(
        ends=tuple(dict.fromkeys(after)),
        marks=tuple(dict.fromkeys(marks)),
        thinks=thinks,
        reasons=thinks or bool(Manners.opening(prompt[-1])) or _drops_thoughts(render),
        calls=_call_style(render),
        tools=_says(render, _TALK[:1], _TOOL["function"]["name"], tools=[_TOOL]),
        names_calls=_says(render, used, _RESULT["tool_call_id"], tools=[_TOOL]),
    )


# ---- small conversations

_TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Quaxa"},
    {"role": "assistant", "content": "Quaxe"},
    {"role": "user", "content": "Quaxi"},
    {"role": "assistant", "content": "Quaxo"},
]
_SYSTEM: dict[str, Any] = {"role": "system", "content": "Quaxu"}
_THINKS = "Quaxy"
_RESULT: dict[str, Any] = {"role": "tool", "tool_call_id": "quaxcall1", "name": "quaxtool", "content": "Quaxr"}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "quaxtool", "description": "x", "parameters": {"type": "object", "properties": {}}},
}
_CALLING: dict[str, Any] = {
    "id": "quaxcall1",
    "type": "function",
    "function": {"name": "quaxtool", "arguments": {"quaxkey": "quaxvalue"}},
}


def _texts(render: Render, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[str] | None:
    """What the template writes before, between and after the contents; None where it cannot say them."""
    text = _rendered(render, messages, **options)
    found: list[str] = []
    for message in messages:
        before, there, text = (text or "").partition(message["content"])
        if not there:
            return None
        found.append(before)
    return [*found, text or ""]


def _rendered(render: Render, messages: Sequence[Mapping[str, Any]], **options: Any) -> str | None:
    try:
        return render(messages=[dict(message) for message in messages], **options)
    except Exception:  # a template is a foreign program: whatever it raises, it cannot say this
        return None


def _says(render: Render, messages: Sequence[Mapping[str, Any]], text: str, **options: Any) -> bool:
    return text in (_rendered(render, messages, **options) or "")


def _drops_thoughts(render: Render) -> bool:
    answer = {**_TALK[1], "content": f"{THINK}\n{_THINKS}\n{THOUGHT}\n\n{_TALK[1]['content']}"}
    said = _rendered(render, [_TALK[0], answer, _TALK[2]]) or ""
    return _TALK[1]["content"] in said and _THINKS not in said


def _call_style(render: Render) -> CallStyle | None:
    talk = [_TALK[0], {"role": "assistant", "content": "", "tool_calls": [_CALLING]}]
    said = _rendered(render, talk, tools=[_TOOL]) or _rendered(render, talk) or ""
    # After the question, since the tools are told before it.
    said = said.partition(_TALK[0]["content"])[2]
    if "quaxtool" not in said or "quaxvalue" not in said:
        return None
    inside = said.partition(CALL)[2].partition(CALLED)[0]
    if (call := read_call(inside)) is None or call.name != "quaxtool":
        return "other"
    return "tagged" if KEY in inside else "hermes"


def _marks(text: str) -> list[Mark]:
    """Of what stands between two turns: what is in brackets, else each of its lines that has a word."""
    if found := _bracketed(text):
        return found
    lines = _BRACKETED.sub("", text).split("\n")
    said = ((number, line.strip()) for number, line in enumerate(lines))
    return [Mark(line, anywhere=not number) for number, line in said if any(map(str.isalnum, line))]


def _bracketed(text: str) -> list[Mark]:
    return [Mark(found) for found in _BRACKETED.findall(text) if found not in _INSIDE]


# ---- thoughts and calls, read


def split_thoughts(text: str) -> tuple[str, str] | None:
    """Thoughts and answer of a text that begins with `<think>...</think>`; None where it does not."""
    start = text.lstrip()
    inside, closed, answer = start.removeprefix(THINK).partition(THOUGHT)
    if not start.startswith(THINK) or not closed:
        return None
    return inside.removeprefix("\n").removesuffix("\n"), answer.lstrip("\n")


def as_json(tool: str, name: str, text: str, value: Any) -> Any:
    """What JSON has it for, as `ReadArgument`."""
    return value


def read_call(text: str, read: ReadArgument = as_json) -> Call | None:
    """What stands between `<tool_call>` and `</tool_call>`, in either style. None: it is neither. Takes linear time.

    `read` decides of an argument between tags, where a text has no quotes, whether it is one.
    """
    called = _json(text)
    if called is _NO_JSON:
        return _read_tagged(text, read)
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


def _read_tagged(text: str, read: ReadArgument) -> Call | None:
    end = text.find(KEY)
    name = (text if end < 0 else text[:end]).strip()
    if not _NAME.fullmatch(name):
        return None
    arguments = {}
    for parameter in _parameters(text, end):
        if parameter is None:
            return None
        key, said = parameter
        value = _json(said)
        arguments[key] = read(name, key, said, said if value is _NO_JSON else value)
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


def marks_in(text: str, marks: Collection[Mark]) -> str | None:
    """The first of some marks that a text holds."""
    return next((mark.text for mark in marks if re.search(mark.pattern(), text)), None)
