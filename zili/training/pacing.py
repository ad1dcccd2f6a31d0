"""How many steps fit into a given time, found by taking a few."""

from __future__ import annotations

import time
from statistics import median

from zili.chips.device import Device
from zili.config import RunConfig
from zili.data.loader import Batches
from zili.training.trainer import Trainer

_WARM_UP, _TIMED = 2, 5


def seconds_per_step(config: RunConfig, loader: Batches, device: Device) -> float:
    """Median seconds of a step, compiled and warm, taken on a model that is thrown away.

    What the first step compiles stays compiled for the run that follows in the same process.
    """
    trainer = Trainer(config, loader, device)
    trainer.model.train()
    seconds = []
    for step in range(_WARM_UP + _TIMED):
        started = time.perf_counter()
        trainer.train_step(loader.batch(step))
        device.synchronize()
        seconds.append(time.perf_counter() - started)
    return median(seconds[_WARM_UP:])
