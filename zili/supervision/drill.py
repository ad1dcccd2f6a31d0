"""A drill: faults are ordered of a run, one after another, and what follows is written down.

It speaks with the run's root as `zili launch drain` does, so whoever cannot read the run's secret drills nothing. What
happened it reads from the run's folder: reports of agents, the ledger, the record of steps.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zili.errors import ConfigError
from zili.plurals import counted
from zili.supervision.faults import KINDS, Fault
from zili.supervision.firing import REPORTS, report_file
from zili.supervision.folder import SupervisionFolder, ask_root
from zili.supervision.ledger import EVENTS

DRILLS = "drill.jsonl"
"""File in the supervision's folder: a line of JSON for each fault of each drill."""
NOT_SURVIVED = 14
"""Exit code of a drill that found a run which did not go on as it should, or none of whose faults fired."""
FIRING = 30.0
"""Seconds for a process to be in the phase that a fault is meant for."""
_FOLLOWS = 180.0
"""Seconds for a step to follow; a hang is found after the run's `--patience` and ten times its longest step."""
_REACH = 15.0
"""Seconds for a root to answer: another one is begun within a few."""
_POLL = 0.05
_APART = 2
"""Finished steps between two faults: three lives without a new step end a run."""
_TAIL = 1 << 16


@dataclass
class Followed:
    """A fault, and what followed it."""

    fault: Fault
    fired: bool = False
    phase: str = ""
    """In which it fired."""
    step: int | None = None
    """Steps that were done then."""
    why: str = ""
    """Why it did not fire."""
    file: str = ""
    """What was damaged."""
    cause: str = ""
    """What the run said."""
    rule: str = ""
    decision: str = ""
    went_on: str = ""
    """From where the next life went on, in its own words."""
    seconds: float | None = None
    """From the fault until the next finished step was recorded; None: there was none."""
    code: int | None = None
    """Exit code of the run, where it ended."""

    @property
    def counts(self) -> bool:
        """Whether it fired in the phase that it was meant for."""
        return self.fired and self.phase == self.fault.phase

    @property
    def went_well(self) -> bool:
        """Whether the run went on, or ended as it should; what did not fire says nothing."""
        kind = KINDS[self.fault.kind]
        ended_rightly = self.code in kind.ends_run if kind.ends_run else self.code == 0
        return not self.fired or self.seconds is not None or ended_rightly

    def as_table(self) -> dict[str, Any]:
        return {**asdict(self), "counts": self.counts, "went_well": self.went_well}


class Watched:
    """What a run's folder says of what happens in it. Only what comes after is told."""

    def __init__(self, run: Path) -> None:
        self._events = run / "supervision" / EVENTS
        self._steps = run / "metrics.jsonl"
        self._read = self._events.stat().st_size if self._events.exists() else 0

    def events(self) -> list[dict[str, Any]]:
        """Those of the ledger since the last call."""
        with suppress(OSError), self._events.open("rb") as opened:
            opened.seek(self._read)
            whole, end, _ = opened.read().rpartition(b"\n")
            self._read += len(whole) + len(end)
            return [event for line in whole.splitlines() if (event := _table(line)) is not None]
        return []

    def newest_step(self) -> tuple[int, float]:
        """The last step on record, and when that was written (seconds since 1970); zeros: there is none."""
        for record in self._newest("train"):
            return int(record["step"]), float(record["time"])
        return 0, 0.0

    def went_on(self, after: float) -> str:
        """From where a life went on that did so after that time; "": none did."""
        for note in self._newest("note"):
            if note["time"] > after and str(note.get("text")).startswith("resumed from"):
                return str(note["text"])
        return ""

    def _newest(self, kind: str) -> Iterator[dict[str, Any]]:
        """Records of a kind, the newest first."""
        records = (_table(line) for line in reversed(_tail(self._steps)))
        return (one for one in records if one is not None and one.get("kind") == kind)


