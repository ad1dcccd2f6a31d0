"""What a tier is: a place that says which checkpoints it has, gives one that is sound, takes one, forgets old ones.

All processes of a run call the same methods in the same order, as they do those of `World`. `take` is called by a
thread of the tier's own, beside the steps; everything else by the main thread, before training begins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from zili.errors import ConfigError
from zili.parallel.world import World
from zili.training.checkpoints import RunState, SoundCheckpoint
from zili.training.parts import HeldPart
from zili.training.restoring import Needs

LOCAL_DISK, RUN_FOLDER, STORE = 1, 2, 3
"""How far a tier is, for a run that goes on. 0 is left for the memory of a peer."""


class Copies(NamedTuple):
    """One step of a run, as a save hands it to its tiers. Nobody changes it any more."""

    state: RunState
    parts: dict[str, HeldPart]
    """This process's part of a checkpoint that all processes write together, each part once."""
    own: dict[str, HeldPart]
    """All that this process holds, also what others hold too; empty where no tier asks for it."""

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def name(self) -> str:
        """Of the folder that a tier puts it into."""
        return step_name(self.step)


class Offered(NamedTuple):
    """A checkpoint that a tier has, as far as can be said without reading it."""

    step: int
    flaw: str = ""
    """Why it cannot be used; empty: it may."""


class Tier(ABC):
    """A place that holds checkpoints."""

    distance: int
    durable: bool
    """Whether each machine that may join the run reads it: what is only there may be gone with a machine."""
    takes_own: bool = False
    """Whether it takes all that a process holds (`Copies.own`), so that the process alone can go on from it."""

    def __init__(self, title: str, world: World, *, every: int, keep: int, fence: Callable[[], bool]) -> None:
        """`title`: what the user calls it. `every`: steps between checkpoints there; 0: at the end alone. `fence`:
        whether this life of the run is still the newest, which only the first process asks."""
        self.title = title
        self.every = every
        self.keep = keep
        self.told: SimpleQueue[str] = SimpleQueue()
        """What its thread has to tell the user, on the first process."""
        self._world = world
        self._fence = fence

    @abstractmethod
    def offers(self) -> list[Offered]:
        """Which steps it has; only whole checkpoints, but for what only reading them shows.

        Raises:
            CheckpointError: it cannot be asked.
            ConfigError: it cannot ever be, such as a store whose package is missing.
        """

    @abstractmethod
    def opened(self, step: int, needs: Needs) -> SoundCheckpoint:
        """The checkpoint of `step`, after its hashes were found right, by all processes, each its share.

        Raises:
            CheckpointError: it is damaged, incomplete, or cannot be read.
        """

    @abstractmethod
    def take(self, copies: Copies, channel: int) -> int:
        """Write a checkpoint, then forget those that it replaces; returns its bytes, on the first process. It counts
        as soon as it is whole, and never before. Its control messages go by `channel`.

        Raises:
            CheckpointError: it cannot be written; on all processes alike.
        """

    @abstractmethod
    def state_of(self, step: int) -> RunState:
        """What the checkpoint of `step` says of itself, as this process alone reads it.

        Raises:
            CheckpointError: it cannot be read.
        """

    @abstractmethod
    def set_aside(self, steps: Sequence[int], why: str = "damaged") -> None:
        """No longer count these: they were passed over, and the run will come there anew. `why`, in one word.

        Raises:
            CheckpointError: it cannot be written.
        """

    @abstractmethod
    def newest_state(self) -> RunState | None:
        """What its newest checkpoint says of itself, as far as this process alone can read it. Hashes nothing."""

    @abstractmethod
    def where(self, step: int) -> str:
        """How the user names the checkpoint of `step`."""

    def probe(self) -> None:  # noqa: B027 - a folder is tried by those who lock it
        """See whether it can be written, before a run begins.

        Raises:
            CheckpointError: it cannot.
        """

    def due(self, step: int) -> bool:
        """Whether a checkpoint of `step` belongs here by its number."""
        return bool(self.every) and step % self.every == 0


def step_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step-{step:08d}"


def refuse_other_run(state: RunState | None, run: Path, place: str) -> None:
    """See that the checkpoints in `place` are those of the run in folder `run`, as far as one can: two runs that try
    two learning rates differ in nothing else that is refused later.

    Raises:
        ConfigError: `state`, of one of them, is of a run whose folder has another name.
    """
    there = "" if state is None else Path(str(state.config.get("folder", ""))).name
    if there not in ("", run.name):
        raise ConfigError(
            f"checkpoint.tiers: {place} has checkpoints of a run in a folder {there}, and this one's is {run.name}; "
            "give each run a place of its own, or this one's folder that name if it is the same run"
        )
