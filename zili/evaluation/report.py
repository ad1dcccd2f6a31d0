"""The report of a run: one HTML file that needs nothing else, neither network nor script.

All text from the run is escaped: a model's samples are untrusted. As a second lock the page's content
security policy admits only the one script of the template, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from collections.abc import Iterable
from datetime import datetime
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import NamedTuple

import zili
from zili.durable import write_whole
from zili.evaluation.report_curves import charts
from zili.evaluation.report_parts import (
    choices,
    commands,
    details,
    evaluations,
    header,
    headline,
    notes,
    samples,
    tiles,
)
from zili.evaluation.run_record import RunRecord, read_run


class Command(NamedTuple):
    """A command line to type, and what it is for."""

    line: str
    purpose: str


def write_report(run_folder: Path | str) -> Path:
    """Write `report.html` into a run folder from what the run left there; returns its path.

    A missing, damaged or empty record leaves its part out and a note in; see `zili.evaluation.run_record`.

    Raises:
        DataError: the folder is not a run.
    """
    folder = Path(run_folder)
    page = render(read_run(folder))
    write_whole(folder / "report.html", page)
    return folder / "report.html"


def render(run: RunRecord) -> str:
    """The whole page."""
    parts = [
        header(run),
        notes(run),
        headline(run),
        tiles(run),
        charts(run),
        evaluations(run),
        samples(run),
        choices(run),
        details(run),
        commands(next_commands(run.folder)),
        f"<footer>Written by Zili {escape(zili.__version__)}, "
        f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}.</footer>",
    ]
    return whole_page(f"{run.name} · Zili", parts)


def whole_page(title: str, parts: Iterable[str]) -> str:
    """`parts`, which are HTML, in the frame that all pages about runs have; `title` is text."""
    files = resources.files("zili.evaluation")
    page = files.joinpath("report.html").read_text(encoding="utf-8")
    return Template(page).substitute(
        title=escape(title),
        style=files.joinpath("report.css").read_text(encoding="utf-8"),
        script_hash=_script_hash(page),
        body="\n".join(part for part in parts if part),
    )


def next_commands(run_folder: Path) -> list[Command]:
    """What one can do with a run, in the order people do it."""
    run = _as_typed(run_folder)
    return [
        Command(f"zili sample {run} --prompt '...'", "continue a text of yours"),
        Command(f"zili chat {run}", "write with it in the terminal"),
        Command(f"zili eval {run} --text PATH", "bits per byte on other text"),
        Command(f"zili train {_as_typed(run_folder / 'recipe.toml')}{_more_steps(run_folder)}", "train on"),
        Command(f"zili report {run}", "write its report, a page, from what it recorded"),
    ]


def _more_steps(run_folder: Path) -> str:
    """The override that gives a finished run as many steps again; a run that is not finished needs none."""
    run = read_run(run_folder)
    if not run.planned_steps or run.last_step < run.planned_steps:
        return ""
    return f" --set training.steps={2 * run.planned_steps}"


def _as_typed(path: Path) -> str:
    """A path as one would type it here: relative where it is below, quoted where needed."""
    whole = path.resolve()
    here = Path.cwd()
    return shlex.quote(str(whole.relative_to(here) if whole.is_relative_to(here) else whole))


def _script_hash(page: str) -> str:
    """The content security policy's name for the template's script."""
    found = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    script = found.group(1) if found else ""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
