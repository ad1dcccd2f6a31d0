"""The report of a run: one HTML file that needs nothing else, neither network nor script."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import NamedTuple

from zili.durable import write_whole
from zili.evaluation.report_curves import charts, lead
from zili.evaluation.report_lives import PHASES_HEAD, ROWS_HEAD, lives
from zili.evaluation.report_parts import choices, details, evaluations, facts, headline, samples, state, tiles
from zili.evaluation.run_record import RunRecord, read_run
from zili.pages import render
from zili.serving.generate.text_stream import visible


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
    write_whole(folder / "report.html", page(read_run(folder)))
    return folder / "report.html"


def page(run: RunRecord) -> str:
    """The whole page."""
    return render(
        "evaluation/report.html.jinja",
        title=run.name,
        state=state(run),
        facts=facts(run),
        notes=[visible(note) for note in run.notes],
        headline=headline(run),
        tiles=list(tiles(run)),
        charts=charts(run),
        lead=lead(run),
        evaluations=evaluations(run),
        lives=lives(run.folder),
        lives_head=ROWS_HEAD,
        phases_head=PHASES_HEAD,
        samples=samples(run),
        choices=choices(run),
        details=details(run),
        recipe=visible(run.recipe),
        commands=next_commands(run.folder),
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
