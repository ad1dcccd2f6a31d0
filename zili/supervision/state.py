"""What the root knows of a run. It lies in the run's folder and with every agent, so that another root can go on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from zili.supervision.watch import PATIENCE

_REMEMBERED = 1_000
"""Failures that are kept: a run of ten thousand chips has about 150 a month."""


@dataclass(frozen=True)
class Launch:
    """What is to run, as the command line said; the same on every machine."""

    words: list[str]
    """Of the worker's command: `train RECIPE ...`."""
    processes: int
    """Of each machine."""
    most: int
    """Machines that work."""
    layouts: dict[str, list[str]]
    """Numbers of machines that a life may have, each with the keys of the recipe that change there."""
    spares: int = 0
    """Machines that may stand by."""
    wait: float = 60.0
    """Seconds to wait for a machine that is missing, before a life begins with fewer."""
    patience: float = PATIENCE
    """Seconds without progress that are never a hang."""
    watch: dict[str, Any] = field(default_factory=dict)
    """The recipe's `[watch]`: whether batches may be left out, and how many."""

    def sizes(self, here: int | None = None) -> list[int]:
        """Numbers of machines that a life may have, with `here` machines at most."""
        return [int(size) for size in self.layouts if here is None or int(size) <= here]


@dataclass
class State:
    """Where the run stands."""

    generation: int = 0
    """Of the newest life."""
    life: int = 0
    """Lives begun."""
    version: int = 0
    """Rises with each change within a generation."""
    machines: list[str] = field(default_factory=list)
    """Of the newest life, in the order of their ranks."""
    running: bool = False
    """Whether that life was begun and is not known to have ended."""
    step: int = 0
    """The last step that the run is known to have done."""
    failures: list[dict[str, Any]] = field(default_factory=list)
    """What ended the lives before, oldest first."""
    doubtful: list[str] = field(default_factory=list)
    """Machines that failed: others are taken first."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Machines that are not to be used any more, and why."""
    leaving: dict[str, int] = field(default_factory=dict)
    """Machines that go after the next step, and the exit codes of their supervisors."""

    bad_batch: dict[str, Any] | None = None
    """What the next life is to leave out: `step`, done before it, and `why`."""

    def remember(self, failure: dict[str, Any]) -> None:
        """Keep what ended a life; the oldest ones make room."""
        self.failures = [*self.failures[1 - _REMEMBERED :], failure]

    def as_table(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def age(self) -> tuple[int, int]:
        """Of two states the newer is the larger."""
        return self.generation, self.version


def state_of(table: Any) -> State:
    """The reverse of `State.as_table`. A table that is none gives an empty state: agents have copies."""
    known = {one.name for one in fields(State)}
    try:
        return _STATE.validate_python({name: value for name, value in table.items() if name in known})
    except (AttributeError, ValidationError):
        return State()


_STATE = TypeAdapter(State)
