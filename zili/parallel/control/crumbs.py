"""What a process is at, left where its machine's agent reads it: in a small file that both have in memory.

Writing costs no system call, and what was written last is there after the process was killed. A process without an
agent writes into memory of its own. The agent leaves one thing there too: the order of a drill (`orders`), which the
process meets when it enters the phase that the order names.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from zili.parallel.control.orders import ORDERS, Order, obey

CRUMBS = "ZILI_CRUMBS"
"""Variable in which `zili launch` names a worker's file."""
Phase = Literal["init", "join", "load", "warm_up", "data", "step", "copy", "save", "evaluate", "end"]
"""Imports, choices and the making of the model; meeting the others; weights and state; the first step; waiting for a
batch; a step; copying the state into memory that outlives the process; writing a checkpoint, as far as the step waits
for it; held-out text; the end."""
PHASES: tuple[Phase, ...] = get_args(Phase)
_FIELDS = (
    *("changes", "phase", "since", "step", "micro_batch", "changed", "begun_after"),
    *("ordered", "ordered_in", "obeyed_in"),
)
_SECONDS = len(_FIELDS)
_LONGEST = _SECONDS + len(PHASES)
_TIMES = _LONGEST + len(PHASES)
_SIZE = 8 * (_TIMES + len(PHASES))


class Crumbs:
    """One process's, as it or its agent sees them. Times are the machine's `time.monotonic`."""

    def __init__(self, path: Path | None = None) -> None:
        """`path`: a file that is made if it is not there; None: memory of this process alone."""
        if path is None:
            self._memory = mmap.mmap(-1, _SIZE)
        else:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                if os.fstat(handle).st_size < _SIZE:
                    os.write(handle, bytes(_SIZE))  # into a hole on a full disk one could not write: SIGBUS
                self._memory = mmap.mmap(handle, _SIZE)
            finally:
                os.close(handle)
        self._cells: Any = memoryview(self._memory).cast("d")  # of float, which the stub does not know
        if not self._cells[2]:
            self._cells[2] = self._cells[5] = time.monotonic()

    def enter(self, phase: Phase) -> None:
        """From now on this process is in `phase`."""
        cells, now = self._cells, time.monotonic()
        before, spent = int(cells[1]), now - cells[2]
        cells[_SECONDS + before] += spent
        cells[_LONGEST + before] = max(cells[_LONGEST + before], spent)
        cells[_TIMES + before] += 1
        cells[1], cells[2] = PHASES.index(phase), now
        self._change()

    @contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """`phase` for a while, then the one before again."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def done(self, step: int) -> None:
        """So many steps of the run are done."""
        self._cells[3] = step
        if not self._cells[6]:
            self._cells[6] = step  # one more than were done before it
        self._change()

    def resumed(self, step: int) -> None:
        """So many steps of the run were done by processes before this one, and it goes on from there."""
        self._cells[3], self._cells[6] = step, step + 1
        self._change()

    def at_micro_batch(self, number: int) -> None:
        """The step at hand has come to this micro-batch."""
        self._cells[4] = number
        self._change()

    def _change(self) -> None:
        self._cells[5] = time.monotonic()
        self._cells[0] += 1
        if self._cells[7] and (order := self.ordered) not in (None, "nan") and self.takes(order):
            obey(order)

    def order(self, what: Order, phase: Phase) -> None:
        """Have the process do `what` when it is in `phase` next."""
        self._cells[8], self._cells[9] = PHASES.index(phase), 0
        self._cells[7] = ORDERS.index(what) + 1

    def withdraw(self) -> None:
        """Take an order back that was not met."""
        self._cells[7] = 0

    def takes(self, what: Order) -> bool:
        """Whether this process was ordered to do `what` in the phase that it is in; it is asked once."""
        cells = self._cells
        if not cells[7] or self.ordered != what or cells[8] != cells[1]:
            return False
        cells[7], cells[9] = 0, cells[1] + 1
        return True

    @property
    def ordered(self) -> Order | None:
        """What the process was ordered to do and has not met."""
        return ORDERS[int(self._cells[7]) - 1] if self._cells[7] else None

    @property
    def obeyed_in(self) -> Phase | None:
        """The phase in which it did what was ordered; None: it has not."""
        return PHASES[int(self._cells[9]) - 1] if self._cells[9] else None

    @property
    def changes(self) -> int:
        """Rises whenever the process gets further."""
        return int(self._cells[0])

    @property
    def phase(self) -> Phase:
        return PHASES[int(self._cells[1])]

    @property
    def since(self) -> float:
        """When the phase began."""
        return float(self._cells[2])

    @property
    def step(self) -> int:
        """Steps of the run that are done."""
        return int(self._cells[3])

    @property
    def micro_batch(self) -> int:
        return int(self._cells[4])

    @property
    def stood(self) -> float:
        """Seconds since the last change."""
        return time.monotonic() - self._cells[5]

    @property
    def begun_after(self) -> int | None:
        """Steps of the run that this process found done; None: it has not come so far."""
        return int(self._cells[6]) - 1 if self._cells[6] else None

    def seconds(self) -> Mapping[Phase, float]:
        """Seconds in each phase, the present one up to now."""
        found: dict[Phase, float] = dict(zip(PHASES, self._cells[_SECONDS:_LONGEST].tolist(), strict=True))
        found[self.phase] += time.monotonic() - self.since
        return found

    def longest(self) -> Mapping[Phase, float]:
        """Seconds of the longest stay in each phase that has ended; 0: none has."""
        return dict(zip(PHASES, self._cells[_LONGEST:_TIMES].tolist(), strict=True))

    def times(self) -> Mapping[Phase, int]:
        """How often each phase was left."""
        return dict(zip(PHASES, map(int, self._cells[_TIMES:].tolist()), strict=True))

    def close(self) -> None:
        self._cells.release()
        self._memory.close()


_own: Crumbs | None = None


def own_crumbs() -> Crumbs:
    """This process's."""
    global _own  # noqa: PLW0603 - as there is one process
    if _own is None:
        file = os.environ.get(CRUMBS)
        _own = Crumbs(Path(file) if file else None)
    return _own
