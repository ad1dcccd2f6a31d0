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
