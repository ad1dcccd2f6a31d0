"""Text from tokens as they come, and text that is safe to show."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import TypeVar

from zili.data.tokenizer import DecodeStream, Tokenizer

REPLACEMENT = "\ufffd"

Reason = TypeVar("Reason")


def stream_text(
    tokenizer: Tokenizer, tokens: Generator[int, None, Reason], before: Sequence[int] = ()
) -> Generator[str, None, Reason]:
    """Pieces of text of `tokens` as they come, after the text of `before`, never half a character; returns what
    `tokens` returns.
    """
    stream = DecodeStream(tokenizer, before=before)
    while True:
        try:
            token = next(tokens)
        except StopIteration as end:
            yield stream.finish()
            reason: Reason = end.value
            return reason
        yield stream.push(token)


class StopText:
    """Ends a text where one of `stops` begins; what might become one is held back.

    Each character is looked at once for each stop (Knuth, Morris and Pratt 1977), however alike text and stop are.
    The stop that is whole first ends the text, whatever pieces it came in; of several, the one that began first.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(stops)
        """How much of each stop the text ends with."""
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What may be sent now."""
        if not self._stops:
            return text
        self._held += text
        for place, letter in enumerate(text, start=len(self._held) - len(text) + 1):
            whole = [
                len(stop) for index, (stop, _) in enumerate(self._stops) if self._meets(index, letter) == len(stop)
            ]
            if whole:
                self.stopped = True
                sent, self._held = self._held[: place - max(whole)], ""
                return sent
        cut = len(self._held) - max(self._matched)
        sent, self._held = self._held[:cut], self._held[cut:]
        return sent

    def _meets(self, index: int, letter: str) -> int:
        stop, borders = self._stops[index]
        matched = self._matched[index]
        while matched and stop[matched] != letter:
            matched = borders[matched - 1]
        self._matched[index] = matched = matched + (stop[matched] == letter)
        return matched

    def finish(self) -> str:
        """What was held back for nothing."""
        held, self._held = self._held, ""
        return held


def _borders(stop: str) -> list[int]:
    """Of each beginning of `stop`, the length of the longest shorter beginning that it ends with."""
    borders = [0] * len(stop)
    matched = 0
    for place in range(1, len(stop)):
        while matched and stop[matched] != stop[place]:
            matched = borders[matched - 1]
        matched += stop[matched] == stop[place]
        borders[place] = matched
    return borders


class AnswerText:
    """The text of an answer as its tokens come, up to the first of some stops."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        skip_special: bool = True,
        before: Sequence[int] = (),
        free: int = 0,
    ) -> None:
        """`before`: as of `DecodeStream`. `free`: so many tokens have text that no stop ends."""
        self._text, self._stop = DecodeStream(tokenizer, skip_special=skip_special, before=before), StopText(stops)
        self._free = free

    @property
    def stopped(self) -> bool:
        """Whether a stop has ended it: what comes after is no part of it."""
        return self._stop.stopped

    def push(self, token: int) -> str:
        """The text that is safe to show now."""
        text = self._text.push(token)
        self._free -= 1
        return text if self._free >= 0 else self._stop.push(text)

    def finish(self) -> str:
        """What was held back, where no stop came."""
        rest = self._stop.push(self._text.finish())
        return rest if self.stopped else rest + self._stop.finish()


def visible(text: str) -> str:
    """`text` with control characters shown as symbols, so that a model's output cannot drive a terminal.

    Newline and tab stay. C0 controls become their pictures (U+2400 block); C1 controls and bidirectional
    overrides, which can disguise what is on the screen, become U+FFFD.
    """
    return text.translate(_VISIBLE)


def _visible_table() -> Iterator[tuple[int, str]]:
    for code in range(0x20):
        if chr(code) not in "\n\t":
            yield code, chr(0x2400 + code)
    yield 0x7F, "\u2421"
    for code in (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)):
        yield code, REPLACEMENT


_VISIBLE = dict(_visible_table())
