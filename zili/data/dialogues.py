"""Files of conversations to learn from, in the forms that are common, as one: messages of roles.

Told apart by a record's keys: `messages` (OpenAI's), `conversations` (ShareGPT's), `instruction` with `output`
(Alpaca's), `dialog` (TeleChat2's). With `rejected` a record is a pair: a question, the answer that was chosen and one
that was not. What cannot be learned from is an error with its place, or left out and counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from zili.data.chat import ROLES
from zili.data.reading import Flaw, OnError, line_records, refuse_or_count
from zili.data.sources import LINE_SUFFIXES, Census, FileRecord, Source, SourceFile, list_files, measure
from zili.errors import DataError

FORMS = "messages, conversations, instruction with output, dialog, chosen with rejected"
_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "call",
}
_OPENAI = {role: role for role in ROLES} | {"developer": "system", "function": "tool", "bot": "assistant"}


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One conversation: what was said, the tools there were, and its place for errors."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    place: str
    rejected: list[dict[str, Any]] | None = None
    """Of a pair the conversation that `messages` is preferred to; they part at a turn of the assistant's."""


class _Unfit(Exception):
    """A record that is no conversation to learn from: a reason to count it by, and what is wrong with it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def read_dialogues(
    paths: Iterable[Source], *, on_error: OnError = "raise", census: Census | None = None
) -> Iterator[Dialogue]:
    """Every conversation in files of JSON lines or JSON arrays, in a fixed order.

    Args:
        paths: files, and folders whose .jsonl files are read.
        on_error: `raise` stops at the first flaw; `skip` counts it in `census.skipped` and goes on.
        census: filled while reading, complete at the end.

    Raises `DataError` with file and line, or record of an array; also when there was no conversation at all.
    """
    paths, census = list(paths), Census(hashes=False) if census is None else census
    for file in list_files(paths, census):
        size, sha256 = measure(file.path) if census.hashes else (file.path.stat().st_size, "")
        before = census.documents
        for place, record in _records(file):
            found = record if isinstance(record, Flaw) else _dialogue(record, place)
            if isinstance(found, Flaw):
                refuse_or_count(found, file, on_error, census)
            else:
                census.documents += 1
                yield found
        census.files.append(FileRecord(file.name, size, sha256, census.documents - before))
    if not census.documents:
        raise DataError(
            f"no conversations in {', '.join(map(str, paths[:3]))}: left out {census.left_out}. Give .jsonl or .json "
            f"files of records with {FORMS}."
        )


def _records(file: SourceFile) -> Iterator[tuple[str, dict[str, Any] | Flaw]]:
    if file.path.name.lower().endswith(LINE_SUFFIXES):
        for number, record in line_records(file):
            yield f"{file.path}: line {number}", record
        return
    if not file.path.name.lower().endswith(".json"):
        yield str(file.path), Flaw("of another kind", f"{file.path}: .jsonl and .json are read.")
        return
    try:
        records = json.loads(file.path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        yield str(file.path), Flaw("broken JSON", f"{file.path}: broken JSON ({error}).")
        return
    for number, record in enumerate(records if isinstance(records, list) else [records], start=1):
        place = f"{file.path}: record {number}"
        wrong = f"{place}: {type(record).__name__} where an object was expected."
        yield place, record if isinstance(record, dict) else Flaw("broken JSON", wrong)


def _dialogue(record: dict[str, Any], place: str) -> Dialogue | Flaw:
    try:
        rejected = None
        if "rejected" in record or "rejected_response" in record:
            messages, rejected = _pair(record)
            _check(rejected)
        else:
            messages = _known(record)
        _check(messages)
        if rejected is not None:
            _check_pair(messages, rejected)
        return Dialogue(messages, _tools(record), place, rejected)
    except _Unfit as unfit:
        return Flaw(unfit.reason, f"{place}: {unfit}.")


# ---- the forms


def _messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [_spoken(turn, "role", "content", _OPENAI) for turn in _turns(record["messages"])]


def _conversations(record: dict[str, Any]) -> list[dict[str, Any]]:
    turns = [_spoken(turn, *_keys(turn), _SHAREGPT) for turn in _turns(record["conversations"])]
    return _with_system(record.get("system"), turns)


def _keys(turn: dict[str, Any]) -> tuple[str, str]:
    return ("from", "value") if "from" in turn else ("role", "content")


def _alpaca(record: dict[str, Any]) -> list[dict[str, Any]]:
    turns = []
    for pair in record.get("history") or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _Unfit("of an unknown form", "its history is no list of pairs")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = [record["instruction"], record.get("input") or ""]
    if not all(isinstance(text, str) for text in (*asked, record["output"])):
        raise _Unfit("not a string", "instruction, input or output is no text")
    turns.append({"role": "user", "content": "\n".join(text for text in asked if text)})
    turns.append({"role": "assistant", "content": record["output"]})
    return _with_system(record.get("system"), turns)


def _telechat(record: dict[str, Any]) -> list[dict[str, Any]]:
    turns = [_spoken(turn, *_keys(turn), _SHAREGPT) for turn in _turns(record["dialog"])]
    return _with_system(record.get("system"), turns)


_FORMS: dict[tuple[str, ...], Callable[[dict[str, Any]], list[dict[str, Any]]]] = {
    ("messages",): _messages,
    ("conversations",): _conversations,
    ("instruction", "output"): _alpaca,
    ("dialog",): _telechat,
}


def _known(record: dict[str, Any]) -> list[dict[str, Any]]:
    form = next((form for keys, form in _FORMS.items() if all(key in record for key in keys)), None)
    if form is None:
        raise _Unfit("of an unknown form", f"keys {', '.join(map(repr, list(record)[:8]))}; known: {FORMS}")
    return form(record)


def _pair(record: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The chosen and the rejected conversation, whole."""
    if "rejected_response" in record:  # ms-swift's: the last turn of a conversation is the chosen answer
        chosen = _known(record)
        return chosen, [*chosen[:-1], {"role": "assistant", "content": record["rejected_response"]}]
    if "chosen" not in record:
        raise _Unfit("of an unknown form", "it has a rejected answer and no chosen one")
    asked = _asked(record)
    chosen, rejected = (_answer(record[key]) for key in ("chosen", "rejected"))
    # Some write the whole conversation, some the answer alone.
    return tuple(turns if turns and turns[0]["role"] != "assistant" else asked + turns for turns in (chosen, rejected))  # type: ignore[return-value]


