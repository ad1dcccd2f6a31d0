"""The shape of a model that lies in a folder of Zili's, read without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from zili.config.model import ModelConfig


def shape_in(folder: Path) -> ModelConfig | None:
    """The shape of an imported model, a checkpoint, or the newest checkpoint of a run; None: nothing of these.

    Adapters are left out: whoever reads such a checkpoint finds them merged.
    """
    for path in _files(folder):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            table = content["model"] if path.name == "model.json" else content["config"]["model"]
            return ModelConfig.model_validate({**table, "lora": None})
        except (OSError, ValueError, LookupError, TypeError):
            continue  # damaged, or not ours; whoever reads the weights says so
    return None


def _files(folder: Path) -> Iterator[Path]:
    yield folder / "run.json"
    yield from sorted(folder.glob("checkpoints/step-*/run.json"), reverse=True)
    yield folder / "model.json"  # the last: a run that was begun from a published model has one, without weights
