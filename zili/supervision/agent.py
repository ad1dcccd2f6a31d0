"""The agent of one machine: it begins, watches and ends the machine's processes, as the root says."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zili.chips import find_backend
from zili.parallel.control.crumbs import CRUMBS, Crumbs
from zili.parallel.control.links import Link, connect
from zili.parallel.control.member import AGENT, AGENT_SECRET, GENERATION
from zili.parallel.control.node import Node, below
from zili.parallel.control.recorder import RECORDER
from zili.supervision.fitness import refuse_foreign_host, refuse_unfit
from zili.supervision.folder import SupervisionFolder
from zili.supervision.ledger import mean_of, told
from zili.supervision.nursery import STACKS
from zili.supervision.processes import LocalProcesses
from zili.supervision.reports import Subject, ask, at
from zili.supervision.root import BEAT, INTERRUPTED, PATIENCE
from zili.supervision.state import Launch, State, state_of
from zili.supervision.watch import ProgressWatch, state_of_process

_TRIES = 1.0
"""Seconds for which a root that does not answer is asked again, before this machine takes its place."""
_REACH = 2.0
"""Seconds for a connection to the root."""
_INSISTS = 2
"""Requests to end after which this process ends at once: the first lets processes save, the second kills them."""
_TAIL = 16_384
"""Bytes of a log's end that are read for why a process ended."""
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


@dataclass(frozen=True)
class ThisMachine:
    """This machine, as the others know it."""

    name: str
    host: str
    """Where the others reach it."""
    chip: str
    cold: bool
    identity: dict[str, str]
    """What has to be equal on all machines, by name."""


