"""The root: it knows the machines of a run, begins its lives, finds out why one ended, and decides what follows.

    python -m zili.supervision.root RUN TERM SOCKET     (the job is read from standard input)

It computes nothing and holds no state that its agents do not have too. When it is gone, workers go on, and the agents
have another one within seconds.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from zili.errors import ChipError, ConfigError, PeerError, ZiliError
from zili.parallel.control.links import Link, Unproven
from zili.parallel.control.node import above
from zili.plurals import counted
from zili.supervision.account import last_line
from zili.supervision.decisions import decide, leave_out_batch
from zili.supervision.endings import Endings
from zili.supervision.file_thread import FileThread
from zili.supervision.folder import SupervisionFolder, generation_of
from zili.supervision.hangs import Hang, Inquiry
from zili.supervision.ledger import Ledger
from zili.supervision.members import PATIENCE, Member, Membership, Refused, Waiting, table_in
from zili.supervision.state import Launch, State, state_of
from zili.supervision.tasks import Tasks
from zili.supervision.verdicts import Failure

BEAT = 0.5
"""Seconds between two signs of life, in both directions."""
_LONELY = 5.0
"""Seconds that a root without any machine waits for one."""
_GIVING_UP = 10
"""Times `--wait` after which a run without machines ends."""
_LEAST_WAIT = 60.0
"""Seconds that it waits at least: machines are not begun in one moment."""
_PREPARES = 300.0
"""Seconds for a machine to be ready for a life: its processes may have to import everything anew."""
_DYING = 30.0
"""Seconds in which processes end that were killed: a device lets go of its memory within them."""
_HINDSIGHT = 2.0
"""Seconds in which the cause may yet show itself where a process ended since another was gone."""
_LAST_WORDS = 20.0
"""Seconds that the run's folder has to take down how the run ended."""
_SLOW = 20.0
"""Seconds after which it is said that the run's folder does not answer."""
INTERRUPTED = 130


