"""Where the time of a run went: every second of it has a phase, or is said to be unknown."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from zili.errors import DataError
from zili.pages.figures import duration
from zili.plurals import counted
from zili.supervision.ledger import EVENTS, clock

# fmt: off
Spent = Literal[
    "step", "data", "copy", "save", "evaluate", "init", "join", "load", "reload", "warm_up", "end",
    "lost", "detection", "stopping", "waiting", "replacement", "idle", "unaccounted",
]
# fmt: on
"""Steps that were kept; waiting for a batch; copying the state into memory that outlives
the process; what a checkpoint keeps the run from training; held-out text; imports and
choices; meeting the others; weights and state, of a first life and of a later one; the first step; the end of the
processes. Steps done that no later life went on from, and those half done; from when nobody got further until it was
known; until all processes had ended; machines at the beginning, and after a life; between two launches; not known."""
SPENT: tuple[Spent, ...] = get_args(Spent)
WORDS: dict[str, str] = {
    **{str(name): str(name) for name in SPENT},
    **{"data": "data wait", "warm_up": "warm-up", "lost": "lost work", "waiting": "waiting for machines"},
}
"""Phases as people read them."""
_TRAINS = ("step", "data")
WITHIN = 0.01
"""Share of the wall time that may be unknown."""
_INTERRUPTED = 130


@dataclass
class Life:
    """What one life of the run was."""

    number: int
    began: float
    """Seconds since 1970, when its machines were told."""
    machines: int
    processes: int
    resumed: int | None = None
    """Steps that it found done; None: it did not come so far."""
    step: int | None = None
    """The last step that it did; None: none."""
    step_seconds: float | None = None
    """A step's with its wait for data, the first of the life aside; None: there was no other."""
    saves: float = 0.0
    """Checkpoints begun, and the wait for the last."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase, with those that passed since the life before."""
    cause: str = ""
    """What ended it."""
    verdict: str = ""
    failed: bool = False
    """Whether it ended since something broke."""
    over: bool = False

    @property
    def wall(self) -> float:
        return sum(self.seconds.values())

    @property
    def steps(self) -> int:
        return max(0, (self.step or 0) - (self.resumed or 0))

    def add(self, phase: str, seconds: float) -> None:
        if seconds:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


@dataclass
class Account:
    """Where a run's time went, in seconds of the wall clock."""

    lives: list[Life]
    idle: float = 0.0
    """Between the end of a launch and the beginning of the next."""
    unaccounted: float = 0.0
    """Outside every life."""
    code: int | None = None
    """The exit code; None: the run goes on, or its supervisors are gone."""
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> dict[str, float]:
        """By phase, in the order of `SPENT`; those of no length are left out."""
        found: dict[str, float] = {"idle": self.idle, "unaccounted": self.unaccounted}
        for life in self.lives:
            for name, size in life.seconds.items():
                found[name] = found.get(name, 0.0) + size
        return {name: found[name] for name in SPENT if found.get(name)}

    @property
    def wall(self) -> float:
        """From the first event to the last."""
        return self.idle + self.unaccounted + sum(life.wall for life in self.lives)

    @property
    def share(self) -> float:
        """Of the time under supervision, the part in which steps were done that were kept."""
        spent = self.wall - self.idle
        return self.seconds.get("step", 0.0) / spent if spent > 0 else 0.0

    @property
    def unknown(self) -> float:
        """Share of the wall time that no phase is known of, or that phases have too much."""
        off = abs(self.unaccounted) + sum(abs(life.seconds.get("unaccounted", 0.0)) for life in self.lives)
        return off / self.wall if self.wall > 0 else 0.0

    @property
    def balances(self) -> bool:
        """Whether the phases, which processes and roots measured apart, sum to the wall time within 1 %."""
        return self.unknown <= WITHIN


