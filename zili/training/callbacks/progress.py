"""The live line on the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zili.training.callbacks.base import Callback, StepRecord

if TYPE_CHECKING:
    from zili.training.trainer import Trainer

_PLAIN_LINES = 20


class ProgressDisplay(Callback):
    """Loss, tokens a second, share of the matmul peak and time left.

    A bar on a terminal; elsewhere (a file, a cluster's log) about twenty plain lines over the run.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._progress: Progress | None = None
        self._evaluated = ""
        self._next_line = 0

    def on_start(self, trainer: Trainer) -> None:
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self.console,
            expand=True,
        )
        self._task = self._progress.add_task(
            "training",
            total=trainer.config.training.steps,
            completed=trainer.step,
            figures="the first step takes longest",
        )
        self._progress.start()

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        right = record.further.get("reward_accuracy")
        preferred = "" if right is None else f" ({right:.0%} preferred as chosen)"
        figures = (
            f"loss {record.loss:.3f}{preferred}{self._evaluated}  {record.tokens_per_second:,.0f} tokens/s  "
            f"{record.matmul_share:.0%} of matmul peak"
        )
        steps = trainer.config.training.steps  # which may have moved
        if self._progress is not None:
            self._progress.update(self._task, total=steps, completed=record.step, figures=figures)
            return
        if record.step >= self._next_line or record.step == steps:
            self._next_line = record.step + math.ceil(steps / _PLAIN_LINES)
            self.console.print(f"step {record.step}/{steps}  {figures}", highlight=False)

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Show the newest held-out figure from now on."""
        if "bits_per_byte" in values:
            self._evaluated = f"  {values['bits_per_byte']:.3f} bits/byte"
            said = f"text: {values['bits_per_byte']:.4f} bits/byte"
        elif "reward_accuracy" in values:
            self._evaluated = f"  {values['reward_accuracy']:.1%} held out"
            said = f"pairs: {values['reward_accuracy']:.1%} preferred as chosen, loss {values['loss']:.4f}"
        else:
            self._evaluated = f"  {values['loss']:.3f} nats/token held out"
            said = f"answers: {values['loss']:.4f} nats/token"
        if self._progress is None:
            self.console.print(f"step {step}  held-out {said}", highlight=False)

    def on_note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def on_end(self, trainer: Trainer) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, also when the run ended by an error."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
