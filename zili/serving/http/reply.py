"""What an assistant's text is made of: thoughts, what it says, and calls of tools, told apart as they come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from zili.data.manners import CALL, CALLED, THINK, THOUGHT, Call, ReadArgument, as_json, read_call


@dataclass
class Parts:
    """What has come anew."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)

    def __add__(self, other: Parts) -> Parts:
        return Parts(self.reasoning + other.reasoning, self.content + other.content, self.calls + other.calls)


class Reply:
    """Takes a text apart. Tags that are not whole yet are held back; a call that cannot be read stays text."""

    def __init__(self, *, thinking: bool, tools: bool, read: ReadArgument = as_json) -> None:
        """`thinking`: the prompt has opened its thoughts already. `tools`: there are some, so that it may call them.
        `read`: as of `read_call`."""
        self._state: Literal["begin", "thinking", "content", "calling"] = "thinking" if thinking else "begin"
        self._tools, self._read = tools, read
        self._held = ""
        self._looked = 0
        """Characters of `_held` in which no call ends: a long one is not looked through again with each piece."""
        self.calls = 0
        """Of tools, so far."""

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
            if self._tools:
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
        call = read_call(inside, self._read)
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
