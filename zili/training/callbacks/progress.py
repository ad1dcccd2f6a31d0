"""What a run shows while it goes: a bar on a terminal, lines in a log."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zili.training.callbacks.base import Callback, StepRecord

if TYPE_CHECKING:
    from zili.training.saving import Saved
    from zili.training.trainer import Trainer

_PACE = 100
"""Records over which the time that is left is reckoned."""


class ProgressDisplay(Callback):
    """Loss, tokens a second, share of the matmul peak and time left.

    A bar on a terminal. Elsewhere (a file, a cluster's log) it prints lines, each with date and time. There is one at
    the first and one at the last record, one every `logging.line_seconds` between them, and one for each evaluation,
    checkpoint and note.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or Console()
        self._clock = clock
        self._progress: Progress | None = None
        self._evaluated = ""
        self._due = 0.0
        self._unsaid: str | None = None
        self._pace: deque[tuple[float, int]] = deque(maxlen=_PACE)

    def on_start(self, trainer: Trainer) -> None:
        steps = trainer.config.training.steps
        if not self.console.is_terminal:
            if trainer.step < steps:
                self._print(f"step {trainer.step}/{steps}  begins; the first one takes longest")
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
            total=steps,
            completed=trainer.step,
            figures="the first step takes longest",
        )
        self._progress.start()

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        right = record.further.get("reward_accuracy")
        preferred = "" if right is None else f" ({right:.0%} preferred as chosen)"
        loss = f"loss {record.loss:.3f}{preferred}{self._evaluated}"
        speed = f"{record.tokens_per_second:,.0f} tokens/s  {record.matmul_share:.0%} of matmul peak"
        steps = trainer.config.training.steps  # which may have moved
        if self._progress is not None:
            self._progress.update(self._task, total=steps, completed=record.step, figures=f"{loss}  {speed}")
            return
        now = self._clock()
        self._pace.append((now, record.step))
        parts = [
            f"step {record.step}/{steps}",
            loss,
            f"lr {record.learning_rate:.2e}",
            f"norm {record.gradient_norm:.3g}",
            speed,
            *([decimal(record.memory_bytes)] if record.memory_bytes else []),
            *self._left(steps - record.step),
        ]
        self._unsaid = "  ".join(parts)
        if now >= self._due or record.step == steps:
            self._due = now + trainer.config.logging.line_seconds
            self._say_record()

    def _left(self, steps: int) -> list[str]:
        """Time that `steps` more take, as the newest did, what came between them included."""
        (since, first), (now, last) = self._pace[0], self._pace[-1]
        if steps <= 0 or last <= first:
            return []
        return [f"{timedelta(seconds=round(steps * (now - since) / (last - first)))} left"]

    def _say_record(self) -> None:
        if self._unsaid is not None:
            self._print(self._unsaid)
            self._unsaid = None

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
            self._print(f"step {step}  held-out {said}")

    def on_saved(self, saved: Saved) -> None:
        if self._progress is None:
            self._print(f"saved {saved.where}: {decimal(saved.bytes)} in {saved.seconds:.1f} s")

    def on_roll_back(self, trainer: Trainer) -> None:
        self._pace.clear()

    def on_note(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        stamp = "" if self.console.is_terminal else time.strftime("%Y-%m-%d %H:%M:%S  ")
        with suppress(OSError):  # a log on a full disk is no reason to end a run, and there is nowhere to say it
            self.console.print(stamp + text, highlight=False, markup=False, soft_wrap=True)

    def on_end(self, trainer: Trainer) -> None:
        self._say_record()
        self.close()

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, also when the run ended by an error."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
