"""Why a run hangs: which process did not arrive where the others wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zili.supervision.reports import Asked, Report, report_of
from zili.supervision.rules import Ending
from zili.supervision.stacks import Frame

ASKING = 4.0
"""Seconds in which machines report on their processes: those who do not answer take longer than the others' stacks."""
_MESH = "mesh_"
_KERNEL = "D"
_STOPPED, _HELD = "T", "t"


@dataclass(frozen=True)
class Hang:
    """What the reports of a run that hangs come to."""

    rank: int
    machine: str
    why: str
    """What tells this process from the others."""
    report: Report
    held: bool = False
    """Whether a debugger holds it: then it is a person's, and goes on when they say so."""

    @classmethod
    def of_late(cls, machine: str, late: Mapping[str, Any]) -> Hang:
        """What is known where nobody reports: `late`, as a table, was the first to be late."""
        known = {name: late[name] for name in ("rank", "phase", "step", "quiet")}
        report = Report(**known, machine=machine, state="", micro_batch=0, changes=0)
        return cls(report.rank, machine, "it was the first to be late, and no machine told more", report)

    @property
    def ending(self) -> Ending:
        """What ended the run, where its own end is not known."""
        return Ending(self.rank, self.machine, step=self.report.step or None)

    def __str__(self) -> str:
        report = self.report
        at = f"at {Frame(*report.frame)}" if report.frame else "which wrote no stacks"
        where = f"in {report.phase} after step {report.step}"
        if report.micro_batch:
            where += f", micro-batch {report.micro_batch}"
        last = _last_collective(report)
        last = f"; last collective: {last}" if last else ""
        return f"process {self.rank} on {self.machine} hangs {where}, {at}: {self.why}{last}"


def culprit(reports: Sequence[Report]) -> Hang:
    """The process that the others wait for, and what tells so.

    In this order: one that is held by a debugger or stopped; one that a signal does not reach; among those whose group
    waits for them, or else among all, one that does not wait for others; one that asked its group for less than the
    others did, or for something else; the one that got least far.

    Raises:
        ValueError: there are no reports.
    """
    for state, why in ((_HELD, "a debugger holds it"), (_STOPPED, "it is stopped (SIGSTOP)")):
        if named := _first(one for one in reports if one.state == state):
            return Hang(named.rank, named.machine, why, named, held=state == _HELD)
    if any(one.frame for one in reports) and (named := _first(one for one in reports if one.frame is None)):
        why = "it waits in the kernel, where no signal reaches it" if named.state == _KERNEL else "it answers no signal"
        return Hang(named.rank, named.machine, why, named)
    behind = _behind(reports) or _other_than_most(reports)
    busy = [one for one in reports if one.frame is not None and not one.waits]
    both = [one for one in busy if one.rank in behind]
    if len(both or busy) == 1:
        (named,) = both or busy
        why = "the others wait for processes, it does not" if len(busy) == 1 else behind[named.rank]
    else:
        among = both or [one for one in reports if one.rank in behind] or busy or reports
        named = min(among, key=lambda one: (one.changes, one.rank))
        why = behind.get(named.rank, "none got less far")
    return Hang(named.rank, named.machine, behind.get(named.rank, why), named)


def _first(reports: Iterable[Report]) -> Report | None:
    return min(reports, key=lambda one: one.rank, default=None)


def _behind(reports: Sequence[Report]) -> dict[int, str]:
    """Processes that asked a group for less than another one of it did, and why they are named.

    One of them may itself wait for another: in one group it is behind since in another group it is not. The last of
    such a chain is meant.
    """
    behind: dict[int, str] = {}
    ahead: set[int] = set()
    for name in _names(reports):
        asked = {one.rank: one.groups[name] for one in reports if name in one.groups}
        most = max(group.asked for group in asked.values())
        late = {rank for rank, group in asked.items() if group.asked < most}
        for rank in late:
            group = asked[rank]
            behind[rank] = f"{_described(group.description)} has been asked {group.asked} times by it, {most} by others"
        if late:
            ahead |= asked.keys() - late
    ends = {rank: why for rank, why in behind.items() if rank not in ahead}
    return ends or behind


def _other_than_most(reports: Sequence[Report]) -> dict[int, str]:
    """Processes whose collective of some number is another one than that of most processes of the group."""
    for name in _names(reports):
        by_number: dict[int, dict[int, str]] = {}
        for one in reports:
            for asked in one.groups[name].last if name in one.groups else ():
                by_number.setdefault(asked.number, {})[one.rank] = _what(asked)
        for number, operations in sorted(by_number.items()):
            (usual, count), *_ = Counter(operations.values()).most_common()
            if count < len(operations):
                kind = _described(next(one.groups[name].description for one in reports if name in one.groups))
                return {
                    rank: f"its collective {number} of {kind} is {operation}, that of others {usual}"
                    for rank, operation in operations.items()
                    if operation != usual
                }
    return {}


def _what(asked: Asked) -> str:
    """What is the same on all processes of a group."""
    alike = any(word in asked.operation for word in ("all_reduce", "broadcast", "barrier"))
    return f"{asked.operation} {asked.sizes}" if alike else asked.operation


def _names(reports: Sequence[Report]) -> list[str]:
    return sorted({name for one in reports for name in one.groups})


def _described(group: str) -> str:
    """What a group's description says to a person."""
    if group.startswith(_MESH):
        return f"mesh dimension {group.removeprefix(_MESH)}"
    if group in ("", "undefined"):
        return "a group without a name"
    return "the group of all processes" if group == "default_pg" else f"group {group}"


def _last_collective(report: Report) -> str:
    newest = next((group for group in reversed(report.groups.values()) if group.last), None)
    if newest is None:
        return ""
    return f"{newest.last[-1].operation} number {newest.asked} of {_described(newest.description)}"


class Inquiry:
    """The root's: all machines are asked once; it says who is to blame when they have answered or are late."""

    def __init__(self, machines: Collection[str], now: float, found: Callable[[Hang], None], suspect: Hang) -> None:
        """`suspect`: who is named where no process is reported."""
        self._suspect = suspect
        self._missing = set(machines)
        self._end = now + ASKING
        self._found = found
        self._reports: list[Report] = []
        self.over = False

    def hear(self, machine: str, tables: list[dict[str, Any]], now: float) -> None:
        """A machine's reports on its processes."""
        self._missing.discard(machine)
        self._reports += [report_of(table) for table in tables]
        self.look(now)

    def look(self, now: float) -> None:
        """Conclude, if everybody has answered or it is time. A machine that says nothing at all is lost by itself."""
        if not self.over and (not self._missing or now > self._end):
            self.over = True
            self._found(culprit(self._reports) if self._reports else self._suspect)
