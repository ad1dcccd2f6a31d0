"""What a report says of the lives of a run under `zili launch`, and of where its time went."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from zili.errors import DataError
from zili.pages.charts import Bar, bar
from zili.pages.figures import duration
from zili.plurals import counted
from zili.serving.generate.text_stream import visible
from zili.supervision.account import WORDS, Account, Life, account_of, summary

_GROUPS = {
    "step": ("step",),
    "lost work": ("lost",),
    "detection": ("detection",),
    "machines, stopping": ("waiting", "stopping", "replacement"),
    "init": ("init",),
    "join": ("join",),
    "load": ("load", "reload"),
    "warm-up": ("warm_up",),
    "data wait": ("data",),
    "copy, save, evaluate": ("copy", "save", "evaluate"),
    "end, unaccounted": ("end", "unaccounted"),
}
"""Parts of the bar: as many as there are colours."""
_MOST = 50
"""Lives that are shown one by one: the first and the last of them."""
_UNITS = ((7200.0, 3600.0, "h"), (120.0, 60.0, "min"), (0.0, 1.0, "s"))


class Lives(NamedTuple):
    """The section: a line, a bar, notes, and two tables with their headings."""

    lead: str
    bar: Bar
    notes: list[str]
    phases: list[list[str]]
    rows: list[list[str]]


PHASES_HEAD = ["Phase", "Time", "Share"]
ROWS_HEAD = ["Life", "Began", "Machines", "Steps", "Took", "Trained", "What ended it"]


def lives(run: Path) -> Lives | None:
    """None: the run was not under `zili launch`, or nothing of it is known."""
    try:
        found = account_of(run)
    except DataError:
        return None
    if not found.lives or found.wall <= 0:
        return None
    each = {counted(life.processes // life.machines, "process") for life in found.lives if life.machines}
    lead = f"{summary(found)}. {' or '.join(sorted(each))} on each machine."
    return Lives(lead, _bar(found), _notes(found), _phases(found), _rows(found.lives))


def _bar(found: Account) -> Bar:
    size, unit = next((size, unit) for least, size, unit in _UNITS if found.wall >= least)
    seconds = found.seconds
    parts = {name: sum(abs(seconds.get(one, 0.0)) for one in group) / size for name, group in _GROUPS.items()}
    return bar(parts, unit)


def _notes(found: Account) -> list[str]:
    notes = [visible(note) + "." for note in found.notes]
    if found.idle:
        notes.append(f"Between launches {duration(found.idle)} passed in which nobody supervised the run.")
    if not found.balances:
        notes.append(f"Of {100 * found.unknown:.1f} % of the time the phase is not known.")
    if len(found.lives) > _MOST:
        last = found.lives[-_MOST // 2]
        notes.append(f"The table leaves out lives {found.lives[_MOST // 2].number} to {last.number - 1}.")
    if found.code is None:
        notes.append("The run goes on, or its supervisors are gone: this reaches to the last event.")
    return notes


def _phases(found: Account) -> list[list[str]]:
    ranked = sorted(found.seconds.items(), key=lambda one: -abs(one[1]))
    return [[WORDS[name], duration(size), f"{100 * size / found.wall:.1f} %"] for name, size in ranked]


def _rows(found: list[Life]) -> list[list[str]]:
    shown = found if len(found) <= _MOST else [*found[: _MOST // 2], *found[-_MOST // 2 :]]
    return [
        [
            str(life.number),
            f"{datetime.fromtimestamp(life.began):%Y-%m-%d %H:%M}",
            f"{life.machines:,}",
            _steps(life),
            duration(life.wall),
            f"{100 * life.seconds.get('step', 0.0) / life.wall:.0f} %" if life.wall > 0 else "",
            _ended(life),
        ]
        for life in shown
    ]


def _ended(life: Life) -> str:
    """What ended it, and what Zili did then."""
    cause = visible(life.cause) or ("" if life.over else "goes on")
    if not life.verdict:
        return cause
    return f"{cause}{'' if cause.endswith('.') else '.'} Zili: {visible(life.verdict)}"


def _steps(life: Life) -> str:
    """Done before it, and by it."""
    return "none" if life.step is None else f"{life.resumed or 0:,} to {life.step:,}"
