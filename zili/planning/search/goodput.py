"""What failures cost: interruptions, the best interval between checkpoints, and the share of time that trains.

A run that N chips share is interrupted N r + r0 times a day. A chip or what is around it interrupts r times a chip-day,
and reasons that do not grow with it r0 times a day. After each it is found out, chips are replaced, the state is read
and the first steps warm up; what was done since the last checkpoint is done again. Young 1974, Daly 2006; Kokolis et
al. 2024 (2410.21680) for effective time as a share of the whole, ETTR.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, exp, expm1, sqrt

DAY = 86_400.0
_ROUNDING = 1e-9
LLAMA3_RATE = 4.7e-4
"""Interruptions a chip-day: Llama 3 (2407.21783, table 5), 419 unexpected ones of 16,384 H100 in 54 days."""


@dataclass(frozen=True)
class Failures:
    """How often a run is interrupted, and what an interruption takes. Seconds, but for the rates."""

    per_chip_day: float = LLAMA3_RATE
    per_day: float = 0.0
    """However many chips there are: software, data, people. Meta's RSC has about 2.2 (7.9 h at 1,024 chips)."""
    detection: float = 180.0
    """Until it is known that the run stands still."""
    replacement: float = 300.0
    """Until as many chips are there as before: with spares at hand, the time to start on them."""
    reload: float = 120.0
    """Reading the last checkpoint."""
    warm_up: float = 300.0
    """Communicators, compilation, and steps until the usual speed."""
    checkpoint: float = 2.0
    """What a checkpoint keeps the run from training: with a write in the background, its beginning."""
    drain: float = 60.0
    """Writing one out: they cannot come more often."""
    blast: int = 1
    """Chips that fail together."""
    spares: float = 0.02
    """Chips kept ready, as a share."""
    spare_order: float = 4 * 3600.0
    """What a replacement takes where no spare is ready."""
    repair: float = DAY
    """Until a chip that failed is a spare again."""

    @property
    def restart(self) -> float:
        """Seconds from an interruption to training as before, where a spare is ready."""
        return self.detection + self.replacement + self.reload + self.warm_up

    def together(self, chips: int) -> int:
        """Chips that fail together."""
        return min(self.blast, chips)

    def spare_chips(self, chips: int) -> int:
        """Kept ready, and paid for, beside so many."""
        return ceil(self.spares * chips - _ROUNDING)


@dataclass(frozen=True)
class Goodput:
    """What a run of so many chips can expect."""

    chips: int
    spares: int
    """Chips kept ready beside them."""
    mean_between: float
    """Seconds between interruptions."""
    interval: float
    """Seconds between checkpoints, at its best."""
    share: float
    """Share of the time in which training goes on (ETTR)."""
    lost: dict[str, float]
    """Shares of the time, by what takes them."""

    @property
    def first_to_improve(self) -> str:
        """The term that costs most."""
        return max(self.lost, key=lambda name: self.lost[name], default="nothing")

    def interruptions(self, seconds: float) -> float:
        """To expect in a run of so long."""
        return seconds / self.mean_between


def mean_between(chips: int, failures: Failures) -> float:
    """Seconds between interruptions. Chips that fail together are one interruption."""
    rate = _of_chips(chips, failures) + failures.per_day
    return DAY / rate if rate else float("inf")


def _of_chips(chips: int, failures: Failures) -> float:
    """Interruptions a day that take chips away."""
    return chips * failures.per_chip_day / failures.together(chips)


def effective_share(interval: float, between: float, restart: float, checkpoint: float) -> float:
    """Share of the time that trains, with checkpoints `interval` seconds of training apart.

    Exact for interruptions at random, at any time, in a restart as well (Daly 2006, equation 20). An interval and its
    checkpoint must pass without one, and each costs what was done since the last, and a restart.
    """
    if between == float("inf"):
        return interval / (interval + checkpoint)
    tried = (interval + checkpoint) / between
    return interval * exp(-restart / between) / (between * expm1(tried)) if tried < 700 else 0.0


def best_interval(between: float, checkpoint: float, least: float = 0.0) -> float:
    """Seconds of training between checkpoints (Daly 2006, equation 37), `least` at least."""
    if between == float("inf"):
        return max(DAY, least)
    if checkpoint >= 2 * between:
        return max(between, least)
    ratio = checkpoint / (2 * between)
    return max(sqrt(2 * checkpoint * between) * (1 + sqrt(ratio) / 3 + ratio / 9) - checkpoint, least)


def goodput(chips: int, failures: Failures) -> Goodput:
    """What to expect, and where the rest of the time goes."""
    between = mean_between(chips, failures)
    restart = failures.restart + _waiting_for_spares(chips, failures)
    interval = best_interval(between, failures.checkpoint, failures.drain)

    def share(**changed: float) -> float:
        now = replace(failures, **changed)  # type: ignore[arg-type]
        wait = 0.0 if "spare_order" in changed else _waiting_for_spares(chips, failures)
        return effective_share(interval, between, now.restart + wait, now.checkpoint)

    whole = effective_share(interval, between, restart, failures.checkpoint)
    # What each term takes: what would be won if it took nothing, scaled to what is lost in all.
    won = {name: share(**{name: 0.0}) - whole for name in ("detection", "replacement", "reload", "warm_up")}
    won["waiting for spares"] = share(spare_order=0.0) - whole
    won["checkpoints"] = share(checkpoint=0.0) - whole
    won["work done again"] = interval / 2 / between * whole
    total = sum(won.values())
    lost = {name.replace("_", "-"): (1 - whole) * one / total for name, one in won.items() if total and one > 0}
    return Goodput(chips, failures.spare_chips(chips), between, interval, whole, lost)


def _waiting_for_spares(chips: int, failures: Failures) -> float:
    """Seconds that the mean interruption waits for chips. Those out for repair are Poisson-distributed; what takes no
    chip, as software does, waits for none."""
    taking = _of_chips(chips, failures)
    if not taking:
        return 0.0
    # What fails together is replaced together.
    ready = failures.spare_chips(chips) // failures.together(chips)
    away = taking * failures.repair / DAY
    # Chance that as many as there are spares are away already.
    term, below = exp(-away) if away < 700 else 0.0, 0.0
    for number in range(ready):
        below += term
        term *= away / (number + 1)
        if not term:
            break
    if away >= 700:
        below = 1.0 if away < ready else 0.0
    return max(0.0, 1 - below) * failures.spare_order * taking / (taking + failures.per_day)
