"""What happened in a run, one line of JSON each, in the order in which its roots learned of it.

`account` makes seconds by phase of it. Every event has `event`, `term` (of the root that wrote it), `time` (seconds
since 1970), `monotonic` and `clock`: two monotonic times compare where the clock is the same. The events:

- `root`: another root took over; `running`: whether a life was.
- `joined`, `gone`: a machine. `generation`: of the life that it has processes of, 0: none. `silent`: seconds for which
  nothing was heard of it.
- `preparing`, `started`: a life, its `machines` and `processes`.
- `progress`: what its processes are at, twice a minute; who needs longest for a step.
- `stopping`: the first sign that it has to end. `cause`: what was seen; `hang`: only that nobody got further; `wanted`:
  somebody asked for it.
- `stopped`: all its processes have ended, and what they were at.
- `verdict`: `decision` and `cause`, in words.
- `end`: the run is over, with its exit `code`.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from zili.parallel.control.crumbs import Crumbs

EVENTS = "events.jsonl"
"""File in the supervision's folder."""
PROGRESS = 30.0
"""Seconds between two events of progress: what is not known where a run's machines all go dark at once."""
_FIRST = 5.0
"""Seconds until the first one of a life, for those who watch."""
_SHOWN = 8
"""Endings that an event tells one by one; all of ten thousand processes would say the same."""

Table = dict[str, Any]


class Ledger:
    """The events of a run, as one root appends them."""

    def __init__(self, folder: Path, term: int, put: Callable[[Callable[[], None]], None]) -> None:
        """`folder`: the supervision's. `put` does what it is given, in turn, and beside the loop: the disk may be
        slow."""
        self._path = folder / EVENTS
        self._term = term
        self._put = put
        self._clock = clock()
        self._heard: dict[str, Table] = {}
        self._due = time.monotonic() + _FIRST

    def write(self, event: str, **facts: Any) -> None:
        """Append an event. Where the disk refuses, it is lost: the run is worth more than its ledger."""
        now = {"time": round(time.time(), 3), "monotonic": round(time.monotonic(), 4), "clock": self._clock}
        line = json.dumps({"event": event, "term": self._term, **now, **facts}, separators=(",", ":")) + "\n"
        self._put(lambda: self._append(line.encode()))

    def _append(self, line: bytes) -> None:
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, line)
        finally:
            os.close(handle)

    def life(self, event: str, **facts: Any) -> None:
        """Append an event of a life that begins or is found to end; what was heard of the one before is forgotten."""
        self._heard, self._due = {}, time.monotonic() + _FIRST
        self.write(event, **facts)

    def hear(self, machine: str, life: int, at: Table | None) -> None:
        """A machine told what its processes are at; written down now and then."""
        if at is None:
            return
        self._heard[machine] = at
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + PROGRESS
            self.write("progress", life=life, at=mean_of(list(self._heard.values())))


def clock() -> str:
    """A name for what `time.monotonic` counts here: one for each start of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:13]
    except OSError:
        return f"process {os.getpid()} of {os.uname().nodename}"


def told(crumbs: Crumbs, asked: float | None = None) -> Table:
    """What a process was at, when it has ended or now. `asked`: when it was to stop, as of `time.monotonic`.

    `seconds` by phase reach up to its last change; `stood` are those from there on, `stopping` those since it was to
    stop.
    """
    stood, seconds = crumbs.stood, dict(crumbs.seconds())
    seconds[crumbs.phase] = max(0.0, seconds[crumbs.phase] - stood)
    return {
        **{"phase": crumbs.phase, "step": crumbs.step or None, "begun_after": crumbs.begun_after},
        **{"seconds": seconds, "stood": stood, "saves": crumbs.times()["save"]},
        "stopping": 0.0 if asked is None else time.monotonic() - asked,
    }


def mean_of(processes: Sequence[Mapping[str, Any]]) -> Table | None:
    """What many processes were at: means; the phase of most; the step that all have reached. None: of none."""
    tables = [one for one in processes if isinstance(one.get("seconds"), Mapping)]
    if not tables:
        return None
    found = [one["begun_after"] for one in tables if one["begun_after"] is not None]
    seconds = {name: round(fmean(one["seconds"][name] for one in tables), 4) for name in tables[0]["seconds"]}
    return {
        "seconds": {name: size for name, size in seconds.items() if size},
        "phase": Counter(one["phase"] for one in tables).most_common(1)[0][0],
        # The last one may have ended before a step that the others say is done.
        "step": min((one["step"] for one in tables if one["step"]), default=None),
        "begun_after": max(found, default=None),
        "saves": round(fmean(one["saves"] for one in tables), 2),
        # Who got further after it was asked to stop did not stand still before.
        "stood": round(fmean(_before(one) for one in tables), 4),
        "went_on": round(fmean(_after(one) for one in tables), 4),
        **_paces(tables),
    }


def _paces(tables: Sequence[Mapping[str, Any]]) -> Table:
    """What a step takes, the median, and the processes that need longest, as far as agents measured it (`Pace`)."""
    steps = [one["step_seconds"] for one in tables if one.get("step_seconds")]
    slowest = [one for table in tables for one in table.get("slowest", ())]
    slowest.sort(key=lambda one: -one["step_seconds"])
    return {"step_seconds": round(median(steps), 4), "slowest": slowest[:_SHOWN]} if steps else {}


def waited(endings: Iterable[dict[str, Any]]) -> None:
    """Say of processes that have ended how long that is ago, for each once: when the life stops, since then its end is
    known, or when the run is over. `heard`: when the root heard of it."""
    for one in endings:
        if "heard" in one:
            one["waited"] = time.monotonic() - one.pop("heard")


def _before(one: Mapping[str, Any]) -> float:
    return max(0.0, one["stood"] - one.get("stopping", 0.0)) + one.get("waited", 0.0)


def _after(one: Mapping[str, Any]) -> float:
    return max(0.0, one.get("stopping", 0.0) - one["stood"]) + one.get("went_on", 0.0)


def seen(endings: Iterable[Mapping[str, Any]], lost: Iterable[str] = ()) -> str:
    """What was seen of a life's end, in words: machines that are gone, else processes that ended by themselves."""
    gone = [f"machine {name} is gone" for name in lost]
    bad = [one for one in endings if one.get("code") and not one.get("stopped")]
    said = gone or [_ending(one) for one in bad]
    return "; ".join(said[:_SHOWN]) + (f"; {len(said) - _SHOWN} more" if len(said) > _SHOWN else "")


def _ending(one: Mapping[str, Any]) -> str:
    code = one["code"]
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"process {one['rank']} on {one['machine']}: {how}, in {one.get('phase', 'init')}"
