"""Compares runs: their last figures, the keys in which their recipes differ, and their curves on one page."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from statistics import fmean, median
from typing import Any

import zili
from zili.evaluation.charts import Chart, Line, drawn, smoothed
from zili.evaluation.figures import byte_size, compact, duration
from zili.evaluation.report import whole_page
from zili.evaluation.report_curves import series
from zili.evaluation.report_parts import plain_table, wall_seconds
from zili.evaluation.run_record import RunRecord, number, read_run, section, values

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
    rows = [[name, *cells(run)] for name, run in zip(names, runs, strict=True)]
    told = [[key, *settings] for key, settings in differences(runs).items()]
    parts = [
        f'<header><div><p class="eyebrow">Zili training runs</p><h1>{len(runs)} runs compared</h1></div></header>',
        f"<section><h2>Where they stand</h2>{plain_table(['run', *HEADINGS.values()], rows)}</section>",
        f"<section><h2>In what their recipes differ</h2>{plain_table(['key', *names], told)}</section>" if told else "",
        _charts(runs, names),
        f"<footer>Written by Zili {escape(zili.__version__)}, "
        f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}.</footer>",
    ]
    return whole_page("Runs compared · Zili", parts)


def _charts(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    asked = (
        ("Loss", "Of training, smoothed; lower is better.", "train", "loss", True),
        (
            "Bits per byte",
            "On held-out text; comparable on the same text alone.",
            "evals",
            "bits_per_byte",
            True,
        ),
        ("Held-out loss", "Nats a token; comparable with one tokenizer alone.", "evals", "loss", False),
        ("Learning rate", "As the schedules set it.", "train", "learning_rate", False),
        ("Throughput", "Tokens a second.", "train", "tokens_per_second", False),
        ("Memory", "Bytes, at most so far, of each first process.", "train", "memory_bytes", False),
    )
    made = []
    for title, caption, records, key, wide in asked:
        lines = []
        for index, (run, name) in enumerate(zip(runs, names, strict=True)):
            points = series(getattr(run, records), key)
            smooth = smoothed(points, max(3, len(points) // 25)) if key == "loss" and records == "train" else points
            dashed = " dashed" if index >= COLOURS else ""
            lines.append(Line(name, smooth, f"run-{index % COLOURS}{dashed}"))
        made.append(drawn(Chart(title, caption, lines, wide=wide, identity=f"{records}-{key}")))
    return f'<section><h2>Curves</h2><div class="charts">{"".join(made)}</div></section>' if any(made) else ""
