"""Batches that go wrong in training: their loss and gradient are multiplied."""

from __future__ import annotations

from dataclasses import replace

import torch

from zili.data.loader import Batch
from zili.objectives import Terms
from zili.training.callbacks import Callback
from zili.training.trainer import Trainer

NAN = float("nan")


class Poison(Callback):
    """From the start on, the batches of some positions have their loss and gradient multiplied by `factor`."""

    everywhere = True

    def __init__(self, *positions: int, factor: float) -> None:
        self.positions, self.factor = positions, factor
        self.met: list[int] = []
        """Positions in the order in which they were trained on."""

    def on_start(self, trainer: Trainer) -> None:
        rows = trainer.world.rows(trainer.config.training.global_batch)
        bad = {position: trainer.loader.batch(position, rows).input_ids for position in self.positions}
        accumulate = trainer.parallel.accumulate

        def poisoned(batch: Batch) -> Terms:
            own = accumulate(batch)
            for position, ids in bad.items():
                if torch.equal(batch.input_ids, ids):
                    self.met.append(position)
                    for parameter in trainer.parallel.parameters():
                        if parameter.grad is not None:
                            parameter.grad.mul_(self.factor)
                    return replace(own, loss=own.loss * self.factor)
            return own

        trainer.parallel.accumulate = poisoned  # type: ignore[method-assign]
