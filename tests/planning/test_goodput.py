"""Failures and goodput: published clusters, and a simulation beside the closed form."""

from __future__ import annotations

import random
from math import exp

import pytest

from zili.planning.search.goodput import (
    DAY,
    Failures,
    best_interval,
    effective_share,
    goodput,
    mean_between,
)

LLAMA3 = Failures(detection=180, replacement=300, reload=120, warm_up=300, checkpoint=2, drain=0, spares=1)
"""u0 = 15 min, w = 2 s."""


def linear_share(interval: float, between: float, restart: float, checkpoint: float) -> float:
    """Share that trains where interruptions are rare (2410.21680, equation 1); below zero where they are not."""
    return (1 - (restart + interval / 2) / between) / (1 + checkpoint / interval)


def simulated_share(chips: int, failures: Failures, interval: float, *, seconds: float, dice: random.Random) -> float:
    """Share of `seconds` that train, event by event; every chip has a spare."""
    between, restart = mean_between(chips, failures), failures.restart
    now = trained = 0.0
    next_failure = dice.expovariate(1 / between)
    while now < seconds:
        end = now + interval + failures.checkpoint
        if end <= next_failure:
            now, trained = end, trained + interval
            continue
        now = next_failure
        # It may be interrupted again before it trains.
        while True:
            next_failure = now + dice.expovariate(1 / between)
            if next_failure >= now + restart:
                now += restart
                break
            now = next_failure
    return trained / now


def test_llama_3_trained_nine_tenths_of_its_time() -> None:
    """Llama 3 (2407.21783, section 3.3.4): one interruption in 3.1 h on 16,384 chips, more than 90 % effective."""
    found = goodput(16_384, LLAMA3)
    assert found.mean_between / 3600 == pytest.approx(3.1, abs=0.05)
    assert found.share == pytest.approx(0.90, abs=0.01)


@pytest.mark.parametrize(("chips", "hours"), [(16_384, 1.8), (131_072, 0.23)])
def test_research_super_cluster(chips: int, hours: float) -> None:
    """RSC-1 (2410.21680, section 4): 6.50 failures in 1,000 node-days, projected."""
    failures = Failures(per_chip_day=6.5e-3 / 8)
    assert mean_between(chips, failures) / 3600 == pytest.approx(hours, rel=0.03)


def test_small_jobs_fail_for_reasons_of_their_own() -> None:
    """RSC-1 measured 7.9 h at 1,024 chips, where the rate a chip alone gives 28.9 h."""
    alone = Failures(per_chip_day=6.5e-3 / 8)
    assert mean_between(1024, alone) / 3600 == pytest.approx(28.9, rel=0.01)
    assert mean_between(1024, Failures(per_chip_day=6.5e-3 / 8, per_day=2.2)) / 3600 == pytest.approx(7.9, rel=0.02)


@pytest.mark.parametrize(
    ("chips", "restart", "checkpoint", "share"),
    [
        (1_024, 900, 60, 0.969), (4_096, 900, 60, 0.930), (10_240, 900, 60, 0.873), (16_384, 900, 2, 0.901),
        (10_240, 120, 2, 0.978), (51_200, 900, 2, 0.72), (102_400, 120, 2, 0.888),
    ],
)  # fmt: skip
def test_the_linear_form_gives_the_published_table(chips: int, restart: float, checkpoint: float, share: float) -> None:
    """Meta's closed form at Young's interval, as tabulated in the planner's facts."""
    between = mean_between(chips, Failures())
    interval = (2 * checkpoint * between) ** 0.5
    assert linear_share(interval, between, restart, checkpoint) == pytest.approx(share, abs=0.006)


@pytest.mark.parametrize("chips", [1_024, 16_384, 51_200, 200_000])
def test_simulation_and_closed_form_agree(chips: int) -> None:
    found = goodput(chips, LLAMA3)
    simulated = simulated_share(
        chips, LLAMA3, found.interval, seconds=20_000 * found.mean_between, dice=random.Random(1)
    )
    assert simulated == pytest.approx(found.share, abs=0.01)


