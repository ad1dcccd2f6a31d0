"""What an agent finds out about its processes when a run hangs: crumbs, stacks, and what they asked of collectives."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from zili.parallel.control.crumbs import Crumbs
from zili.parallel.control.recorder import socket_name
from zili.supervision.stacks import place_in
from zili.supervision.watch import state_of_process

_STACKS = 1.5
"""Seconds for a process to write its stacks. A signal that is not answered by then waits in the kernel."""
_ANSWER = 1.0
"""Seconds for its recorder to answer, which takes a millisecond."""
_LARGEST = 16 << 20
"""Bytes of an answer that are read: torch keeps 2,000 collectives, half a kilobyte each."""
_LAST = 16
"""Newest collectives of a group that are compared."""
_BETWEEN = 0.02
_QUESTION = b"POST /handler/fr_trace_json HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Asked(NamedTuple):
    """A collective, as a process asked for it."""

    number: int
    """Of its group, in the order in which the process asked."""
    operation: str
    sizes: str


@dataclass(frozen=True)
class GroupRecord:
    """What a process asked of one group."""

    description: str
    """`mesh_NAME` is the mesh's dimension NAME; `default_pg` are all processes."""
    asked: int
    """Number of the last collective."""
    last: list[Asked] = field(default_factory=list)
    """The newest ones, oldest first."""


@dataclass(frozen=True)
class Report:
    """One process of a run that hangs."""

    rank: int
    machine: str
    state: str
    """`state_of_process`."""
    phase: str
    step: int
    micro_batch: int
    changes: int
    """Crumbs that it has left: processes of a run leave the same ones, in the same order."""
    quiet: float
    """Seconds since the last one."""
    frame: tuple[str, int, str] | None = None
    """File, line and function that it is at; None: it wrote no stacks."""
    waits: bool = False
    """Whether it only waits for other processes there."""
    groups: dict[str, GroupRecord] = field(default_factory=dict)

    def as_table(self) -> dict[str, Any]:
        return asdict(self)


def report_of(table: dict[str, Any]) -> Report:
    """The reverse of `Report.as_table`, through JSON.

    Raises:
        KeyError, TypeError: it is none.
    """
    groups = {
        name: GroupRecord(one["description"], one["asked"], [Asked(*asked) for asked in one["last"]])
        for name, one in table["groups"].items()
    }
    frame = table["frame"]
    return Report(**{**table, "groups": groups, "frame": frame and tuple(frame)})


class At(NamedTuple):
    """What a process's crumbs say."""

    phase: str
    step: int
    micro_batch: int
    changes: int
    quiet: float
    """Seconds without a new one."""

    def __str__(self) -> str:
        where = f"{self.phase} after step {self.step}, micro-batch {self.micro_batch}"
        return f"{where}, {self.changes} crumbs, none for {self.quiet:.1f} s"


def at(crumbs: Crumbs, quiet: float) -> At:
    """What these crumbs say now: they are gone when the process is."""
    return At(crumbs.phase, crumbs.step, crumbs.micro_batch, crumbs.changes, quiet)


@dataclass(frozen=True)
class Subject:
    """A process to ask, and where it answers."""

    rank: int
    machine: str
    pid: int
    at: At
    stacks: Path
    recorder: Path
    keep: Callable[[str], None]
    """Keeps its stacks for people."""
    send: Callable[[signal.Signals], None]
    """Sends it a signal, and to nothing that it began."""


async def ask(subject: Subject) -> Report:
    """Ask one process. A stopped one is let go on for this: its stacks are written as soon as it wakes."""
    state = state_of_process(subject.pid)
    # First what it asked for: a signal ends some calls that hang.
    groups = {} if state == "T" else await _groups(subject.recorder)
    text = "" if state == "t" else await stacks_of(subject.stacks, subject.send, wake=state == "T")
    said = f"process {subject.rank} on {subject.machine}, {subject.at}, state {state or '?'}"
    subject.keep(f"{said}\n\n{text or 'It wrote no stacks.'}\n\n{_listed(groups)}")
    place = place_in(text)
    frame, waits = (None, False) if place is None else (place.frame, place.waits)
    return Report(subject.rank, subject.machine, state, *subject.at, frame, waits, groups)


def _listed(groups: dict[str, GroupRecord]) -> str:
    return "".join(
        f"group {name} ({group.description})\n"
        + "".join(f"  {one.number} {one.operation} {one.sizes}\n" for one in group.last)
        for name, group in groups.items()
    )


async def stacks_of(file: Path, send: Callable[[signal.Signals], None], *, wake: bool = False) -> str:
    """What a process, to which `send` sends signals, writes into `file` at SIGUSR1; empty: nothing."""
    before = _size(file)
    send(signal.SIGUSR1)
    if wake:
        send(signal.SIGCONT)
    end = asyncio.get_running_loop().time() + _STACKS
    seen = before
    while asyncio.get_running_loop().time() < end:
        await asyncio.sleep(_BETWEEN)
        size = _size(file)
        if size > before and size == seen:
            break
        seen = size
    with suppress(OSError), file.open("rb") as opened:
        opened.seek(before)
        return opened.read(_LARGEST).decode("utf-8", "replace")
    return ""


def _size(file: Path) -> int:
    with suppress(OSError):
        return file.stat().st_size
    return 0


async def _groups(recorder: Path) -> dict[str, GroupRecord]:
    """By name, the groups of which a process asked something; none where it does not answer."""
    try:
        raw = await asyncio.wait_for(_answer(recorder), _ANSWER)
        return groups_in(json.loads(raw.partition(b"\r\n\r\n")[2]))
    except (OSError, ValueError, KeyError, TypeError, TimeoutError, AttributeError):
        return {}


async def _answer(recorder: Path) -> bytes:
    with socket_name(recorder) as name:
        reader, writer = await asyncio.open_unix_connection(name)
    try:
        writer.write(_QUESTION)
        pieces, size = [], 0
        while size < _LARGEST and (piece := await reader.read(1 << 16)):
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)
    finally:
        writer.close()


def groups_in(trace: dict[str, Any]) -> dict[str, GroupRecord]:
    """The groups of what torch's recorder says.

    Raises:
        KeyError, TypeError, ValueError: it says it in another way.
    """
    found: dict[str, tuple[str, list[Asked]]] = {}  # the one that was asked last comes last
    for entry in trace["entries"]:
        if not entry["is_p2p"]:
            name, description = entry["process_group"]
            asked = Asked(int(entry["collective_seq_id"]), str(entry["profiling_name"]), str(entry["input_sizes"]))
            _, before = found.pop(name, (description, []))
            found[name] = description, [*before[1 - _LAST :], asked]
    return {name: GroupRecord(description, asked[-1].number, asked) for name, (description, asked) in found.items()}
