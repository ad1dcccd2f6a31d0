"""A callback through which a test lets a process of a run meet a fault."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import zili


class Faults(zili.Callback):
    """After a step: what the file `fault-RANK` of a folder says, once."""

    everywhere = True

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_start(self, trainer: Any) -> None:
        """A batch whose gradient is no number: its position is in the file `nan-batch`."""
        bad, accumulate = self.folder / "nan-batch", trainer.parallel.accumulate

        def accumulated(batch: zili.Batch) -> Any:
            own = accumulate(batch)
            if bad.exists() and trainer.watch.position(trainer.step) == int(bad.read_text()):
                for parameter in trainer.parallel.parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(float("nan"))
            return own

        trainer.parallel.accumulate = accumulated

    def before_step(self, trainer: Any, batch: zili.Batch) -> None:
        """A batch on which the last process fails whenever it meets it: its position is in the file `bad-batch`."""
        bad = self.folder / "bad-batch"
        if trainer.world.rank and bad.exists() and trainer.watch.position(trainer.step) == int(bad.read_text()):
            raise IndexError("index out of range in self")

    def after_step(self, trainer: Any) -> None:
        file = self.folder / f"fault-{trainer.world.rank}"
        if trainer.world.rank == 0:
            time.sleep(0.002)  # the faults come from outside, and steps of this size take no time
        if not file.exists():
            return
        what = file.read_text()
        file.unlink()
        if what == "raise":
            raise ValueError("the callback does not like this step")
        if what == "die in the optimizer":
            optimizer, step = trainer.optimizers[-1], trainer.optimizers[-1].step

            def die() -> None:
                step()  # weights have moved, and the step is not counted
                os.kill(os.getpid(), signal.SIGKILL)

            optimizer.step = die
