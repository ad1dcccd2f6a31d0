"""Where a run stands, read from its files while they grow: for the agent's endpoint and for `zili top`.

Each look reads what has come since the one before. Of a long record only the end is read.
"""

from __future__ import annotations

import json
import os
import time
import tomllib
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zili.exposition import Stragglers
from zili.plurals import counted
from zili.supervision.account import Account, Book, event_in
from zili.supervision.ledger import EVENTS
from zili.supervision.state import State, state_of

Record = dict[str, Any]
_RECORD_END = 4 << 20
"""Bytes of the record's end that the first look reads."""
_PIECE = 1 << 20
"""Bytes that are read at once; a longer line is broken."""
_STEPS = 240
_HAPPENED = 64
_RECORD, _RECIPE = "metrics.jsonl", "recipe.toml"


class Happened(NamedTuple):
    """Something that a person wants to know."""

    time: float
    """Seconds since 1970."""
    text: str


class Growing:
    """The lines of a file that others append to."""

    def __init__(self, path: Path, end: int | None = None) -> None:
        """`end`: bytes of its end with which the first look begins; None: all."""
        self._path, self._end = path, end
        self._file: tuple[int, int] | None = None
        self._at = 0

    def news(self) -> Iterator[bytes | None]:
        """Whole lines since the last look; None before the first line of another file than then.

        Raises:
            OSError: it cannot be read; one that is not there has no lines.
        """
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            found = os.fstat(file.fileno())
            if (found.st_dev, found.st_ino) != self._file or found.st_size < self._at:
                self._file = found.st_dev, found.st_ino
                self._at = 0 if self._end is None else max(0, found.st_size - self._end)
                yield None
                if self._at:
                    file.seek(self._at)
                    self._at += len(file.readline(_PIECE))  # its beginning is before
            file.seek(self._at)
            while line := file.readline(_PIECE):
                if not line.endswith(b"\n") and len(line) < _PIECE:
                    return  # it is being written
                self._at += len(line)
                if line.strip():
                    yield line


