"""Windows score every token once, with context, and packing keeps them whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zili.evaluation.windows import IGNORE_INDEX, batches, pack, windows_of

START = 99


@given(tokens=st.integers(0, 70), length=st.integers(2, 16))
def test_every_token_is_scored_once_and_in_order(tokens: int, length: int) -> None:
    ids = np.arange(tokens)
    windows = list(windows_of(ids, START, length))
    scored = [label for window in windows for label in window.labels if label != IGNORE_INDEX]
    assert scored == ids.tolist()


@given(tokens=st.integers(1, 70), length=st.integers(2, 16))
def test_inputs_are_the_tokens_before_the_labels(tokens: int, length: int) -> None:
    for window in windows_of(np.arange(tokens), START, length):
        assert len(window.inputs) <= length
        for given_token, wanted in zip(window.inputs, window.labels, strict=True):
            if wanted != IGNORE_INDEX:
                assert given_token == (wanted - 1 if wanted else START)


@given(tokens=st.integers(1, 70), length=st.integers(2, 16))
def test_later_windows_give_half_a_window_of_context(tokens: int, length: int) -> None:
    for window in list(windows_of(np.arange(tokens), START, length))[1:]:
        first_scored = int(np.argmax(window.labels != IGNORE_INDEX))
        assert first_scored >= length / 2


@given(sizes=st.lists(st.integers(1, 8), max_size=40))
def test_packing_keeps_every_window_and_no_row_overflows(sizes: list[int]) -> None:
    windows = [next(windows_of(np.full(size, i), START, 8)) for i, size in enumerate(sizes)]
    rows = pack(windows, 8)
    assert sorted(int(w.labels[0]) for row in rows for w in row) == list(range(len(sizes)))
    assert all(sum(len(w.inputs) for w in row) <= 8 for row in rows)


def test_batches_have_one_shape_and_one_document_a_window() -> None:
    windows = [next(windows_of(np.full(size, size), START, 6)) for size in (2, 3, 6)]
    found = list(batches(pack(windows, 6), 6, 2, START))
    assert [tuple(batch.input_ids.shape) for batch in found] == [(2, 6)]
    batch = found[0]
    assert batch.labels.tolist() == [[6] * 6, [3, 3, 3, 2, 2, IGNORE_INDEX]]
    assert batch.document_ids.tolist() == [[0] * 6, [0, 0, 0, 1, 1, 2]]
    assert batch.input_ids.tolist() == [[START, 6, 6, 6, 6, 6], [START, 3, 3, START, 2, START]]


@pytest.mark.parametrize("rows", [0, 5])
def test_a_last_batch_is_filled_with_unscored_rows(rows: int) -> None:
    windows = [next(windows_of(np.arange(4), START, 4)) for _ in range(rows)]
    found = list(batches(pack(windows, 4), 4, 2, START))
    assert len(found) == (rows + 1) // 2
    assert sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in found) == 4 * rows
