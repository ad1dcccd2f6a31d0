"""Schedules against their closed forms."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zili.config.run import ScheduleConfig
from zili.training.schedules import learning_rate_share


def shares(steps: int, **settings: object) -> list[float]:
    config = ScheduleConfig.model_validate(settings)
    return [learning_rate_share(step, steps, config) for step in range(steps)]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warmup_rises_in_equal_parts_and_reaches_the_peak(kind: str) -> None:
    assert shares(40, kind=kind, warmup_steps=4)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], abs=1e-12)


def test_constant_stays() -> None:
    assert shares(10, kind="constant") == [1.0] * 10


def test_cosine_at_start_quarter_middle_and_end() -> None:
    # 101 steps after 10 of warm-up: progress is a hundredth a step; cos(pi / 4) = 1 / sqrt(2).
    found = shares(111, kind="cosine", warmup_steps=10, final=0.2)
    assert found[10] == 1.0
    assert found[35] == pytest.approx(0.2 + 0.8 * (1 + 2**-0.5) / 2, abs=1e-12)
    assert found[60] == pytest.approx(0.6, abs=1e-12)
    assert found[110] == pytest.approx(0.2, abs=1e-12)


def test_wsd_is_stable_and_then_falls_in_a_straight_line() -> None:
    found = shares(100, kind="wsd", warmup_steps=5, decay_fraction=0.2, final=0.1)
    assert found[5:81] == [1.0] * 76
    falls = [before - after for before, after in pairwise(found[80:])]
    assert falls == pytest.approx([0.9 / 19] * 19, abs=1e-12)
    assert found[99] == pytest.approx(0.1, abs=1e-12)


def test_a_decay_that_is_told_its_start_falls_from_there_to_the_last_step() -> None:
    found = shares(100, kind="wsd", warmup_steps=5, decay_start=60, final=0.2)
    assert found[5:61] == [1.0] * 56
    assert found[60:] == pytest.approx([1 - 0.8 * i / 39 for i in range(40)], abs=1e-12)
    assert found == pytest.approx(shares(100, kind="wsd", warmup_steps=5, decay_fraction=0.4, final=0.2), abs=1e-12)


def test_wsd_of_nothing_but_decay_begins_after_warmup() -> None:
    found = shares(11, kind="wsd", warmup_steps=1, decay_fraction=1.0, final=0.0)
    assert found == pytest.approx([0.5] + [1 - i / 9 for i in range(10)], abs=1e-12)


def test_a_constant_rate_stays_past_the_last_step() -> None:
    assert learning_rate_share(500, 50, ScheduleConfig(kind="constant")) == 1.0


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_the_rate_stays_final_past_the_last_step(kind: str) -> None:
    config = ScheduleConfig.model_validate({"kind": kind, "final": 0.3})
    assert learning_rate_share(500, 50, config) == pytest.approx(0.3, abs=1e-12)


Slope = Callable[[int, int, float], float]
# The steepest descent of each kind a step, by calculus.
STEEPEST: dict[str, Slope] = {
    "cosine": lambda steps, warmup, fraction: 1.5708 / max(1, steps - 1 - warmup),
    "wsd": lambda steps, warmup, fraction: 1 / max(1, min(steps - 1 - warmup, round(fraction * steps) - 1)),
    "constant": lambda steps, warmup, fraction: 0.0,
}


@given(
    kind=st.sampled_from(sorted(STEEPEST)),
    steps=st.integers(2, 300),
    warmup=st.floats(0, 0.9),
    fraction=st.floats(0.01, 1.0),
    final=st.floats(0, 1),
)
def test_no_jumps_and_never_outside_zero_to_one(
    kind: str, steps: int, warmup: float, fraction: float, final: float
) -> None:
    rise = int(warmup * steps)
    found = shares(steps, kind=kind, warmup_steps=rise, decay_fraction=fraction, final=final)
    assert all(0.0 <= share <= 1.0 for share in found)
    limit = max(1 / (rise + 1), STEEPEST[kind](steps, rise, fraction)) + 1e-9
    assert all(abs(after - before) <= limit for before, after in pairwise(found))
