"""Finds out how a chat template writes: what ends a turn, and how thoughts and calls of tools look.

A template is a program that says none of this. What is here is guessed: small conversations are rendered, and what the
template wrote around them is looked at. Nothing outside this file guesses about a template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from zili.data.reply import THINK, CallStyle, Tags, read_call, split_thoughts

Render = Callable[..., str]
"""A template: messages, tools, add_generation_prompt and options to text. Raises where it cannot say them."""
_TOLD = {f"{start}{name}>" for name in ("tools", "tool_response") for start in ("<", "</")}
_TAG = re.compile(r"[<\[◁][\w:|.-]{1,32}[>\]▷]")
"""What may open thoughts, calls and arguments."""
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
    think: Tags = THINK
    """The tags of thoughts: those that it writes, else those of most models."""
    says_calls: bool = False
    """Whether it writes calls of tools."""
    calls: CallStyle | None = None
    """How it writes them; None: in a way that is not read back here, or not at all."""
    tools: bool = False
    """Whether it tells the model which tools there are."""
    names_calls: bool = False
    """Whether it tells by an id which call a result is of."""

    @property
    def tags(self) -> frozenset[str]:
        """Marks that its model writes inside an answer, even where a tokenizer has them as special tokens."""
        style = self.calls or CallStyle()
        return frozenset({*self.think, *style.call, *style.key, *style.value})

    def opening(self, prompt: str) -> str:
        """The beginning of an answer's thoughts at the end of a prompt, such as `<think>\\n`; or an empty text."""
        begin = self.think.begin
        return prompt[prompt.rindex(begin) :] if prompt.rstrip().endswith(begin) else ""

    def split(self, content: str) -> tuple[str, str] | None:
        """Thoughts and answer of a content that begins with thoughts, in its own tags or, as in most data, in
        `<think>...</think>`; None where it does not."""
        return split_thoughts(content, self.think) or split_thoughts(content)


def find_manners(render: Render) -> Manners:
    """The manners of a template. One that cannot say a small conversation has none that are known."""
    talk = _texts(render, _TALK) or _texts(render, _TALK[:2])
    if talk is None:
        return Manners()
    prompt = _texts(render, _TALK[:1], add_generation_prompt=True) or [""]
    system = _texts(render, [_SYSTEM, *_TALK[:2]]) or [""]
    thoughts = _rendered(render, [_TALK[0], {**_TALK[1], "reasoning_content": _THINKS}]) or ""
    called, think = _called(render), _around(thoughts, _THINKS) or THINK
    found = Manners(thinks=_THINKS in thoughts, think=think, says_calls=bool(called), calls=_call_style(called))
    inside = found.tags | _TOLD
    # What stands before all may be a prompt of the template's own: of that only brackets are marks.
    marks = [mark for text in (*talk[1:], *prompt[1:], *system[1:2]) for mark in _marks(text, inside)]
    used = [_TALK[0], {**_TALK[1], "tool_calls": [_CALLING]}, _RESULT, _TALK[3]]
    results = _texts(render, used, tools=[_TOOL])
    marks += [mark for text in (talk[0], system[0], *(results or ())[2:4]) for mark in _bracketed(text, inside)]
    after = [mark for text in (talk[2], talk[-1]) for mark in _marks(text, inside)[:2]]
    return replace(
        found,
        ends=tuple(dict.fromkeys(after)),
        marks=tuple(dict.fromkeys(marks)),
        reasons=found.thinks or bool(found.opening(prompt[-1])) or _drops_thoughts(render, found.think),
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


def _drops_thoughts(render: Render, think: Tags) -> bool:
    answer = {**_TALK[1], "content": f"{think.begin}\n{_THINKS}\n{think.end}\n\n{_TALK[1]['content']}"}
    said = _rendered(render, [_TALK[0], answer, _TALK[2]]) or ""
    return _TALK[1]["content"] in said and _THINKS not in said


def _called(render: Render) -> str:
    """An answer that calls a tool; empty where the template leaves the call out."""
    talk = [_TALK[0], {"role": "assistant", "content": "", "tool_calls": [_CALLING]}]
    said = _rendered(render, talk, tools=[_TOOL]) or _rendered(render, talk) or ""
    # After the question, since the tools are told before it.
    said = said.partition(_TALK[0]["content"])[2]
    return said if "quaxtool" in said and "quaxvalue" in said else ""


def _call_style(said: str) -> CallStyle | None:
    """How the call in an answer is written; None: there is none, or it cannot be read."""
    found = [*_TAG.finditer(said, 0, min(said.rfind("quaxtool"), said.rfind("quaxvalue")))]
    if not found:
        return None
    call, usual = _closed(found[-1][0]), CallStyle()
    inside = said[found[-1].end() :].partition(call.end)[0]
    key, value = _around(inside, "quaxkey"), _around(inside, "quaxvalue")
    tagged = key is not None and value is not None
    follows = inside.partition("quaxtool")[2] if tagged else inside
    gap = follows[: len(follows) - len(follows.lstrip())]
    style = CallStyle(tagged, gap, call, key or usual.key, value or usual.value)
    read = read_call(inside, style=style)
    return style if read is not None and read.name == "quaxtool" else None


def _around(said: str, text: str) -> Tags | None:
    """The tags in which `text` stands, white space aside; None: it stands in none."""
    before, _, after = said.partition(text)
    found = [*_TAG.finditer(before)]
    if not found or before[found[-1].end() :].strip():
        return None
    tags = _closed(found[-1][0])
    return tags if after.lstrip().startswith(tags.end) else None


def _closed(tag: str) -> Tags:
    return Tags(tag, f"{tag[0]}/{tag[1:]}")


def _marks(text: str, inside: Set[str]) -> list[Mark]:
    """Marks in the text between two turns: what is in brackets, else each of its lines that has a word. What stands
    `inside` a turn is none."""
    if found := _bracketed(text, inside):
        return found
    lines = _BRACKETED.sub("", text).split("\n")
    said = ((number, line.strip()) for number, line in enumerate(lines))
    return [Mark(line, anywhere=not number) for number, line in said if any(map(str.isalnum, line))]


def _bracketed(text: str, inside: Set[str]) -> list[Mark]:
    return [Mark(found) for found in _BRACKETED.findall(text) if found not in inside]
