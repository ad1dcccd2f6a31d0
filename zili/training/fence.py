"""Keeps a process that was taken for dead, and wakes, from the checkpoints of those that replaced it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from zili.errors import CheckpointError
from zili.parallel.control.member import GENERATION, GENERATION_FILE


def generation_fence(run: Path) -> Callable[[], bool]:
    """The fence of a run that `zili launch` started: whether no later life is written into the run's folder. True
    where nobody gave this process the number of its life.

    The fence raises CheckpointError where that cannot be read.
    """

    def newest() -> bool:
        own = os.environ.get(GENERATION)
        if own is None:
            return True
        file = run / GENERATION_FILE
        try:
            return int(own) >= int(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read, so nothing of the run is changed: {error}") from error

    return newest


def refuse_late_life(fence: Callable[[], bool], place: object) -> None:
    """Before anything in `place` changes that others see.

    Raises:
        CheckpointError: `fence` says that this life is no longer the newest.
    """
    if not fence():
        raise CheckpointError(
            f"a newer life of this run writes in {place}: this process was taken for dead and replaced"
        )


def of_this_life() -> str:
    """The end of a name that no other life uses, which may be asleep and write on when it wakes."""
    own = os.environ.get(GENERATION)
    return "" if own is None else f"-life-{own}"
