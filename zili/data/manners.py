"""Finds out how a chat template writes: what ends a turn, and how thoughts and calls of tools look.

A template is a program that says none of this. What is here is guessed: small conversations are rendered, and what the
template wrote around them is looked at. Nothing outside this file guesses about a template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zili.data.reply import ANSWER_TAGS, CALL, CALLED, KEY, THINK, THOUGHT, read_call

Render = Callable[..., str]
"""A template: messages, tools, add_generation_prompt and options to text. Raises where it cannot say them."""
_INSIDE = {*ANSWER_TAGS, *(f"{start}{name}>" for name in ("tools", "tool_response") for start in ("<", "</"))}
_BRACKETED = re.compile(r"<{1,2}[^\s<>]{1,64}>{1,2}|\[[|/]{0,2}\w{2,32}\|?\]")


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
    """What is known of one template, whatever the tokenizer; a `Dialect` has both."""

    ends: tuple[Mark, ...] = ()
    """Marks after which it is not the assistant's turn."""
    marks: tuple[Mark, ...] = ()
    """All marks of turns."""
    thinks: bool = False
    """Whether it writes the thoughts (`reasoning_content`) of an answer to learn."""
    reasons: bool = False
    """Whether its model thinks before it answers: it writes thoughts, opens them, or drops those of earlier answers."""
    calls: str | None = None
    """The name in `CALL_STYLES` of how it writes calls; "other": in a way that is not read back here."""
    tools: bool = False
    """Whether it tells the model which tools there are."""
    names_calls: bool = False
    """Whether it tells by an id which call a result is of."""


def opening(prompt: str) -> str:
    """The beginning of an answer's thoughts at the end of a prompt, such as `<think>\\n`; or an empty text."""
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
        reasons=thinks or bool(opening(prompt[-1])) or _drops_thoughts(render),
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


def _call_style(render: Render) -> str | None:
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
    """Marks in the text between two turns: what is in brackets, else each of its lines that has a word."""
    if found := _bracketed(text):
        return found
    lines = _BRACKETED.sub("", text).split("\n")
    said = ((number, line.strip()) for number, line in enumerate(lines))
    return [Mark(line, anywhere=not number) for number, line in said if any(map(str.isalnum, line))]


def _bracketed(text: str) -> list[Mark]:
    return [Mark(found) for found in _BRACKETED.findall(text) if found not in _INSIDE]
