"""How a machine's agent carries out a fault of a drill, and what it reports of it.

A fault from outside is fired so: when the process's crumbs say that it is in the phase, it is stopped (SIGSTOP), and
its crumbs are read again. If it is still there, the fault is fired; else it goes on, and the next time is waited for.
So a fault never fires in another phase than it says. What a process does to itself it does when it enters the phase.
The report is a file in `RUN/supervision/drill`: the root that passed on the order may be what is killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from zili.durable import write_whole
from zili.errors import ZiliError
from zili.parallel.control.crumbs import Crumbs
from zili.parallel.control.orders import ORDERS
from zili.supervision.damage import damage
from zili.supervision.faults import AT_A_BEGINNING, DAMAGES, Fault
from zili.supervision.file_thread import FileThread
from zili.supervision.folder import SupervisionFolder
from zili.supervision.places import Places
from zili.supervision.processes import LocalProcesses
from zili.supervision.watch import state_of_process

REPORTS = "drill"
"""Folder of the reports in the supervision's."""
_POLL = 0.001
"""Seconds between two looks at crumbs: a copy into memory takes a few of them."""
_STOPS = 0.5
"""Seconds in which a process is stopped."""
_PAUSE = 1.0


class Firing:
    """One fault on this machine."""

    def __init__(
        self,
        folder: SupervisionFolder,
        places: Places,
        processes: Callable[[], LocalProcesses],
        tell_root: Callable[..., None],
        files: FileThread,
    ) -> None:
        """`processes`: those that the machine has at the moment. `tell_root` says something to the root."""
        self._folder, self._places, self._files = folder, places, files
        self._processes, self._tell_root = processes, tell_root
        self._rank = 0
        self._report: dict[str, Any] = {"fired": False}

    async def fire(self, order: dict[str, Any]) -> None:
        """Carry out a fault and report it. It raises nothing: the machine goes on."""
        drill, seconds = str(order.pop("drill")), float(order.pop("seconds"))
        fault = Fault(**order)
        self._file = self._folder.path / REPORTS / f"{drill}-{fault.number}.json"
        try:
            async with asyncio.timeout(seconds):
                await self._carry_out(fault)
        except TimeoutError:
            self._report["why"] = f"no process was in {fault.phase} within {seconds:.0f} s"
        except (OSError, ZiliError, LookupError) as error:
            self._report["why"] = str(error)
        await self._tell()

    async def _tell(self) -> None:
        text = json.dumps(self._report)
        with suppress(OSError):
            await self._files.do(lambda: write_whole(self._file, text))

    def _fired(self, phase: str, step: int) -> None:
        self._report |= {"fired": True, "phase": phase, "step": step, "rank": self._rank, "time": time.time()}

    async def _carry_out(self, fault: Fault) -> None:
        self._rank = await self._rank_of(fault.process)
        if fault.kind in DAMAGES:
            self._report["file"] = await self._files.do(lambda: damage(self._folder.run, fault.kind, fault.draw))
        if fault.phase in AT_A_BEGINNING:
            await self._begin_a_life()
        if fault.kind in ORDERS:
            await self._order(fault)
        else:
            await self._fire_from_outside(fault)

    async def _rank_of(self, process: int) -> int:
        """The rank of a process of this machine, once its processes are there."""
        while not (ranks := sorted(self._processes().alive)):
            await asyncio.sleep(_POLL)
        return ranks[process % len(ranks)]

    async def _begin_a_life(self) -> None:
        """Kill the process, and wait for the one that takes its place."""
        before = await self._pid()
        self._processes().signal(signal.SIGKILL, self._rank)
        while await self._pid() == before:
            await asyncio.sleep(_POLL)

    async def _pid(self) -> int:
        while not (pid := self._processes().alive.get(self._rank, 0)):
            await asyncio.sleep(_POLL)
        return pid

    def _crumbs(self) -> Crumbs:
        """The process's, of this firing alone: they are there after its end."""
        return Crumbs(self._places.crumbs(self._rank))

    # ---------------------------------------------------------------- by the process itself

    async def _order(self, fault: Fault) -> None:
        pid = await self._pid()
        crumbs = self._crumbs()
        try:
            crumbs.order(next(one for one in ORDERS if one == fault.kind), fault.phase)
            while crumbs.obeyed_in is None:
                if self._processes().alive.get(self._rank) != pid:
                    raise LookupError(f"process {self._rank} ended before it was in {fault.phase}")
                await asyncio.sleep(_POLL)
            self._fired(crumbs.obeyed_in, crumbs.step)
        finally:
            crumbs.withdraw()
            crumbs.close()

    # ---------------------------------------------------------------- from outside

    async def _fire_from_outside(self, fault: Fault) -> None:
        pid = await self._pid()
        crumbs = self._crumbs()
        try:
            while not await self._held_in(fault.phase, crumbs, pid):
                if self._processes().alive.get(self._rank) != pid:
                    raise LookupError(f"process {self._rank} ended before it was in {fault.phase}")
                await asyncio.sleep(_POLL)
            self._fired(crumbs.phase, crumbs.step)
            await self._strike(fault.kind)
        except asyncio.CancelledError:  # the time is over: the process goes on
            self._send(signal.SIGCONT)
            raise
        finally:
            crumbs.close()

    async def _held_in(self, phase: str, crumbs: Crumbs, pid: int) -> bool:
        """Whether the process is in `phase`; then it is stopped there."""
        if crumbs.phase != phase:
            return False
        self._send(signal.SIGSTOP)
        end = time.monotonic() + _STOPS
        while state_of_process(pid) not in ("T", "") and time.monotonic() < end:
            await asyncio.sleep(_POLL)
        if crumbs.phase == phase and state_of_process(pid) == "T":
            return True
        self._send(signal.SIGCONT)
        return False

    async def _strike(self, kind: str) -> None:
        """Break something while the process is stopped."""
        if kind == "agent":
            await self._tell()
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "hang":
            return
        elif kind == "nursery":
            self._processes().kill_nursery()
            return
        elif kind == "root":
            self._tell_root(say="die")  # it may be on any machine, and outlives the agent that began it
        elif kind == "pause":
            await asyncio.sleep(_PAUSE)
        else:
            self._send(signal.SIGTERM if kind == "term" else signal.SIGKILL)
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        self._processes().signal(number, self._rank, alone=True)


def report_file(run: Path, drill: str, number: int) -> Path:
    """Where an agent reports a fault."""
    return run / "supervision" / REPORTS / f"{drill}-{number}.json"