class Drill:
    """Faults of one schedule on one run."""

    def __init__(self, folder: SupervisionFolder, seed: int, tend: Callable[[], None] = lambda: None) -> None:
        """`tend` is called again and again while it waits."""
        self._folder, self._seed, self._tend = folder, seed, tend
        self._name = f"{seed}-{secrets.token_hex(4)}"
        self._over = False
        self._furthest = 0
        """The largest step that the run was seen to have done."""
        (folder.path / REPORTS).mkdir(mode=0o700, exist_ok=True)

    def run(self, faults: Sequence[Fault], every: float) -> Iterator[Followed]:
        """Make each fault, at least `every` seconds and two steps after the one before, and tell what followed."""
        for fault in faults:
            if not self._steady(every):
                yield Followed(fault, why="the run was over, or made no step")
                continue
            found = self._follow(fault)
            self._keep(found)
            yield found
            if found.code is not None:
                self._over = True

    def _waiting(self, seconds: float) -> Iterator[float]:
        """Look now and then, for so long; the seconds that have passed."""
        begun = time.monotonic()
        while (passed := time.monotonic() - begun) < seconds:
            yield passed
            self._tend()
            time.sleep(_POLL)

    def _steady(self, every: float) -> bool:
        """Wait until the run has made some steps that it had not made before; whether it did."""
        watched = Watched(self._folder.run)
        for passed in self._waiting(every + _FOLLOWS):
            if self._over or "over" in self._folder.root()[1]:
                return False
            step, _ = watched.newest_step()
            if passed >= every and step >= self._furthest + _APART:
                self._furthest = step
                return True
        return False

    def _follow(self, fault: Fault) -> Followed:
        watched, found = Watched(self._folder.run), Followed(fault)
        found.why = self._order(fault)
        if not found.why:
            self._hear(found, watched)
        return found

    def _order(self, fault: Fault) -> str:
        """Have the machine carry out a fault; "": it was told, else why not."""
        order = {**fault.as_table(), "drill": self._name, "seconds": FIRING}
        said = ""
        for _ in self._waiting(_REACH):
            try:
                said = ask_root(self._folder, {"machine": fault.machine, "fault": order})
            except ConfigError as error:  # another root is begun
                said = str(error)
            if not said:
                break
        return said

    def _hear(self, found: Followed, watched: Watched) -> None:
        """Wait for the report, and for what follows."""
        file = report_file(self._folder.run, self._name, found.fault.number)
        for _ in self._waiting(FIRING + _REACH):
            with suppress(OSError, ValueError):
                report = json.loads(file.read_text(encoding="utf-8"))
                found.fired, found.phase = bool(report["fired"]), str(report.get("phase", ""))
                found.step, found.file = report.get("step"), str(report.get("file", ""))
                found.why = str(report.get("why", ""))
                self._furthest = max(self._furthest, found.step or 0)
                file.unlink(missing_ok=True)
                if found.fired:
                    self._watch(found, watched, float(report["time"]))
                return
        found.why = f"machine {found.fault.machine} reported nothing"

    def _watch(self, found: Followed, watched: Watched, fired: float) -> None:
        """Wait for the next finished step after a fault at `fired`, or for the end of the run."""
        follows = KINDS[found.fault.kind].follows
        began = None if follows else fired
        for _ in self._waiting(_FOLLOWS):
            for event in watched.events():
                if event["event"] == "verdict":
                    found.cause, found.rule, found.decision = event["cause"], event["rule"], event["decision"]
                elif event["event"] in (follows, "started") and event["time"] >= fired:
                    began = event["time"]
                elif event["event"] == "end":
                    found.code, found.cause = event["code"], found.cause or event["text"]
                    return
            step, recorded = watched.newest_step()
            self._furthest = max(self._furthest, step)
            if began is not None and recorded > began:
                found.seconds, found.went_on = round(recorded - fired, 3), watched.went_on(fired)
                return

    def _keep(self, found: Followed) -> None:
        line = json.dumps({"drill": self._name, "seed": self._seed, "time": time.time(), **found.as_table()})
        handle = os.open(self._folder.path / DRILLS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, line.encode() + b"\n")
        finally:
            os.close(handle)


def drilled(run: Path) -> tuple[SupervisionFolder, list[str], int]:
    """The folder of a run that can be drilled; its machines, and the processes of each.

    Raises:
        ConfigError: it is no run under `zili launch`, of another user, or over.
    """
    folder = run / "supervision"
    try:
        owner = folder.stat().st_uid
    except OSError as error:
        raise ConfigError(f"{run} is no run that `zili launch` has begun") from error
    if owner != os.getuid():
        raise ConfigError(f"{run} is the run of another user (number {owner}); a drill is for who began the run")
    found = SupervisionFolder(run)
    term, record = found.root()
    if not term or "over" in record:
        raise ConfigError(f"{run} is over, or was never begun: begin it with `zili launch`, or drill its recipe")
    state = found.read_state()
    processes = _processes(folder / EVENTS)
    if not state.get("machines") or not processes:
        raise ConfigError(f"{run} has no process yet; drill it when it trains")
    return found, list(state["machines"]), max(1, processes // len(state["machines"]))


def exit_code(found: Sequence[Followed]) -> int:
    """0: the run went on after each fault that fired, or ended as it should; else `NOT_SURVIVED`."""
    well = all(one.went_well for one in found)
    return 0 if well and any(one.counts for one in found) else NOT_SURVIVED


def sum_up(found: Sequence[Followed]) -> str:
    """A drill in a line."""
    count = sum(one.counts for one in found)
    bad = sum(not one.went_well for one in found)
    text = f"{counted(count, 'fault')} of {len(found)} fired in the phase meant for"
    return f"{text}; the run did not go on after {bad}" if bad else f"{text}; the run went on, or ended as it should"


def _processes(events: Path) -> int:
    """Of the newest life."""
    for line in reversed(_tail(events)):
        if (event := _table(line)) is not None and event.get("event") == "preparing":
            return int(event["processes"])
    return 0


def _tail(file: Path) -> list[bytes]:
    with suppress(OSError), file.open("rb") as opened:
        opened.seek(max(0, os.fstat(opened.fileno()).st_size - _TAIL))
        return opened.read().splitlines()
    return []


def _table(line: bytes) -> dict[str, Any] | None:
    with suppress(ValueError, RecursionError):
        found = json.loads(line)
        return found if isinstance(found, dict) else None
    return None
