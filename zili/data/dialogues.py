"""Files of conversations to learn from, in the forms that are common, as one: messages of roles.

Told apart by a record's keys: `messages` (OpenAI's), `conversations` (ShareGPT's), `instruction` with `output`
(Alpaca's), `dialog` (TeleChat2's). With `rejected` a record is a pair: a question, the answer that was chosen and one
that was not. What cannot be learned from is an error with its place, or left out and counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from zili.data.chat import ROLES
from zili.data.fields import Fields, Unfit, check_sound
from zili.data.reading import Flaw, OnError, records, refuse_or_count
from zili.data.sources import (
    JSON_SUFFIXES,
    LINE_SUFFIXES,
    Census,
    FileRecord,
    Source,
    SourceFile,
    list_files,
    measure,
    printable,
    size_of,
)
from zili.errors import DataError

FORMS = "messages, conversations, instruction with output, dialog, chosen with rejected"
_ROLES = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}
_REJECTED = ("rejected", "rejected_response", "rejected_messages", "non_preferred_output")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_WEIGHTS = ("weight", "loss", "loss_scale", "train", "training", "trainable")
_SYSTEMS = ("system", "system_prompt")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio", "objects")
_JUDGED = ("label", "kto_tag")
_ANSWERS = ("chosen", "reject", "preferred", "non_preferred")
"""How names of columns begin that hold answers."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One conversation: what was said, the tools there were, and its place for errors."""

    messages: list[dict[str, Any]]
    """Of an assistant's that shall not be learned `weight` is 0."""
    tools: list[dict[str, Any]] | None
    place: str
    rejected: list[dict[str, Any]] | None = None
    """Of a pair the conversation that `messages` is preferred to; they part at a turn of the assistant's."""
    options: dict[str, Any] = field(default_factory=dict)
    """The template's own, such as enable_thinking (TRL's `chat_template_kwargs`)."""


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
        size, sha256 = measure(file.path) if census.hashes else (size_of(file.path), "")
        before = census.documents
        for place, record in _records(file):
            found = record if isinstance(record, Flaw) else _dialogue(record, place, census)
            if isinstance(found, Flaw):
                refuse_or_count(found, file, on_error, census)
            else:
                census.documents += 1
                yield found
        census.files.append(FileRecord(file.name, size, sha256, census.documents - before))
    if not census.documents:
        given = ", ".join(printable(str(path)) for path in paths[:3])
        raise DataError(
            f"no conversations in {given}: left out {census.left_out}. Give .jsonl or .json "
            f"files of records with {FORMS}."
        )


