"""Keeps what is said in a conversation apart from what its template writes.

People, tools and system prompts may spell a guarded token. Before a template is rendered, every such spelling is
replaced by a code of two characters that no text has. Only a spelling that is whole afterwards, the template's own,
becomes the token. A mark that the tokenizer has no token for cannot be told apart so: a text that holds one is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zili.data.manners import Mark
from zili.data.tokenizer import Tokenizer
from zili.errors import DataError

# Halves of surrogate pairs: text that can be encoded has none, so nothing that is said can hold one.
BEGIN, END = "\ud800", "\ud801"
"""What a template writes before and after what the assistant says."""
OPEN = "\ud802"
"""Where what is said goes on."""
_HIGH, _LOW = 0xD900, 0xDC00
_LOWS = 0x400
_CODE = re.compile("[\ud900-\udbff][\udc00-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_DEEPEST = 64
"""Levels of lists and tables in a conversation: no use of tools needs more, and rendering calls itself for each."""


@dataclass(frozen=True)
class Segment:
    """A part of a rendered text; the signs of what is said have no ids."""

    text: str
    ids: list[int]


class Guard:
    """For one template and one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, marks: Collection[Mark], source: str, name: str) -> None:
        """`marks`: of turns, all that the template of this `source` has."""
        self._name = name
        # No token sets these apart from text: whoever writes one could speak for another.
        self._plain = [mark for mark in marks if mark.text not in tokenizer.added_tokens]
        marked = {mark.text for mark in marks}
        # Tokens that are not special are text, but for those that the template itself writes.
        written = {text for text in tokenizer.added_tokens if text and (text in marked or text in source)}
        roles = {text: tokenizer.token_id(text) for text in tokenizer.roles.values() if text}
        self._ids = {text: number for text, number in roles.items() if number is not None}
        self._ids |= {text: tokenizer.added_tokens[text] for text in written | set(tokenizer.special_tokens) if text}
        self._spelled = sorted(self._ids, key=len, reverse=True)
        self._codes = {
            text: chr(_HIGH + number // _LOWS) + chr(_LOW + number % _LOWS) for number, text in enumerate(self._spelled)
        }
        self._texts = {code: text for text, code in self._codes.items()}
        self._cut = re.compile(f"({any_of([*self._spelled, BEGIN, END])})")
        self._tokenizer = tokenizer.taking_for_text(written)
        # Characters that a vocabulary does not have may become its unknown token; nothing else may become a mark.
        self._never = set(self._ids.values()) - {tokenizer.unknown_id}

    def broken(self, value: Any, depth: int = 0) -> Any:
        """`value` with a code in place of every spelling of a guarded token in it.

        Raises:
            DataError: a text in it holds a mark that is no token, or is no Unicode; or it is nested too deep.
        """
        if isinstance(value, str):
            return self._broken_text(value)
        if depth > _DEEPEST:
            raise DataError(f"it is nested deeper than {_DEEPEST} levels")
        if isinstance(value, Mapping):
            return {self.broken(key): self.broken(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.broken(inner, depth + 1) for inner in value]
        return value

    def _broken_text(self, text: str) -> str:
        if not text.isascii() and (found := _SURROGATE.search(text)):
            code = f"U+{ord(found[0]):04X}"
            raise DataError(f"text with a lone surrogate, {code} at character {found.start()}, cannot be encoded")
        if self._plain and (mark := _mark_in(text, self._plain)) is not None:
            raise MarkSpoken(
                f"a text holds {mark!r}, with which {self._name} marks turns: the tokenizer has no token of that "
                "name, so that the model could not tell the two apart. Change the text, or take another template"
            )
        return self._cut.sub(lambda found: self._codes[found[0]], text)

    def segments(self, text: str) -> Iterator[Segment]:
        """The parts of a rendered text, and their ids."""
        for part in self._cut.split(text):
            if part in (BEGIN, END):
                yield Segment(part, [])
            elif part in self._ids:
                yield Segment(part, [self._ids[part]])
            elif part:
                said = _CODE.sub(lambda found: self._texts.get(found[0], found[0]), part)
                ids = self._tokenizer.encode(said).tolist()
                if not self._never.isdisjoint(ids):
                    raise MarkSpoken(f"the tokenizer takes part of a text for one of its special tokens: {said[:60]!r}")
                yield Segment(said, ids)


def any_of(words: Collection[str]) -> str:
    """An expression that finds any of some words, the longest where several begin.

    What words begin with alike is written once: some tokenizers reserve hundreds of tokens, and each would be tried
    at every `<` of a text.
    """
    following: dict[str, list[str]] = {}
    for word in filter(None, words):
        following.setdefault(word[0], []).append(word)
    branches = []
    for alike in following.values():
        begin = os.path.commonprefix(alike)  # noqa: RUF071  (of letters, as is wanted)
        branches.append(re.escape(begin) + any_of([word.removeprefix(begin) for word in alike]))
    if not branches or (len(branches) == 1 and "" not in words):
        return "".join(branches)
    return f"(?:{'|'.join(branches)})" + ("?" if "" in words else "")


def _mark_in(text: str, marks: Collection[Mark]) -> str | None:
    """The first of some marks that a text holds."""
    return next((mark.text for mark in marks if re.search(mark.pattern(), text)), None)


class MarkSpoken(DataError):
    """Somebody says what the template marks turns with."""

    reason = "with a mark of the template in a text"
