"""Files of conversations to learn from, in the forms that are common, as one: messages of roles.

Told apart by a record's keys: `messages` (OpenAI's), `conversations` (ShareGPT's), `dialog` (TeleChat2's), a question
with its answer (`_ANSWERED`). With `rejected` a record is a pair: a question, the answer that was chosen and one that
was not. What cannot be learned from is an error with its place, or left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from zili.data.dialect import NOT_OPTIONS
from zili.data.fields import Fields, Unfit, check_sound
from zili.data.reading import Flaw, OnError, Wanted, read_files, records
from zili.data.sources import JSON_SUFFIXES, LINE_SUFFIXES, TABLE_SUFFIXES, Census, Source, SourceFile
from zili.data.turns import (
    THOUGHTS,
    check_pair,
    check_turns,
    in_json,
    joined,
    refuse_unlearnable,
    spoken,
    thoughts_of,
    weight,
)

FORMS = (
    "messages, conversations, dialog, instruction with output, query with response, prompt with completion, "
    "chosen with rejected"
)
_TURNS = ("messages", "conversations", "dialog")
_ANSWERED = {"instruction": "output", "query": "response", "prompt": "completion"}
"""Alpaca's, ms-swift's of old, TRL's."""
_QUESTIONS = (*_ANSWERED, "question")
_REJECTED = ("rejected", "rejected_response", "rejected_messages", "non_preferred_output")
_SYSTEMS = ("system", "system_prompt")
_LONGEST_NAME = 60
_JUDGED = ("label", "kto_tag")
_ANSWERS = re.compile("chosen|reject|preferred|^negative")
"""Names that columns with answers have something of."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One conversation: what was said, the tools there were, and its place for errors."""

    messages: list[dict[str, Any]]
    """An answer that is not to be learned has `weight` 0."""
    tools: list[dict[str, Any]] | None
    place: str
    rejected: list[dict[str, Any]] | None = None
    """In a pair, the conversation that `messages` is preferred to; they part at a turn of the assistant's."""
    options: dict[str, Any] = field(default_factory=dict)
    """The template's own, such as enable_thinking (TRL's `chat_template_kwargs`)."""


def read_dialogues(
    paths: Iterable[Source], *, on_error: OnError = "raise", census: Census | None = None
) -> Iterator[Dialogue]:
    """Every conversation in files of JSON lines, JSON arrays or parquet, in a fixed order.

    Args:
        paths: files, and folders whose .jsonl and .parquet files are read.
        on_error: `raise` stops at the first flaw; `skip` counts it in `census.skipped` and goes on.
        census: filled while reading, complete at the end.

    Raises `DataError` with file and line, or record of an array; also when there was no conversation at all.
    """
    census = Census(hashes=False) if census is None else census

    def read(file: SourceFile) -> Iterator[Dialogue | Flaw]:
        for place, record in _records(file):
            yield record if isinstance(record, Flaw) else _dialogue(record, place, census)

    wanted = Wanted("conversations", f".jsonl, .json or .parquet files of records with {FORMS}")
    return read_files(paths, read, wanted, on_error, census)


def _records(file: SourceFile) -> Iterator[tuple[str, dict[str, Any] | Flaw]]:
    if file.path.name.lower().endswith(LINE_SUFFIXES + JSON_SUFFIXES + TABLE_SUFFIXES):
        return records(file)
    what = ".jsonl, .ndjson and .json, also as .gz and .zst, and .parquet"
    wrong = Flaw("of another kind", f"{file.shown}: {what} are read.")
    return iter([(file.shown, wrong)])


def _dialogue(record: dict[str, Any], place: str, census: Census) -> Dialogue | Flaw:
    reader = _Reader(record)
    try:
        check_sound(record)
        found = reader.dialogue(place)
    except Unfit as unfit:
        return Flaw(unfit.reason, f"{place}: {unfit}.")
    census.unused.update(reader.unused)
    return found


# ---- the forms


