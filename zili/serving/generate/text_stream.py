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