class Root:
    """Its methods run in one loop of asyncio: each is done before the next begins."""

    def __init__(self, folder: SupervisionFolder, term: int, launch: Launch) -> None:
        self._folder = folder
        self._term = term
        self._launch = launch
        self._files = FileThread()
        self._ledger = Ledger(folder.path, term, self._files.put)
        self._state = state_of(folder.read_state())
        self._phase = Waiting.RUNNING if self._state.running else Waiting.GATHERING
        self._members = Membership(launch)
        self._since = time.monotonic()
        """When the present phase began."""
        self._ends = Endings(self._state.machines, launch.processes)
        self._killed: float | None = None
        """Since when all processes of the life were to end at once."""
        self._inquiry: Inquiry | None = None
        self._interrupted = False
        self._saved: int | None = None
        """Step of the run's newest checkpoint, as far as names tell."""
        self._said_slow = False
        self._links: set[Link] = set()
        self._takes: set[asyncio.Task[Any]] = set()
        self._tasks = Tasks(self._failed)
        self._over = asyncio.Event()
        self._code = 0

    async def serve(self, listening: socket.socket) -> int:
        """Serve until the run is over; returns the exit code."""
        self._ledger.write("root", running=self._state.running)
        server = await asyncio.start_server(self._take, sock=listening, backlog=2048)
        self._tasks.begin(self._watch_folder())
        try:
            while not self._over.is_set():
                self._look()
                for member in self._members.values():
                    member.tell(do="beat")
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._over.wait(), BEAT)
        finally:
            server.close()
            await asyncio.gather(*(link.closed() for link in self._links))
        if self._takes:
            await asyncio.wait(self._takes, timeout=1)  # asyncio prints a traceback for each that is cancelled
        return self._code

    def _failed(self, error: BaseException) -> None:
        """Something that is done beside the loop went wrong."""
        if isinstance(error, ZiliError):
            self._end(error.exit_code, str(error))
        elif isinstance(error, OSError):
            self._end(ConfigError.exit_code, f"{self._folder.path} cannot be used any more: {error}")
        else:
            traceback.print_exception(error)  # a defect of ours: another root goes on
            self._code = 1
            self._over.set()

    async def _watch_folder(self) -> None:
        """Look whether another root has come, and how far the run's checkpoints are."""
        while not self._over.is_set():
            newest, self._saved = await self._files.patiently(self._folder.look)
            if newest > self._term:
                self._over.set()
            self._files.put(self._folder.give_sign)
            await asyncio.sleep(BEAT)

    # ---------------------------------------------------------------- machines come and go

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link, member, own = Link(reader, writer), None, asyncio.current_task()
        assert own is not None
        self._takes.add(own)
        self._links.add(link)
        try:
            await link.prove(self._folder.secret, above=True)
            while (said := table_in(await link.receive())) is not None:
                if "drain" in said:
                    link.send(json.dumps({"text": self._drain(said["drain"])}).encode())
                elif "fault" in said:
                    link.send(json.dumps({"text": self._pass_on(said["machine"], said["fault"])}).encode())
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
            self._links.discard(link)
            link.close()
            if member is not None and self._members.get(member.name) is member:
                self._lose(member, "is gone")

    def _welcome(self, said: dict[str, Any], link: Link) -> Member:
        """A machine's first word."""
        member = Member(str(said.get("machine")), link)
        refusal = self._members.refusal(member.name, said.get("identity"), self._state)
        if refusal:
            member.tell(do="end", code=ConfigError.exit_code, text=refusal, alone=True)
            raise Refused(refusal)
        self._members[member.name] = member
        member.held = said["held"]
        self._ledger.write("joined", machine=member.name, generation=said["generation"], ago=said["ago"])
        if self._take_state(state_of(said["state"])):
            self._mirror()
        else:
            member.tell(do="state", state=self._state.as_table())
        self._adopt(member, said)
        self._grow()
        self._look()
        return member

    def _adopt(self, member: Member, said: dict[str, Any]) -> None:
        """Go on with the life whose processes this machine still has, after another root began it."""
        life = said["generation"]
        at_work = self._phase in (Waiting.RUNNING, Waiting.STOPPING)
        member.stopped = life != self._state.generation  # it has no process of the newest life
        if at_work and not member.stopped:
            for ending in said["endings"]:
                self._ended(ending)
            if said["stopping"] and self._phase is Waiting.RUNNING:  # so did the root before
                self._stop(gentle=True)
            elif self._phase is Waiting.STOPPING:
                member.tell(do="stop", generation=life, gentle=self._killed is None)
        elif life:
            member.tell(do="stop", generation=life, gentle=False)
        elif self._phase is Waiting.RUNNING:
            self._missed(member.name, "came back without its processes")

    def _grow(self) -> None:
        """With a machine more, go on with more, from where the run is."""
        now = len(self._state.machines)
        more = [size for size in self._launch.sizes(len(self._members.staying(self._state))) if size > now]
        if self._phase is Waiting.RUNNING and len(self._workers()) == now and more:
            self._note(f"{counted(len(self._members), 'machine')} are here: going on with {max(more)}")
            self._stop(gentle=True)

    def _take_state(self, theirs: State) -> bool:
        """Go on from what an agent knows, if that is newer; whether it was."""
        newer = theirs.age > self._state.age
        if newer:
            self._state = theirs
            self._ends = Endings(theirs.machines, self._launch.processes)
            if self._phase in (Waiting.GATHERING, Waiting.RUNNING):
                self._turn(Waiting.RUNNING if theirs.running else Waiting.GATHERING)
        return newer

    def _lose(self, member: Member, how: str) -> None:
        self._forget(member, how)
        self._look()

    def _forget(self, member: Member, how: str) -> None:
        del self._members[member.name]
        self._ledger.write("gone", machine=member.name, how=how, silent=round(time.monotonic() - member.heard, 3))
        member.link.close()
        self._state.leaving.pop(member.name, None)
        self._missed(member.name, how)

    def _missed(self, name: str, how: str) -> None:
        saves = self._phase is Waiting.STOPPING and self._killed is None
        if (saves or self._phase in (Waiting.RUNNING, Waiting.PREPARING)) and name in self._state.machines:
            self._ends.lost.append(name)
            self._note(f"machine {name} {how}")
            self._stop()

    def _hear(self, member: Member, said: dict[str, Any]) -> None:
        member.heard = time.monotonic()
        what, life = said["say"], said.get("generation")
        if what == "interrupt":
            self._interrupt(hard=said["hard"])
        elif what == "die":  # a fault of a drill
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "leave":
            self._let_leave(member.name, INTERRUPTED)
        elif what == "beat":
            at = said.get("at")
            self._state.step = max(self._state.step, (at or {}).get("step") or 0)
            self._ledger.hear(member.name, self._state.life, at)
        elif life != self._state.generation:
            return  # of an earlier life
        elif what == "prepared":
            member.address, member.prepared = said["address"], True
            self._look()
        elif what == "ended":
            self._ended(said["ending"])
        elif what == "hung":
            self._ask(member.name, said["late"][0])
        elif what == "reports" and self._inquiry is not None:
            self._inquiry.hear(member.name, said["reports"], member.heard)
        elif what == "where":
            marks = self._members.having(said["kind"])
            member.tell(do="where", generation=life, kind=said["kind"], marks=marks)
        elif what == "stopped":
            if self._phase is Waiting.RUNNING:  # the root before had told all of them to stop
                self._turn(Waiting.STOPPING)
            member.held = said["held"]
            self._ends.hear_stopped(said["endings"])
            member.stopped = True
            self._look()

    # ---------------------------------------------------------------- lives

    def _look(self) -> None:
        """See whether what the root waits for is there. Called whenever something has changed, and twice a second."""
        now = time.monotonic()
        silent = self._members.silent(now)
        if self._is_cut_off(silent):
            return
        for member in silent:  # of several in one moment the first is the cause
            self._forget(member, f"says nothing for {PATIENCE:.0f} s")
        self._say_slow()
        if self._inquiry is not None and self._phase in (Waiting.RUNNING, Waiting.STOPPING):
            self._inquiry.look(now)
        if not self._members and now - self._since > _LONELY:
            self._over.set()
        elif self._phase is Waiting.GATHERING:
            self._gather(now - self._since)
        elif self._phase is Waiting.PREPARING:
            self._await_preparations(now)
        elif self._phase is Waiting.RUNNING:
            absent = [name for name in self._state.machines if name not in self._members]
            if absent and now - self._since > PATIENCE:  # a new root waits for them that long
                self._missed(absent[0], "did not come back to the new root")
            elif self._ends.doubt is not None and now - self._ends.doubt > _HINDSIGHT:
                self._stop()
        elif self._phase is Waiting.STOPPING:
            self._leave_what_does_not_end(now)
            if all(member.stopped for member in self._workers()):
                self._conclude()

    def _await_preparations(self, now: float) -> None:
        late = [member.name for member in self._workers() if not member.prepared]
        if not late:
            self._start()
        elif now - self._since > _PREPARES and self._files.busy < _SLOW:
            self._missed(late[0], f"is not ready for a life within {_PREPARES:.0f} s")

    def _is_cut_off(self, silent: list[Member]) -> bool:
        """Whether most machines of the life fell silent in one moment, though no link of theirs ended. This one's cable
        is the likelier cause, and one of the others is to have the root."""
        names = {member.name for member in silent}
        here = [name for name in self._members if name not in names]
        if not here or 2 * len(names & set(self._state.machines)) <= len(self._state.machines):
            return False
        self._turn(Waiting.OVER)
        self._tasks.begin(self._hand_over(here))
        return True

    async def _hand_over(self, here: list[str]) -> None:
        try:
            await self._files.do(lambda: self._folder.hand_over(self._term, here))
        finally:
            self._over.set()

    def _say_slow(self) -> None:
        slow = self._files.busy > _SLOW
        if slow and not self._said_slow:
            self._note(f"{self._folder.run} does not answer for {_SLOW:.0f} s: see its file server")
        self._said_slow = slow

    def _gather(self, waited: float) -> None:
        order = self._members.order(self._state)
        sizes = self._launch.sizes(len(order))
        if self._launch.most in sizes or (sizes and waited > self._launch.wait):
            self._prepare(order[: max(sizes)])
        elif waited > max(_GIVING_UP * self._launch.wait, _LEAST_WAIT):
            least = min(self._launch.sizes())
            came = f"{counted(len(order), 'machine')} of {least} came within {waited:.0f} s"
            self._end(
                PeerError.exit_code,
                f"{came}; each has to see {self._folder.run} and to reach the others (--host); or begin with fewer",
            )

    def _prepare(self, machines: list[str]) -> None:
        state = self._state
        state.life += 1
        state.generation = generation_of(self._term, state.life)
        state.version, state.machines, state.running = 0, machines, True
        self._ends, self._inquiry = Endings(machines, self._launch.processes), None
        self._turn(Waiting.PREPARING)
        for member in self._workers():
            member.prepared = member.stopped = False
        processes = len(machines) * self._launch.processes
        facts = {"life": state.life, "generation": state.generation, "machines": machines, "processes": processes}
        self._ledger.life("preparing", **facts)
        self._tasks.begin(self._tell_to_prepare(state.generation))

    async def _tell_to_prepare(self, generation: int) -> None:
        """From here on no process of an earlier life finishes a checkpoint, and only then do the machines begin."""
        if not await self._files.patiently(lambda: self._folder.begin(generation)):
            self._over.set()  # another root has come
            return
        if (bad := self._state.bad_batch) is not None:
            try:
                told = await self._files.patiently(lambda: leave_out_batch(self._folder.run, bad, self._launch.watch))
            except ZiliError as error:
                self._end(error.exit_code, str(error))
                return
            self._state.bad_batch = None
            self._note(told)
        if generation != self._state.generation or self._phase is not Waiting.PREPARING:
            return
        for number, member in enumerate(self._workers()):
            member.tell(
                do="prepare",
                generation=generation,
                life=self._state.life,
                number=number,
                of=len(self._state.machines),
                ranks=(number * self._launch.processes, self._launch.processes),
            )

    def _start(self) -> None:
        self._turn(Waiting.RUNNING)
        self._ledger.life("started", life=self._state.life)
        workers, newest = self._workers(), self._members.learn_held() if self._may_trust_memory() else 0
        world = counted(len(workers) * self._launch.processes, "process")
        self._note(f"life {self._state.life}: {world} on {counted(len(workers), 'machine')}")
        for number, member in enumerate(workers):
            parent = above(number)
            member.tell(
                do="start",
                generation=self._state.generation,
                parent="" if parent is None else workers[parent].address,
                newest=newest,
                partner=workers[(number + 1) % len(workers)].address if len(workers) > 1 else "",
                keys=self._launch.layouts[str(len(workers))],
            )
        self._mirror()
        self._grow()  # a machine may have come while the others prepared themselves

    def _may_trust_memory(self) -> bool:
        """Whether a life may go on from states in memory. Two that did and got no step further may have failed by what
        they had from there: the next one, which is the last, reads the disk."""
        steps = [failure.get("step") for failure in self._state.failures[-3:]]
        return len(steps) < 3 or len(set(steps)) > 1

    def _ended(self, ending: dict[str, Any]) -> None:
        """A process has ended by itself."""
        met_a_cause = self._ends.hear(ending)
        if self._ends.all_done:
            self._end(0, "")
        elif met_a_cause and self._phase is Waiting.RUNNING:
            self._stop()

    def _ask(self, machine: str, late: dict[str, Any]) -> None:
        """A process gets no further: whose fault is it?"""
        at_work = self._phase in (Waiting.RUNNING, Waiting.STOPPING)
        if at_work and self._ends.hang is None and (self._inquiry is None or self._inquiry.over):
            workers = self._workers()
            suspect = Hang.of_late(machine, late)
            self._inquiry = Inquiry([one.name for one in workers], time.monotonic(), self._found, suspect)
            for member in workers:
                member.tell(do="report", generation=self._state.generation)

    def _found(self, hang: Hang) -> None:
        self._note(f"{hang}. All stacks are in {self._folder.run}/logs/life-{self._state.life:04d}/hang")
        if not hang.held:
            self._ends.hang = hang
            self._stop()

    def _stop(self, *, gentle: bool = False) -> None:
        self._turn(Waiting.STOPPING)
        self._killed = None if gentle else self._since
        cause = self._ends.cause()
        wanted = "interrupted" if self._interrupted else "a machine is to be left" if gentle else ""
        hang = self._ends.hang is not None
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
        if self._interrupted:
            self._end(INTERRUPTED, "")
            return
        self._state.step = max(self._state.step, self._ends.step, self._saved or 0)
        failure = self._ends.failure(self._state.step or None)
        self._ledger.life("stopped", life=self._state.life, failed=failure is not None, **self._ends.facts())
        if failure is None:
            self._go_on()
        else:
            self._decide(failure)

    def _decide(self, failure: Failure) -> None:
        """Find out what follows a failure, say it, and do it."""
        without = self._members.sizes_without(failure.machine, self._state)
        skips = self._launch.watch.get("failure") == "roll_back"
        decision = decide(failure, self._state, can_do_without=bool(without), may_skip_data=skips)
        verdict = decision.verdict
        self._ledger.write("verdict", decision=decision.action, cause=verdict.reason, rule=verdict.rule)
        self._note(f"{verdict.reason} {failure.hint} Zili: {decision.action} (rule {verdict.rule})")
        if decision.left_out in self._members:
            self._dismiss(decision.left_out, ChipError.exit_code, f"this machine is left out: {verdict.reason}")
        if decision.stops:
            self._end(decision.exit_code(self._ends.code_that_says_why(failure.rank)), "")
        else:
            self._go_on()

    def _go_on(self) -> None:
        self._turn(Waiting.GATHERING)
        self._part()
        self._mirror()
        self._look()

    # ---------------------------------------------------------------- somebody asks

    def _interrupt(self, *, hard: bool) -> None:
        self._interrupted = True
        if self._phase is Waiting.GATHERING:
            self._end(INTERRUPTED, "" if self._state.life else "interrupted before a life began")
        elif self._phase is not Waiting.OVER:
            self._stop(gentle=not hard)

    def _drain(self, name: str) -> str:
        """Do without a machine after the next step, if the run can; what is said to who asked."""
        if name not in self._members:
            return f"there is no machine {name}; there are {', '.join(sorted(self._members))}"
        if not self._members.sizes_without(name, self._state):
            return f"the run cannot do without {name}: bring another machine first"
        self._let_leave(name, 0)
        return f"{name} is left after the next step; take it away when its supervisor has ended"

    def _pass_on(self, name: str, fault: dict[str, Any]) -> str:
        """Have a machine carry out a fault of a drill; "": it was told."""
        if name not in self._members:
            return f"there is no machine {name}; there are {', '.join(sorted(self._members))}"
        self._members[name].tell(do="fault", fault=fault)
        return ""

    def _let_leave(self, name: str, code: int) -> None:
        """A machine goes after the next step, its supervisor ends with `code`. Where it was the last the run ends."""
        if name not in self._members or name in self._state.leaving or self._phase is Waiting.OVER:
            return
        self._state.leaving[name] = code
        if not self._members.staying(self._state):
            self._interrupt(hard=False)
            return
        self._note(f"machine {name} is to be left after the next step")
        if name not in self._state.machines or self._phase is Waiting.GATHERING:
            self._part()
        elif self._phase in (Waiting.PREPARING, Waiting.RUNNING):
            self._stop(gentle=True)
        self._mirror()

    def _part(self) -> None:
        """Let the machines go that are to be left, and have no process of a life that goes on."""
        busy = self._state.machines if self._phase is not Waiting.GATHERING else ()
        for name in [member.name for member in self._members.of(self._state.leaving) if member.name not in busy]:
            self._ledger.write("gone", machine=name, how="is left", silent=0.0)
            self._dismiss(name, self._state.leaving.pop(name), "this machine is left, as was asked; take it away")

    def _dismiss(self, name: str, code: int, text: str) -> None:
        """The run goes on without this machine."""
        self._members.pop(name).tell(do="end", code=code, text=text, alone=True)

    # ---------------------------------------------------------------- the end

    def _end(self, code: int, text: str) -> None:
        if self._phase is not Waiting.OVER:
            self._turn(Waiting.OVER)
            self._code = code
            # Who begins the run again has looked at what failed.
            self._state = State(self._state.generation, self._state.life)
            self._ledger.life("end", life=self._state.life, code=code, text=text, **self._ends.facts())
            self._tasks.begin(self._finish(code, text))

    async def _finish(self, code: int, text: str) -> None:
        """Leave word, say where the time went, and let all machines go."""
        told = ""
        with suppress(TimeoutError, OSError, ConfigError):
            async with asyncio.timeout(_LAST_WORDS):
                if code == INTERRUPTED and not text:
                    _, step = await self._files.do(self._folder.look)
                    text = f"interrupted; {'there is no checkpoint' if step is None else f'step {step} is saved'}"
                told = await self._files.do(lambda: self._last_words(code, text))
        if told:
            self._note(told)
        for member in self._members.values():
            member.tell(do="end", code=code, text=text)
        self._over.set()

    def _last_words(self, code: int, text: str) -> str:
        """Write how it ended; where the time went."""
        self._folder.write_state(self._state.as_table())
        self._folder.lay_down(self._term, code, text)
        return last_line(self._folder.run)

    # ---------------------------------------------------------------- what all know

    def _workers(self) -> list[Member]:
        """Of the newest life, in the order of their ranks, as far as they are here."""
        return self._members.of(self._state.machines)

    def _turn(self, phase: Waiting) -> None:
        self._phase, self._since = phase, time.monotonic()

    def _mirror(self) -> None:
        self._state.version += 1
        table = self._state.as_table()
        self._files.put(lambda: self._folder.write_state(table))
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