class _Reader:
    """Reads one record. Whatever in it is not used is in `unused` in the end."""

    def __init__(self, record: dict[str, Any]) -> None:
        self._record = Fields(record)
        self._turns: list[Fields] = []

    def dialogue(self, place: str) -> Dialogue:
        """Raises: Unfit."""
        refuse_unlearnable(self._record)
        key = next((key for key in _REJECTED if key in self._record), None)
        if key is None and "chosen" in self._record:
            raise Unfit(
                "of an unknown form", "beside its chosen answer the rejected one is no text, no list of objects"
            )
        messages, rejected = (self._known(), None) if key is None else self._pair(key)
        check_turns(messages)
        if rejected is not None:
            check_turns(rejected)
            check_pair(messages, rejected)
        found = Dialogue(messages, _tools(self._record), place, rejected, self._options())
        self._check_verdict()
        self._check_rest(paired=rejected is not None)
        return found

    @property
    def unused(self) -> list[str]:
        """Names of what was not used, once for each place where it says something."""
        names = [*self._record.unused(), *(f"a turn's {key}" for turn in self._turns for key in turn.unused())]
        return [name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..." for name in names]

    def _options(self) -> dict[str, Any]:
        options = self._record.first("chat_template_kwargs") or {}
        if not isinstance(options, dict):
            raise Unfit("of an unknown form", "its chat_template_kwargs are no object")
        for name in NOT_OPTIONS.intersection(options):
            raise Unfit(
                "of an unknown form", f"its chat_template_kwargs have {name!r}, which is no option of a template"
            )
        return options

    def _check_verdict(self) -> None:
        """What says of a whole record whether it is to be learned."""
        if weight(self._record) == 0:
            raise Unfit("of weight 0", "it is not to be learned")
        for key in _JUDGED:
            told = self._record.peek(key)
            if (isinstance(told, bool | int | float) and not told) or str(told).lower() == "false":
                raise Unfit("judged bad", f"its {key} says that the answer is bad (KTO), which is not learned from")
            if told is True:
                self._record[key]

    def _check_rest(self, *, paired: bool) -> None:
        """Refuse what was not used and would change what is learned. Beside a pair that was read, names such as
        `chosen_model` say something about it."""
        for key, value in self._record.unused().items():
            if not isinstance(value, str | list | dict):
                continue
            if not paired and _ANSWERS.search(key):
                raise Unfit("of an unknown form", f"{key!r} is an answer that is not read so; known: {FORMS}")
            if key in THOUGHTS:
                raise Unfit("with thoughts beside its turns", f"it is not said which turn has the thoughts of {key!r}")

    def _known(self) -> list[dict[str, Any]]:
        record = self._record
        for key in _TURNS:
            if key in record:
                return self._with_system(self._all_spoken(record[key]))
        for question, answer in _ANSWERED.items():
            if question in record and answer in record:
                if answer != "completion" and not isinstance(record.peek(answer), str):
                    raise Unfit("not a string", f"its {answer} is no text")
                asked, turns = self._asked(question), self._answer(record[answer])
                return [*(map(_unlearned, asked) if answer == "completion" else asked), *self._thinking(turns)]
        raise Unfit("of an unknown form", f"keys {', '.join(map(repr, list(record)[:8]))}; known: {FORMS}")

    def _thinking(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """An answer with the thoughts that stand beside it."""
        thoughts = thoughts_of(self._record) if len(turns) == 1 else None
        return [{**turns[0], "reasoning_content": thoughts}] if thoughts else turns

    def _pair(self, key: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The chosen and the rejected conversation, whole."""
        record = self._record
        if key == "rejected_messages":  # ms-swift's, beside the chosen ones
            return self._known(), self._with_system(self._all_spoken(record[key]))
        if key == "rejected_response":  # ms-swift's: the last turn of a conversation is the chosen answer
            chosen = self._known()
            return chosen, [*chosen[:-1], *self._answer(record[key])]
        name = "preferred_output" if key == "non_preferred_output" else "chosen"
        if name not in record:
            raise Unfit("of an unknown form", "it has a rejected answer and no chosen one")
        asked = self._asked_of_openai() if key == "non_preferred_output" else self._asked_beside()
        chosen, rejected = (self._whole(asked, self._answer(record[one])) for one in (name, key))
        return chosen, rejected

    def _whole(self, asked: list[dict[str, Any]], turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Some write the whole conversation, some the answer alone."""
        if not turns or turns[0]["role"] == "assistant":
            return asked + turns
        whole = self._with_system(turns)
        if whole[-1]["role"] == "assistant" and any(turn not in whole for turn in asked):
            raise Unfit("with two questions", "what is asked beside a whole conversation is not in it")
        return whole

    def _asked_beside(self) -> list[dict[str, Any]]:
        """What the answers of a pair answer."""
        key = next((key for key in (*_QUESTIONS, *_TURNS) if key in self._record), None)
        if key is None:
            return []
        return self._known() if key in _TURNS else self._asked(key)

    def _asked(self, key: str) -> list[dict[str, Any]]:
        if isinstance(self._record.peek(key), list):
            return self._with_system(self._all_spoken(self._record[key]))
        return self._with_system([*self._history(), {"role": "user", "content": self._question(key)}])

    def _question(self, key: str) -> Any:
        if key != "instruction":
            return self._record[key]
        asked = [self._record[key], self._record.first("input") or ""]
        if not all(isinstance(text, str) for text in asked):
            raise Unfit("not a string", "its instruction or input is no text")
        return "\n".join(text for text in asked if text)

    def _history(self) -> list[dict[str, Any]]:
        history = self._record.first("history") or []
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise Unfit("of an unknown form", "its history is no list of pairs")
        roles = ("user", "assistant")
        return [{"role": role, "content": text} for pair in history for role, text in zip(roles, pair, strict=True)]

    def _asked_of_openai(self) -> list[dict[str, Any]]:
        asked = self._record.first("input")
        if not isinstance(asked, dict):
            raise Unfit("of an unknown form", "its input is no object with messages")
        beside = {key: self._record.peek(key) for key in self._record if key != "input"}
        both = next((key for key in asked if key in beside and asked[key] is not None), None)
        if both is not None:
            raise Unfit("of an unknown form", f"it has {both!r} twice, in its input and beside it")
        self._record = Fields({**beside, **asked})
        refuse_unlearnable(self._record)
        return self._known()

    def _answer(self, value: Any) -> list[dict[str, Any]]:
        if isinstance(value, str):
            return [{"role": "assistant", "content": value}]
        return self._all_spoken([value] if isinstance(value, dict) else value)

    # ---- turns

    def _all_spoken(self, turns: Any) -> list[dict[str, Any]]:
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise Unfit("of an unknown form", "its turns are no list of objects")
        fields = [Fields(turn) for turn in turns]
        self._turns += fields
        said = joined([(turn, spoken(turn)) for turn in fields])
        # A system prompt without a word is none.
        return said[1:] if said and said[0] == {"role": "system", "content": ""} else said

    def _with_system(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        system = self._record.first(*_SYSTEMS)
        if system is not None and not isinstance(system, str):
            raise Unfit("not a string", "its system prompt is no text")
        if system is None or not system.strip():
            return turns
        first = {"role": "system", "content": system}
        if turns and turns[0]["role"] == "system":
            said = turns[0]["content"]
            if not isinstance(said, str) or said.strip() != system.strip():
                raise Unfit("with two system prompts", "it has one as its first turn and another beside its turns")
            return turns
        return [first, *turns]


def _unlearned(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn of a prompt: in TRL's form the completion alone is learned."""
    return {**turn, "weight": 0} if turn["role"] == "assistant" else turn


def _tools(record: Fields) -> list[dict[str, Any]] | None:
    tools = in_json(record.first("tools", "tool"), "its tools are")
    functions = in_json(record.first("functions"), "its functions are")  # OpenAI's, of old
    for given in (tools, functions):
        if given and not (isinstance(given, list) and all(isinstance(tool, dict) for tool in given)):
            raise Unfit("of an unknown form", "its tools are no list of objects")
    return [*(tools or []), *({"type": "function", "function": one} for one in functions or [])] or None
