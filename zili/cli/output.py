"""What commands print: on a terminal as wide as it is; in a pipe or a file plain and whole, for other programs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table

from zili.cli.options import program, training
from zili.config import Choice

_WHOLE = 100_000
"""Columns where nobody looks: no line is wrapped or cut."""
_SECONDS = 30.0
"""Between lines of progress in a log."""


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Where a command prints to."""
    found = Console(stderr=stderr, quiet=quiet)
    return found if found.is_terminal else Console(stderr=stderr, quiet=quiet, width=_WHOLE)


def table(
    to: Console,
    columns: Sequence[str],
    *,
    left: Sequence[str] = (),
    title: str | None = None,
    boxed: bool = False,
    lines: bool = False,
) -> Table:
    """An empty table, figures to the right, the columns named in `left` to the left. On a terminal it may be `boxed`,
    with `lines` between rows, and a cell that is too wide is folded, never cut; elsewhere a row is a line."""
    whole = not to.is_terminal
    frame = box.HEAVY_HEAD if boxed and not whole else None
    made = Table(
        box=frame, pad_edge=frame is not None, show_lines=lines and not whole, title=title, title_justify="left"
    )
    for name in columns:
        side: JustifyMethod = "left" if name in left else "right"
        heading = name.replace("\n", " ") if whole else name
        made.add_column(heading, justify=side, no_wrap=whole, overflow="fold")
    return made


def several_lines(to: Console, *texts: str) -> str:
    """The text of a cell: on a terminal each of `texts` has a line."""
    return ("\n" if to.is_terminal else "; ").join(filter(None, texts))


def print_opened(choices: Iterable[Choice], report: Iterable[str], to: Console) -> None:
    """What was decided for a run that is open: every automatic choice with its reason, and what its data amounts to."""
    for line in (*choices, *report):
        to.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def print_next(folder: Path, to: Console) -> None:
    """The commands one can go on with, as this shell takes them."""
    from zili.evaluation.report import next_commands

    for command in next_commands(folder):
        trains = command.line.startswith("zili train")
        line = command.line.replace(*(("zili train", training()) if trains else ("zili", program())), 1)
        to.print(f"  {line:<46} # {command.purpose}", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def working(text: str = "") -> Iterator[Callable[[str], None]]:
    """Say on standard error what a command is doing while it prints nothing else. On a terminal it is one line that
    changes; elsewhere a line at the start, and every `_SECONDS` one if there is news. Gives the function that takes
    news."""
    to = console(stderr=True)
    if to.is_terminal:
        with to.status(text) as status:
            yield status.update
        return
    due = 0.0

    def say(new: str) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + _SECONDS
            to.print(new, highlight=False, markup=False)

    if text:
        say(text)
    yield say
