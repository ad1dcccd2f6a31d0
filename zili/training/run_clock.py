"""The clock of a run: checkpoints every few minutes, and an end before its time is over.

Neither changes a step: a run that was stopped and goes on has the bits of one that was not.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from zili.config import RunConfig

_RECENT = 20
"""Steps whose slowest is expected of the next one, evaluations and waits for the disk included."""
_SAVES = 2
"""Saves that the end waits for, each as long as the slowest so far: one may be under way, and the last one follows."""
_BYTES_A_SECOND = 1e8
"""Speed that a disk is assumed to have before anything was saved."""
_MOST_UNKNOWN = 0.25
"""Share of the time that such a guess may take."""
_MARGIN, _MOST_MARGIN = 0.02, 30.0
"""Share of the time that is left for the end of the process, and the most of it in seconds."""


class RunClock:
    """The first process's clock; it tells the others what is due."""

    def __init__(
        self, config: RunConfig, started: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`started`: when the process was, as `clock` tells time; now, if not given."""
        self._clock = clock
        self._started = clock() if started is None else started
        self._limit = 3600 * config.training.hours
        self._between = 60 * config.checkpoint.minutes
        self._saved = self._before = clock()
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._slowest_save = 0.0

    def after_step(self) -> None:
        """A step is over, with all that came after it."""
        now = self._clock()
        self._steps.append(now - self._before)
        self._before = now

    def save_began(self) -> None:
        self._saved = self._clock()

    def save_took(self, seconds: float) -> None:
        self._slowest_save = max(self._slowest_save, seconds)

    def save_is_due(self) -> bool:
        """Whether the last checkpoint is `checkpoint.minutes` old."""
        return self._between > 0 and self._clock() - self._saved >= self._between

    def time_is_over(self, size: Callable[[], int], further: int = 0) -> bool:
        """Whether another step, `further` ones and a checkpoint after them, of `size` bytes of this process, might end
        too late."""
        if not self._limit:
            return False
        guess = min(_SAVES * size() / _BYTES_A_SECOND, _MOST_UNKNOWN * self._limit) if not self._slowest_save else 0.0
        margin = min(_MOST_MARGIN, _MARGIN * self._limit)
        needed = (1 + further) * max(self._steps, default=0.0) + _SAVES * self._slowest_save + guess + margin
        return self._clock() - self._started + needed >= self._limit
