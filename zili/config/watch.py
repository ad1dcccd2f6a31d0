"""What a run watches of itself, and what it does about what it sees."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from zili.config.section import Section

Answer = Literal["stop", "skip", "roll_back"]


class WatchConfig(Section):
    """What a run watches of itself: docs/training.md.

    Every batch that it leaves out is written down, and left out again by who repeats the run."""

    non_finite: Answer = "stop"
    """What follows a loss or gradient norm that is no finite number. Stop: an error. Skip: the batch counts as read,
    its update is not applied. Roll_back: the run goes back to the newest sound checkpoint from before, and leaves out
    the batch and `margin` batches on each side."""
    spike: Literal["ignore", "stop", "skip", "roll_back"] = "ignore"
    """The same for a loss or gradient norm that is a number, but far above those of the last good steps."""
    threshold: PositiveFloat = 10.0
    """How far: deviations from the median, in units of 1.4826 times the median absolute deviation; a deviation
    is at least 0.01 of a loss's median, and 0.1 of a norm's."""
    window: PositiveInt = 128
    """Good steps that count, the newest; the step before the one at hand is not yet among them."""
    fewest: int = Field(32, ge=2)
    """Good steps before which nothing is called a spike."""
    margin: NonNegativeInt = 0
    """Batches that roll_back leaves out before the bad one, and as many after it."""
    failure: Literal["stop", "roll_back"] = "stop"
    """What `zili launch` does where data or code ended the run, and would again at the same batch."""
    most: PositiveInt = 3
    """Times that batches may be left out among `within` batches; at the next one the run stops."""
    within: PositiveInt = 1000
    """Batches, counted back from the one at hand."""
    decisions: Path | None = None
    """A run folder, or its decisions.json: what was left out there is left out here, so that the run is repeated."""
    stragglers: NonNegativeInt = 0
    """Steps between looks for a process that is slower than the others; 0: none."""
    corruption: NonNegativeInt = 0
    """Steps between looks for wrong sums: a micro-batch is computed twice, and replicas compare their weights; 0: none.
    Weights are then compared before each checkpoint too."""

    @model_validator(mode="after")
    def _window_can_fill(self) -> Self:
        if self.fewest > self.window:
            raise ValueError(f"fewest ({self.fewest}) good steps are never among window ({self.window}) of them")
        return self

    @property
    def rolls_back(self) -> bool:
        """Whether the run itself may go back to a checkpoint."""
        return "roll_back" in (self.non_finite, self.spike)

    @property
    def judges(self) -> bool:
        """Whether every step is judged, and not only those that are logged or saved."""
        return self.non_finite != "stop" or self.spike != "ignore"