class Standing:
    """A run, as its files tell it. What is wrong in them is counted and left out."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.steps: deque[Record] = deque(maxlen=_STEPS)
        """The last steps that were recorded."""
        self.start: Record = {}
        self.evaluation: Record = {}
        self.saved: Record = {}
        """The last checkpoint, as the record has it."""
        self.stragglers = Stragglers()
        self.progress: Record = {}
        """What processes were at when the root last wrote it down."""
        self.state = State()
        self.account: Account | None = None
        """None: the run is not under `zili launch`, as far as is known."""
        self.broken = 0
        """Lines that are no whole record."""
        self.unread = ""
        """Why a file cannot be read."""
        self._notes: deque[Happened] = deque(maxlen=_HAPPENED)
        self._events: deque[Happened] = deque(maxlen=_HAPPENED)
        self._joined = 0
        """Machines that the last one of them tells of."""
        self._book: Book | None = None
        self._record = Growing(run / _RECORD, _RECORD_END)
        self._ledger = Growing(run / "supervision" / EVENTS)
        self._recipe: tuple[float, Record] = (0.0, {})

    @property
    def last(self) -> Record:
        """The last step that was recorded; empty: none."""
        return self.steps[-1] if self.steps else {}

    @property
    def planned(self) -> int | None:
        """Steps after which the run is done."""
        found = self._in_recipe("steps", self.start.get("steps"))
        return found if isinstance(found, int) else None

    @property
    def batch(self) -> int | None:
        """Samples of a step."""
        found = self._in_recipe("global_batch", None)
        return found if isinstance(found, int) else None

    @property
    def happened(self) -> list[Happened]:
        """The newest last."""
        return sorted([*self._notes, *self._events], key=lambda one: one.time)

    @property
    def is_a_run(self) -> bool:
        return any((self.run / name).exists() for name in (_RECORD, _RECIPE, "supervision"))

    def look(self, at: Mapping[str, Any] | None = None) -> None:
        """Read what is new. `at`: what processes are at now, from who sees them."""
        self.unread = ""
        try:
            self._read_record()
            self._read_events(at)
            self._read_state()
        except OSError as error:
            self.unread = str(error)

    def checkpoint(self) -> tuple[int, float] | None:
        """Step of the newest checkpoint, and when it was whole; None: there is none."""
        if {"step", "time"} <= self.saved.keys():
            return int(self.saved["step"]), float(self.saved["time"])
        try:
            newest = max((self.run / "checkpoints").glob("step-[0-9]*"))
            return int(newest.name.removeprefix("step-")), newest.stat().st_mtime
        except (OSError, ValueError):
            return None

    # ---------------------------------------------------------------- files

    def _read_record(self) -> None:
        for line in self._record.news():
            if line is None:
                self.steps.clear()
                self._notes.clear()
                continue
            record = _record_in(line)
            if record is None:
                self.broken += 1
                continue
            self._take(record)

    def _take(self, record: Record) -> None:
        kind = record["kind"]
        if kind == "train":
            self.steps.append(record)
        elif kind == "start":
            self.start, self.stragglers = record, Stragglers()
        elif kind == "straggler":
            self.stragglers.hear(record)
        elif kind == "eval":
            self.evaluation = record
        elif kind == "saved":
            self.saved = record
        elif kind == "note":
            self._notes.append(Happened(record["time"], str(record.get("text", ""))))

    def _read_events(self, at: Mapping[str, Any] | None) -> None:
        for line in self._ledger.news():
            if line is None:
                self._book = Book()
                self._events.clear()
                self._joined = 0
                continue
            event = event_in(line)
            try:
                assert self._book is not None
                self._book.take(event or {})
                self._hear(event or {})
            except (KeyError, TypeError, ValueError, AttributeError):
                self.broken += 1
        if self._book is not None:
            self.account = self._book.so_far(at)

    def _hear(self, event: Record) -> None:
        if event["event"] == "progress" and event.get("at"):
            self.progress = event["at"]
        text = _told(event)
        if event["event"] == "joined":
            self._joined += 1
            if self._joined > 1:  # of thousands that come one is a line
                self._events.pop()
                text = f"{counted(self._joined, 'machine')} joined"
        elif text:
            self._joined = 0
        if text:
            self._events.append(Happened(event["time"], text))

    def _read_state(self) -> None:
        try:
            found = json.loads((self.run / "supervision" / "state.json").read_bytes())
        except (FileNotFoundError, ValueError, RecursionError):
            return
        self.state = state_of(found) if isinstance(found, dict) else State()

    def _in_recipe(self, key: str, other: Any) -> Any:
        """A key of `[training]` in the run's resolved recipe, which may be damaged."""
        try:
            changed = (self.run / _RECIPE).stat().st_mtime
            if changed != self._recipe[0]:
                self._recipe = changed, tomllib.loads((self.run / _RECIPE).read_text(encoding="utf-8"))
            return self._recipe[1]["training"][key]
        except (OSError, ValueError, KeyError, TypeError):
            return other


def _record_in(line: bytes) -> Record | None:
    """A record of the run; None: it is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("kind"), str):
        return None
    needed = ("time", "step") if found["kind"] in ("train", "saved", "eval") else ("time",)
    return found if all(isinstance(found.get(name), int | float) for name in needed) else None


def _told(event: Record) -> str:
    """An event in words; empty: nobody asks for it."""
    what = event["event"]
    if what == "joined":
        return f"machine {event['machine']} joined"
    if what == "gone":
        return f"machine {event['machine']} {event['how']}"
    if what == "preparing":
        machines, processes = counted(len(event["machines"]), "machine"), counted(event["processes"], "process")
        return f"life {event['life']}: {processes} on {machines}"
    if what == "stopping":  # a verdict follows where nobody asked for it
        return f"life {event['life']} is to end: {event['cause']}" if event.get("wanted") else ""
    if what == "verdict":
        return f"{event['cause']} Zili: {event['decision']}"
    return f"the run is over, exit code {event['code']}" if what == "end" else ""


def age(since: float) -> float:
    """Seconds since a time of 1970's count; a clock that went back gives none."""
    return max(0.0, time.time() - since)
