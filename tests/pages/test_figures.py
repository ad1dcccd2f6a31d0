"""Numbers as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zili.pages.figures import (
    byte_size,
    compact,
    duration,
    linear_ticks,
    log_ticks,
    percent,
    tick_labels,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.5, "1.5"), (999, "999"), (999.9, "1k"), (12_345, "12.3k"), (7_345_408, "7.35M"),
     (1.15e11, "115B"), (3e-4, "3e-4"), (2.5e-4, "2.5e-4"), (0.05, "0.05"), (-1234, "-1.23k")],
)  # fmt: skip
def test_compact(value: float, text: str) -> None:
    assert compact(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.25 s"), (42, "42 s"), (59.6, "1 min"), (312, "5 min 12 s"), (12_000, "3 h 20 min"),
     (200_000, "2 d 7 h")],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds).replace("\u202f", " ") == text


def test_sizes_and_shares() -> None:
    assert [byte_size(n).replace("\u202f", " ") for n in (12, 600_123, 8.3e9)] == [
        "12 bytes",
        "600 kB",
        "8.3 GB",
    ]
    assert [percent(s).replace("\u202f", " ") for s in (0.713, 0.0021, 0)] == ["71 %", "0.21 %", "0 %"]


@given(low=st.floats(-1e6, 1e6), width=st.floats(1e-3, 1e6))
def test_ticks_are_round_within_the_axis_and_neither_few_nor_many(low: float, width: float) -> None:
    ticks = linear_ticks(low, low + width)
    assert 2 <= len(ticks) <= 9
    assert all(low - 1e-6 * width <= t <= low + 1.000001 * width for t in ticks)


def test_ticks_of_one_axis_share_their_decimals() -> None:
    assert tick_labels(linear_ticks(0, 0.003, 6)) == [
        "0.0000",
        "0.0005",
        "0.0010",
        "0.0015",
        "0.0020",
        "0.0025",
        "0.0030",
    ]
    assert tick_labels([1.4, 1.6, 1.8, 2.0]) == ["1.4", "1.6", "1.8", "2.0"]
    assert tick_labels([0, 5000, 10_000, 20_000]) == ["0", "5k", "10k", "20k"]
    assert tick_labels([0, 1e-5, 2e-5]) == ["0", "1e-5", "2e-5"]


def test_log_ticks() -> None:
    assert log_ticks(0.3, 12) == pytest.approx([0.5, 1, 2, 5, 10])
    assert log_ticks(1e-3, 1e4) == pytest.approx([10.0**p for p in range(-3, 5)])
