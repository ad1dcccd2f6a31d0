"""Conversations laid into rows whole: none is cut, none is lost without a word."""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from zili.data.loader import Batch, Batches, Loader
from zili.data.order import DOCUMENTS, WINDOWS, Mixture, permutation
from zili.data.store import TokenStore
from zili.errors import DataError

_SCHEME = 1  # raise when the same arguments come to mean other batches
_NOT_LEARNED = -100
"""torch's mark of a label that counts nothing."""


def packed(lengths: Sequence[int], room: int, order: Iterable[int]) -> list[list[int]]:
    """Which items share a row of `room`: each, in the `order` given, goes where it leaves the least (best fit, Johnson
    1974). Items longer than `room` are in none.

    An order at random fills rows to 99 % and mixes what a row teaches; the longest first would fill them to 99.9 % with
    conversations of one length, which are often of one kind.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}
    rooms: list[int] = []
    for item in order:
        length = lengths[item]
        if length > room:
            continue
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            left, row = room - length, len(rows)
            rows.append([item])
        else:
            before = rooms[place]
            row = open_rows[before].pop()
            if not open_rows[before]:
                del open_rows[before], rooms[place]
            rows[row].append(item)
            left = before - length
        if left:
            if left not in open_rows:
                bisect.insort(rooms, left)
                open_rows[left] = []
            open_rows[left].append(row)
    return rows


def open_loader(
    sources: Sequence[tuple[TokenStore, float]], *, sequence_length: int, global_batch: int, seed: int
) -> Batches:
    """The loader that these stores are for: of conversations if any has a mask of what is learned, of plain text if
    none has.

    Raises `DataError` as the loaders do.
    """
    of_dialogues = any(store.learned is not None for store, _ in sources)
    loader = DialogueLoader if of_dialogues else Loader
    return loader(sources, sequence_length=sequence_length, global_batch=global_batch, seed=seed)


class DialogueLoader:
    """Batches of conversations, packed whole into rows of one length; `Loader`'s interface.

    A label is learned where the assistant says it, and `-100` everywhere else: what others say, and padding.
    `document_ids` are those of the inputs, so that attention stays inside a conversation. Rows are packed once and
    shuffled each epoch; step k's batch depends on the seed, k and the stores alone.
    """

    def __init__(
        self,
        sources: Sequence[tuple[TokenStore, float]],
        *,
        sequence_length: int,
        global_batch: int,
        seed: int,
    ) -> None:
        """`sources`: stores with masks, and their weights.

        Raises `DataError` for a store without a mask, or of which no conversation fits a row.
        """
        self.sources = list(sources)
        self.sequence_length, self.global_batch, self.seed = sequence_length, global_batch, seed
        self._mixture = Mixture([weight for _, weight in sources], seed)
        self._lines = [_Rows(store, sequence_length, seed, i) for i, (store, _) in enumerate(sources)]

    @property
    def report(self) -> list[str]:
        """A line for each source: how its conversations lie in rows, and what was left out."""
        return [line.report for line in self._lines]

    @property
    def learned_share(self) -> float:
        """Of the positions of a batch, those with a label that counts, in the mean over the data."""
        shares = zip(self._mixture.shares, self._lines, strict=True)
        return sum(float(share) * line.learned / (line.count * self.sequence_length) for share, line in shares)

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The batch of step `step` (from 0), or those of its rows that one data-parallel rank takes."""
        first = step * self.global_batch
        return self.samples(np.arange(first, first + self.global_batch)[rows])

    def samples(self, numbers: NDArray[np.int64]) -> Batch:
        """The rows of these global sample numbers."""
        shape = (len(numbers), self.sequence_length)
        inputs, labels = np.empty(shape, np.int64), np.empty(shape, np.int64)
        documents = np.empty(shape, np.int32)
        source, position = self._mixture.locate(numbers)
        for place, (number, which) in enumerate(zip(position.tolist(), source.tolist(), strict=True)):
            self._lines[which].fill(number, inputs[place], labels[place], documents[place])
        return Batch(torch.from_numpy(inputs), torch.from_numpy(labels), torch.from_numpy(documents))

    def epochs(self, steps: int) -> list[float]:
        """How often each source has been read after `steps` steps."""
        seen = [float(share) * steps * self.global_batch for share in self._mixture.shares]
        return [count / line.count for count, line in zip(seen, self._lines, strict=True)]

    def fingerprint(self) -> str:
        """Identity of the sequence of samples: equal means that sample n is the same row. For checkpoints."""
        parts = {
            "scheme": f"dialogues {_SCHEME}",
            "sources": [store.identity() for store, _ in self.sources],
            "shares": [str(share) for share in self._mixture.shares],
            "sequence_length": self.sequence_length,
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class _Rows:
    """The endless sequence of one source's rows: number p is row `p % count` of epoch `p // count`."""

    def __init__(self, store: TokenStore, room: int, seed: int, source: int) -> None:
        if store.learned is None:
            raise DataError(
                f"{store.prefix}: a store of plain text among conversations: it has no mask of what is learned. "
                "Give sources of one kind."
            )
        self._store, self._learned, self._key = store, store.learned, (seed, source)
        # The last token of a conversation predicts nothing, and so needs no place.
        lengths = [int(length) - 1 for length in store.lengths]
        self._rows = packed(lengths, room, permutation(len(lengths), seed, DOCUMENTS, source, 0).tolist())
        self.count = len(self._rows)
        if not self.count:
            raise DataError(
                f"{store.prefix}: none of its {len(store)} conversations fits {room} tokens, the shortest has "
                f"{min(lengths) + 1}. Raise training.sequence_length."
            )
        used = sum(lengths[item] for row in self._rows for item in row)
        kept = sum(map(len, self._rows))
        self.learned = sum(int(self._learned_of(item).sum()) for row in self._rows for item in row)
        longer = len(store) - kept
        self.report = (
            f"{store.prefix.name}: {kept:,} conversations in {self.count:,} rows of {room:,} tokens, "
            f"{100 * used / (self.count * room):.1f} % full, {self.learned:,} tokens learned an epoch"
            + (f"; {longer:,} LEFT OUT, longer than a row (up to {max(lengths) + 1:,} tokens)" if longer else "")
        )
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        seed, source = self._key
        return permutation(self.count, seed, WINDOWS, source, epoch)

    def _learned_of(self, item: int) -> NDArray[np.uint8]:
        start = int(self._store.offsets[item])
        return self._learned[start + 1 : start + int(self._store.lengths[item])]

    def fill(
        self, number: int, inputs: NDArray[np.int64], labels: NDArray[np.int64], documents: NDArray[np.int32]
    ) -> None:
        """Row `number` of the sequence into `[S]` arrays."""
        epoch, place = divmod(number, self.count)
        inputs[:], labels[:] = self._store.manifest.end_id, _NOT_LEARNED
        start = 0
        row = self._rows[int(self._order(epoch)[place])]
        for document, item in enumerate(row):
            ids = self._store.document(item)
            end = start + len(ids) - 1
            inputs[start:end] = ids[:-1]
            labels[start:end] = np.where(self._learned_of(item), ids[1:].astype(np.int64), _NOT_LEARNED)
            documents[start:end] = document
            start = end
        documents[start:] = len(row)
