"""Reading a run folder as it is found: finished, still running, interrupted, or cut off by a crash."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zili.errors import DataError
from zili.plurals import counted

Record = dict[str, Any]


@dataclass
class RunRecord:
    """What a run left behind. Anything may be missing; `notes` says in sentences what is missing or wrong."""

    folder: Path
    starts: list[Record] = field(default_factory=list)
    train: list[Record] = field(default_factory=list)
    """In the order of steps. Of a step that was repeated after a resume, the last record."""
    evals: list[Record] = field(default_factory=list)
    """In the order of steps, then of the size of the scored text: a last evaluation may take more of it."""
    samples: list[Record] = field(default_factory=list)
    summary: Record = field(default_factory=dict)
    recipe: str = ""
    planned_steps: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def last_step(self) -> int:
        return int(self.train[-1]["step"]) if self.train else 0


def number(record: Record, key: str) -> float | None:
    """`record[key]` if it is a finite number."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def values(records: list[Record], key: str) -> list[float]:
    """The finite numbers under `key`, in order."""
    return [value for record in records if (value := number(record, key)) is not None]


def section(record: Record, key: str) -> Record:
    """`record[key]` if it is a table, otherwise an empty one."""
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def read_run(folder: Path) -> RunRecord:
    """Everything a report needs from `folder`.

    Raises:
        DataError: the folder is not a run (no metrics.jsonl and no recipe.toml).
    """
    metrics, recipe = folder / "metrics.jsonl", folder / "recipe.toml"
    if not metrics.is_file() and not recipe.is_file():
        raise DataError(
            f"{folder} is not a run: it holds neither metrics.jsonl nor recipe.toml; "
            "give the folder that `zili train` made, such as runs/quickstart"
        )
    run = RunRecord(folder)
    _take_metrics(run, metrics)
    run.samples = list(_lines(folder / "samples.jsonl", run.notes))
    run.summary = _summary(folder / "summary.json", run.notes)
    if recipe.is_file():
        run.recipe = recipe.read_text(encoding="utf-8", errors="replace")
    run.planned_steps = _planned_steps(run)
    _note_state(run)
    return run


def _take_metrics(run: RunRecord, path: Path) -> None:
    train: dict[float, Record] = {}
    evals: dict[tuple[float, float], Record] = {}
    if not path.is_file():
        run.notes.append("There is no metrics.jsonl: the run stopped before its first step.")
        return
    for record in _lines(path, run.notes):
        kind, step = record.get("kind"), number(record, "step")
        if kind == "start":
            run.starts.append(record)
        elif kind == "note" and record.get("text"):
            run.notes.append(str(record["text"]))
        elif kind == "train" and step is not None:
            train[step] = record
        elif kind == "eval" and step is not None:
            evals[step, number(record, "bytes") or 0] = record
    run.train = [train[step] for step in sorted(train)]
    run.evals = [evals[place] for place in sorted(evals)]


def _lines(path: Path, notes: list[str]) -> Iterator[Record]:
    """JSON objects of a file, one a line; a broken line is named in `notes` and left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for count, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                yield record
            else:
                cut = "" if line.endswith("\n") else "; it was probably being written when the run stopped"
                notes.append(f"{path.name} line {count} is not a whole JSON object and was left out{cut}.")


def _summary(path: Path, notes: list[str]) -> Record:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        notes.append("summary.json is damaged and was left out.")
        return {}
    return found


def _planned_steps(run: RunRecord) -> int | None:
    """The recipe's number, which may move while a quickstart runs; else the one that the last start recorded.

    The recipe may be damaged: hence not `zili.config.load_recipe`.
    """
    told = number(run.starts[-1], "steps") if run.starts else None
    try:
        written = number(section(tomllib.loads(run.recipe), "training"), "steps")
    except tomllib.TOMLDecodeError:
        written = None
    steps = told if written is None else written
    return None if steps is None else int(steps)


def _note_state(run: RunRecord) -> None:
    if run.train and run.planned_steps and run.last_step < run.planned_steps:
        run.notes.append(
            f"Step {run.last_step:,} of {run.planned_steps:,}: the run was stopped early, or is still going."
        )
    if len(run.starts) > 1:
        run.notes.append(f"The run was started {len(run.starts)} times, each after the first from a checkpoint.")
    broken = [r for r in run.train if "loss" in r and number(r, "loss") is None]
    if broken:
        run.notes.append(
            f"The loss is not a number in {counted(len(broken), 'step')}, first at step {int(broken[0]['step']):,}: "
            "the training diverged there. Go on from an earlier checkpoint with a lower learning rate."
        )
    if run.train and not run.evals:
        run.notes.append("There is no evaluation yet, so there are no bits per byte to show.")
