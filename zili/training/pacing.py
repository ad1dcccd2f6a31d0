"""Ends a run on time: the number of steps is estimated again while it runs, as long as no step depends on it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING

from zili.training.callbacks.base import Callback
from zili.training.schedules import decay_start

if TYPE_CHECKING:
    from zili.config import RunConfig
    from zili.training.trainer import Trainer

_FIRST = 2
"""First steps, whose times do not count: they compile, and take memory."""
_RECENT = 0.1
"""Share of the steps so far whose mean time is expected of the others, at least `_FEWEST`."""
_FEWEST = 5


class Pacer(Callback):
    """Sets `training.steps` of a running trainer to what fits before a deadline.

    While the rate is constant, how many steps will follow makes no difference, so the number may move with the speed of
    the machine. At the last moment at which the decay can begin it is settled, together with `schedule.decay_start`.
    From then on it is a run like any other: one that has these two in its recipe from the first step has the same bits.
    A machine that gets slower or faster during the decay ends it later or earlier.
    """

    everywhere = True

    def __init__(
        self, deadline: float, keep: Callable[[RunConfig], None], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`deadline`: when training should be over, its evaluations included, as `clock` tells time. `keep` is told the
        trainer's configuration with each checkpoint, and when the number is settled."""
        self._deadline, self._keep, self._clock = deadline, keep, clock
        self._seconds: deque[float] = deque()
        self._then: float | None = None
        self._evaluating = self._one_evaluation = 0.0
        self._expected: Callable[[Trainer], float] | None = None
        self.settled = False

    def expect(self, seconds: Callable[[Trainer], float]) -> None:
        """Have `seconds` of one evaluation asked for before the first step: until one was made, it is all there is."""
        self._expected = seconds

    def on_start(self, trainer: Trainer) -> None:
        if self._expected is not None:
            self._one_evaluation = self._expected(trainer)
        self._then = self._clock()

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        """What evaluations take is paid for apart."""
        self._evaluating = self._one_evaluation = values["seconds"]

    def after_step(self, trainer: Trainer) -> None:
        if self.settled:
            return
        now = self._clock()
        assert self._then is not None
        self._seconds.append(now - self._then - self._evaluating)
        self._then, self._evaluating = now, 0.0
        if len(self._seconds) > _FIRST:
            # One process decides for all: each has a clock of its own.
            steps = trainer.world.from_first(lambda: trainer.step + self._fitting(trainer, now))
            self._set(trainer, max(steps, trainer.config.schedule.warmup_steps + 1))

    def on_checkpoint(self, trainer: Trainer) -> None:
        self._keep(trainer.config)

    def _fitting(self, trainer: Trainer, now: float) -> int:
        """Steps that fit before the deadline."""
        done = len(self._seconds) - _FIRST
        recent = min(done, max(_FEWEST, round(_RECENT * done)))
        step = sum(islice(reversed(self._seconds), recent)) / recent
        left = self._deadline - now - self._one_evaluation
        every = trainer.config.evaluation.every
        if every:  # those before the last one: each step brings its share
            step += self._one_evaluation / every
        return max(0, int(left / step))

    def _set(self, trainer: Trainer, steps: int) -> None:
        config = trainer.config
        start = decay_start(steps, config.schedule)
        self.settled = trainer.step >= start
        decays = self.settled and config.schedule.kind == "wsd"
        schedule = {"decay_start": trainer.step} if decays else {}
        trainer.config = config.changed(training={"steps": steps}, schedule=schedule)
        if self.settled:
            self._keep(trainer.config)
            trainer.note(f"step {trainer.step}: step {steps:,} will be the last, which is what fits the time")
