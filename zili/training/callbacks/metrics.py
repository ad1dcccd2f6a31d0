"""The run's record: `metrics.jsonl`, and TensorBoard event files on request."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from zili.models.arithmetic import count_parameters
from zili.training.callbacks.base import Callback, StepRecord

if TYPE_CHECKING:
    from zili.training.trainer import Trainer

METRICS_FILE = "metrics.jsonl"


class MetricsLog(Callback):
    """Appends one JSON object a line; `kind` says which: start, train, eval or note.

    The base record of a run: the report and every other view are made from it. A run that goes on from a
    checkpoint drops the lines past that step first, since those steps happen again.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_FILE

    def write(self, kind: str, **values: Any) -> None:
        """Append one record; the line reaches the operating system before this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"kind": kind, "time": time.time(), **values}) + "\n"
        with self.path.open("a+b") as file:
            file.write((b"\n" if _ends_cut(file) else b"") + line.encode())

    def on_start(self, trainer: Trainer) -> None:
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

    def _drop_after(self, step: int) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _is_upto(line, step)]
        if len(kept) < len(lines):
            aside = self.path.with_suffix(".partial")
            aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            aside.replace(self.path)


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

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._writer: Any = None

    def on_start(self, trainer: Trainer) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self._folder, purge_step=trainer.step + 1)

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        for name, value in record.figures().items():
            if name != "step":
                self._writer.add_scalar(f"train/{name}", value, record.step)

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Record one evaluation."""
        for name, value in values.items():
            self._writer.add_scalar(f"eval/{name}", value, step)

    def on_checkpoint(self, trainer: Trainer) -> None:
        self._writer.flush()  # a run that is killed goes on from here and would not write these again

    def on_end(self, trainer: Trainer) -> None:
        self._writer.close()
