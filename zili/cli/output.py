"""What commands print: on a terminal as wide as it is; in a pipe or a file plain and whole, for other programs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table

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
    """The text of a cell that has a line for each of `texts` where somebody looks."""
    return ("\n" if to.is_terminal else "; ").join(filter(None, texts))


@contextmanager
def working(text: str) -> Iterator[Callable[[str], None]]:
    """What a command is at while it prints nothing else, on standard error: one line that changes on a terminal;
    elsewhere a line at the start, and one each `_SECONDS` where there is something new. Gives what to tell it by."""
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

    say(text)
    yield say
