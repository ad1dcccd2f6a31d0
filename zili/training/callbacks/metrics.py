"""The run's record: `metrics.jsonl`, and TensorBoard event files on request."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from zili.models.arithmetic import count_parameters
from zili.plurals import counted
from zili.training.callbacks.base import Callback, StepRecord

if TYPE_CHECKING:
    from zili.config import RunConfig
    from zili.training.trainer import Trainer

METRICS_FILE = "metrics.jsonl"
_RESULTS = ("train/loss", "eval/loss", "eval/bits_per_byte", "train/tokens_per_second")
"""Figures that TensorBoard shows beside the settings of runs."""


def _say(text: str) -> None:
    print(text, file=sys.stderr)


class _Missing:
    """Counts what the disk refuses of a record: no reason to end a run. It is said at the first and at the end."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path = path
        self._say = say
        self._count = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._count += 1
            if self._count == 1:
                self._say(f"{self._path} cannot be written: {error}. The run goes on, its record will have gaps")

    def sum_up(self) -> None:
        if self._count:
            self._say(f"{self._path} has gaps: writing it failed {counted(self._count, 'time')}")


class MetricsLog(Callback):
    """Appends one JSON object a line; `kind` says which: start, train, eval or note.

    The base record of a run: the report and every other view are made from it. A run that goes on from a
    checkpoint drops the lines past that step first, since those steps happen again.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = _say) -> None:
        """`say` is told when the disk refuses."""
        self.path = folder / METRICS_FILE
        self._missing = _Missing(self.path, say)

    def write(self, kind: str, **values: Any) -> None:
        """Append one record; the line reaches the operating system before this returns, or is missing."""
        line = json.dumps({"kind": kind, "time": time.time(), **values}) + "\n"
        with self._missing.counted():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                file.write((b"\n" if _ends_cut(file) else b"") + line.encode())

    def on_start(self, trainer: Trainer) -> None:
        with self._missing.counted():
            self._drop_after(trainer.step)
        model = trainer.config.model
        self.write(
            "start",
            step=trainer.step,
            parameters=count_parameters(model).total,
            device=trainer.device.name(),
            matmul_peak=trainer.matmul_peak,
            steps=trainer.config.training.steps,
        )

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        self.write("train", **record.figures())

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Record one evaluation; what makes them lives on a higher floor."""
        self.write("eval", step=step, **values)

    def on_note(self, text: str) -> None:
        self.write("note", text=text)

    def on_end(self, trainer: Trainer) -> None:
        self._missing.sum_up()

    def _drop_after(self, step: int) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _is_upto(line, step)]
        if len(kept) < len(lines):
            aside = self.path.with_suffix(".partial")
            try:
                aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
                aside.replace(self.path)
            finally:
                aside.unlink(missing_ok=True)


def _ends_cut(file: BinaryIO) -> bool:
    """Whether the last line was cut short when the machine went down: the next must not be lost with it."""
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def _is_upto(line: str, step: int) -> bool:
    try:
        return json.loads(line).get("step", 0) <= step
    except (ValueError, AttributeError, TypeError):
        return False  # a line cut short when the machine went down


class TensorBoardLog(Callback):
    """The same figures as event files, for those who watch many runs at once."""

    def __init__(self, folder: Path, say: Callable[[str], None] = _say) -> None:
        """`say` is told when the disk refuses."""
        self._folder = folder / "tensorboard"
        self._missing = _Missing(self._folder, say)
        self._writer: Any = None

    def on_start(self, trainer: Trainer) -> None:
        threading.excepthook = _hushed
        self._open(trainer.step)
        self._attempt(lambda writer: _add_settings(writer, trainer.config))

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        self._add("train", record.step, record.figures())

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Record one evaluation."""
        self._add("eval", step, values)

    def on_checkpoint(self, trainer: Trainer) -> None:
        if self._writer is None:
            self._open(trainer.step)
        else:
            # A run that is killed goes on from here and would not write these again.
            self._attempt(lambda writer: writer.flush())

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
