"""A callback: one concern of a run, called at its events."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from zili.data.loader import Batch
    from zili.training.saving import Saved
    from zili.training.trainer import Trainer


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as it is logged."""

    step: int
    """Steps done, this one included."""
    tokens: int
    """Tokens consumed since the beginning of the run."""
    samples: int
    """Samples of the data read since then, those of batches that were left out too."""
    loss: float
    """Mean cross entropy over the step's targets, nats a token; of preferences, over its pairs."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    step_seconds: float
    data_seconds: float
    """Seconds of the step that were spent waiting for data."""
    tokens_per_second: float
    matmul_share: float
    """Model FLOP/s over the matmul peak measured at start."""
    memory_bytes: int | None = None
    """Most that the first process has had of its device's memory so far, on a CPU of the host's; None: not known."""
    further: dict[str, float] = field(default_factory=dict)
    """In a mixture, `expert_load_max` and `expert_load_min`: the most and the least used expert's tokens over the mean,
    in the least even layer. With multi-token prediction `next_loss`, nats a token. For preferences, means over pairs:
    `reward_chosen` and `reward_rejected`, what the model gives each answer over the reference, times beta, and
    `reward_accuracy`, the share in which the chosen has the larger."""

    def figures(self) -> dict[str, float]:
        """All that is known under one name each."""
        table = asdict(self)
        return {**{k: v for k, v in table.items() if k != "further" and v is not None}, **self.further}


class Callback:
    """Does nothing; override what is needed. Called in the order given to the trainer."""

    everywhere: ClassVar[bool] = False
    """Whether every process of the run has it; else the first one alone, which is the one that writes and speaks."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, everything built and restored."""

    def before_step(self, trainer: Trainer, batch: Batch) -> None:
        """Before every step, with this process's rows of its batch, on the CPU."""

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """After a step whose record was taken (`logging.every`)."""

    def on_checkpoint(self, trainer: Trainer) -> None:
        """After a checkpoint of this step was begun; it may still be on its way to the disk."""

    def on_saved(self, saved: Saved) -> None:
        """After a checkpoint was found whole, at the latest before the next one begins."""

    def after_step(self, trainer: Trainer) -> None:
        """After every step, logged or not."""

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        """After the held-out text was scored: `bits_per_byte`, `loss` and what else its kind has (docs/training.md)."""

    def on_event(self, kind: str, values: dict[str, Any]) -> None:
        """The run has seen something of itself: `decision`, `straggler` or `corruption`, with its figures. A note says
        the same to the user."""

    def on_roll_back(self, trainer: Trainer) -> None:
        """The run has gone back to an earlier checkpoint: the steps after `trainer.step` happen again, on other
        batches."""

    def on_note(self, text: str) -> None:
        """Something the user should know: one line."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, or when interrupted: the last checkpoint is written."""

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        """In place of `on_end`, where an error ends the run."""
