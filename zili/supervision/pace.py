"""How fast each process of a machine gets on, as its agent sees it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from zili.parallel.control.crumbs import Crumbs
from zili.supervision.ledger import mean_of, told

_STEPS = 60
"""Looks, half a second apart, over which a step's seconds are taken, where steps are shorter."""
_LEAST = 3
"""Looks at least, and so two steps: longer ones are taken over more than half a minute."""
_TOLD = 2
"""Slowest processes of each machine; the root, which hears all machines twice a second, keeps the slowest of all."""


class Pace:
    """One machine's processes."""

    def __init__(self, machine: str) -> None:
        self.machine = machine
        self.processes: Mapping[int, Mapping[str, Any]] = {}
        """By rank what each is at (`told`) with `step_seconds`, as of the last look. Replaced and never changed: other
        threads may read it."""
        self._marks: dict[int, deque[tuple[int, float, float]]] = {}
        """By rank, after each step that was seen: steps done, seconds of steps, of them waiting for data."""

    def look(self, crumbs: Mapping[int, Crumbs]) -> dict[str, Any] | None:
        """What the processes are at together, with the slowest of them; None: there are none. Asked twice a second."""
        found = {rank: told(one) for rank, one in crumbs.items()}
        for rank in self._marks.keys() - found.keys():
            del self._marks[rank]
        slowest: list[dict[str, Any]] = []
        for rank, at in found.items():
            mean = self._mean(rank, at)
            if mean is not None:
                at["step_seconds"], data = mean
                one = {"rank": rank, "machine": self.machine, "step_seconds": round(mean[0], 4)}
                slowest.append({**one, "data_seconds": round(data, 4)})
        self.processes = found
        together = mean_of(list(found.values()))
        if together is not None and slowest:
            together["slowest"] = sorted(slowest, key=lambda one: -one["step_seconds"])[:_TOLD]
        return together

    def _mean(self, rank: int, at: Mapping[str, Any]) -> tuple[float, float] | None:
        """Seconds of a step, and of its wait for data."""
        step, data = at["step"] or 0, at["seconds"]["data"]
        spent = at["seconds"]["step"] + data
        marks = self._marks.setdefault(rank, deque(maxlen=_STEPS))
        if marks and (step < marks[-1][0] or spent < marks[-1][1]):  # another life's process
            marks.clear()
        if step and (not marks or step > marks[-1][0]):
            marks.append((step, spent, data))
        if len(marks) < _LEAST:
            return None
        (before, since, waited), (after, until, waits) = marks[0], marks[-1]
        return (until - since) / (after - before), (waits - waited) / (after - before)