def summary(found: Account) -> str:
    """A line: lives, the share that trained, and where the rest went."""
    spent = found.wall - found.idle
    rest = {name: size for name, size in found.seconds.items() if name not in ("step", "idle")}
    ranked = sorted(rest, key=lambda name: -abs(rest[name]))
    shares = [f"{WORDS[name]} {100 * rest[name] / spent:.1f} %" for name in ranked if abs(rest[name]) >= spent / 200]
    whole = f"{lives_text(found)} in {duration(spent)}: {100 * found.share:.1f} % trained"
    return f"{whole}; {', '.join(shares)}" if shares else whole


def last_line(run: Path) -> str:
    """What a run's supervisors say when it is over; "": they never wrote what happened, or no life began."""
    try:
        found = account_of(run)
    except DataError:  # the disk refused every event
        return ""
    return f"{summary(found)} (zili report {run})" if found.lives else ""


def lives_text(found: Account) -> str:
    """`1 life`, `3 lives`."""
    return f"{len(found.lives):,} {'life' if len(found.lives) == 1 else 'lives'}"


def read_events(run: Path) -> tuple[list[dict[str, Any]], int]:
    """The events of a run, and how many lines are broken.

    Raises:
        DataError: there are none.
    """
    file = run / "supervision" / EVENTS
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(f"{run} has no events of a supervisor ({file}): start it with `zili launch`") from error
    found = [event for line in lines if (event := event_in(line)) is not None]
    if not found:
        raise DataError(f"{file} holds no event")
    return found, len([line for line in lines if line.strip()]) - len(found)


def event_in(line: str | bytes) -> dict[str, Any] | None:
    """The event of a line; None: it holds none."""
    try:
        read = json.loads(line)
        timed = all(isinstance(read[key], int | float) for key in ("time", "monotonic", "term"))
        if timed and isinstance(read["event"], str) and _is_sound(read.get("at")):
            return dict(read)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    return None


def _is_sound(at: Any) -> bool:
    """Whether it says what processes were at; nothing is sound too."""
    if at is None:
        return True
    counts = [at.get(name) for name in ("step", "begun_after", "saves", "stood", "went_on")]
    slowest = [one[name] for one in at.get("slowest", ()) for name in ("rank", "step_seconds", "data_seconds")]
    known = [one for one in (*counts, *slowest, *at.get("seconds", {}).values()) if one is not None]
    return all(isinstance(one, int | float) for one in known)


def _going_on(at: Mapping[str, Any]) -> dict[str, Any]:
    """What processes are at that live: who gets no further for a moment has lost nothing yet."""
    phase, stood = at["phase"], at["stood"]
    seconds = at["seconds"]
    return {**at, "seconds": {**seconds, phase: seconds.get(phase, 0.0) + stood}, "stood": 0.0}


def account_of(run: Path) -> Account:
    """The account of a run's folder.

    Raises:
        DataError: it has no events.
    """
    events, broken = read_events(run)
    found = account(events)
    if broken:
        found.notes.append(
            f"{counted(broken, 'line')} of {EVENTS} cannot be read and {'was' if broken == 1 else 'were'} left out"
        )
    return found


def account(events: Iterable[Mapping[str, Any]]) -> Account:
    """Seconds by phase from the events of a run. A root that has lost its term may have written after its successor:
    what it says then is left out."""
    book = Book()
    for event in events:
        book.take(event)
    return book.close()


