"""The trainer's own endpoint for Prometheus, for runs without `zili launch`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from zili.errors import ConfigError
from zili.exposition import (
    LOOPBACK,
    PORT,
    ServedFigure,
    Stragglers,
    of_evaluation,
    of_process,
    of_record,
    refuse_missing_client,
    serving,
)
from zili.parallel.control.crumbs import own_crumbs
from zili.training.callbacks.base import Callback, StepRecord

if TYPE_CHECKING:
    from zili.training.saving import Saved
    from zili.training.trainer import Trainer


class PrometheusEndpoint(Callback):
    """Figures of the run and of its first process, while it goes. docs/operations.md lists their names."""

    def __init__(self, port: int = PORT, host: str = LOOPBACK) -> None:
        """`port` 0: any that is free; a note says which.

        Raises:
            ConfigError: prometheus-client is not installed, or there is no such port.
        """
        refuse_missing_client()
        if not 0 <= port < 1 << 16:
            raise ConfigError(f"callbacks.prometheus: port {port} is not between 0 and 65535")
        self._place = host, port
        self._open = ExitStack()
        # Replaced whole, never changed: the endpoint's thread reads them.
        self._record: Mapping[str, Any] = {}
        self._evaluation: Mapping[str, Any] = {}
        self._stragglers = Stragglers()
        self._checkpoint: tuple[int, float, float | None] | None = None
        """Step, when it was whole, and the seconds that took."""

    def on_start(self, trainer: Trainer) -> None:
        from zili.training.checkpoints import list_checkpoints, step_of  # not at the top: it is checked without torch

        config = trainer.config
        self._run, self._rank = config.folder.resolve().name, str(trainer.world.rank)
        self._steps = config.training.steps
        told = {"step": trainer.step, "tokens": trainer.tokens, "samples": trainer.samples}
        self._record = {**told, "time": time.time()}
        with suppress(OSError, IndexError):
            newest = list_checkpoints(trainer.checkpoint_folder)[-1]
            self._checkpoint = step_of(newest), newest.stat().st_mtime, None
        self._open.enter_context(serving(self._figures, self._place, trainer.note))

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        self._steps = trainer.config.training.steps  # which may have moved
        self._record = {**record.figures(), "time": time.time()}

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        self._evaluation = dict(values)

    def on_event(self, kind: str, values: dict[str, Any]) -> None:
        """What the run has seen of itself."""
        if kind == "straggler":
            self._stragglers.hear(values)

    def on_saved(self, saved: Saved) -> None:
        from zili.training.checkpoints import step_of

        self._checkpoint = step_of(saved.path), time.time(), saved.seconds

    def on_end(self, trainer: Trainer) -> None:
        self._open.close()

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self._open.close()

    def _figures(self) -> Iterator[ServedFigure]:
        run = {"run": self._run}
        record, crumbs = self._record, own_crumbs()
        yield from of_record(record, **run)
        yield from of_evaluation(self._evaluation, **run)
        yield from self._stragglers.figures(**run)
        yield ServedFigure("zili_planned_steps", self._steps, run)
        yield ServedFigure("zili_data_position_samples", record["samples"], run)
        yield from _of_checkpoint(self._checkpoint, run)
        seconds: dict[str, float] = dict(crumbs.seconds().items())
        yield ServedFigure("zili_goodput_ratio", seconds["step"] / max(sum(seconds.values()), 1e-9), run)
        yield from (ServedFigure("zili_phase_seconds", size, {**run, "phase": name}) for name, size in seconds.items())
        # torchrun's, and zili launch's.
        yield ServedFigure("zili_restarts_total", _whole(os.environ.get("TORCHELASTIC_RESTART_COUNT")), run)
        step_seconds = record.get("step_seconds")
        yield from of_process(
            crumbs.phase, crumbs.step, crumbs.stood, seconds, step_seconds, run=self._run, rank=self._rank
        )


def _of_checkpoint(newest: tuple[int, float, float | None] | None, run: Mapping[str, str]) -> Iterator[ServedFigure]:
    if newest is None:
        return
    step, since, took = newest
    yield ServedFigure("zili_checkpoint_step", step, run)
    yield ServedFigure("zili_checkpoint_age_seconds", max(0.0, time.time() - since), run)
    if took is not None:
        yield ServedFigure("zili_checkpoint_save_seconds", took, run)


def _whole(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0
