"""TensorBoard event files of a run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from zili.training.callbacks.base import Callback, StepRecord
from zili.training.callbacks.metrics import Missing

if TYPE_CHECKING:
    from zili.config import RunConfig
    from zili.training.trainer import Trainer

_RESULTS = ("train/loss", "eval/loss", "eval/bits_per_byte", "train/tokens_per_second")
"""Figures that TensorBoard shows beside the settings of runs."""


class TensorBoardLog(Callback):
    """The same figures as event files, for those who watch many runs at once."""

    def on_start(self, trainer: Trainer) -> None:
        threading.excepthook = _hushed
        self._folder = trainer.config.folder / "tensorboard"
        self._missing = Missing(self._folder, trainer.note)
        self._writer: Any = None
        self._open(trainer.step)
        self._attempt(lambda writer: _add_settings(writer, trainer.config))

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        self._add("train", record.step, record.figures())

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        self._add("eval", step, values)

    def on_checkpoint(self, trainer: Trainer) -> None:
        if self._writer is None:
            self._open(trainer.step)
        else:
            # A run that is killed goes on from here and would not write these again.
            self._attempt(lambda writer: writer.flush())

    def on_roll_back(self, trainer: Trainer) -> None:
        self._attempt(lambda writer: writer.close())
        self._open(trainer.step)

    def on_end(self, trainer: Trainer) -> None:
        self._attempt(lambda writer: writer.close())
        self._missing.sum_up()

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with self._missing.counted():
            self._writer = SummaryWriter(self._folder, purge_step=step + 1)

    def _add(self, kind: str, step: int, values: dict[str, float]) -> None:
        def add(writer: Any) -> None:
            for name, value in values.items():
                if name != "step":
                    writer.add_scalar(f"{kind}/{name}", value, step)

        self._attempt(add)

    def _attempt(self, work: Callable[[Any], None]) -> None:
        """`work` of the writer. One that was refused once refuses for ever: the next checkpoint opens another."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with self._missing.counted():
                work(writer)
                self._writer = writer


def _add_settings(writer: Any, config: RunConfig) -> None:
    """The run's settings, for TensorBoard's table of hyperparameters, where runs are compared by them."""
    from torch.utils.tensorboard.summary import hparams

    # Not SummaryWriter.add_hparams, which begins a run of its own beside this one.
    for summary in hparams(dict(_flat(config.model_dump(mode="json"))), dict.fromkeys(_RESULTS, 0.0)):
        writer.file_writer.add_summary(summary)


def _flat(table: dict[str, Any], before: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """Every setting that is one value, by its dotted name."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        elif isinstance(value, bool | int | float | str):
            yield f"{before}{key}", value


def _hushed(met: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread hands a refusal of the disk on to its writer, and would print a traceback beside."""
    if not (isinstance(met.exc_value, OSError) and type(met.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(met)
