"""One turn of a conversation in a file, by whatever names it has for things, as a message."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import zip_longest
from math import nan
from typing import Any

from zili.data.dialect import ROLES
from zili.data.fields import Fields, Unfit, check_sound

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
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thoughts", "thought", "think")
_WEIGHTS = ("weight", "loss", "loss_scale", "loss_mask", "train", "training", "trainable")
_MASKS = ("mask", "masked", "ignore", "ignored", "skip", "no_loss", "train_detail", "train_on_turn")
"""Names that say what is not learned. Data sets use them with opposite meanings, so none of them is guessed at."""
_CALLS = ("tool_call", "calls", "function", "functions", "tools", "reasoning_details")
"""Calls, tools and thoughts where they are not read."""
_CALL = ("id", "type", "function", "name", "arguments")
_MEDIA = re.compile(r"(?:[a-z]+_)?(?:image|video|audio)(?:s|_urls?|_paths?|_files?)?|objects")
_LONGEST = 60
"""Characters shown of what somebody wrote."""


def spoken(turn: Fields) -> dict[str, Any]:
    """A turn as a message. An assistant's that is not to be learned has `weight` 0.

    Raises: Unfit.
    """
    role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
    given = turn.first(role_key)
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise Unfit("of an unknown role", f"a turn's {role_key} is {_shown(given)}; known: {', '.join(_ROLES)}")
    refuse_unlearnable(turn)
    text, learned = _text(turn, text_key), weight(turn)
    found = _asked(turn, role, text) if role not in ("assistant", "call") else _answered(turn, role, text, learned)
    for key in _CALLS:
        if turn.peek(key) and key in turn.unused():
            raise Unfit(
                "of an unknown form", f"a turn's {key!r} is not read: calls are tool_calls, tools beside the turns"
            )
    return found


def is_call(turn: Fields) -> bool:
    """Whether a turn is a call of a tool, and nothing else."""
    role = turn.peek("from") or turn.peek("role")
    return isinstance(role, str) and _ROLES.get(role) == "call"


def _asked(turn: Fields, role: str, text: Any) -> dict[str, Any]:
    """What is not the assistant's."""
    if any(turn.peek(key) for key in _WEIGHTS):
        raise Unfit("with weights that are not learned by", f"what is said as {role} shall be learned")
    named = turn.first("tool_call_id"), turn.first("name") if role == "tool" else None
    kept = {key: value for key, value in zip(("tool_call_id", "name"), named, strict=True) if value is not None}
    empty = role == "system" and (text is None or (isinstance(text, str) and not text.strip()))
    return {"role": role, "content": "" if empty else text, **kept}


def _answered(turn: Fields, role: str, text: Any, learned: int) -> dict[str, Any]:
    calls = _read_calls(text) if role == "call" else _called(turn)
    content = "" if role == "call" or (calls and text is None) else text
    rest = {"tool_calls": calls, "reasoning_content": thoughts_of(turn)}
    unlearned = {} if learned else {"weight": 0}
    said = {key: value for key, value in rest.items() if value}
    return {"role": "assistant", "content": content, **said, **unlearned}


def thoughts_of(fields: Fields) -> str | None:
    """The value under any of its names.

    Raises: Unfit.
    """
    thoughts = fields.first(*THOUGHTS)
    if thoughts is not None and not isinstance(thoughts, str):
        raise Unfit("not a string", f"the thoughts of an answer are {type(thoughts).__name__}, not text")
    return thoughts


def _text(turn: Fields, key: str) -> Any:
    """The content of a turn; that of one that comes in parts as one text."""
    content = turn.first(key)
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise Unfit("with more than text", "a part of a turn's content is no text")
        texts.append(text)
        beside = part if isinstance(part, dict) else {}
        turn.lost |= {f"part's {name}": value for name, value in beside.items() if name not in ("type", "text")}
    return "".join(texts)