def _records(file: SourceFile) -> Iterator[tuple[str, dict[str, Any] | Flaw]]:
    if file.path.name.lower().endswith(LINE_SUFFIXES + JSON_SUFFIXES):
        return records(file)
    wrong = Flaw("of another kind", f"{file.shown}: .jsonl, .ndjson and .json are read, also as .gz and .zst.")
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
    """Of one record. Whatever in it is not used is in `unused` in the end."""

    def __init__(self, record: dict[str, Any]) -> None:
        self._record = Fields(record)
        self._turns: list[Fields] = []

    def dialogue(self, place: str) -> Dialogue:
        """Raises: Unfit."""
        _refuse_media(self._record)
        key = next((key for key in _REJECTED if key in self._record), None)
        if key is None and "chosen" in self._record:
            raise Unfit(
                "of an unknown form", "beside its chosen answer the rejected one is no text, no list of objects"
            )
        messages, rejected = (self._known(), None) if key is None else self._pair(key)
        _check(messages)
        if rejected is not None:
            _check(rejected)
            _check_pair(messages, rejected)
        options = self._record.first("chat_template_kwargs") or {}
        if not isinstance(options, dict):
            raise Unfit("of an unknown form", "its chat_template_kwargs are no object")
        found = Dialogue(messages, _tools(self._record), place, rejected, options)
        self._check_verdict()
        self._check_rest()
        return found

    @property
    def unused(self) -> list[str]:
        """Names of what was not used, once for each place where it says something."""
        return [*self._record.unused(), *(f"a turn's {key}" for turn in self._turns for key in turn.unused())]

    def _check_verdict(self) -> None:
        """What says of a whole record whether it is to be learned."""
        if _weight(self._record) == 0:
            raise Unfit("of weight 0", "it is not to be learned")
        for key in _JUDGED:
            if isinstance(self._record.peek(key), bool) and not self._record[key]:
                raise Unfit("judged bad", f"its {key} says that the answer is bad (KTO), which is not learned from")

    def _check_rest(self) -> None:
        for key, value in self._record.unused().items():
            if key.startswith(_ANSWERS) and isinstance(value, str | list | dict):
                raise Unfit("of an unknown form", f"{key!r} is an answer that is not read so; known: {FORMS}")

    def _known(self) -> list[dict[str, Any]]:
        record = self._record
        if "messages" in record:
            return self._with_system(self._all_spoken(record["messages"]))
        if "conversations" in record:
            return self._with_system(self._all_spoken(record["conversations"]))
        if "instruction" in record and "output" in record:
            return self._alpaca(record["output"])
        if "dialog" in record:
            return self._with_system(self._all_spoken(record["dialog"]))
        raise Unfit("of an unknown form", f"keys {', '.join(map(repr, list(record)[:8]))}; known: {FORMS}")

    def _alpaca(self, output: Any) -> list[dict[str, Any]]:
        record, turns = self._record, []
        history = record.first("history") or []
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise Unfit("of an unknown form", "its history is no list of pairs")
        for pair in history:
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        asked = [record["instruction"], record.first("input") or ""]
        if not all(isinstance(text, str) for text in (*asked, output)):
            raise Unfit("not a string", "instruction, input or output is no text")
        turns.append({"role": "user", "content": "\n".join(text for text in asked if text)})
        turns.append({"role": "assistant", "content": output})
        return self._with_system(turns)

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
        asked = self._asked_of_openai() if key == "non_preferred_output" else self._asked()
        chosen, rejected = (self._whole(asked, self._answer(self._record[one])) for one in (name, key))
        return chosen, rejected

    def _whole(self, asked: list[dict[str, Any]], turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Some write the whole conversation, some the answer alone."""
        if turns and turns[0]["role"] != "assistant":
            return self._with_system(turns)
        return asked + turns

    def _asked(self) -> list[dict[str, Any]]:
        record = self._record
        if "instruction" in record and not isinstance(record.peek("prompt"), list):
            return self._alpaca("")[:-1]
        prompt = record.first("prompt")
        if isinstance(prompt, list):
            return self._with_system(self._all_spoken(prompt))
        if prompt is not None:
            return self._with_system([{"role": "user", "content": prompt}])
        return self._known() if any(key in record for key in ("messages", "conversations", "dialog")) else []

    def _asked_of_openai(self) -> list[dict[str, Any]]:
        asked = self._record.first("input")
        if not isinstance(asked, dict):
            raise Unfit("of an unknown form", "its input is no object with messages")
        self._record = Fields({**{key: self._record[key] for key in self._record if key != "input"}, **asked})
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
        spoken = [_spoken(turn) for turn in fields]
        # A system prompt without a word is none.
        return spoken[1:] if spoken and spoken[0] == {"role": "system", "content": ""} else spoken

    def _with_system(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        system = self._record.first(*_SYSTEMS)
        if system is not None and not isinstance(system, str):
            raise Unfit("not a string", "its system prompt is no text")
        if system is None or not system.strip():
            return turns
        first = {"role": "system", "content": system}
        if turns and turns[0]["role"] == "system":
            if turns[0]["content"].strip() != system.strip():
                raise Unfit("with two system prompts", "it has one as its first turn and another beside its turns")
            return turns
        return [first, *turns]


def _spoken(turn: Fields) -> dict[str, Any]:
    role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
    given = turn.first(role_key)
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise Unfit("of an unknown role", f"a turn's {role_key} is {given!r}; known: {', '.join(_ROLES)}")
    _refuse_media(turn)
    text = _text(turn.first(text_key))
    weight = _weight(turn)
    if role not in ("assistant", "call"):
        if any(turn.peek(key) for key in _WEIGHTS):
            raise Unfit("with weights that are not learned by", f"what {given} says shall be learned")
        named = turn.first("tool_call_id"), turn.first("name") if role == "tool" else None
        kept = {key: value for key, value in zip(("tool_call_id", "name"), named, strict=True) if value is not None}
        empty = role == "system" and isinstance(text, str) and not text.strip()
        return {"role": role, "content": "" if empty or (role == "system" and text is None) else text, **kept}
    calls = _calls(text) if role == "call" else _called(turn)
    content = "" if role == "call" or (calls and text is None) else text
    thoughts = turn.first(*_THOUGHTS)
    if thoughts is not None and not isinstance(thoughts, str):
        raise Unfit("not a string", f"the thoughts of a turn are {type(thoughts).__name__}, not text")
    rest = {"tool_calls": calls, "reasoning_content": thoughts}
    unlearned = {"weight": 0} if weight == 0 else {}
    return {
        "role": "assistant",
        "content": content,
        **{key: value for key, value in rest.items() if value},
        **unlearned,
    }


def _text(content: Any) -> Any:
    """The text of a content that comes in parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
        if not isinstance(text, str):
            raise Unfit("with more than text", "a part of a turn's content is no text")
        texts.append(text)
    return "".join(texts)


def _weight(fields: Fields) -> int:
    """1 to learn it, 0 not to; by any of the names for it."""
    weights = [fields[key] for key in _WEIGHTS if key in fields]
    for weight in weights:
        if not isinstance(weight, bool | int | float) or weight not in (0, 1):
            raise Unfit("with weights that are not learned by", f"a weight of {weight!r:.40}: 0 and 1 are known")
    return int(all(weights))


def _refuse_media(fields: Fields) -> None:
    for key in _MEDIA:
        if fields.first(key):
            raise Unfit("with more than text", f"it has {key!r}: text alone is learned")


def _called(turn: Fields) -> list[Any]:
    calls = turn.first("tool_calls") or []
    if not isinstance(calls, list):
        raise Unfit("of an unknown form", "the tool_calls of a turn are no list")
    one = turn.first("function_call")  # OpenAI's, of old
    return calls if one is None else [*calls, {"type": "function", "function": one}]


def _check_pair(chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> None:
    """Of the same question, and two answers to it."""
    if chosen == rejected:
        raise Unfit("with the same answer twice", "the chosen answer is the rejected one")
    apart = (turns for turns in zip_longest(chosen, rejected) if turns[0] != turns[1])
    if any(turn is None or turn["role"] != "assistant" for turn in next(apart)):
        raise Unfit("with two questions", "chosen and rejected answer different questions")


def _tools(record: Fields) -> list[dict[str, Any]] | None:
    tools = _in_json(record.first("tools", "tool"), "its tools are")
    functions = _in_json(record.first("functions"), "its functions are")  # OpenAI's, of old
    for given in (tools, functions):
        if given and not (isinstance(given, list) and all(isinstance(tool, dict) for tool in given)):
            raise Unfit("of an unknown form", "its tools are no list of objects")
    return [*(tools or []), *({"type": "function", "function": one} for one in functions or [])] or None


def _in_json(value: Any, what: str) -> Any:
    """What a text says in JSON; what is no text is as it is, and a text without a word is nothing."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise Unfit("broken JSON", f"{what} no JSON ({error})") from error
    check_sound(found)
    return found


def _calls(text: Any) -> list[Any]:
    calls = _in_json(text, "a function call is")
    return calls if isinstance(calls, list) else [calls]


def _check(messages: list[dict[str, Any]]) -> None:
    """Turns with something in them, in an order that a conversation has, ending with an answer to learn."""
    before = "system"
    for number, message in enumerate(messages, start=1):
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            raise Unfit("not a string", f"turn {number} ({role}) is {type(content).__name__}, not text")
        if not content.strip() and not message.get("tool_calls"):
            raise Unfit("with an empty turn", f"turn {number} ({role}) is empty")
        if role not in _FOLLOWING[before] or (role == "system" and number > 1):
            raise Unfit("in no order", f"turn {number} is {role} after {'nothing' if number == 1 else before}")
        before = role
    if before != "assistant":
        raise Unfit("without an answer", "its last turn is not the assistant's")
    if not any(message["role"] == "assistant" and message.get("weight", 1) for message in messages):
        raise Unfit("of weight 0", "none of its answers is to be learned")


_FOLLOWING = {
    "system": ("system", "user"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant", "user"),
}
