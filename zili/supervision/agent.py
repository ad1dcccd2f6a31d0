"""The agent of one machine: it begins, watches and ends the machine's processes, as the root says."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from zili.chips import find_backend
from zili.errors import ConfigError, NoProgressError
from zili.parallel.control.crumbs import CRUMBS, Crumbs
from zili.parallel.control.links import Link, Unproven, address_of, connect
from zili.parallel.control.member import AGENT, AGENT_SECRET, GENERATION, HELD_BYTES
from zili.parallel.control.node import Node, below
from zili.parallel.control.recorder import RECORDER
from zili.supervision.file_thread import FileThread
from zili.supervision.firing import Firing
from zili.supervision.fitness import cannot_listen, listening_here, refuse_unfit
from zili.supervision.folder import Signs, SupervisionFolder
from zili.supervision.held import HeldStates, StateMark, mark_of
from zili.supervision.ledger import told
from zili.supervision.members import PATIENCE
from zili.supervision.nursery import STACKS
from zili.supervision.pace import Pace
from zili.supervision.places import Places, end_of
from zili.supervision.processes import ERROR_FILE, LocalProcesses
from zili.supervision.proving import Proving
from zili.supervision.reports import Subject, ask, at
from zili.supervision.root import BEAT, INTERRUPTED
from zili.supervision.state import Launch, State, state_of
from zili.supervision.tasks import Tasks
from zili.supervision.watch import ProgressWatch, state_of_process

Result = TypeVar("Result")
_TRIES = 1.0
"""Seconds for which a root that does not answer is asked again, before this machine takes its place."""
_UNSEEN = 4.0
"""The same where its machine does not answer at all: it may live, and its signs of life take a while to be seen."""
_OTHERS = 10.0
"""Seconds for another machine to begin a root, where this one is cut off from most."""
_REACH = 2.0
"""Seconds for a connection to the root."""
_INSISTS = 2
"""Requests to end after which this process ends at once: the first lets processes save, the second kills them."""
_TWICE = 30.0
"""Seconds in which two SIGTERM are one, as for a worker: job managers send it to all processes of a job, and launchers
pass it on."""
_ROOTS = 5
"""Roots in a row that end by an error, after which no other one is begun."""
_STEADY = 30.0
"""Seconds under one root after which those before it do not count."""
_LOOK = 30.0
"""Seconds that the run's folder has for a first look at it."""
_WHERE = 5.0
"""Seconds for the root to say where states are."""
_READING = 2.0
"""Seconds in which the end of a log is read: what ended a run is told without it where the folder does not answer."""


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
        self, folder: SupervisionFolder, own: Path, launch: Launch, machine: ThisMachine, show: Callable[[str], None]
    ) -> None:
        """`own`: an empty folder on this machine's disk. `show` tells a person a line."""
        self._run = folder.run
        self._folder = folder
        self._places = Places(folder.run, own)
        self._launch = launch
        self._machine = machine
        self._show = show
        self._files = FileThread()
        self._launched = time.monotonic()
        self._state = State()
        self._term = 0
        self._link: Link | None = None
        self._generation = 0
        self._node: Node | None = None
        self._place: dict[str, Any] = {}
        self._endings: dict[int, dict[str, Any]] = {}
        self._crumbs: dict[int, Crumbs] = {}
        self._watch = ProgressWatch(launch.patience)
        look, cold = self._refuse_unfit, machine.cold
        self._proving = Proving(machine.chip, machine.host, launch.processes, own, show, cold=cold, look=look)
        self._held = HeldStates(machine.name, folder.secret, self._ask_where)
        self._wheres: dict[str, asyncio.Future[dict[StateMark, list[str]]]] = {}
        """Questions to the root about kinds of states."""
        self.pace = Pace(machine.name)
        self._stopping = False
        self._stop_asked: float | None = None
        """When this machine's processes were to stop."""
        self._asked = 0
        """How often the run was asked to end, here."""
        self._leaving: float | None = None
        """Since when this machine is to leave the run."""
        self._over = 0
        self._tasks = Tasks(self._break)
        self._burials: set[asyncio.Task[None]] = set()
        self._broken: BaseException | None = None
        """What an order, or what is done beside them, failed with."""
        self._broke = asyncio.Event()
        self._root: subprocess.Popen[bytes] | None = None
        self._crashes = 0
        """Roots in a row that this machine began and that ended by an error."""

    @property
    def state(self) -> State:
        """What the root last told of the run."""
        return self._state

    async def run(self) -> int:
        """Supervise until the run is over; returns its exit code."""
        self._processes = self._new_processes()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._leave)
        self._tasks.begin(self._beat())
        try:
            await self._proving.prove(self._processes, self._renewed)
            while (over := await self._under_a_root()) is None:
                pass
            return over
        except BaseException:
            if self._root is not None:
                self._root.kill()  # the run goes on elsewhere, if at all, and so does its root
            raise
        finally:
            self._tasks.cancel()
            self._processes.close()
            if self._node is not None:
                await self._node.close(0)
            self._held.close()
            if self._root is not None:
                await asyncio.to_thread(self._root.wait)

    async def _refuse_unfit(self) -> None:
        listening_here(self._machine.host).close()
        look = self._files.do(lambda: refuse_unfit(self._run, find_backend(self._machine.chip), self._launch.processes))
        try:
            await asyncio.wait_for(look, _LOOK)
        except TimeoutError as error:
            raise ConfigError(f"{self._run} does not answer for {_LOOK:.0f} s: its disk or mount hangs") from error

    def _new_processes(self) -> LocalProcesses:
        return LocalProcesses(self._machine.chip, cold=self._proving.cold, ended=self._bury)

    def _renewed(self) -> LocalProcesses:
        self._processes.close()
        self._processes = self._new_processes()
        return self._processes

    # ---------------------------------------------------------------- the root

    async def _under_a_root(self) -> int | None:
        """Serve one root, to its end: None; or to the run's: its exit code."""
        self._link = await self._reach_root()
        return self._over if self._link is None else await self._serve(self._link)

    async def _reach_root(self) -> Link | None:
        """The root of the run. Where none answers, this machine begins one; of several that do, one gets the term.

        None: the run is over, as the root left word that this machine had.
        """
        lost, signs = time.monotonic(), Signs()
        while True:
            term, record = await self._unless_broken(self._files.patiently(self._folder.root))
            if "over" in record and 0 < self._term <= term:
                self._over = self._end(**record["over"])
                return None
            silent = False
            if "address" in record and term >= self._term:
                try:
                    link = await asyncio.wait_for(connect(record["address"], self._folder.secret), _REACH)
                    self._term = term
                    self._greet(link)
                    return link
                except (ConnectionRefusedError, Unproven):
                    pass  # an earlier root's port, which may be anybody's by now
                except OSError:
                    silent = True
            if silent and signs.come(*await self._files.patiently(self._folder.sign)):
                lost = time.monotonic()
                await self._stand_aside(record["address"], signs)
            if time.monotonic() - lost > self._patience_with(record, silent=silent):
                await self._begin_root(term + 1)
                lost = time.monotonic()
            await asyncio.sleep(0.02)

    async def _unless_broken(self, work: Coroutine[Any, Any, Result]) -> Result:
        """What `work` gives; where this machine is to end meanwhile it does, though a folder hangs."""
        doing, broke = asyncio.ensure_future(work), asyncio.ensure_future(self._broke.wait())
        try:
            await asyncio.wait([doing, broke], return_when=asyncio.FIRST_COMPLETED)
            if self._broken is not None:
                raise self._broken
            return await doing
        finally:
            doing.cancel()
            broke.cancel()

    async def _stand_aside(self, root: str, signs: Signs) -> None:
        """The root lives, and this machine does not reach it: the others may. To begin another one would take the run
        from them."""
        if signs.first:
            self._show(f"the root at {root} lives, and this machine does not reach it: see its network")
        if self._processes.alive and signs.generation > self._generation:
            await self._kill()  # the others went on without it

    def _patience_with(self, record: dict[str, Any], *, silent: bool = False) -> float:
        """Seconds until a root is begun here, after that of `record`; `silent`: nobody answers at its address.

        Raises:
            NoProgressError: those that this machine began end by errors again and again.
        """
        code = 0 if self._root is None else self._root.poll() or 0
        if code > 0:
            self._root, self._crashes = None, self._crashes + 1
        if self._crashes >= _ROOTS:
            raise NoProgressError(
                f"the root of this run ended {self._crashes} times in a row by an error (exit code {code}), which it "
                f"has told above; {self._folder.path} may be damaged"
            )
        waits = 0.0
        if self._machine.name in record.get("cut_off", ()):
            waits = _OTHERS
        elif "address" in record:
            waits = _UNSEEN if silent else _TRIES
        return waits + (2.0**self._crashes - 1)

    async def _begin_root(self, term: int) -> None:
        """Begin the root of `term` here, unless another machine has that term."""
        with listening_here(self._machine.host, backlog=2048) as listening:
            address = address_of(self._machine.host, listening.getsockname()[1])
            record = {"address": address, "machine": self._machine.name}
            if not await self._files.patiently(lambda: self._folder.become_root(term, record)):
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
            held=self._held.inventory(),
            stopping=self._stopping,
        )
        # The root before may not have heard it, or is gone with what it knew.
        if self._asked:
            self._say(link, say="interrupt", hard=self._asked > 1)
        elif self._leaving is not None:
            self._say(link, say="leave")

    async def _serve(self, link: Link) -> int | None:
        """Obey the root until its link ends: None; or the run: its exit code."""
        begun = time.monotonic()
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
            if time.monotonic() - begun > _STEADY:
                self._crashes = 0
            if what == "state":
                self._state = state_of(order["state"])
            elif what == "where":
                self._learn_where(order)
            elif what == "note":
                self._show(order["text"])
            elif what == "end":
                return self._end(**order)
            elif what != "beat":
                orders: dict[str, Callable[..., Coroutine[Any, Any, None]]]
                orders = {"prepare": self._prepare, "start": self._start, "stop": self._stop, "report": self._report}
                orders["fault"] = self._break_something
                self._tasks.begin(orders[what](**order))

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
            self._say(say="beat", at=self.pace.look(self._crumbs))
            self._look()
            await asyncio.sleep(BEAT)

    def _break(self, error: BaseException) -> None:
        """This machine cannot do what all wait for: it ends, and the others hear that."""
        self._broken = self._broken or error
        self._broke.set()

    def _leave(self) -> None:
        """This machine is taken away: its processes save, and the run goes on without it where it can. Asked again, it
        leaves at once, as if its power was cut."""
        now = time.monotonic()
        if self._leaving is None:
            self._leaving = now
            self._say(say="leave")
        elif now - self._leaving > _TWICE:
            self._break(SystemExit(INTERRUPTED))

    def _interrupt(self) -> None:
        """A person wants the run to end."""
        self._asked += 1
        self._say(say="interrupt", hard=self._asked > 1)
        if self._asked > _INSISTS:
            os._exit(INTERRUPTED)  # the nursery ends the processes when its agent is gone

    # ---------------------------------------------------------------- a life

    async def _prepare(self, generation: int, life: int, number: int, of: int, ranks: tuple[int, int]) -> None:
        """Make this machine's node of a new life."""
        self._generation, self._endings = generation, {}
        if self._node is not None:
            await self._node.close(0)
        if self._processes.alive:  # of a life that went on without this machine
            await self._kill()
        if self._processes.over:
            self._renewed()
        await self._processes.ready
        await self._proving.prove_again(self._processes, self._renewed)
        if generation != self._generation:
            return  # a newer one began meanwhile
        first, count = ranks
        self._stopping, self._stop_asked = False, None
        self._place = {"life": life, "number": number, "of": of, "first": first, "count": count}
        self._watch.begin(of * count)
        ranks_here = range(first, first + count)
        self._node = Node(number, ranks_here, below(number, of), self._folder.secret, self._held.take)
        try:
            self._address = address_of(self._machine.host, await self._node.listen(self._machine.host))
        except OSError as error:
            raise cannot_listen(self._machine.host, error) from error
        self._say(say="prepared", generation=generation, address=self._address)

    async def _start(self, generation: int, parent: str, partner: str, newest: int, keys: list[str]) -> None:
        if generation != self._generation or self._node is None:
            return
        self._held.begin(partner, newest)
        self._wheres = {}
        words = [*self._launch.words, *(word for key in keys for word in ("--set", key))]
        logs = self._places.logs(self._place["life"])
        await self._files.patiently(lambda: logs.mkdir(parents=True, exist_ok=True))
        if generation != self._generation or self._stopping:
            return  # it ended meanwhile
        for local in range(self._place["count"]):
            self._begin(local, words)
        if parent:
            with suppress(OSError):  # then a machine is gone, which the root knows
                await self._node.join(parent, PATIENCE)

    def _begin(self, local: int, words: list[str]) -> None:
        place = self._place
        rank, world = place["first"] + local, place["of"] * place["count"]
        environment = {
            **{"RANK": str(rank), "LOCAL_RANK": str(local), "GROUP_RANK": str(place["number"])},
            **{"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(place["count"]), "GROUP_WORLD_SIZE": str(place["of"])},
            "TORCHELASTIC_RUN_ID": str(self._run),
            "TORCHELASTIC_RESTART_COUNT": str(place["life"] - 1),
            ERROR_FILE: str(self._places.error(rank)),
            **{AGENT: self._address, AGENT_SECRET: self._folder.secret.hex()},
            **{GENERATION: str(self._generation), HELD_BYTES: str(self._held.bytes)},
            **{STACKS: str(self._places.stacks(rank)), CRUMBS: str(self._places.crumbs(rank))},
            RECORDER: str(self._places.recorder(rank)),
        }
        for file in (self._places.error(rank), self._places.crumbs(rank), self._places.recorder(rank)):
            file.unlink(missing_ok=True)
        self._crumbs[rank] = Crumbs(self._places.crumbs(rank))
        self._processes.begin(rank, words, environment, self._places.log(self._place["life"], rank), shown=rank == 0)

    async def _stop(self, generation: int, gentle: bool) -> None:
        """End this machine's processes: by SIGTERM, at which they save; else at once."""
        if generation == self._generation:
            await self._kill(signal.SIGTERM if gentle else signal.SIGKILL)
        endings = list(self._endings.values()) if generation == self._generation else []
        self._say(say="stopped", generation=generation, endings=endings, held=self._held.inventory())

    async def _kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send all processes of this machine a signal, and wait until they have ended."""
        self._stopping, self._stop_asked = True, time.monotonic()
        if self._processes.alive:
            self._processes.signal(number)
        await self._processes.none.wait()
        await asyncio.gather(*self._burials)

    def _bury(self, rank: int, code: int) -> None:
        """A process of this machine has ended."""
        crumbs = self._crumbs.pop(rank)
        self._proving.used()
        ending = {
            "rank": rank,
            "machine": self._machine.name,
            "code": code,
            "stopped": self._stopping and code in (-signal.SIGKILL, INTERRUPTED, -signal.SIGTERM),
            "error": self._places.said(rank),
            "log": "",
            **told(crumbs, self._stop_asked),
        }
        crumbs.close()
        self._endings[rank] = ending
        burial = self._tasks.begin(
            self._tell_end(self._generation, ending, self._places.log(self._place["life"], rank))
        )
        self._burials.add(burial)
        burial.add_done_callback(self._burials.discard)

    async def _tell_end(self, generation: int, ending: dict[str, Any], log: Path) -> None:
        by_itself = not self._stopping
        if ending["code"]:
            with suppress(TimeoutError, OSError):  # the cause is told without it then
                ending["log"] = await asyncio.wait_for(self._files.do(lambda: end_of(log)), _READING)
        if by_itself:
            self._say(say="ended", generation=generation, ending=ending)

    # ---------------------------------------------------------------- states in memory

    async def _ask_where(self, kind: str) -> dict[StateMark, list[str]]:
        """Which other machines have states of a kind: their addresses, by marks."""
        asked = self._wheres[kind] = asyncio.get_running_loop().create_future()
        self._say(say="where", generation=self._generation, kind=kind)
        with suppress(TimeoutError):  # the root may be gone: then there is the disk
            return await asyncio.wait_for(asyncio.shield(asked), _WHERE)
        return {}

    def _learn_where(self, order: dict[str, Any]) -> None:
        asked = self._wheres.get(order["kind"])
        if asked is not None and not asked.done() and order["generation"] == self._generation:
            asked.set_result({mark_of(mark): addresses for mark, addresses in order["marks"]})

    # ---------------------------------------------------------------- drills

    async def _break_something(self, fault: dict[str, Any]) -> None:
        """Carry out a fault of a drill."""
        await Firing(self._folder, self._places, lambda: self._processes, self._say, self._files).fire(fault)

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
            stacks=self._places.stacks(rank),
            recorder=self._places.recorder(rank),
            keep=partial(self._keep, self._places.hang(self._place["life"], rank)),
            send=lambda number: self._processes.signal(number, rank, alone=True),
        )

    def _keep(self, file: Path, text: str) -> None:
        """Keep what a process reported where people find it."""

        def write() -> None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")

        self._files.put(write)
