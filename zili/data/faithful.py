"""Renders a conversation for training, and checks that everything that was given is in the text.

A template writes what it knows of and drops the rest without a word: thoughts, calls, tools, a result. So the rendered
text is compared with the conversation, and what should be there and is not is a reason to leave it out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from zili.data.dialect import Dialect, Rendered
from zili.data.dialogues import Dialogue
from zili.data.manners import Manners
from zili.data.reply import HERMES, read_arguments
from zili.data.tokenizer import Tokenizer
from zili.errors import DataError

Messages = Sequence[Mapping[str, Any]]
Spelling = Callable[[str], str]
_SPELLINGS: tuple[Spelling, ...] = (
    str,
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: json.dumps(text)[1:-1],
)
"""A text as it is, and as JSON writes it."""
_MOST_LEAVES = 64
"""So many of a call's arguments are looked for in a prompt: a template that drops some drops the first, too."""


class Unsaid(DataError):
    """A conversation that a template cannot say whole: a reason to count it by, and what is wrong."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Learned:
    """A conversation with a mask of what is learned."""

    rendered: Rendered
    thoughtless: int = 0
    """Earlier answers that are not learned, since the template drops their thoughts."""


def to_learn(rendered: Rendered, messages: Messages, dialogue: Dialogue, dialect: Dialect) -> Learned:
    """`rendered`, one of `dialogue`'s conversations of `messages`, with the answers masked that are not to be learned.

    Raises:
        Unsaid: something that was given is not in it.
    """
    if not any(rendered.said):
        raise Unsaid(
            "with nothing to learn",
            f"nothing to learn: {dialect.name} marks nothing that the assistant says ({{% generation %}} does)",
        )
    manners = dialect.manners
    _check_kinds(messages, dialogue.tools, manners, dialect.name)
    _check_spelled(messages, manners, dialect.tokenizer)
    _check_tools(dialogue.tools or [], rendered.text, dialect.name)
    if not manners.names_calls:
        _check_results(messages, dialect.name)
    _check_turns(messages, rendered, dialect.name)
    answers = [message for message in messages if message["role"] == "assistant"]
    return _masked(rendered, answers, manners, dialect.name)


def check_told(rendered: Rendered, messages: Messages, dialect: Dialect) -> None:
    """Compare a conversation to be answered: what others said and which tools were called, with the first of their
    arguments. Earlier thoughts, what was said beside a call, and all calls where it writes none, are the template's to
    drop. It takes time in proportion to the text.

    Raises:
        Unsaid: some of it is not in `rendered`.
    """
    calls, text, place = dialect.manners.says_calls, rendered.text, 0
    known = {True: [*_SPELLINGS], False: [*_SPELLINGS]}
    for number, message in enumerate(messages, start=1):
        answers, began = message["role"] == "assistant", place
        called = _called(message, _MOST_LEAVES) if calls else ()
        for given in called if answers else [message["content"]]:
            end = _end_of(given, text, place, known[answers])
            end = _end_of(given, text, began, known[answers]) if end < 0 else end  # in an order of its own
            if end < 0 and not _holds(text, given):
                reason = "with text that the template leaves out"
                raise Unsaid(reason, f"{dialect.name} leaves out of turn {number}: {given[:60]!r}")
            place = max(place, end)


def _check_kinds(messages: Messages, tools: Any, manners: Manners, name: str) -> None:
    """Whether the template has a place for all kinds of things that there are."""
    if tools and not manners.tools:
        raise Unsaid("with tools that the template does not tell", f"{name} has no place for tools")
    for message in messages:
        if message.get("tool_calls") and not manners.says_calls:
            raise Unsaid("with calls that the template cannot say", f"{name} has no place for calls of tools")
        if message.get("reasoning_content") and not manners.thinks:
            raise Unsaid(
                "with thoughts that the template does not write",
                f"{name} does not write thoughts: give a template that does, or write them into the content, as "
                "<think>...</think>",
            )


def _check_spelled(messages: Messages, manners: Manners, of: Tokenizer) -> None:
    """Whether answers spell out calls or thoughts, which would then be letters and not the model's own tokens."""
    call, think = (manners.calls or HERMES).call, manners.think
    for message in (message for message in messages if message["role"] == "assistant"):
        thoughts, inside = message.get("reasoning_content") or "", message["content"]
        inside = (manners.split(inside) or ("", inside))[1]
        if call.begin in inside and call.end in inside and call.begin in of.added_tokens:
            raise Unsaid(
                "with calls written as text",
                f"an answer spells {call.begin}, which would be learned letter by letter: give its calls as tool_calls",
            )
        astray = inside.lstrip().startswith(think.begin) or think.end in inside
        if (astray or think.end in thoughts) and (manners.thinks or think.begin in of.added_tokens):
            raise Unsaid(
                "with thoughts written as text",
                f"an answer spells {think.begin} or {think.end} where the template does not read them: it begins with "
                f"{think.begin}...{think.end}, once, or has its thoughts as reasoning_content",
            )


def _check_tools(tools: Messages, text: str, name: str) -> None:
    """Whether the rendered text has the name, and each line of the description, of every tool."""
    for tool in tools:
        function = tool.get("function") or tool
        if not isinstance(function, Mapping):
            continue
        told = [str(function.get("name") or ""), *str(function.get("description") or "").splitlines()]
        missing = next((line for line in told if not _holds(text, line)), None)
        if missing is not None:
            reason = "with tools that the template does not tell"
            raise Unsaid(reason, f"{name} leaves out of a tool: {missing[:60]!r}")


