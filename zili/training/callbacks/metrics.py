"""The run's record: `metrics.jsonl`."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from zili.errors import CheckpointError
from zili.models.arithmetic import count_parameters
from zili.plurals import counted
from zili.training.callbacks.base import Callback, StepRecord

if TYPE_CHECKING:
    from zili.training.saving import Saved
    from zili.training.trainer import Trainer

METRICS_FILE = "metrics.jsonl"
_STAY = ("decision", "straggler", "corruption")
"""Kinds of lines that stay when the steps after a checkpoint happen again."""


_say = logging.getLogger(__name__).warning


class Missing:
    """Counts what the disk refuses of a record: no reason to end a run. It is said at the first and at the end."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path = path
        self._say = say
        self._count = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        try:
            yield
        except (OSError, CheckpointError) as error:
            self._count += 1
            if self._count == 1:
                self._say(f"{self._path} cannot be written: {error}. The run goes on, its record will have gaps")

    def sum_up(self) -> None:
        if self._count:
            self._say(f"{self._path} has gaps: writing it failed {counted(self._count, 'time')}")


class MetricsLog(Callback):
    """Appends one JSON object a line; `kind` says which: start, train, eval, saved, note or an event's.

    The base record of a run: the report and every other view are made from it. A run that goes on from a
    checkpoint drops the lines past that step first, since those steps happen again.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = _say) -> None:
        """`say` is told when the disk refuses."""
        from zili.training.fence import generation_fence  # not at the top: recipes are checked without torch

        self.path = folder / METRICS_FILE
        self._missing = Missing(self.path, say)
        self._newest = generation_fence(folder)

    def write(self, kind: str, **values: Any) -> None:
        """Append one record; the line reaches the operating system before this returns, or is missing. A life of the
        run that a newer one has replaced writes none."""
        line = json.dumps({"kind": kind, "time": time.time(), **values}) + "\n"
        with self._missing.counted():
            if not self._newest():
                return
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
        self.write("eval", step=step, **values)

    def on_event(self, kind: str, values: dict[str, Any]) -> None:
        self.write(kind, **values)

    def on_roll_back(self, trainer: Trainer) -> None:
        with self._missing.counted():
            self._drop_after(trainer.step)

    def on_saved(self, saved: Saved) -> None:
        from zili.training.checkpoints import step_of

        self.write("saved", step=step_of(saved.path), path=saved.where, bytes=saved.bytes, seconds=saved.seconds)

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
        record = json.loads(line)
        # What was decided stands: a run that goes back does so by it, and does not decide it again.
        return record.get("kind") in _STAY or record.get("step", 0) <= step
    except (ValueError, AttributeError, TypeError):
        return False  # a line cut short when the machine went down