def weight(fields: Fields) -> int:
    """1 to learn it, 0 not to; by any of the names for it.

    Raises: Unfit.
    """
    weights = [fields[key] for key in _WEIGHTS if key in fields]
    weights += [nan for key in _WEIGHTS if key in fields.not_numbers]
    for one in weights:
        if not isinstance(one, bool | int | float) or one not in (0, 1):
            raise Unfit("with weights that are not learned by", f"a weight of {_shown(one)}: 0 and 1 are known")
    return int(all(weights))


def refuse_unlearnable(fields: Fields) -> None:
    """Raises: Unfit, there is more than text, or a mask that every trainer reads otherwise."""
    for key in fields:
        value = fields.peek(key)
        if _MEDIA.fullmatch(key.lower()) and value and isinstance(value, str | list | dict):
            raise Unfit("with more than text", f"it has {key!r}: text alone is learned")
        if key.lower() in _MASKS:
            raise Unfit("with weights that are not learned by", f"it has {key!r}: say weight, 0 or 1, of an answer")


def _called(turn: Fields) -> list[Any]:
    calls = turn.first("tool_calls") or []
    if not isinstance(calls, list):
        raise Unfit("of an unknown form", "the tool_calls of a turn are no list")
    one = turn.first("function_call")  # OpenAI's, of old
    if isinstance(one, dict) and not any(one.values()):  # a row of a table has every key
        one = None
    return _checked([*calls, {"type": "function", "function": one}] if one else calls)


def _read_calls(text: Any) -> list[Any]:
    """Calls of tools, given in JSON: one, or a list."""
    calls = in_json(text, "a function call is")
    return _checked(calls if isinstance(calls, list) else [calls])


def _checked(calls: list[Any]) -> list[Any]:
    """Calls of which all is read: their arguments may have another name, and are not to be lost by it."""
    for call in (call for call in calls if isinstance(call, dict)):
        inner = call.get("function")
        for part in (call, inner if isinstance(inner, dict) else {}):
            told = {key: value for key, value in part.items() if value and isinstance(value, str | list | dict)}
            odd = next((key for key in told if key not in _CALL), None)
            if odd is not None:
                raise Unfit("of an unknown form", f"a call has {odd!r}: {', '.join(_CALL)} are read")
    return calls


def in_json(value: Any, what: str) -> Any:
    """What a text says in JSON; what is no text is as it is, and a text without a word is nothing.

    Raises: Unfit.
    """
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise Unfit("broken JSON", f"{what} no JSON ({error})") from error
    check_sound(found)
    return found


def _shown(value: Any) -> str:
    return f"{value!r:.{_LONGEST}}" if isinstance(value, str | int | float) else f"a {type(value).__name__}"


# ---- conversations


def joined(turns: Sequence[tuple[Fields, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Messages in which calls that come one by one, as ms-swift writes those of one answer, are that answer's."""
    found: list[dict[str, Any]] = []
    for turn, message in turns:
        before: dict[str, Any] = found[-1] if found else {"role": None}
        alone = is_call(turn) and "reasoning_content" not in message
        if alone and before["role"] == "assistant" and before.get("weight", 1) == message.get("weight", 1):
            found[-1] = {**before, "tool_calls": [*before.get("tool_calls", []), *message["tool_calls"]]}
        else:
            found.append(message)
    return found


def check_turns(messages: Sequence[dict[str, Any]]) -> None:
    """Turns with something in them, in an order that a conversation has, ending with an answer to learn.

    Raises: Unfit.
    """
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


def check_pair(chosen: Sequence[dict[str, Any]], rejected: Sequence[dict[str, Any]]) -> None:
    """The same question, and two answers to it.

    Raises: Unfit.
    """
    if chosen == rejected:
        raise Unfit("with the same answer twice", "the chosen answer is the rejected one")
    apart = (turns for turns in zip_longest(chosen, rejected) if turns[0] != turns[1])
    if any(turn is None or turn["role"] != "assistant" for turn in next(apart)):
        raise Unfit("with two questions", "chosen and rejected answer different questions")
