"""Documents kept on disk for another look, so that the files they came from are read once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from struct import Struct

from zili.data.reading import Document

_SIZES = Struct("<QQ")
"""Bytes of the source and of the text, before both."""


class Spool:
    """A file of documents in their order. Memory holds one at a time, the disk all of their text."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def keeping(self, documents: Iterable[Document]) -> Iterator[Document]:
        """`documents`, each written down as it goes by; what was in the file before is gone."""
        with self._path.open("wb") as stream:
            for document in documents:
                source, text = document.source.encode(), document.text.encode()
                stream.write(_SIZES.pack(len(source), len(text)))
                stream.write(source)
                stream.write(text)
                yield document

    def __iter__(self) -> Iterator[Document]:
        """All documents, once more."""
        with self._path.open("rb") as stream:
            while sizes := stream.read(_SIZES.size):
                source, text = (stream.read(size).decode() for size in _SIZES.unpack(sizes))
                yield Document(text, source)

    def remove(self) -> None:
        """Give its room on the disk back."""
        self._path.unlink()
