"""How the processes of one life ended, as the root hears of it, and what that was."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from zili.errors import ZiliError
from zili.supervision.hangs import Hang
from zili.supervision.ledger import mean_of, seen, waited
from zili.supervision.members import as_ending
from zili.supervision.rules import rule_for
from zili.supervision.verdicts import Ending, Failure, cause_of, failure_of

_SAY_WHY = {kind.exit_code for kind in ZiliError.__subclasses__()}
"""Exit codes that say what it was."""


class Endings:
    """Those of the life of some machines."""

    def __init__(self, machines: Sequence[str] = (), processes: int = 0) -> None:
        """`machines`: in the order of their ranks. `processes`: of each."""
        self._machines = machines
        self._processes = processes
        self._told: dict[int, dict[str, Any]] = {}
        self._done: set[int] = set()
        self.lost: list[str] = []
        """Machines that were gone before it ended."""
        self.hang: Hang | None = None
        """Who got no further, where that ended it."""
        self.doubt: float | None = None
        """Since when a process has ended that perhaps only lost a peer (`time.monotonic`)."""

    def hear(self, ending: dict[str, Any]) -> bool:
        """A process has ended by itself; whether it met a cause, and not perhaps only another one's end."""
        now = time.monotonic()
        self._told.setdefault(ending["rank"], {**ending, "heard": now})
        if ending["code"] == 0:
            self._done.add(ending["rank"])
            if ending["phase"] != "end":  # others wait for it, unless all of them end so
                self.doubt = self.doubt or now
            return False
        if rule_for(as_ending(ending)).consequence:
            self.doubt = self.doubt or now  # who met the cause may be slower to say so
            return False
        return True

    def hear_stopped(self, endings: Iterable[dict[str, Any]]) -> None:
        """All processes of a machine have ended, as they were told to."""
        for ending in endings:
            self._told.setdefault(ending["rank"], ending)

    @property
    def all_done(self) -> bool:
        """Whether every process of the life has come to its end."""
        return len(self._done) == len(self._machines) * self._processes

    def failure(self, saved: int | None) -> Failure | None:
        """What ended the life; None: it was asked to end. `saved`: the last step that the run is known to have done,
        for processes that had not come to one."""
        own = [as_ending(one, saved) for one in self._told.values() if one["code"]]
        met = [one for one in own if not one.stopped]
        if self.hang is not None:
            hung = next((one for one in own if one.rank == self.hang.rank), None)
            return failure_of(hung or self.hang.ending, seen="hang")
        if self.lost:
            rank = self._machines.index(self.lost[0]) * self._processes
            steps = max((one.step or 0 for one in own), default=saved or 0)
            return failure_of(Ending(rank, self.lost[0], step=steps or None), seen="machine-lost")
        cause = cause_of(met) if met else None
        early = self._early()
        if early and (cause is None or rule_for(cause).consequence):
            return failure_of(as_ending(early, saved), seen="ended-early")
        return None if cause is None else failure_of(cause)

    def _early(self) -> dict[str, Any] | None:
        """A process that ended as if all was done, and had not come to the end."""
        found = [one for one in self._told.values() if one["code"] == 0 and one["phase"] != "end"]
        return min(found, key=lambda one: one["rank"], default=None)

    @property
    def step(self) -> int:
        """The last step that a process is known to have done."""
        return max((one["step"] or 0 for one in self._told.values()), default=0)

    def code_that_says_why(self, rank: int) -> int | None:
        """Exit code of process `rank`, where that says what it was."""
        code = int(self._told.get(rank, {}).get("code", 0))
        return code if code in _SAY_WHY else None

    def cause(self) -> str:
        """What was seen of it, in words. From here on its end is known."""
        waited(self._told.values())
        return seen(self._told.values(), self.lost)

    def facts(self) -> dict[str, Any]:
        """What the ledger keeps: what its processes were at, and what was seen."""
        cause = self.cause()
        return {"at": mean_of(list(self._told.values())), "cause": cause}
