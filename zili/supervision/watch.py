"""Which processes of a machine get no further.

What is long is derived from the run's own times, so no recipe says it. A process counts as late when it leaves no new
crumb for longer than `ProgressWatch.limit`, which grows with the longest stay in that phase that any process of the
machine has ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from zili.parallel.control.crumbs import Crumbs, Phase

PATIENCE = 60.0
"""Seconds without a new crumb that are never a hang, whatever was measured: file systems and networks that come back by
themselves do so in tens of seconds (NCCL gives a link 20 s, object stores are asked again for up to a minute)."""
UNMEASURED = 30
"""Times the patience, where nothing was measured yet: half an hour, as a collective has."""
_FACTOR = 10
"""A machine that is loaded tenfold for a while is slow and not stuck."""
_RECOMPILED = 2
"""A later step may compile again what the first one did, under load."""
_REPEATED: frozenset[Phase] = frozenset({"data", "step", "copy", "save", "evaluate"})
"""What comes again and again: measured in earlier lives of the run too. What comes once in a life takes as long as what
it finds: the first life reads no checkpoint."""
_LOOK = 2.0
"""Seconds between two looks that count at most. An agent that was itself stopped, starved or asleep with its whole
machine has seen nothing of what its processes did meanwhile."""


class Late(NamedTuple):
    """A process that gets no further."""

    rank: int
    phase: Phase
    step: int
    quiet: float
    """Seconds without a new crumb."""
    limit: float
    """Seconds that were allowed."""


class ProgressWatch:
    """One machine's processes, by their crumbs. It is asked about twice a second."""

    def __init__(self, patience: float = PATIENCE) -> None:
        """`patience`: seconds without a new crumb that are never a hang."""
        self._patience = patience
        self._before: dict[Phase, float] = {}
        """Longest stays of earlier lives."""
        self._world = 0
        self._quiet: dict[int, float] = {}
        self._changes: dict[int, int] = {}
        self._looked: float | None = None

    def begin(self, world: int) -> None:
        """A life of `world` processes begins. What another number of them needed says little."""
        if world != self._world:
            self._before = {}
        self._world, self._quiet, self._changes, self._looked = world, {}, {}, None

    def late(self, crumbs: Mapping[int, Crumbs], now: float, held: bool = False) -> list[Late]:
        """Those that get no further at `now` (`time.monotonic`), by rank.

        `held`: a debugger holds one of them; the time in which it does is nobody's fault.
        """
        passed = 0.0 if self._looked is None or held else min(now - self._looked, _LOOK)
        self._looked = now
        longest = self._longest(crumbs)
        found = []
        for rank, one in crumbs.items():
            if self._changes.get(rank) != one.changes:
                self._changes[rank], self._quiet[rank] = one.changes, 0.0
            else:
                self._quiet[rank] += passed
            quiet, limit = self._quiet[rank], self.limit(one.phase, longest)
            if quiet > limit:
                found.append(Late(rank, one.phase, one.step, quiet, limit))
        return found

    def forgive(self) -> None:
        """Count anew from here on."""
        self._quiet = dict.fromkeys(self._quiet, 0.0)

    def quiet(self, rank: int) -> float:
        """Seconds for which process `rank` has left no new crumb."""
        return self._quiet.get(rank, 0.0)

    def limit(self, phase: Phase, longest: Mapping[Phase, float]) -> float:
        """Seconds without a new crumb that a process may stay in `phase`."""
        unmeasured = UNMEASURED * self._patience
        measured = longest.get(phase, 0.0)
        if not measured:
            return unmeasured
        allowed = _FACTOR * measured
        if phase == "step":
            allowed = max(allowed, _RECOMPILED * longest.get("warm_up", 0.0))
        # One slow stay must not let all later ones hang for hours.
        return min(self._patience + allowed, max(unmeasured, 2 * measured))

    def _longest(self, crumbs: Mapping[int, Crumbs]) -> Mapping[Phase, float]:
        found = dict(self._before)
        for one in crumbs.values():
            for phase, seconds in one.longest().items():
                found[phase] = max(found.get(phase, 0.0), seconds)
        self._before = {phase: seconds for phase, seconds in found.items() if phase in _REPEATED}
        return found


def state_of_process(pid: int) -> str:
    """The letter that Linux has for what a process is doing: `R` and `S` are usual, `T` is stopped, `t` is held by a
    debugger, `D` waits in the kernel, where no signal reaches it; empty where that cannot be known."""
    with suppress(OSError, IndexError):
        # The name before it may have spaces and brackets.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2][0]
    return ""
