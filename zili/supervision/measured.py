"""What a run under `zili launch` measured of its own failures, for the planner's model of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from zili.errors import DataError
from zili.planning.search.goodput import DAY, LLAMA3_RATE, Failures
from zili.planning.search.layouts import seconds_text
from zili.plurals import counted
from zili.supervision.account import Account, Life, account_of, lives_text

ENOUGH = 5
"""Failures from which a rate is taken: nine of ten times the true one is then within a factor of about 2.5."""
_ASSUMED = ("detection", "replacement", "reload", "warm_up", "checkpoint", "drain")


@dataclass(frozen=True)
class Measured:
    """The planner's figures with a run's own in their place."""

    failures: Failures
    figures: dict[str, float]
    """Those that are the run's own, by their names in `Failures`; seconds, but for the rate."""
    notes: list[str]
    """What was measured and what is assumed, with the numbers."""


def measured(run: Path, usual: Failures) -> Measured:
    """`usual` with what `run` measured. A rate other than the usual one was given, and stays.

    Raises:
        DataError: the run has no events, or no life did two steps.
    """
    found = account_of(run)
    worked = [life for life in found.lives if life.step_seconds]
    if not worked:
        raise DataError(
            f"{run} is too short to measure by: {lives_text(found)} in {found.wall:.0f} s, and none did two steps"
        )
    figures = {**_restarts(found), **_checkpoint(found.lives)}
    rate, of_rate = _rate(found, usual)
    figures |= rate
    step = fmean(life.step_seconds or 0.0 for life in worked)
    processes = counted(max(life.processes for life in worked), "process")
    notes = [
        f"measured in {run}, {processes}, {lives_text(found)}, a step {seconds_text(step)}: "
        + ", ".join(f"{_word(name)} {seconds_text(figures[name])}" for name in _ASSUMED if name in figures)
    ]
    left = [f"{_word(name)} {seconds_text(getattr(usual, name))}" for name in _ASSUMED if name not in figures]
    notes += [f"assumed, as it was not measured: {', '.join(left)}"] if left else []
    notes += [
        of_rate,
        f"what is measured is taken as it was with {processes}: joining and reading grow with their number",
    ]
    return Measured(replace(usual, **figures), figures, notes)  # type: ignore[arg-type]


def _word(name: str) -> str:
    return name.replace("_", "-")


def _restarts(found: Account) -> dict[str, float]:
    """Means over the lives that follow a failure and came to train; without one, what the first life tells."""
    failed = [life for life in found.lives if life.failed]
    figures: dict[str, float] = {}
    if failed:
        figures["detection"] = fmean(life.seconds.get("detection", 0.0) for life in failed)
    pairs = [(old, new) for old, new in pairwise(found.lives) if old.failed and new.step_seconds]
    if pairs:
        figures["replacement"] = fmean(
            old.seconds.get("stopping", 0.0) + _sum(new, "replacement", "init") for old, new in pairs
        )
        figures["reload"] = fmean(_sum(new, "load", "reload") for _, new in pairs)
    warmed = [new for _, new in pairs] or [life for life in found.lives if life.step_seconds]
    # The first step is a step as well.
    figures["warm_up"] = fmean(max(0.0, _sum(life, "join", "warm_up") - (life.step_seconds or 0.0)) for life in warmed)
    return figures


def _sum(life: Life, *phases: str) -> float:
    return sum(life.seconds.get(name, 0.0) for name in phases)


def _checkpoint(lives: list[Life]) -> dict[str, float]:
    saves, spent = sum(life.saves for life in lives), sum(_sum(life, "save") for life in lives)
    return {"checkpoint": spent / saves} if saves >= 1 and spent else {}


def _rate(found: Account, usual: Failures) -> tuple[dict[str, float], str]:
    """Interruptions a chip-day, if there were enough to tell; and a note."""
    number = sum(life.failed for life in found.lives)
    days = sum(life.processes * life.wall for life in found.lives) / DAY
    seen = f"{counted(number, 'failure')} in {days:.3g} chip-days"
    if usual.per_chip_day != LLAMA3_RATE:
        return {}, f"{usual.per_chip_day:.3g} failures a chip-day, as given; the run had {seen}"
    if number < ENOUGH:
        return (
            {},
            f"assumed: {usual.per_chip_day:.3g} failures a chip-day; {seen} are too few to tell, {ENOUGH} are enough",
        )
    return {"per_chip_day": number / days}, f"measured: {number / days:.3g} failures a chip-day, of {seen}"