class Book:
    """The events, one after the other, for those who read on while a run goes."""

    def __init__(self) -> None:
        self._account = Account([])
        self._last: Mapping[str, Any] | None = None
        self._now = 0.0
        self._mark = 0.0
        """Up to here every second has a phase."""
        self._open: _Open | None = None
        self._launched = True
        self._root_came: float | None = 0.0
        """When the first root of this launch came; None: a life has begun since."""
        self._ahead = 0.0
        """Seconds for which the first machine of this launch had been at work then."""

    def take(self, event: Mapping[str, Any]) -> None:
        """The next event."""
        if self._last is not None and event["term"] < self._last["term"]:
            return
        self._now += self._passed(event)
        self._last = event
        heard = getattr(self, f"_{event['event']}", None)
        if heard is not None:
            heard(event)

    def _passed(self, event: Mapping[str, Any]) -> float:
        before = self._last
        if before is None:
            return 0.0
        same = before.get("clock") == event.get("clock")
        clock = "monotonic" if same else "time"
        passed = float(event[clock] - before[clock])
        if passed < 0:
            self._account.notes.append(f"the clock went back by {-passed:.0f} s at event {event['event']}")
        return max(0.0, passed)

    # ---------------------------------------------------------------- events

    def _root(self, event: Mapping[str, Any]) -> None:
        if not self._launched:
            self._account.idle += self._since_mark()
            self._launched, self._account.code = True, None
            self._root_came, self._ahead = self._now, 0.0

    def _joined(self, event: Mapping[str, Any]) -> None:
        """A machine of the life at hand that has no process of it: the supervisors were gone, and so is the life."""
        if self._root_came is not None:
            self._began_before(event.get("ago", 0.0) - (self._now - self._root_came))
        life = self._open
        if life and event["term"] > life.term and event.get("generation") != life.generation and life.has(event):
            life.life.cause = "the supervisors were gone"
            self._lose()

    def _preparing(self, event: Mapping[str, Any]) -> None:
        if self._open:
            self._lose()
        self._root_came = None
        number, machines = int(event.get("life", 0)), list(event.get("machines", ()))
        life = Life(number, float(event["time"]), len(machines), int(event.get("processes", 0)))
        self._account.lives.append(life)
        self._open = _Open(life, int(event["term"]), event.get("generation"), machines)
        self._gather()

    def _started(self, event: Mapping[str, Any]) -> None:
        if self._open:
            self._gather()
            self._open.started = self._now

    def _progress(self, event: Mapping[str, Any]) -> None:
        if self._open and event.get("at"):
            self._open.progress = self._now, event["at"]

    def _stopping(self, event: Mapping[str, Any]) -> None:
        if self._open and self._open.known is None:
            self._open.known = self._now
            self._open.hang, self._open.wanted = bool(event.get("hang")), bool(event.get("wanted"))
            self._open.life.cause = str(event.get("cause", ""))

    def _stopped(self, event: Mapping[str, Any]) -> None:
        if not self._open:
            return
        life = self._open.life
        if not self._open.wanted:
            life.cause = str(event.get("cause") or life.cause)
        life.failed = bool(event.get("failed", True)) and not self._open.wanted
        if self._open.started is None:
            self._gather()
        else:
            self._open.spread(event.get("at"), self._now)
            self._mark = self._now
        self._shut()

    def _verdict(self, event: Mapping[str, Any]) -> None:
        if self._account.lives:
            life = self._account.lives[-1]
            life.verdict, life.cause = str(event.get("decision", "")), str(event.get("cause") or life.cause)

    def _end(self, event: Mapping[str, Any]) -> None:
        if self._open:
            code = event.get("code")
            self._stopped({**event, "failed": code not in (0, _INTERRUPTED)})
        elif self._account.lives:
            self._account.lives[-1].add("end", self._since_mark())
        else:
            self._account.unaccounted += self._since_mark()
        self._launched, self._account.code = False, event.get("code")

    # ---------------------------------------------------------------- seconds

    def _began_before(self, ahead: float) -> None:
        """A machine was at work so long before the first root came: it imports first."""
        more = max(0.0, ahead - self._ahead)
        self._ahead += more
        idle = min(more, self._account.idle)
        self._account.idle -= idle
        self._mark -= idle
        self._now += more - idle if not self._account.lives else 0.0

    def _since_mark(self) -> float:
        passed, self._mark = self._now - self._mark, self._now
        return passed

    def _gather(self) -> None:
        assert self._open is not None
        first = len(self._account.lives) == 1
        self._open.life.add("waiting" if first else "replacement", self._since_mark())

    def _lose(self) -> None:
        """The end of the life at hand was not written: what is known of it is what its processes told before."""
        assert self._open is not None
        if self._open.started is None:
            self._gather()
        else:
            at, table = self._open.progress or (self._open.started, None)
            self._open.known, self._open.hang = at, False
            self._open.spread(table, at)
            self._open.life.add("unaccounted", self._now - at)
            self._mark = self._now
        self._open.life.failed = True
        self._shut()

    def _shut(self) -> None:
        assert self._open is not None
        self._open.life.over, self._open = True, None

    def so_far(self, at: Mapping[str, Any] | None = None) -> Account:
        """The account up to the last event; with `at`, what processes are at, up to now. More events may follow."""
        copy = deepcopy(self)
        if at is not None and copy._last is not None and copy._open is not None:
            now = {"time": time.time(), "monotonic": time.monotonic(), "clock": clock()}
            copy.take({"event": "progress", "term": copy._last["term"], **now, "at": _going_on(at)})
        return copy.close()

    def close(self) -> Account:
        """The account; nothing is taken after it."""
        found = self._account
        if self._open:
            life = self._open.life
            self._lose()
            life.over = life.failed = False
        elif self._launched and found.lives:
            found.lives[-1].add("replacement", self._since_mark())
        elif self._launched:
            found.unaccounted += self._since_mark()
        _move_lost(found.lives)
        return found


