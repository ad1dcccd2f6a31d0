"""Runs the areas of `zili doctor` as parts of `zili.diagnosis.device_check`; each returns doctor's report."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zili.diagnosis.doctor import examine
from zili.diagnosis.findings import Finding
from zili.supervision import nursery

Note = Callable[[Finding], None]
_PATIENCE = 30.0
_TOGETHER = 2


def speed(chip: str, note: Note) -> dict[str, Any]:
    return _examined(chip, note, "speed", "repeatability", "disk")


def numbers(chip: str, note: Note) -> dict[str, Any]:
    return _examined(chip, note, "numbers")


def capabilities(chip: str, note: Note) -> dict[str, Any]:
    # A package that is not installed is told so: doctor would take it for a fault of the chip.
    importlib.import_module("zili.diagnosis.capabilities")
    return _examined(chip, note, "capabilities")


def collectives(chip: str, note: Note) -> dict[str, Any]:
    """Between two devices, or two processes on the CPU."""
    return _examined(chip, note, "collectives")


def workers(chip: str, note: Note) -> dict[str, Any]:
    """Whether they can be forked."""
    nursery.warm()  # a package that is not installed is told so, as above
    return _examined(chip, note, "workers")


def _examined(chip: str, note: Note, *areas: str) -> dict[str, Any]:
    # The disk is that of temporary files: nothing is left elsewhere.
    return examine(chip, None, Path(tempfile.gettempdir()), note, _PATIENCE, areas, most=_TOGETHER)
