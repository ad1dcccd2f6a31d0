"""Batches for training: that of a position is a pure function of the seed, the position and the stores. It is the
step's number, unless batches before it are left out."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zili.data.order import DOCUMENTS, WINDOWS, Mixture, permutation
from zili.data.store import TokenStore
from zili.errors import DataError

Rows = tuple[NDArray[np.int64], NDArray[np.int32]]
"""Tokens `[B, S+1]` and the document of each within its row `[B, S+1]`."""


class Batch(NamedTuple):
    """Packed rows on the CPU."""

    input_ids: Tensor
    """`[B, S]` int64."""
    labels: Tensor
    """`[B, S]` int64: the token after each input; every one is a target."""
    document_ids: Tensor
    """`[B, S]` int32, from 0 in each row: the document of each label. Attention stops where it changes.

    An end token, as input, so belongs to the document after it: it sees nothing of its own, and from it alone the
    next one's first token is predicted. It is how a model is told that a document begins (`zili.evaluation`,
    `zili sample`).
    """
    reference: Tensor | None = None
    """`[B, N]` fp32, where documents 2j and 2j + 1 of a row are a chosen and a rejected answer: the log-probability of
    each document under the reference model, 0 where a row has fewer."""
    padding: Tensor | None = None
    """`[B, S]` bool, true where a row is only filled up: what is no token of any document. None: nowhere."""

    teacher: Tensor | None = None
    """`[B, S, D]`, where there is a teacher: its hidden states of these rows, kept until its head is asked."""

    def split(self, size: int) -> Iterator[Batch]:
        """The same, `size` rows at a time."""
        return (self.rows(slice(start, start + size)) for start in range(0, len(self.input_ids), size))

    def given(self) -> dict[str, Tensor]:
        """Its tensors by name, without those that it does not have."""
        return {name: rows for name, rows in self._asdict().items() if rows is not None}

    def rows(self, some: slice) -> Batch:
        """Some of its rows."""
        return self.each(lambda part: part[some])

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """`change` of everything there is."""
        return Batch(*(None if part is None else change(part) for part in self))  # type: ignore[arg-type]


class Batches(Protocol):
    """What a trainer asks of a loader."""

    @property
    def report(self) -> list[str]:
        """Lines for the user: which part of the data is read, and which is not."""

    @property
    def learned_share(self) -> float:
        """Targets a position of a batch, in the mean over the data: labels that count, or pairs of answers."""

    def batch(self, step: int, rows: slice = ...) -> Batch:
        """The batch of position `step` (from 0), or those of its rows that one data-parallel rank takes."""

    def fingerprint(self) -> str:
        """Identity of the sequence of samples: equal means that sample n is the same row. For checkpoints."""


class _Line(Protocol):
    """The endless sequence of one source's rows."""

    count: int
    """Rows of an epoch."""


class MixedRows(ABC):
    """Rows of several sources in a mixture: what loaders of every kind have in common."""

    scheme: str | int
    """Another one when the same arguments come to mean other batches."""
    _lines: Sequence[_Line]

    def __init__(
        self,
        sources: Sequence[tuple[TokenStore, float]],
        *,
        sequence_length: int,
        global_batch: int,
        seed: int,
    ) -> None:
        """`sources`: stores and their weights (shares of samples, of any sum). `seed`: 0 or more.

        Raises `DataError` for a weight that is no positive number, or of which nothing fills a row.
        """
        if not sources or any(not 0 < weight < float("inf") for _, weight in sources):
            raise DataError(f"mixture weights {[weight for _, weight in sources]}: give positive numbers.")
        if min(sequence_length, global_batch) < 1 or seed < 0:
            raise DataError(f"{sequence_length=}, {global_batch=}: at least 1; {seed=}: at least 0.")
        self.sources = list(sources)
        self.sequence_length = sequence_length
        self.global_batch = global_batch
        self.seed = seed
        self._mixture = Mixture([weight for _, weight in sources], seed)
        self._lines = [self.line(store, number) for number, (store, _) in enumerate(sources)]

    @abstractmethod
    def line(self, store: TokenStore, number: int) -> _Line:
        """The rows of a source, which is one of that number."""

    @abstractmethod
    def samples(self, numbers: NDArray[np.int64]) -> Batch:
        """The rows of these global sample numbers: the data position of a run is one such number."""

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The batch of position `step` (from 0), or those of its rows that one data-parallel rank takes."""
        first = step * self.global_batch
        return self.samples(np.arange(first, first + self.global_batch)[rows])

    def epochs(self, steps: int) -> list[float]:
        """How often each source has been read after `steps` steps."""
        seen = [float(share) * steps * self.global_batch for share in self._mixture.shares]
        return [count / line.count for count, line in zip(seen, self._lines, strict=True)]

    def fingerprint(self) -> str:
        """Identity of the sequence of samples: equal means that sample n is the same row. For checkpoints."""
        parts = {
            "scheme": self.scheme,
            "sources": [store.identity() for store, _ in self.sources],
            "shares": [str(share) for share in self._mixture.shares],
            "sequence_length": self.sequence_length,
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Loader(MixedRows):
    """Packs documents of several stores into rows of one length, in a mixture, shuffled.

    Each source is read in epochs. Its documents are shuffled and laid end to end, the line is cut into windows of S+1
    tokens of which neighbours share one, and the windows are shuffled. So an epoch predicts every token once, except
    the first of the line and the last (fewer than S) that fill no window. Nothing depends on how many processes read,
    or on what was read before.

    Memory: 16 bytes a document, and for each source's two latest epochs 16 a document and 8 a window.
    """

    scheme = 2
    _lines: Sequence[_Windows]

    def line(self, store: TokenStore, number: int) -> _Windows:
        """The store's windows, one at least."""
        return _Windows(store, self.sequence_length, self.seed, number)

    @property
    def report(self) -> list[str]:
        """Nothing is left out of plain text."""
        return []

    @property
    def learned_share(self) -> float:
        """Every label counts."""
        return 1.0

    def samples(self, numbers: NDArray[np.int64]) -> Batch:
        """The rows of these global sample numbers."""
        shape = (len(numbers), self.sequence_length + 1)
        tokens, documents = np.empty(shape, np.int64), np.empty(shape, np.int32)
        source, position = self._mixture.locate(numbers)
        for index, line in enumerate(self._lines):
            mine = source == index
            if mine.any():
                tokens[mine], documents[mine] = line.windows(position[mine])
        return _pack(tokens, documents)