def _asked(record: dict[str, Any]) -> list[dict[str, Any]]:
    prompt = record.get("prompt")
    if isinstance(prompt, list):
        return _with_system(record.get("system"), _all_spoken(prompt))
    if "instruction" in record:
        return _alpaca({**record, "output": ""})[:-1]
    if prompt is None:
        return _known(record) if any(all(key in record for key in keys) for keys in _FORMS) else []
    return _with_system(record.get("system"), [{"role": "user", "content": prompt}])


def _answer(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return _all_spoken([value] if isinstance(value, dict) else value)


def _all_spoken(turns: Any) -> list[dict[str, Any]]:
    return [_spoken(turn, *_keys(turn), _OPENAI | _SHAREGPT) for turn in _turns(turns)]


def _check_pair(chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> None:
    """Of the same question, and two answers to it."""
    if chosen == rejected:
        raise _Unfit("with the same answer twice", "the chosen answer is the rejected one")
    apart = (turns for turns in zip_longest(chosen, rejected) if turns[0] != turns[1])
    if any(turn is None or turn["role"] != "assistant" for turn in next(apart)):
        raise _Unfit("with two questions", "chosen and rejected answer different questions")


def _turns(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise _Unfit("of an unknown form", "its turns are no list of objects")
    return value


def _spoken(turn: dict[str, Any], role_key: str, text_key: str, roles: dict[str, str]) -> dict[str, Any]:
    role = roles.get(str(turn.get(role_key)))
    if role is None:
        known = ", ".join(roles)
        raise _Unfit("of an unknown role", f"a turn's {role_key} is {turn.get(role_key)!r}; known: {known}")
    text = turn.get(text_key)
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(text)}
    kept = {key: turn[key] for key in ("tool_calls", "reasoning_content") if turn.get(key)}
    return {"role": role, "content": text or "" if kept.get("tool_calls") else text, **kept}


def _calls(text: Any) -> list[Any]:
    try:
        calls = json.loads(text) if isinstance(text, str) else text
    except ValueError as error:
        raise _Unfit("broken JSON", f"a function call is no JSON ({error})") from error
    return calls if isinstance(calls, list) else [calls]


def _with_system(system: Any, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if system is not None and not isinstance(system, str):
        raise _Unfit("not a string", "its system prompt is no text")
    return [{"role": "system", "content": system}, *turns] if system else turns


def _tools(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = record.get("tools") or record.get("tool")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise _Unfit("broken JSON", f"its tools are no JSON ({error})") from error
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _Unfit("of an unknown form", "its tools are no list of objects")
    return tools or None


def _check(messages: list[dict[str, Any]]) -> None:
    """Turns with something in them, in an order that a conversation has, ending with an answer to learn."""
    before = "system"
    for number, message in enumerate(messages, start=1):
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            raise _Unfit("not a string", f"turn {number} ({role}) is {type(content).__name__}, not text")
        if not content.strip() and not message.get("tool_calls"):
            raise _Unfit("with an empty turn", f"turn {number} ({role}) is empty")
        if role not in _FOLLOWING[before] or (role == "system" and number > 1):
            raise _Unfit("in no order", f"turn {number} is {role} after {'nothing' if number == 1 else before}")
        before = role
    if before != "assistant":
        raise _Unfit("without an answer", "its last turn is not the assistant's")


_FOLLOWING = {
    "system": ("system", "user"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant", "user"),
}
