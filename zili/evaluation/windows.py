"""Cutting documents into windows that score every token once, and packing the windows into rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zili.ops.reference import IGNORE_INDEX


@dataclass(frozen=True)
class Window:
    """`inputs [n]`, and `labels [n]` with `IGNORE_INDEX` where a token is only context."""

    inputs: np.ndarray
    labels: np.ndarray


class WindowBatch(NamedTuple):
    """What the model is called with; all three `[B, S]` int64."""

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor


def windows_of(ids: np.ndarray, start_token: int, length: int) -> Iterator[Window]:
    """Windows of at most `length` inputs over `start_token + ids [n]`, scoring each of the n tokens once.

    The first window scores all its tokens. Each later one begins `length - ceil(length / 2)` further and
    scores only what no earlier window has, so that a scored token there has at least `ceil(length / 2)`
    tokens before it.
    """
    context = (length + 1) // 2
    stride = length - context
    labels = np.asarray(ids, dtype=np.int64)
    inputs = np.concatenate(([start_token], labels[:-1])) if len(labels) else labels
    begin = scored = 0
    while scored < len(labels):
        end = min(begin + length, len(labels))
        wanted = labels[begin:end].copy()
        wanted[: scored - begin] = IGNORE_INDEX
        yield Window(inputs[begin:end], wanted)
        begin, scored = begin + stride, end


def pack(windows: Sequence[Window], length: int) -> list[list[Window]]:
    """Rows of windows, each at most `length` tokens, by first fit in decreasing size."""
    rows: list[list[Window]] = []
    room: list[int] = []
    first_with_room = 0
    for window in sorted(windows, key=lambda w: len(w.inputs), reverse=True):
        size = len(window.inputs)
        place = next((i for i in range(first_with_room, len(rows)) if room[i] >= size), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(length)
        rows[place].append(window)
        room[place] -= size
        while first_with_room < len(rows) and room[first_with_room] == 0:
            first_with_room += 1
    return rows


def batches(rows: Sequence[Sequence[Window]], length: int, batch_size: int, filler: int) -> Iterator[WindowBatch]:
    """Batches of exactly `[batch_size, length]`, each window a document of its own, gaps filled and unscored.

    One shape for every batch: the model compiled for training runs without being compiled again.
    """
    for at in range(0, len(rows), batch_size):
        input_ids = torch.full((batch_size, length), filler, dtype=torch.int64)
        labels = torch.full((batch_size, length), IGNORE_INDEX, dtype=torch.int64)
        document_ids = torch.zeros((batch_size, length), dtype=torch.int64)
        for row, windows in enumerate(rows[at : at + batch_size]):
            column = 0
            for number, window in enumerate(windows):
                end = column + len(window.inputs)
                input_ids[row, column:end] = torch.from_numpy(window.inputs)
                labels[row, column:end] = torch.from_numpy(window.labels)
                document_ids[row, column:end] = number
                column = end
            document_ids[row, column:] = len(windows)
        yield WindowBatch(input_ids, labels, document_ids)