def _check_results(messages: Messages, name: str) -> None:
    """Whether results stand in the order of their calls, which alone says what each is of."""
    asked: list[Any] = []
    come = 0
    for message in messages:
        if message["role"] == "assistant":
            asked, come = [call.get("id") for call in message.get("tool_calls") or []], 0
        elif message["role"] == "tool":
            given = message.get("tool_call_id")
            if given is not None and given in asked and given not in asked[come : come + 1]:
                raise Unsaid(
                    "with results in another order than their calls",
                    f"{name} does not tell which call a result is of, and that of {given!r} is out of order",
                )
            come += 1


def _check_turns(messages: Messages, rendered: Rendered, name: str) -> None:
    """Whether everything that others say is in the rendered text, in order; a system prompt may stand anywhere."""
    answers = sum(message["role"] == "assistant" for message in messages)
    turns, place = iter(rendered.turns if len(rendered.turns) == answers else ()), 0
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role == "assistant":
            turn = next(turns, None)
            place = place if turn is None else _end_of(turn.text, rendered.text, place)
        elif role == "system":
            place = place if _holds(rendered.text, message["content"]) else -1
        else:
            place = _end_of(message["content"], rendered.text, place)
        if place < 0:
            raise Unsaid("with text that the template leaves out", f"{name} leaves out turn {number}")


def _masked(rendered: Rendered, answers: Messages, manners: Manners, name: str) -> Learned:
    if len(rendered.turns) != len(answers):
        return _unparted(rendered, answers, manners, name)
    said, thoughtless = list(rendered.said), 0
    for number, (turn, answer) in enumerate(zip(rendered.turns, answers, strict=True), start=1):
        if not answer.get("weight", 1):
            said[turn.start : turn.stop] = [False] * (turn.stop - turn.start)
            continue
        thoughts, told = _told(answer, manners)
        missing = next((text for text in told if not _holds(turn.text, text)), None)
        if missing is not None:
            raise Unsaid(
                "with text that the template leaves out", f"{name} leaves out of answer {number}: {missing[:60]!r}"
            )
        if _holds(turn.text, thoughts):
            continue
        if number == len(answers):
            reason = "with thoughts that the template does not write"
            raise Unsaid(reason, f"{name} leaves out the last answer's thoughts")
        # To learn it would be to learn to answer without having thought.
        said[turn.start : turn.stop] = [False] * (turn.stop - turn.start)
        thoughtless += 1
    if not any(said):
        raise Unsaid("with nothing to learn", "none of its answers is learned")
    return Learned(Rendered(rendered.ids, said, rendered.turns, rendered.text), thoughtless)


def _unparted(rendered: Rendered, answers: Messages, manners: Manners, name: str) -> Learned:
    """What is learned where a template marks what is said in another way than answer by answer."""
    if not all(answer.get("weight", 1) for answer in answers):
        raise Unsaid(
            "with weights that cannot be put in place",
            f"{name} marks {len(rendered.turns)} of {len(answers)} answers, so that none can be left out",
        )
    for thoughts, told in (_told(answer, manners) for answer in answers):
        missing = next((text for text in (thoughts, *told) if not _holds(rendered.text, text)), None)
        if missing is not None:
            raise Unsaid("with text that the template leaves out", f"{name} leaves out of an answer: {missing[:60]!r}")
    return Learned(rendered)


def _told(answer: Mapping[str, Any], manners: Manners) -> tuple[str, list[str]]:
    """The thoughts of an answer, and all else that it says."""
    thoughts, content = str(answer.get("reasoning_content") or ""), answer["content"]
    inline = manners.split(content) if manners.thinks and not thoughts else None
    thoughts, content = inline or (thoughts, content)
    return thoughts, [content, *_called(answer)]


def _called(answer: Mapping[str, Any], most: int | None = None) -> Iterator[str]:
    """What its calls of tools say: their names, and so many of each one's arguments."""
    for call in answer.get("tool_calls") or []:
        function = call.get("function") or call
        yield function["name"]
        yield from islice(_leaves(read_arguments(function.get("arguments"))), most)


def _leaves(value: Any) -> Iterator[str]:
    """Keys and values as JSON and Python write them; `Dialogue` is nested no deeper than can be walked."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
    elif not isinstance(value, bool) and value is not None:
        yield json.dumps(value)


def _holds(text: str, given: str) -> bool:
    """Whether a text has another in it, as it is or as JSON writes it; white space around it does not count."""
    return _end_of(given, text) >= 0


def _end_of(given: str, text: str, start: int = 0, spellings: list[Spelling] | None = None) -> int:
    """Where it ends, after `start`; below 0: it is not there. The spelling that was found is the first of `spellings`
    afterwards: most are alike, and each that is not there is looked for up to the end."""
    given, known = given.strip(), spellings or [*_SPELLINGS]
    for number, spelling in enumerate(known):
        spelled = spelling(given)
        if (place := text.find(spelled, start)) >= 0:
            known.insert(0, known.pop(number))
            return place + len(spelled)
    return -1
