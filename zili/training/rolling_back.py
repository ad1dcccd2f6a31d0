"""What a run does about a step that was judged bad: leave out its update, or go back to before it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from zili.errors import TrainingError
from zili.plurals import counted
from zili.training.fence import generation_fence
from zili.training.left_out import (
    DECISIONS_FILE,
    LeftOut,
    leave_out,
    read_decisions,
    refuse_too_many,
    repeated,
    together,
    write_decisions,
)
from zili.training.tiers.choosing import steps_offered

if TYPE_CHECKING:
    from zili.training.trainer import Trainer


class RolledBack(Exception):
    """A step was bad, and the recipe says to go back: all processes raise it at the same place."""

    def __init__(self, decision: LeftOut) -> None:
        super().__init__(str(decision))
        self.decision = decision


def known_decisions(trainer: Trainer) -> tuple[LeftOut, ...]:
    """What the recipe and the run's folder say is left out; a checkpoint may know of more. The first process reads it.

    Raises:
        ZiliError: they cannot be read.
    """
    config = trainer.config
    known = together(repeated(config.watch), read_decisions(config.folder / DECISIONS_FILE))
    if new := set(known).difference(trainer.watch.decisions):
        trainer.note(f"{counted(len(new), 'decision')} on batches to leave out, taken again")
    return known


def act(trainer: Trainer, *, everything: bool = False) -> None:
    """Do what is to be done about bad steps, as far as they can be read without waiting, or about all of them.

    Raises:
        TrainingError: the recipe says to stop, or too many batches were left out.
        RolledBack: the run is to go back.
    """
    watch = trainer.watch
    while (found := watch.look(None if everything else trainer.step)) is not None:
        refuse_too_many(found, watch.decisions, watch.config)
        if found.action == "roll_back":
            raise RolledBack(found)
        _decide(trainer, found)


def go_back(trainer: Trainer, bad: LeftOut) -> None:
    """To the newest sound checkpoint from before a bad step, whose batch is left out from now on.

    Raises:
        TrainingError: there is none.
    """
    trainer.saver.rest()
    saved = steps_offered(trainer.saver.tiers)
    if not any(step <= bad.step for step in saved):
        error = TrainingError(f"step {bad.step + 1}: {bad.why}; there is no checkpoint before it to go back to")
        error.agreed = True  # the figures and the list are the same for all
        raise error
    _decide(trainer, leave_out(bad.step, bad.why, trainer.watch.decisions, trainer.config.watch, saved))
    trainer.resume(from_disk=True)
    for callback in trainer.callbacks:
        callback.on_roll_back(trainer)


def _decide(trainer: Trainer, decision: LeftOut) -> None:
    """Write down, and say, what is left out."""
    trainer.watch.decide(together(trainer.watch.decisions, [decision]))
    trainer.world.from_first(lambda: _write_down(trainer))
    trainer.note(str(decision))
    for callback in trainer.callbacks:
        callback.on_event("decision", asdict(decision))


def _write_down(trainer: Trainer) -> None:
    folder = trainer.config.folder
    if generation_fence(folder)():  # a life that was replaced and wakes late decides nothing
        write_decisions(folder, trainer.watch.decisions)