class Agent:
    """One machine's part of a run's supervision."""

    def __init__(
        self, run: Path, folder: SupervisionFolder, launch: Launch, machine: ThisMachine, show: Callable[[str], None]
    ) -> None:
        self._run = run
        self._folder = folder
        self._launch = launch
        self._machine = machine
        self._show = show
        self._launched = time.monotonic()
        self._own = _own_folder(folder, machine.name)
        self._state = State()
        self._term = 0
        self._link: Link | None = None
        self._generation = 0
        self._node: Node | None = None
        self._place: dict[str, Any] = {}
        self._endings: dict[int, dict[str, Any]] = {}
        self._crumbs: dict[int, Crumbs] = {}
        self._watch = ProgressWatch(launch.patience)
        self._stopping = False
        self._stop_asked: float | None = None
        """When this machine's processes were to stop."""
        self._asked = 0
        self._over = 0
        self._work: set[asyncio.Task[None]] = set()
        self._broken: BaseException | None = None
        """What an order, or what is done beside them, failed with."""
        self._root: subprocess.Popen[bytes] | None = None

    async def run(self) -> int:
        """Supervise until the run is over; returns its exit code."""
        self._processes = self._new_processes()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._interrupt)
        self._follow(self._beat())
        try:
            refuse_foreign_host(self._machine.host)
            refuse_unfit(self._run, find_backend(self._machine.chip), self._launch.processes)
            await self._processes.ready
            while (over := await self._under_a_root()) is None:
                pass
            return over
        except BaseException:
            if self._root is not None:
                self._root.kill()  # the run goes on elsewhere, if at all, and so does its root
            raise
        finally:
            for task in tuple(self._work):
                task.cancel()
            self._processes.close()
            if self._node is not None:
                await self._node.close(0)
            shutil.rmtree(self._own, ignore_errors=True)
            if self._root is not None:
                await asyncio.to_thread(self._root.wait)

    def _new_processes(self) -> LocalProcesses:
        return LocalProcesses(self._machine.chip, cold=self._machine.cold, ended=self._bury)

    # ---------------------------------------------------------------- the root

    async def _under_a_root(self) -> int | None:
        """Serve one root, to its end: None; or to the run's: its exit code."""
        self._link = await self._reach_root()
        return self._over if self._link is None else await self._serve(self._link)

    async def _reach_root(self) -> Link | None:
        """The root of the run. Where none answers, this machine begins one; of several that do, one gets the term.

        None: the run is over, as the root left word that this machine had.
        """
        lost = time.monotonic()
        while True:
            term, record = self._folder.root()
            if "over" in record and 0 < self._term <= term:
                self._over = self._end(**record["over"])
                return None
            if "address" in record and term >= self._term:
                with suppress(OSError):  # an earlier root's port may be anybody's by now
                    link = await asyncio.wait_for(connect(record["address"], self._folder.secret), _REACH)
                    self._term = term
                    self._greet(link)
                    return link
            if "address" not in record or time.monotonic() - lost > _TRIES:
                self._begin_root(term + 1)
                lost = time.monotonic()
            await asyncio.sleep(0.02)

    def _begin_root(self, term: int) -> None:
        """Begin the root of `term` here, unless another machine has that term."""
        with socket.create_server((self._machine.host, 0), backlog=2048) as listening:
            address = f"{self._machine.host}:{listening.getsockname()[1]}"
            if not self._folder.become_root(term, {"address": address, "machine": self._machine.name}):
                return
            if self._root is not None:
                self._root.kill()  # it may be stopped, and would stay behind
                self._root.wait()
            words = [sys.executable, "-m", "zili.supervision.root", str(self._run), str(term), str(listening.fileno())]
            self._root = subprocess.Popen(
                words, stdin=subprocess.PIPE, pass_fds=[listening.fileno()], start_new_session=True
            )
        assert self._root.stdin is not None
        self._root.stdin.write(json.dumps(asdict(self._launch)).encode())
        self._root.stdin.close()

    def _greet(self, link: Link) -> None:
        self._say(
            link,
            machine=self._machine.name,
            identity=self._machine.identity,
            ago=round(time.monotonic() - self._launched, 3),
            generation=self._generation,
            endings=list(self._endings.values()),
            state=self._state.as_table(),
        )
        if self._asked:  # the root before may not have heard it, or is gone with what it knew
            self._say(link, say="interrupt", hard=self._asked > 1)

    async def _serve(self, link: Link) -> int | None:
        """Obey the root until its link ends: None; or the run: its exit code."""
        while True:
            if self._broken is not None:
                raise self._broken
            try:
                raw = await asyncio.wait_for(link.receive(), PATIENCE)
            except TimeoutError:
                raw = None  # it is there and says nothing
            if raw is None:
                link.close()
                return None
            order = json.loads(raw)
            what = order.pop("do")
            if what == "state":
                self._state = state_of(order["state"])
            elif what == "note":
                self._show(order["text"])
            elif what == "end":
                return self._end(**order)
            elif what != "beat":
                orders: dict[str, Callable[..., Coroutine[Any, Any, None]]]
                orders = {"prepare": self._prepare, "start": self._start, "stop": self._stop, "report": self._report}
                self._follow(orders[what](**order))

    def _end(self, code: int, text: str, alone: bool = False) -> int:
        """`alone`: the run goes on without this machine, and so elsewhere with a root if that is here."""
        if text:
            self._show(text)
        if alone and self._root is not None:
            self._root.kill()
        return code

    def _say(self, link: Link | None = None, **thing: Any) -> None:
        link = link or self._link
        if link is not None:
            link.send(json.dumps(thing).encode())

    async def _beat(self) -> None:
        while True:
            at = mean_of([told(crumbs) for crumbs in self._crumbs.values()])
            self._say(say="beat", at=at)
            self._look()
            await asyncio.sleep(BEAT)

    def _follow(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._work.add(task)
        task.add_done_callback(self._followed)

    def _followed(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._broken = error  # this machine cannot do what all wait for: it ends, and the others hear that

    def _interrupt(self) -> None:
        self._asked += 1
        self._say(say="interrupt", hard=self._asked > 1)
        if self._asked > _INSISTS:
            os._exit(INTERRUPTED)  # the nursery ends the processes when its agent is gone

    # ---------------------------------------------------------------- a life

    async def _prepare(self, generation: int, life: int, number: int, of: int, ranks: tuple[int, int]) -> None:
        """Make this machine's node of a new life."""
        self._generation = generation
        if self._node is not None:
            await self._node.close(0)
        if self._processes.alive:  # of a life that went on without this machine
            await self._kill()
        if self._processes.over:
            self._processes.close()
            self._processes = self._new_processes()
        await self._processes.ready
        if generation != self._generation:
            return  # a newer one began meanwhile
        first, count = ranks
        self._endings, self._stopping, self._stop_asked = {}, False, None
        self._place = {"life": life, "number": number, "of": of, "first": first, "count": count}
        self._watch.begin(of * count)
        self._node = Node(number, range(first, first + count), below(number, of), self._folder.secret)
        self._address = f"{self._machine.host}:{await self._node.listen(self._machine.host)}"
        self._say(say="prepared", generation=generation, address=self._address)

    async def _start(self, generation: int, parent: str, keys: list[str]) -> None:
        if generation != self._generation or self._node is None:
            return
        words = [*self._launch.words, *(word for key in keys for word in ("--set", key))]
        for local in range(self._place["count"]):
            self._begin(local, words)
        if parent:
            with suppress(OSError):  # then a machine is gone, which the root knows
                await self._node.join(parent, PATIENCE)

    def _begin(self, local: int, words: list[str]) -> None:
        place = self._place
        rank, world, logs = place["first"] + local, place["of"] * place["count"], self._logs()
        logs.mkdir(parents=True, exist_ok=True)
        environment = {
            **{"RANK": str(rank), "LOCAL_RANK": str(local), "GROUP_RANK": str(place["number"])},
            **{"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(place["count"]), "GROUP_WORLD_SIZE": str(place["of"])},
            "TORCHELASTIC_RUN_ID": str(self._run),
            "TORCHELASTIC_RESTART_COUNT": str(place["life"] - 1),
            _ERROR_FILE: str(self._error_file(rank)),
            **{AGENT: self._address, AGENT_SECRET: self._folder.secret.hex()},
            GENERATION: str(self._generation),
            **{STACKS: str(self._stacks_file(rank)), CRUMBS: str(self._crumbs_file(rank))},
            RECORDER: str(self._recorder(rank)),
        }
        for file in (self._error_file(rank), self._crumbs_file(rank), self._recorder(rank)):
            file.unlink(missing_ok=True)
        self._crumbs[rank] = Crumbs(self._crumbs_file(rank))
        self._processes.begin(rank, words, environment, logs / f"rank-{rank:05d}.log", shown=rank == 0)

    async def _stop(self, generation: int, gentle: bool) -> None:
        """End this machine's processes: by SIGTERM, at which they save; else at once."""
        if generation == self._generation:
            await self._kill(signal.SIGTERM if gentle else signal.SIGKILL)
        self._say(say="stopped", generation=generation, endings=list(self._endings.values()))

    async def _kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send all processes of this machine a signal, and wait until they have ended."""
        self._stopping, self._stop_asked = True, time.monotonic()
        if self._processes.alive:
            self._processes.signal(number)
        await self._processes.none.wait()

    def _bury(self, rank: int, code: int) -> None:
        """A process of this machine has ended."""
        crumbs = self._crumbs.pop(rank)
        ending = {
            "rank": rank,
            "machine": self._machine.name,
            "code": code,
            "stopped": self._stopping and code in (-signal.SIGKILL, INTERRUPTED, -signal.SIGTERM),
            "error": self._error(rank),
            "log": self._log_end(rank) if code else "",
            **told(crumbs, self._stop_asked),
        }
        crumbs.close()
        self._endings[rank] = ending
        if not self._stopping:
            self._say(say="ended", generation=self._generation, ending=ending)

    # ---------------------------------------------------------------- hangs

    def _look(self) -> None:
        """Tell the root of processes that get no further."""
        held = any(state_of_process(pid) == "t" for pid in self._processes.alive.values())
        late = self._watch.late(self._crumbs, time.monotonic(), held)
        if late:
            self._say(say="hung", generation=self._generation, late=[one._asdict() for one in late])

    async def _report(self, generation: int) -> None:
        """Find out where each process of this machine is."""
        if generation == self._generation:
            subjects = [self._subject(rank, pid) for rank, pid in self._processes.alive.items() if pid]
            self._watch.forgive()
            reports = await asyncio.gather(*(ask(one) for one in subjects))
            self._say(say="reports", generation=generation, reports=[one.as_table() for one in reports])

    def _subject(self, rank: int, pid: int) -> Subject:
        return Subject(
            rank=rank,
            machine=self._machine.name,
            pid=pid,
            at=at(self._crumbs[rank], self._watch.quiet(rank)),
            stacks=self._stacks_file(rank),
            recorder=self._recorder(rank),
            kept=self._logs() / "hang" / f"rank-{rank:05d}.txt",
            send=lambda number: self._processes.signal(number, rank, alone=True),
        )

    # ---------------------------------------------------------------- files

    def _logs(self) -> Path:
        return self._run / "logs" / f"life-{self._place['life']:04d}"

    def _stacks_file(self, rank: int) -> Path:
        return self._own / f"stacks-{rank}"

    def _recorder(self, rank: int) -> Path:
        return self._own / f"asked-{rank}"

    def _error_file(self, rank: int) -> Path:
        return self._own / f"error-{rank}.json"

    def _crumbs_file(self, rank: int) -> Path:
        return self._own / f"crumbs-{rank}"

    def _error(self, rank: int) -> str:
        with suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads(self._error_file(rank).read_text(encoding="utf-8"))["message"]
            return str(said["message"] if isinstance(said, dict) else said)[-_TAIL:]
        return ""

    def _log_end(self, rank: int) -> str:
        file = self._logs() / f"rank-{rank:05d}.log"
        with suppress(OSError), file.open("rb") as opened:
            opened.seek(max(0, os.fstat(opened.fileno()).st_size - _TAIL))
            return opened.read().decode("utf-8", "replace")
        return ""


def _own_folder(folder: SupervisionFolder, machine: str) -> Path:
    """An empty folder on this machine's disk, for this user alone. What an agent left there that was killed is gone."""
    own = folder.own_place(machine).with_suffix(".d")
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(mode=0o700)
    return own
