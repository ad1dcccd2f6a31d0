"""Conversations laid into rows whole: none is cut, none is lost without a word."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from zili.data.loader import Batch, Batches, Loader, MixedRows
from zili.data.order import DOCUMENTS, WINDOWS, permutation
from zili.data.store import TokenStore
from zili.errors import DataError
from zili.plurals import counted

_NOT_LEARNED = -100
"""torch's mark of a label that counts nothing."""


def packed(lengths: Sequence[int], room: int, order: Iterable[int]) -> list[list[int]]:
    """Which items share a row of `room`: each, in the `order` given, goes where it leaves the least (best fit, Johnson
    1974). Items longer than `room` are in none.

    An order at random fills rows to 99 % and mixes what a row teaches. The longest first would fill them to 99.9 %,
    with conversations of one length, which are often of one kind.
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


class DialogueLoader(MixedRows):
    """Batches of conversations, packed whole into rows of one length; `Loader`'s interface.

    A label is learned where the assistant says it, and `-100` everywhere else: what others say, and padding.
    `document_ids` are those of the inputs, so that attention stays inside a conversation; `padding` is what is left of
    a row, which counts in no expert's load either. Rows are packed once and
    shuffled each epoch; step k's batch depends on the seed, k and the stores alone. Pairs are packed as one.
    """

    scheme = "dialogues 1"
    _lines: Sequence[_Rows]
    reference: dict[str, NDArray[np.float32]] | None = None
    """For pairs: the log-probability of every document of a store under the reference model, by the store's identity.
    `zili.training.reference_model` computes it."""

    @property
    def pairs(self) -> bool:
        """Whether these are pairs of answers, of which one was chosen."""
        return self.sources[0][0].manifest.pairs

    def line(self, store: TokenStore, number: int) -> _Rows:
        """The store's rows. It has a mask, and is of the kind that the first one is.

        Raises: DataError.
        """
        if store.learned is None:
            raise DataError(
                f"{store.prefix}: a store of plain text among conversations: it has no mask of what is learned. "
                "Give sources of one kind."
            )
        if store.manifest.pairs != self.pairs:
            raise DataError(f"{store.prefix}: pairs of answers and conversations. Give sources of one kind.")
        return _Rows(store, self.sequence_length, self.seed, number)

    @property
    def report(self) -> list[str]:
        """A line for each source: how its conversations lie in rows, and what was left out."""
        return [line.report for line in self._lines]

    @property
    def learned_share(self) -> float:
        """Targets a position of a batch, in the mean over the data: tokens that are learned, or pairs."""
        shares = zip(self._mixture.shares, self._lines, strict=True)
        return sum(float(share) * line.targets / (line.count * self.sequence_length) for share, line in shares)

    def samples(self, numbers: NDArray[np.int64]) -> Batch:
        """The rows of these global sample numbers."""
        source, position = self._mixture.locate(numbers)
        lines = [self._lines[which] for which in source.tolist()]
        assert not self.pairs or self.reference is not None, "preferences are learned beside a reference"
        batch = _laid(lines, position.tolist(), self.sequence_length)
        documents = [line.documents(number) for line, number in zip(lines, position.tolist(), strict=True)]
        return self._beside_reference(batch, [line.store for line in lines], documents)

    def every_row(self, source: int, rows: int) -> Iterator[tuple[Batch, list[list[int]]]]:
        """Each row of a source once, so many at a time, and the documents in them; of pairs with a reference of 0 while
        it is not known. Rows that fill the last batch up have no label that counts and no documents."""
        line = self._lines[source]
        for start in range(0, line.count, rows):
            numbers = range(start, min(start + rows, line.count))
            batch = _laid([line] * len(numbers), numbers, self.sequence_length)
            # Filled up with rows of one token and nothing to learn.
            filled = (
                F.pad(part, (0, 0, 0, rows - len(numbers)), value=value)
                for part, value in zip(batch[:3], (0, _NOT_LEARNED, 0), strict=True)
            )
            batch = Batch(*filled)
            documents = [line.documents(number) for number in numbers]
            yield self._beside_reference(batch, [line.store] * len(numbers), documents), documents

    def _beside_reference(self, batch: Batch, stores: Sequence[TokenStore], rows: list[list[int]]) -> Batch:
        if not self.pairs:
            return batch
        most = max(line.most for line in self._lines)
        known = np.zeros((len(batch.input_ids), most), np.float32)
        for row, store, documents in zip(known, stores, rows, strict=False):
            row[: len(documents)] = 0.0 if self.reference is None else self.reference[store.identity()][documents]
        return batch._replace(reference=torch.from_numpy(known))


def _laid(lines: Sequence[_Rows], numbers: Sequence[int], length: int) -> Batch:
    shape = (len(lines), length)
    inputs, labels = np.empty(shape, np.int64), np.empty(shape, np.int64)
    documents, padding = np.empty(shape, np.int32), np.ones(shape, np.bool_)
    for place, (line, number) in enumerate(zip(lines, numbers, strict=True)):
        end = line.fill(number, inputs[place], labels[place], documents[place])
        padding[place, :end] = False
    inputs_, labels_, documents_, padding_ = map(torch.from_numpy, (inputs, labels, documents, padding))
    return Batch(inputs_, labels_, documents_, padding=padding_)


class _Rows:
    """The endless sequence of one source's rows: number p is row `p % count` of epoch `p // count`."""

    def __init__(self, store: TokenStore, room: int, seed: int, source: int) -> None:
        assert store.learned is not None
        self.store, self._learned, self._key = store, store.learned, (seed, source)
        self._together = 2 if store.manifest.pairs else 1
        # The last token of a conversation predicts nothing, and so needs no place.
        lengths = (np.asarray(store.lengths, np.int64) - 1).reshape(-1, self._together).sum(1).tolist()
        items = packed(lengths, room, permutation(len(lengths), seed, DOCUMENTS, source, 0).tolist())
        self._rows = [[self._together * item + k for item in row for k in range(self._together)] for row in items]
        self.count = len(items)
        """Rows of an epoch."""
        kind = "pair" if store.manifest.pairs else "conversation"
        if not self.count:
            raise DataError(
                f"{store.prefix}: none of its {counted(len(lengths), kind)} fits {room} tokens, the shortest has "
                f"{min(lengths) + self._together}. Raise training.sequence_length."
            )
        self.most = max(map(len, self._rows))
        """Documents of the row that has the most."""
        used, kept = sum(lengths[item] for row in items for item in row), sum(map(len, items))
        learned = sum(int(self._learned_of(document).sum()) for row in self._rows for document in row)
        self.targets = kept if store.manifest.pairs else learned
        """What a batch's loss is the mean over, in an epoch."""
        longer = len(lengths) - kept
        self.report = (
            f"{store.prefix.name}: {counted(kept, kind)} in {counted(self.count, 'row')} of {room:,} tokens, "
            f"{100 * used / (self.count * room):.1f} % full, {counted(learned, 'token')} learned an epoch"
            + (
                f"; {longer:,} LEFT OUT, longer than a row (up to {max(lengths) + self._together:,} tokens)"
                if longer
                else ""
            )
        )
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        seed, source = self._key
        return permutation(self.count, seed, WINDOWS, source, epoch)

    def _learned_of(self, document: int) -> NDArray[np.uint8]:
        start = int(self.store.offsets[document])
        return self._learned[start + 1 : start + int(self.store.lengths[document])]

    def documents(self, number: int) -> list[int]:
        """What is in row `number` of the sequence."""
        epoch, place = divmod(number, self.count)
        return self._rows[int(self._order(epoch)[place])]

    def fill(
        self, number: int, inputs: NDArray[np.int64], labels: NDArray[np.int64], documents: NDArray[np.int32]
    ) -> int:
        """Row `number` of the sequence into `[S]` arrays; returns where padding begins."""
        inputs[:], labels[:] = self.store.manifest.end_id, _NOT_LEARNED
        start = 0
        row = self.documents(number)
        for place, document in enumerate(row):
            ids = self.store.document(document)
            end = start + len(ids) - 1
            inputs[start:end] = ids[:-1]
            labels[start:end] = np.where(self._learned_of(document), ids[1:].astype(np.int64), _NOT_LEARNED)
            documents[start:end] = place
            start = end
        documents[start:] = len(row)
        return start
