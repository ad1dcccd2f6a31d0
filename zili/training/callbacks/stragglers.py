"""Looks for processes that are slower than the others, and says which, in what, and by how much."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from zili.parallel.control.crumbs import own_crumbs
from zili.parallel.machines import own_place
from zili.parallel.witness import Waits
from zili.training.callbacks.base import Callback

if TYPE_CHECKING:
    from zili.data.loader import Batch
    from zili.training.trainer import Trainer

PERSISTS = 3
"""Looks in a row after which a slow process is named: one may be an accident."""
FEWEST = 3
"""Processes: of two, who is to say which is slow?"""
_FAR = 5.0
"""Robust deviations above the median."""
_OF_NORMAL = 1.4826
_LEAST_DEVIATION = 0.05
"""Of the median step: processes that are all but equal would name one another."""
_PHASES = {"data": "waiting for data", "step": "forward, backward and update"}


class Slow(NamedTuple):
    """A process that a look found slow."""

    rank: int
    phase: str
    seconds: float
    median: float


class StragglerWatch(Callback):
    """Every `every` steps. A step takes all processes as long, since they wait for one another. So what is compared is
    how long each waits for data a step, and how long it does not wait for others in the step that is looked at. In that
    one each collective is waited for where it begins. Between the stages of a pipeline such waits are not told apart
    from work: there only data is compared.
    """

    everywhere = True

    def __init__(self, every: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._every, self._clock = every, clock
        self._waits: Waits | None = None
        self._begun = 0.0
        self._data = (0.0, 0)
        """Seconds that this process had waited for data at the last look, and its step."""
        self._first = 0
        self._places: list[str] = []
        self._found: Counter[tuple[int, str]] = Counter()
        self._named: set[tuple[int, str]] = set()

    def on_start(self, trainer: Trainer) -> None:
        self._places = trainer.world.gathered(own_place(trainer.world))
        self._data = own_crumbs().seconds()["data"], trainer.step
        self._first = trainer.step
        if trainer.world.size < FEWEST:
            trainer.note(f"watch.stragglers: nobody is compared among fewer than {FEWEST} processes")

    def before_step(self, trainer: Trainer, batch: Batch) -> None:
        # Not the first step that this process makes, which compiles.
        if trainer.world.size < FEWEST or (trainer.step + 1) % self._every or trainer.step == self._first:
            return
        trainer.device.synchronize()
        self._waits = Waits(trainer.device, self._clock)
        self._waits.__enter__()
        self._begun = self._clock()

    def after_step(self, trainer: Trainer) -> None:
        if self._waits is None:
            return
        trainer.device.synchronize()
        seconds = self._clock() - self._begun
        self._waits.__exit__(None, None, None)
        data, since = own_crumbs().seconds()["data"], trainer.step - self._data[1]
        own = {"data": (data - self._data[0]) / since, "step": seconds - self._waits.seconds}
        self._waits, self._data = None, (data, trainer.step)
        every = [json.loads(one) for one in trainer.world.gathered(json.dumps(own))]
        if every:  # on the first process
            phases = ("data",) if trainer.world.layout.pipeline > 1 else ("data", "step")
            step = median(one["step"] for one in every)
            self._tell(trainer, [one for phase in phases for one in slow([p[phase] for p in every], phase, step)])

    def _tell(self, trainer: Trainer, found: list[Slow]) -> None:
        now = {(one.rank, one.phase): one for one in found}
        self._found = Counter({key: self._found[key] + 1 for key in now})
        for key, count in self._found.items():
            if count >= PERSISTS and key not in self._named:
                self._named.add(key)
                self._say(trainer, now[key])
        for key in [key for key in self._named if key not in now]:
            self._named.remove(key)
            trainer.note(f"step {trainer.step}: {self._places[key[0]]} is no longer slow in {_PHASES[key[1]]}")
            self._event(trainer, key, over=True)

    def _say(self, trainer: Trainer, one: Slow) -> None:
        trainer.note(
            f"step {trainer.step}: {self._places[one.rank]} is slow in {_PHASES[one.phase]}: {one.seconds:.3g} s a "
            f"step, where the median of all is {one.median:.3g} s, for {PERSISTS} looks in a row"
        )
        self._event(trainer, one[:2], over=False, seconds=one.seconds, median=one.median)

    def _event(self, trainer: Trainer, key: tuple[int, str], **figures: float) -> None:
        rank, phase = key
        values = {"step": trainer.step, "process": rank, "place": self._places[rank], "phase": phase, **figures}
        for callback in trainer.callbacks:
            callback.on_event("straggler", values)


def slow(seconds: list[float], phase: str, step: float) -> list[Slow]:
    """Who is far above the others, by median and median absolute deviation; `step`: seconds of a median step."""
    middle = median(seconds)
    deviation = _OF_NORMAL * median(abs(one - middle) for one in seconds)
    most = middle + _FAR * max(deviation, _LEAST_DEVIATION * step)
    return [Slow(rank, phase, one, middle) for rank, one in enumerate(seconds) if one > most]
