"""The origin of a release's weights, as far as their folder says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zili.release.folder import read_json
from zili.release.opening import OpenModel

_RECORDED = ("training", "optimizer", "schedule", "parallel", "seed")
"""Tables of a recipe that say how a model was trained, and nothing about the machine."""


def provenance_of(source: Path, model: OpenModel) -> dict[str, Any]:
    """Plain values. Of a run: its name, step, tokens, data, recipe and versions; of an import: what it was."""
    if model.checkpoint is not None:
        return _of_run(model.checkpoint, model)
    if (source / "release.json").is_file():
        return {"kind": "release", "of": read_json(source / "release.json").get("provenance", {})}
    return _of_publication(model)


def _of_run(checkpoint: Path, model: OpenModel) -> dict[str, Any]:
    from zili.training.checkpoints import read_state

    state = read_state(checkpoint)
    recipe = {part: state.config[part] for part in _RECORDED if part in state.config}
    training = recipe["training"] = {k: v for k, v in recipe.get("training", {}).items() if k != "start_from"}
    chip = state.config.get("chip", {})
    return {
        "kind": "run",
        "name": state.config.get("name"),
        "step": state.step,
        "samples": state.samples,
        # Of the steps: the samples have those that were left out too.
        "tokens": state.step * training.get("global_batch", 0) * training.get("sequence_length", 0),
        "data_fingerprint": state.data_fingerprint,
        "recipe": recipe,
        "chip": {key: chip.get(key) for key in ("name", "precision")},
        "versions": state.versions,
        "operations": state.operations,
        "started_from": _of_publication(model) if model.origin else None,
    }


def _of_publication(model: OpenModel) -> dict[str, Any]:
    if model.origin is None:
        return {"kind": "unknown"}
    named = ("_name_or_path", "architectures", "model_type")
    config = model.origin.config
    return {"kind": "published", "layout": model.origin.layout, **{k: config[k] for k in named if k in config}}