def test_the_interval_is_the_best() -> None:
    between = mean_between(16_384, LLAMA3)
    best = best_interval(between, 60.0)
    shares = [effective_share(best * factor, between, LLAMA3.restart, 60.0) for factor in (0.7, 1.0, 1.4)]
    assert shares[1] == max(shares)


def test_the_linear_form_fails_where_failures_are_frequent() -> None:
    """At 102,400 chips and a quarter of an hour to restart it says 32 to 46 %; at twice that, less than nothing."""
    between = mean_between(409_600, Failures())
    assert linear_share(60, between, 900, 2) < 0 < effective_share(60, between, 900, 2)


def test_what_is_lost_is_what_each_term_takes() -> None:
    """Where failures are rare each is a ratio: seconds an interruption over those between, w over tau, half of tau."""
    found = goodput(1_024, LLAMA3)
    between, interval = found.mean_between, found.interval
    for name, seconds in (("detection", 180), ("replacement", 300), ("reload", 120), ("warm-up", 300)):
        assert found.lost[name] == pytest.approx(seconds / between, rel=0.1)
    assert found.lost["checkpoints"] == pytest.approx(2 / interval, rel=0.1)
    assert found.lost["work done again"] == pytest.approx(interval / 2 / between, rel=0.1)
    assert goodput(51_200, LLAMA3).first_to_improve in ("replacement", "warm-up")
    assert goodput(51_200, Failures(checkpoint=120, spares=1)).first_to_improve == "checkpoints"


def test_without_spares_a_failure_waits_for_a_chip() -> None:
    with_spares, without = (goodput(10_240, Failures(spares=share)) for share in (0.02, 0.0))
    assert without.share < with_spares.share - 0.2
    assert without.first_to_improve == "waiting for spares"


def test_spares_that_are_paid_for_are_ready() -> None:
    """Two hundredths of 40 chips are one chip: a failure waits only where that one is away already."""
    assert [goodput(chips, Failures()).spares for chips in (8, 50, 51, 1000)] == [1, 1, 2, 20]
    away = 40 * 4.7e-4  # in a day, which a repair takes
    few, many = (goodput(40, Failures(spares=share)) for share in (0.02, 1.0))
    waiting = (1 - exp(-away)) * 4 * 3600 / few.mean_between
    assert few.lost["waiting for spares"] == pytest.approx(waiting, rel=0.05)
    assert many.lost.get("waiting for spares", 0.0) < 1e-9


def test_spares_replace_what_fails_together() -> None:
    """Seven spares are of no use where eight chips fail at once, and eight are."""
    seven, eight = (goodput(64, Failures(blast=8, spares=count / 64)) for count in (7, 8))
    assert (seven.spares, eight.spares) == (7, 8)
    assert seven.lost["waiting for spares"] > 10 * eight.lost["waiting for spares"]


def test_no_more_chips_fail_than_there_are() -> None:
    assert mean_between(8, Failures(blast=4096)) == mean_between(8, Failures(blast=8))


def test_software_waits_for_no_chip() -> None:
    """However few spares there are."""
    for chips in (8, 32, 64):
        found = goodput(chips, Failures(per_chip_day=0, per_day=3, spares=0))
        assert "waiting for spares" not in found.lost
        assert found.share == goodput(chips, Failures(per_chip_day=0, per_day=3, spares=1)).share
    # Half of the interruptions take a chip: the mean one waits half as long.
    rate = 64 * 4.7e-4
    chips, both = (goodput(64, Failures(per_day=more, spares=0)) for more in (0.0, rate))
    for found, wait in ((chips, 4 * 3600), (both, 2 * 3600)):
        assert found.lost["waiting for spares"] == pytest.approx(wait / found.mean_between, rel=0.1)


def test_a_run_that_nothing_interrupts() -> None:
    assert goodput(10_240, Failures(per_chip_day=0)).share > 0.999
    assert goodput(10_240, Failures(per_chip_day=1)).share < 0.01


def test_a_month_at_ten_thousand_chips() -> None:
    assert goodput(10_240, LLAMA3).interruptions(30 * DAY) == pytest.approx(10_240 * 4.7e-4 * 30)
