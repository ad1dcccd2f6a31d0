"""Checks the sizes that a GGUF file claims against the size of the file, before anything is read.

The `gguf` package makes an object of every element that a file counts, and files of a hundred bytes may count 2^40.
Layout of the file: ggml-org/ggml docs/gguf.md.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value, by the number of its type."""
_MOST = 1 << 22
"""Elements of all lists together: a vocabulary has a few for each token, and there is none of a million."""
_MOST_DIMENSIONS = 8


def check_counts(path: Path) -> None:
    """Raises: ValueError, a count is beyond the file's size or beyond any model."""
    with path.open("rb") as file:
        _Counts(file, path.stat().st_size).check()


class _Counts:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self._elements = 0
        self._order = "<"

    def check(self) -> None:
        magic, version = self._file.read(4), self._number("I")
        if magic != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if version & 0xFFFF == 0:
            self._order = ">"
        tensors, values = self._count(24, "tensors"), self._count(13, "values")
        for _ in range(values):
            self._skip(self._count(1, "characters"))
            self._value(self._number("I"))
        for _ in range(tensors):
            self._skip(self._count(1, "characters"))
            dimensions = self._number("I")
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            self._skip(8 * dimensions + 12)

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._skip(self._count(1, "characters"))
        elif kind == _ARRAY:
            self._array(self._number("I"))
        else:
            self._skip(_size(kind))

    def _array(self, kind: int) -> None:
        count = self._count(8 if kind == _STRING else _size(kind), "elements")
        if kind != _STRING:
            self._skip(count * _size(kind))
            return
        for _ in range(count):
            self._skip(self._count(1, "characters"))

    def _count(self, least: int, what: str) -> int:
        """A number of things that take at least so many bytes each."""
        count, left = self._number("Q"), self._size - self._file.tell()
        if count * least > left:
            raise ValueError(f"it counts {count:,} {what} and ends after {left:,} bytes")
        self._elements += count if what != "characters" else 0
        if self._elements > _MOST:
            raise ValueError(f"it counts more than {_MOST:,} elements")
        return count

    def _number(self, form: str) -> int:
        form = self._order + form
        raw = self._file.read(struct.calcsize(form))
        if len(raw) < struct.calcsize(form):
            raise ValueError("it ends within its header")
        return int(struct.unpack(form, raw)[0])

    def _skip(self, size: int) -> None:
        if self._file.tell() + size > self._size:
            raise ValueError("it ends within its header")
        self._file.seek(size, 1)


def _size(kind: int) -> int:
    if kind not in _SIZES:  # lists of lists too, which llama.cpp does not read either
        raise ValueError(f"a value of type {kind}, which is not known")
    return _SIZES[kind]
