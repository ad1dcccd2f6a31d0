"""The root: it knows the machines of a run, begins its lives, finds out why one ended, and decides what follows.

    python -m zili.supervision.root RUN TERM SOCKET     (the job is read from standard input)

It computes nothing and holds no state that its agents do not have too. When it is gone, workers go on, and the agents
have another one within seconds.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zili.errors import ChipError, ConfigError, DataError, NoProgressError, PeerError, ZiliError
from zili.parallel.control.links import Link, Unproven
from zili.parallel.control.node import above
from zili.plurals import counted
from zili.supervision.account import account_of, summary
from zili.supervision.folder import SupervisionFolder
from zili.supervision.hangs import Hang, Inquiry
from zili.supervision.ledger import Ledger, mean_of, seen, waited
from zili.supervision.members import Member, Refused, Waiting, as_ending, table_in
from zili.supervision.rules import rule_for
from zili.supervision.state import Launch, State, state_of
from zili.supervision.verdicts import ACTIONS, Ending, Failure, Verdict, cause_of, failure_of, judge

BEAT = 0.5
"""Seconds between two signs of life, in both directions."""
PATIENCE = 3.0
"""Seconds without one after which a machine counts as gone."""
_DEAF = 1.0
"""Seconds between two looks that count at most: a root that was itself stopped, starved or held by a disk has heard
nothing of what machines said meanwhile."""
_LONELY = 5.0
"""Seconds that a root without any machine waits for one."""
_GIVING_UP = 10
"""Times `--wait` after which a run without machines ends."""
_DYING = 30.0
"""Seconds in which processes end that were killed: a device lets go of its memory within them."""
_HINDSIGHT = 2.0
"""Seconds in which the cause may yet show itself where a process ended since another was gone."""
INTERRUPTED = 130


class Root:
    """Its methods run in one loop of asyncio: each is done before the next begins."""

    def __init__(self, folder: SupervisionFolder, term: int, launch: Launch) -> None:
        self._folder = folder
        self._term = term
        self._launch = launch
        self._ledger = Ledger(folder.path, term)
        self._state = state_of(folder.read_state())
        self._phase = Waiting.RUNNING if self._state.running else Waiting.GATHERING
        self._members: dict[str, Member] = {}
        self._since = time.monotonic()
        """When the present phase began."""
        self._listened = self._since
        self._endings: dict[int, dict[str, Any]] = {}
        self._done: set[int] = set()
        self._lost: list[str] = []
        self._doubt: float | None = None
        """Since when a process has ended that perhaps only lost a peer."""
        self._killed: float | None = None
        """Since when all processes of the life were to end at once."""
        self._inquiry: Inquiry | None = None
        self._hang: Hang | None = None
        self._interrupted = False
        self._identity: dict[str, str] = {}
        self._takes: set[asyncio.Task[Any]] = set()
        self._over = asyncio.Event()
        self._code = 0

    async def serve(self, listening: socket.socket) -> int:
        """Serve until the run is over; returns the exit code."""
        self._ledger.write("root", running=self._state.running)
        server = await asyncio.start_server(self._take, sock=listening, backlog=2048)
        async with server:
            while not self._over.is_set():
                self._look()
                for member in self._members.values():
                    member.tell(do="beat")
                try:
                    await asyncio.wait_for(self._over.wait(), BEAT)
                except TimeoutError:
                    continue
            await asyncio.gather(*(member.link.closed() for member in self._members.values()))
        if self._takes:
            await asyncio.wait(self._takes, timeout=1)  # asyncio prints a traceback for each that is cancelled
        return self._code

    # ---------------------------------------------------------------- machines come and go

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link, member, own = Link(reader, writer), None, asyncio.current_task()
        assert own is not None
        self._takes.add(own)
        try:
            await link.prove(self._folder.secret, above=True)
            while (said := table_in(await link.receive())) is not None:
                if "drain" in said:
                    link.send(json.dumps({"text": self._drain(said["drain"])}).encode())
                elif member is None:
                    member = self._welcome(said, link)
                else:
                    self._hear(member, said)
        except (Unproven, Refused):
            pass  # a stranger, or garbage; or it was told why
        except Exception:
            traceback.print_exc()  # a defect of ours: this machine's link ends, and it comes again
        finally:
            self._takes.discard(own)
            link.close()
            if member is not None and self._members.get(member.name) is member:
                self._lose(member, "is gone")

    def _welcome(self, said: dict[str, Any], link: Link) -> Member:
        """A machine's first word."""
        member = Member(said["machine"], link)
        refusal = self._refusal(said)
        if refusal:
            member.tell(do="end", code=ConfigError.exit_code, text=refusal, alone=True)
            raise Refused(refusal)
        self._members[member.name] = member
        self._ledger.write("joined", machine=member.name, generation=said["generation"], ago=said["ago"])
        if self._take_state(state_of(said["state"])):
            self._mirror()
        else:
            member.tell(do="state", state=self._state.as_table())
        self._adopt(member, said)
        self._grow()
        self._look()
        return member

    def _refusal(self, said: dict[str, Any]) -> str:
        """Why a machine may not take part; "": it may."""
        name, identity = said["machine"], said["identity"]
        if name in self._members:
            return f"machine {name} has a supervisor of this run already"
        if not self._members:
            self._identity = identity
        for what, value in self._identity.items():
            if identity.get(what) != value:
                return f"{name} has {what} {identity.get(what)}, the others have {value}: make them equal"
        if name in self._state.left_out:
            return f"machine {name} is left out of this run: {self._state.left_out[name]}"
        most = self._launch.most + self._launch.spares
        if len(self._members) >= most and name not in self._state.machines:
            return f"the run has its {counted(most, 'machine')}; --spares lets more stand by"
        return ""

    def _adopt(self, member: Member, said: dict[str, Any]) -> None:
        """Go on with the life whose processes this machine still has, after another root began it."""
        life, running = said["generation"], self._phase is Waiting.RUNNING
        member.stopped = life != self._state.generation  # it has no process of the newest life
        if running and life == self._state.generation:
            for ending in said["endings"]:
                self._ended(ending)
        elif life:
            member.tell(do="stop", generation=life, gentle=False)
        elif running:
            self._missed(member.name, "came back without its processes")

    def _grow(self) -> None:
        """With a machine more, go on with more, from where the run is."""
        now = len(self._state.machines)
        more = [int(size) for size in self._launch.layouts if now < int(size) <= len(self._members)]
        if self._phase is Waiting.RUNNING and len(self._workers()) == now and more:
            self._note(f"{counted(len(self._members), 'machine')} are here: going on with {max(more)}")
            self._stop(gentle=True)

    def _take_state(self, theirs: State) -> bool:
        """Go on from what an agent knows, if that is newer; whether it was."""
        newer = theirs.age > self._state.age
        if newer:
            self._state = theirs
            if self._phase is Waiting.GATHERING and theirs.running:
                self._turn(Waiting.RUNNING)
        return newer

    def _listen(self, now: float) -> None:
        """Do without the machines that say nothing any more; of several in one moment the first is the cause."""
        slept = max(0.0, now - self._listened - _DEAF)
        self._listened = now
        for member in tuple(self._members.values()):
            member.heard += slept  # what it said meanwhile is still to be read
            if now - member.heard > PATIENCE:
                self._forget(member, f"says nothing for {PATIENCE:.0f} s")

    def _lose(self, member: Member, how: str) -> None:
        self._forget(member, how)
        self._look()

    def _forget(self, member: Member, how: str) -> None:
        del self._members[member.name]
        self._ledger.write("gone", machine=member.name, how=how, silent=round(time.monotonic() - member.heard, 3))
        member.link.close()
        self._missed(member.name, how)

    def _missed(self, name: str, how: str) -> None:
        if self._phase in (Waiting.RUNNING, Waiting.PREPARING) and name in self._state.machines:
            self._lost.append(name)
            self._note(f"machine {name} {how}")
            self._stop()

    def _hear(self, member: Member, said: dict[str, Any]) -> None:
        member.heard = time.monotonic()
        what, life = said["say"], said.get("generation")
        if what == "interrupt":
            self._interrupt(hard=said["hard"])
        elif what == "beat":
            self._ledger.hear(member.name, self._state.life, said.get("at"))
        elif life != self._state.generation:
            return  # of an earlier life
        elif what == "prepared":
            member.address, member.prepared = said["address"], True
            self._look()
        elif what == "ended":
            self._ended(said["ending"])
        elif what == "hung":
            self._ask()
        elif what == "reports" and self._inquiry is not None:
            self._inquiry.hear(member.name, said["reports"], member.heard)
        elif what == "stopped":
            for ending in said["endings"]:
                self._endings.setdefault(ending["rank"], ending)
            member.stopped = True
            self._look()

    # ---------------------------------------------------------------- lives

    def _look(self) -> None:
        """See whether what the root waits for is there. Called whenever something has changed, and twice a second."""
        now = time.monotonic()
        self._listen(now)
        if self._inquiry is not None and self._phase in (Waiting.RUNNING, Waiting.STOPPING):
            self._inquiry.look(now)
        if not self._folder.is_root(self._term) or (not self._members and now - self._since > _LONELY):
            self._over.set()
        elif self._phase is Waiting.GATHERING:
            self._gather(now - self._since)
        elif self._phase is Waiting.PREPARING and all(member.prepared for member in self._workers()):
            self._start()
        elif self._phase is Waiting.RUNNING:
            absent = [name for name in self._state.machines if name not in self._members]
            if absent and now - self._since > PATIENCE:  # a new root waits for them that long
                self._missed(absent[0], "did not come back to the new root")
            elif self._doubt is not None and now - self._doubt > _HINDSIGHT:
                self._stop()
        elif self._phase is Waiting.STOPPING:
            self._leave_what_does_not_end(now)
            if all(member.stopped for member in self._workers()):
                self._conclude()

    def _gather(self, waited: float) -> None:
        fit = [m.name for m in self._members.values() if m.name not in self._state.left_out and not m.draining]
        # Those that worked keep their places; who stood by comes after them.
        order = [name for name in self._state.machines if name in fit]
        order += [name for name in fit if name not in order]
        order.sort(key=lambda name: name in self._state.doubtful)
        sizes = [int(size) for size in self._launch.layouts if int(size) <= len(order)]
        if self._launch.most in sizes or (sizes and waited > self._launch.wait):
            self._prepare(order[: max(sizes)])
        elif waited > _GIVING_UP * self._launch.wait:
            least = min(map(int, self._launch.layouts))
            came = f"{counted(len(order), 'machine')} of {least} came within {waited:.0f} s"
            self._end(PeerError.exit_code, f"{came}; see what the others say, or begin with fewer")

    def _prepare(self, machines: list[str]) -> None:
        state = self._state
        state.life += 1
        state.generation = self._folder.begin(self._term, state.life)
        state.version, state.machines, state.running = 0, machines, True
        self._endings, self._done, self._lost, self._doubt = {}, set(), [], None
        self._inquiry = self._hang = None
        self._turn(Waiting.PREPARING)
        processes = len(machines) * self._launch.processes
        facts = {"life": state.life, "generation": state.generation, "machines": machines, "processes": processes}
        self._ledger.life("preparing", **facts)
        for number, member in enumerate(self._workers()):
            member.prepared = member.stopped = False
            ranks = (number * self._launch.processes, self._launch.processes)
            member.tell(
                do="prepare", generation=state.generation, life=state.life, number=number, of=len(machines), ranks=ranks
            )

    def _start(self) -> None:
        self._turn(Waiting.RUNNING)
        self._ledger.life("started", life=self._state.life)
        workers = self._workers()
        world = counted(len(workers) * self._launch.processes, "process")
        self._note(f"life {self._state.life}: {world} on {counted(len(workers), 'machine')}")
        for number, member in enumerate(workers):
            parent = above(number)
            member.tell(
                do="start",
                generation=self._state.generation,
                parent="" if parent is None else workers[parent].address,
                keys=self._launch.layouts[str(len(workers))],
            )
        self._mirror()

    def _ended(self, ending: dict[str, Any]) -> None:
        """A process has ended by itself."""
        self._endings.setdefault(ending["rank"], {**ending, "heard": time.monotonic()})
        if ending["code"] == 0:
            self._done.add(ending["rank"])
            if len(self._done) == len(self._state.machines) * self._launch.processes:
                self._end(0, "")
        elif self._phase is Waiting.RUNNING:
            if rule_for(as_ending(ending)).consequence:
                self._doubt = self._doubt or time.monotonic()  # who met the cause may be slower to say so
            else:
                self._stop()

    def _ask(self) -> None:
        """A process gets no further: whose fault is it?"""
        at_work = self._phase in (Waiting.RUNNING, Waiting.STOPPING)
        if at_work and self._hang is None and (self._inquiry is None or self._inquiry.over):
            workers = self._workers()
            self._inquiry = Inquiry([member.name for member in workers], time.monotonic(), self._found)
            for member in workers:
                member.tell(do="report", generation=self._state.generation)

    def _found(self, hang: Hang) -> None:
        self._note(f"{hang}. All stacks are in {self._folder.run}/logs/life-{self._state.life:04d}/hang")
        if not hang.held:
            self._hang = hang
            self._stop()

    def _stop(self, *, gentle: bool = False) -> None:
        self._turn(Waiting.STOPPING)
        self._killed = None if gentle else self._since
        waited(self._endings.values())
        cause = seen(self._endings.values(), self._lost)
        wanted = "interrupted" if self._interrupted else "a machine is to be left" if gentle else ""
        hang = self._hang is not None
        self._ledger.write("stopping", life=self._state.life, cause=wanted or cause, hang=hang, wanted=bool(wanted))
        for member in self._workers():
            member.tell(do="stop", generation=self._state.generation, gentle=gentle)

    def _leave_what_does_not_end(self, now: float) -> None:
        """Do without machines that cannot end their processes: one that waits for a dead disk or driver hears no
        signal, and would hold up all others for ever."""
        for member in self._workers():
            if self._killed is None or member.stopped or now - self._killed < _DYING:
                continue
            why = f"has processes that SIGKILL did not end in {_DYING:.0f} s: see its kernel's log"
            self._note(f"machine {member.name} {why}")
            self._state.left_out[member.name] = why
            member.tell(do="end", code=ChipError.exit_code, text=f"this machine {why}", alone=True)
            self._forget(member, why)

    def _conclude(self) -> None:
        """All processes of a life have ended: what was it, and what follows?"""
        self._state.running = False
        failure = self._failure()
        if self._interrupted:
            self._end(INTERRUPTED, "interrupted; a run that had begun wrote a checkpoint")
            return
        self._tell_life("stopped", failed=failure is not None)
        if failure is None:
            self._go_on()
        else:
            self._judge(failure)

    def _failure(self) -> Failure | None:
        """What ended the life; None: it was asked to end."""
        own = [as_ending(one, self._saved_step()) for one in self._endings.values() if one["code"]]
        met = [one for one in own if not one.stopped]
        hung = self._hang and next((one for one in own if self._hang and one.rank == self._hang.rank), None)
        if hung:
            return failure_of(hung, seen="hang")
        if self._lost:
            rank = self._state.machines.index(self._lost[0]) * self._launch.processes
            steps = max((one.step or 0 for one in own), default=self._saved_step() or 0)
            return failure_of(Ending(rank, self._lost[0], step=steps or None), seen="machine-lost")
        return failure_of(cause_of(met)) if met else None

    def _judge(self, failure: Failure) -> None:
        """Decide what follows a failure, and say it."""
        verdict = judge(failure, [Failure(**earlier) for earlier in self._state.failures])
        self._state.failures.append(asdict(failure))
        action = ACTIONS[verdict.action]
        if verdict.action == "replace":
            action = self._replace(failure, verdict)
        self._ledger.write("verdict", decision=action, cause=verdict.reason, rule=verdict.rule)
        self._note(f"{verdict.reason} {failure.hint} Zili: {action} (rule {verdict.rule})")
        if verdict.action not in ("stop", "roll_back"):
            self._go_on()
            return
        code = int(self._endings.get(failure.rank, {}).get("code", 0))
        said_why = code in {kind.exit_code for kind in ZiliError.__subclasses__()}
        self._end(verdict.exit_code or (code if said_why else NoProgressError.exit_code), "")

    def _replace(self, failure: Failure, verdict: Verdict) -> str:
        """Do with other machines, if the run can; what is done. One that failed once is the last to be taken again, one
        that fails again and again is left out for good."""
        name = failure.machine
        if failure.kind == "preemption":
            return ACTIONS["restart"]  # a machine that is taken away goes by itself
        if not self._can_do_without(name):
            return f"{ACTIONS['restart']}, as no other machine is here"
        if verdict.rule != "machine-again":
            self._state.doubtful = [*(one for one in self._state.doubtful if one != name), name]
        else:
            self._state.left_out[name] = verdict.reason
            if name in self._members:
                member = self._members.pop(name)
                text = f"this machine is left out: {verdict.reason}"
                member.tell(do="end", code=ChipError.exit_code, text=text, alone=True)
        return ACTIONS["replace"]

    def _can_do_without(self, name: str) -> bool:
        others = [member for member in self._members.values() if member.name != name and not member.draining]
        return any(int(size) <= len(others) for size in self._launch.layouts)

    def _go_on(self) -> None:
        self._turn(Waiting.GATHERING)
        self._mirror()
        self._part()
        self._look()

    def _saved_step(self) -> int | None:
        """Step of the newest checkpoint, as far as names tell."""
        steps = [int(path.name.removeprefix("step-")) for path in (self._folder.run / "checkpoints").glob("step-*")]
        return max(steps, default=None)

    def _interrupt(self, *, hard: bool) -> None:
        self._interrupted = True
        if self._phase is Waiting.GATHERING:
            self._end(INTERRUPTED, "interrupted before a life began")
        elif self._phase is not Waiting.OVER:
            self._stop(gentle=not hard)

    def _drain(self, name: str) -> str:
        """Do without a machine after the next step, if the run can; what is said to who asked."""
        if name not in self._members:
            return f"there is no machine {name}; there are {', '.join(sorted(self._members))}"
        if not self._can_do_without(name):
            return f"the run cannot do without {name}: bring another machine first"
        self._members[name].draining = True
        self._note(f"machine {name} is to be left after the next step")
        if name not in self._state.machines or self._phase is Waiting.GATHERING:
            self._part()
        elif self._phase in (Waiting.PREPARING, Waiting.RUNNING):
            self._stop(gentle=True)
        return f"{name} is left after the next step; take it away when its supervisor has ended"

    def _part(self) -> None:
        """Let the machines go that are to be left."""
        for member in [one for one in self._members.values() if one.draining]:
            del self._members[member.name]
            self._ledger.write("gone", machine=member.name, how="is left", silent=0.0)
            member.tell(do="end", code=0, text="this machine is left, as was asked; take it away", alone=True)

    def _end(self, code: int, text: str) -> None:
        self._turn(Waiting.OVER)
        # Who begins the run again has looked at what failed.
        self._state = State(self._state.generation, self._state.life)
        self._folder.write_state(self._state.as_table())
        self._folder.lay_down(self._term, code, text)
        self._tell_life("end", code=code, text=text)
        self._sum_up()
        for member in self._members.values():
            member.tell(do="end", code=code, text=text)
        self._code = code
        self._over.set()

    def _tell_life(self, event: str, **facts: Any) -> None:
        endings = list(self._endings.values())
        waited(endings)
        self._ledger.life(event, life=self._state.life, at=mean_of(endings), cause=seen(endings, self._lost), **facts)

    def _sum_up(self) -> None:
        """Say where the time went."""
        with suppress(DataError):  # the disk refused every event
            found = account_of(self._folder.run)
            if found.lives:
                self._note(f"{summary(found)} (zili report {self._folder.run})")

    # ---------------------------------------------------------------- what all know

    def _workers(self) -> list[Member]:
        """Of the newest life, in the order of their ranks, as far as they are here."""
        return [self._members[name] for name in self._state.machines if name in self._members]

    def _turn(self, phase: Waiting) -> None:
        self._phase, self._since = phase, time.monotonic()

    def _mirror(self) -> None:
        self._state.version += 1
        table = self._state.as_table()
        self._folder.write_state(table)
        for member in self._members.values():
            member.tell(do="state", state=table)

    def _note(self, text: str) -> None:
        """Tell a line to whoever watches: the first machine of the run shows it."""
        for member in self._workers()[:1] or list(self._members.values())[:1]:
            member.tell(do="note", text=text)


def main(words: Iterable[str] = ()) -> int:
    """Be the root of a run; the exit code is the run's."""
    run, term, number = tuple(words) or sys.argv[1:]
    for asked in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(asked, signal.SIG_IGN)  # schedulers send them to all of a job; agents tell what was asked
    listening = socket.socket(fileno=int(number))
    try:
        root = Root(SupervisionFolder(Path(run)), int(term), Launch(**json.load(sys.stdin)))
        return asyncio.run(root.serve(listening))
    except ZiliError as error:
        print(f"zili: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
