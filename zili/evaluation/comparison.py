"""Compares runs: their last figures, the keys in which their recipes differ, and their curves on one page."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from zili.evaluation.report_curves import series
from zili.evaluation.report_parts import wall_seconds
from zili.evaluation.run_record import RunRecord, number, read_run, section, values
from zili.pages import render
from zili.pages.charts import Chart, Line, draw, smoothed
from zili.pages.figures import byte_size, compact, duration

COLOURS = 6
"""So many lines have a colour of their own; further ones have the same again, dashed."""


def compare(folders: Sequence[Path]) -> list[RunRecord]:
    """The records of several runs.

    Raises:
        DataError: one of the folders is not a run.
    """
    return [read_run(folder) for folder in folders]


def figures(run: RunRecord) -> dict[str, float | None]:
    """Where a run stands; None: it has no such figure."""
    losses, speeds = values(run.train, "loss"), values(run.train, "tokens_per_second")
    start = run.starts[-1] if run.starts else {}
    return {
        "parameters": number(section(run.summary, "model"), "parameters") or number(start, "parameters"),
        "step": float(run.last_step),
        "tokens": number(run.train[-1], "tokens") if run.train else None,
        "loss": fmean(losses[-max(1, len(losses) // 40) :]) if losses else None,
        "held_out_loss": next(iter(values(list(reversed(run.evals)), "loss")), None),
        "bits_per_byte": next(iter(values(list(reversed(run.evals)), "bits_per_byte")), None),
        "tokens_per_second": median(speeds) if speeds else None,
        "memory_bytes": max(values(run.train, "memory_bytes"), default=None),
        "seconds": wall_seconds(run),
    }


HEADINGS = {
    "parameters": "parameters",
    "step": "step",
    "tokens": "tokens",
    "loss": "loss",
    "held_out_loss": "held out",
    "bits_per_byte": "bits/byte",
    "tokens_per_second": "tokens/s",
    "memory_bytes": "memory",
    "seconds": "time",
}
"""What `figures` are called in a table."""


def cells(run: RunRecord) -> list[str]:
    """`figures` as text, in the order of `HEADINGS`."""
    forms = {
        "step": lambda step: f"{step:,.0f}",
        "memory_bytes": byte_size,
        "seconds": duration,
        **dict.fromkeys(("loss", "held_out_loss", "bits_per_byte"), lambda figure: f"{figure:.4f}"),
    }
    found = figures(run)
    return ["–" if (value := found[name]) is None else forms.get(name, compact)(value) for name in HEADINGS]


def differences(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """The keys in which the recipes differ, each with its value in every run; names and folders are not compared."""
    recipes = [dict(_flat(_recipe(run))) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in ("name", "folder"))
    found = {key: [str(recipe.get(key, "–")) for recipe in recipes] for key in keys}
    return {key: told for key, told in found.items() if len(set(told)) > 1}


def _recipe(run: RunRecord) -> dict[str, Any]:
    try:
        return tomllib.loads(run.recipe)
    except tomllib.TOMLDecodeError:
        return {}


def _flat(table: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def page(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """One HTML file with the curves of all runs in the same charts."""
    return render(
        "evaluation/comparison.html.jinja",
        title=f"{len(runs)} runs compared",
        names=list(names),
        head=["run", *HEADINGS.values()],
        rows=[[name, *cells(run)] for name, run in zip(names, runs, strict=True)],
        differences=[[key, *settings] for key, settings in differences(runs).items()],
        charts=[drawing for chart in _charts(runs, names) if (drawing := draw(chart))],
    )


_CHARTS = (
    ("train", "loss", "Loss", "Of training, smoothed; lower is better.", "nats a token"),
    ("evals", "bits_per_byte", "Bits per byte", "On held-out text; comparable on the same text alone.", "bits a byte"),
    ("evals", "loss", "Held-out loss", "Comparable with one tokenizer alone; lower is better.", "nats a token"),
    ("train", "learning_rate", "Learning rate", "As the schedules set it.", ""),
    ("train", "tokens_per_second", "Throughput", "Tokens in a second.", "tokens/s"),
    ("train", "memory_bytes", "Memory", "At most so far, of each first process.", "bytes"),
)
"""Records, key in them, title, caption and unit."""


def _charts(runs: Sequence[RunRecord], names: Sequence[str]) -> Iterator[Chart]:
    for index, (records, key, title, caption, unit) in enumerate(_CHARTS):
        curves = [series(getattr(run, records), key) for run in runs]
        if (records, key) == ("train", "loss"):
            curves = [smoothed(points, max(3, len(points) // 25)) for points in curves]
        named = enumerate(zip(names, curves, strict=True))
        lines = [Line(name, points, _look(place)) for place, (name, points) in named]
        yield Chart(title, caption, lines, unit=unit, wide=index < 2, identity=f"{records}-{key}")


def _look(place: int) -> str:
    return f"run-{place % COLOURS}" + (" dashed" if place >= COLOURS else "")
