"""Endings of processes for tests: the corpus of real ones, and failures made by hand."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from zili.supervision.rules import Kind, rules
from zili.supervision.verdicts import Ending, Failure

ENDINGS = Path(__file__).parent / "endings"
SETS = tuple(name for name in ("first", "second", "third", "fourth") if (ENDINGS / name).is_dir())
PHASES = ("start", "join", "load", "compile", "step", "save", "evaluate")


def corpus(name: str) -> dict[str, dict[str, Any]]:
    """Every file of one set by its name."""
    found = sorted((ENDINGS / name).glob("*.toml"))
    return {path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in found}


def given(case: dict[str, Any]) -> Ending:
    told = {key: case[key] for key in ("code", "signal", "error", "log", "phase", "step") if key in case}
    return Ending(rank=0, machine="a", **told)


def fail(rule: str, step: int | None, machine: str = "a", kind: Kind | None = None) -> Failure:
    kind = kind or next(one.kind for one in rules() if one.name == rule)
    return Failure(rule, kind, machine, 0, step, "step", "it failed", "look")
