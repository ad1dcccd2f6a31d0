"""`release.json`: what a release is, where it comes from, and what its model must say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from zili import __version__
from zili.config.model import ModelConfig
from zili.errors import CheckpointError
from zili.models.arithmetic import count_parameters
from zili.release.folder import read_json
from zili.release.layouts.layout import PublishedConfig
from zili.release.probe import Probe

RELEASE_FILE = "release.json"
_FORMAT, _VERSION = "zili-release", 1


@dataclass(frozen=True)
class Evaluation:
    """One line of a table of results."""

    task: str
    metric: str
    value: float
    error: float | None = None
    """Standard error."""
    samples: int | None = None
    few_shot: int | None = None
    command: str | None = None
    """What made it."""
    generated: bool = False
    """The task was made for this purpose by Zili: no benchmark."""


@dataclass(frozen=True)
class Release:
    """The record of a release folder."""

    layout: str
    model: ModelConfig
    dtype: str
    """The dtype of the weights."""
    notes: tuple[str, ...]
    """What the layout says in other words than the source."""
    difference: float
    """Largest difference of a log-probability between release and source, nats. The source is as it is stored: for a
    run the fp32 weights that were trained, whatever `dtype` says."""
    probe: Probe
    provenance: Mapping[str, Any]
    evaluations: tuple[Evaluation, ...] = ()
    but_for_rounding: float | None = None
    """The same beside the source rounded to `dtype`. None in releases from before it was told apart: their
    `difference` is this."""

    def as_json(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "layout": self.layout,
            "dtype": self.dtype,
            "parameters": count_parameters(self.model).total,
            "model": self.model.model_dump(),
            "notes": list(self.notes),
            "difference_from_source": self.difference,
            "difference_but_for_rounding": self.but_for_rounding,
            "provenance": dict(self.provenance),
            "evaluations": [asdict(one) for one in self.evaluations],
            "made_with": {"zili": __version__, "torch": torch.__version__},
            "probe": self.probe.as_json(),
        }


def read_release(folder: Path) -> Release:
    """The record in a release folder.

    Raises:
        CheckpointError: none there, broken, or of a version this Zili does not read.
    """
    path = folder / RELEASE_FILE
    values = read_json(path)
    if values.get("format") != _FORMAT or values.get("version") != _VERSION:
        raise CheckpointError(
            f"{path}: format {values.get('format')!r} version {values.get('version')!r}; this Zili reads "
            f"{_FORMAT!r} version {_VERSION}"
        )
    try:
        return Release(
            layout=str(values["layout"]),
            model=PublishedConfig(path, {}).model(values["model"]),
            dtype=str(values["dtype"]),
            notes=tuple(values["notes"]),
            difference=float(values["difference_from_source"]),
            probe=Probe.from_json(values["probe"]),
            provenance=dict(values["provenance"]),
            evaluations=tuple(Evaluation(**one) for one in values["evaluations"]),
            but_for_rounding=None if (rounded := values.get("difference_but_for_rounding")) is None else float(rounded),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}; fetch the folder again") from error
