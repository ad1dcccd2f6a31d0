"""A callback of your own: it notes steps that took much longer than usual. python examples/own_callback.py RECIPE

A package of yours that has it under the entry point `zili.callbacks` lets any recipe name it:

    [project.entry-points."zili.callbacks"]
    slow_steps = "own_callback:SlowSteps"
"""

from __future__ import annotations  # else an annotation such as zili.Trainer imports torch, before the chip is known

import sys
from statistics import median

import zili


class SlowSteps(zili.Callback):
    """What `__init__` takes are its settings: `[callbacks.slow_steps] times = 5` in a recipe."""

    def __init__(self, times: float = 3.0) -> None:
        self.times = times
        self.seconds: list[float] = []

    def on_step(self, trainer: zili.Trainer, record: zili.StepRecord) -> None:
        self.seconds.append(record.step_seconds)
        usual = median(self.seconds)
        if record.step_seconds > self.times * usual:
            trainer.note(f"step {record.step} took {record.step_seconds:.2f} s, where {usual:.2f} s is usual")


if __name__ == "__main__":
    zili.train(sys.argv[1], callbacks=[SlowSteps(times=2.0)])
