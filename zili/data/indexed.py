"""Megatron's indexed data set: `.bin` holds the tokens, `.idx` says where each document lies.

Source of the format: NVIDIA/Megatron-LM `megatron/core/datasets/indexed_dataset.py` (`_IndexWriter`,
`_IndexReader`, `DType`). Little-endian throughout:

    9 bytes   magic `MMIDIDX\\0\\0`
    uint64    version, 1
    uint8     token type: 4 int32, 8 uint16 (1 to 8 exist; there is no uint32)
    uint64    N, sequences
    uint64    M, entries of the document index (documents + 1)
    int32 N   tokens of each sequence
    int64 N   byte offset of each sequence in `.bin`
    int64 M   first sequence of each document, and N at the end
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from zili.errors import DataError

MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
LONGEST = 2**31 - 1
"""Tokens in one document: lengths are int32."""


def token_type(vocab_size: int) -> np.dtype[Any]:
    """uint16 below 65,500 tokens, Megatron's own limit, else int32.

    Wider ids are int32 and not uint32 because Megatron's table has no uint32; the bytes are the same for
    every id below 2^31.
    """
    return np.dtype("<u2" if vocab_size < 65_500 else "<i4")


def write_index(stream: BinaryIO, dtype: np.dtype[Any], lengths: array[int]) -> None:
    """Write an `.idx` for documents of `lengths` tokens, one sequence each."""
    code = next(code for code, name in _TYPES.items() if np.dtype(name) == dtype)
    count = len(lengths)
    stream.write(_HEADER.pack(MAGIC, 1, code, count, count + 1))
    sizes = np.frombuffer(lengths, dtype=np.intc).astype("<i4")
    ends = np.cumsum(sizes, dtype="<i8") * dtype.itemsize
    stream.write(sizes.tobytes())
    stream.write((ends - sizes.astype("<i8") * dtype.itemsize).tobytes())
    stream.write(np.arange(count + 1, dtype="<i8").tobytes())


@dataclass(frozen=True, slots=True)
class Index:
    """A checked `.idx`: `lengths [N]` and `offsets [N]` in tokens, offsets from the start of `.bin`."""

    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        return int(self.offsets[-1]) + int(self.lengths[-1])


def read_index(path: Path) -> Index:
    """Map an `.idx` and check it against itself. Raises `DataError` with expected and found bytes."""
    found = path.stat().st_size
    if found < _HEADER.size:
        raise DataError(f"{path}: {found} bytes, but the header alone takes {_HEADER.size}. {REBUILD}")
    with path.open("rb") as stream:
        magic, version, code, count, documents = _HEADER.unpack(stream.read(_HEADER.size))
    if magic != MAGIC or version != 1 or code not in _TYPES or _TYPES[code][-2] == "f":
        raise DataError(f"{path}: not a Megatron token index (magic {magic!r}, version {version}, type {code}).")
    expected = _HEADER.size + 12 * count + 8 * documents
    if found != expected or not count:
        raise DataError(f"{path}: {count} documents take {expected} bytes, found {found}: cut off. {REBUILD}")
    raw = np.memmap(path, mode="r", dtype=np.uint8, offset=_HEADER.size)
    lengths = raw[: 4 * count].view("<i4")
    pointers = raw[4 * count : 12 * count].view("<i8")
    if documents != count + 1:
        raise DataError(f"{path}: {documents - 1} documents in {count} sequences; one sequence each is read.")
    dtype = np.dtype(_TYPES[code])
    offsets = np.cumsum(lengths, dtype=np.int64) - lengths
    if lengths.min() < 0 or not np.array_equal(offsets * dtype.itemsize, pointers):
        raise DataError(f"{path}: damaged: its offsets are not the sums of its lengths. {REBUILD}")
    return Index(dtype, lengths, offsets)


REBUILD = "Build the store again."