def _pack(tokens: NDArray[np.int64], documents: NDArray[np.int32]) -> Batch:
    targets = documents[:, 1:] - documents[:, 1:2]
    parts = (tokens[:, :-1], tokens[:, 1:], targets)
    return Batch(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))


@dataclass(frozen=True, slots=True)
class _Epoch:
    """One pass over a source: its documents `[N]` and windows in order, and where documents begin `[N+1]`."""

    documents: NDArray[np.int64]
    begins: NDArray[np.int64]
    windows: NDArray[np.int64]


class _Windows:
    """The endless row of one source's windows: number p is window `p % count` of epoch `p // count`."""

    def __init__(self, store: TokenStore, sequence_length: int, seed: int, source: int) -> None:
        self._store = store
        self._length = sequence_length
        self._key = (seed, source)
        self._lengths = np.asarray(store.lengths, dtype=np.int64)
        self.count = (store.manifest.tokens - 1) // sequence_length
        if self.count < 1:
            raise DataError(
                f"{store.prefix}: {store.manifest.tokens} tokens fill no row of {sequence_length} + 1. "
                "Give more text or a shorter sequence."
            )
        self._cached = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> _Epoch:
        seed, source = self._key
        documents = permutation(len(self._lengths), seed, DOCUMENTS, source, epoch)
        documents = documents[self._lengths[documents] > 0]
        begins = np.zeros(len(documents) + 1, np.int64)
        np.cumsum(self._lengths[documents], out=begins[1:])
        return _Epoch(documents, begins, permutation(self.count, seed, WINDOWS, source, epoch))

    def windows(self, positions: NDArray[np.int64]) -> Rows:
        """Windows number `positions [B]` of this source."""
        shape = (len(positions), self._length + 1)
        tokens, documents = np.empty(shape, np.int64), np.empty(shape, np.int32)
        epochs, inside = np.divmod(positions, self.count)
        for number in np.unique(epochs):
            here = epochs == number
            epoch = self._cached(int(number))
            tokens[here], documents[here] = self._gather(epoch, epoch.windows[inside[here]] * self._length)
        return tokens, documents

    def _gather(self, epoch: _Epoch, starts: NDArray[np.int64]) -> Rows:
        """S+1 tokens of the line from each of `starts [B]`, without a loop over rows or documents.

        Every row is a run of pieces, a piece being what of one document lies in it. Spelled out per piece:
        where it begins on the line, how long it is, where its tokens lie in the store.
        """
        width = self._length + 1
        first = np.searchsorted(epoch.begins, starts, side="right") - 1
        last = np.searchsorted(epoch.begins, starts + width, side="left") - 1
        per_row = last - first + 1
        row = np.repeat(np.arange(len(starts)), per_row)
        within = np.arange(len(row)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
        piece = first[row] + within
        begin = np.maximum(epoch.begins[piece], starts[row])
        length = np.minimum(epoch.begins[piece + 1], starts[row] + width) - begin
        place = self._store.offsets[epoch.documents[piece]] + begin - epoch.begins[piece]
        # Position i of the output lies in piece j at `place[j] + (i - first position of j)`.
        shift = place - (np.cumsum(length) - length)
        index = np.repeat(shift, length) + np.arange(len(starts) * width)
        tokens = self._store.tokens[index].astype(np.int64).reshape(-1, width)
        return tokens, np.repeat(within.astype(np.int32), length).reshape(-1, width)
