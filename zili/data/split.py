"""Which documents are held out of training: decided by their content alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from zili.errors import DataError

_KEYS = 1 << 64


def content_key(text: str) -> int:
    """A number in [0, 2^64) spread evenly over texts: the first eight bytes of sha256 of the UTF-8 text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@dataclass(frozen=True, slots=True)
class Split:
    """Holds a text out when its key is below a threshold.

    A pure function of content: exact duplicates land on one side. A document stays on its side when the corpus around
    it grows, is reordered, or is read on another machine.
    """

    threshold: int

    @classmethod
    def of(cls, fraction: float, smallest_key: int = _KEYS) -> Split:
        """Hold out about `fraction` of the documents, and at least the one with `smallest_key`."""
        if not 0.0 < fraction < 1.0:
            raise DataError(f"held-out fraction {fraction}: give a number between 0 and 1, such as 0.05.")
        return cls(max(round(fraction * _KEYS), smallest_key + 1 if smallest_key < _KEYS else 0))

    def holds_out(self, text: str) -> bool:
        return content_key(text) < self.threshold

    @property
    def rule(self) -> str:
        return f"held out when the first 8 bytes of sha256(text), big-endian, are below {self.threshold}"


def cut(text: str, size: int) -> Iterator[str]:
    """`text` in pieces of `size` to `2 * size` characters, ended at a blank line, else a line, else a space.

    For corpora of a few long files, which could not be split otherwise. Joined, the pieces are the text.
    """
    start = 0
    while len(text) - start > 2 * size:
        end = start + size
        for mark in ("\n\n", "\n", " "):
            found = text.find(mark, start + size, start + 2 * size)
            if found >= 0:
                end = found + len(mark)
                break
        yield text[start:end]
        start = end
    yield text[start:]