@dataclass
class _Open:
    """The life at hand."""

    life: Life
    term: int
    generation: Any
    machines: Sequence[str]
    started: float | None = None
    known: float | None = None
    """When it was known that it has to end."""
    hang: bool = False
    wanted: bool = False
    """Whether somebody asked for that."""
    progress: tuple[float, Mapping[str, Any]] | None = None

    def has(self, event: Mapping[str, Any]) -> bool:
        return event.get("machine") in self.machines

    def spread(self, at: Mapping[str, Any] | None, stopped: float) -> None:
        """Give the seconds from the start to `stopped` their phases: those before the last change as the processes
        measured them, those after as the root did."""
        assert self.started is not None
        life, known = self.life, stopped if self.known is None else self.known
        told = at or {}
        life.step, life.resumed = told.get("step"), told.get("begun_after")
        life.saves = told.get("saves", 0.0)
        for name, size in told.get("seconds", {}).items():
            life.add(self._named(name), size)
        spent = sum(life.seconds.get(name, 0.0) for name in _TRAINS)
        life.step_seconds = spent / (life.steps - 1) if life.steps > 1 and spent else None
        stood, went_on = told.get("stood", 0.0), told.get("went_on", 0.0)
        stopping = max(0.0, stopped - known - went_on)
        before = sum(told.get("seconds", {}).values())
        self._stand(told.get("phase", ""), stood)
        life.add("stopping", stopping)
        life.add("unaccounted", stopped - self.started - before - stood - stopping)

    def _stand(self, phase: str, stood: float) -> None:
        """From the last change on. A process that ended by itself was at work until then, in a step for as long as
        one takes: that part is lost. The rest is detection."""
        if self.hang:
            self.life.add("detection", stood)
        elif phase in _TRAINS:
            working = min(stood, self.life.step_seconds or stood)
            self.life.add("lost", working)
            self.life.add("detection", stood - working)
        else:
            self.life.add(self._named(phase), stood)

    def _named(self, phase: str) -> str:
        """Weights that a later life reads are read once more."""
        return "reload" if phase == "load" and (self.life.resumed or self.life.number > 1) else phase


def _move_lost(lives: Sequence[Life]) -> None:
    """Steps of a life that no later one found done are lost work."""
    found: int | None = None
    for life in reversed(lives):
        if found is not None and life.step is not None:
            lost = life.step - min(life.step, max(life.resumed or 0, found))
            _lose_steps(life, lost)
        if life.resumed is not None:
            found = life.resumed if found is None else min(found, life.resumed)


def _lose_steps(life: Life, steps: int) -> None:
    spent = sum(life.seconds.get(name, 0.0) for name in _TRAINS)
    if not steps or not spent:
        return
    share = min(1.0, steps * (life.step_seconds or spent) / spent)
    for name in _TRAINS:
        lost = share * life.seconds.get(name, 0.0)
        life.add(name, -lost)
        life.add("lost", lost)
