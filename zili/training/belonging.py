"""Whether a checkpoint belongs to a run: of the same model, data in the same order, teacher and objective."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any

from zili.config import ModelConfig, RunConfig
from zili.errors import CheckpointError
from zili.training.checkpoints import RunState

_DATA_ORDER = ("seed", "training.global_batch", "training.sequence_length", "data.sources")


def state_that_belongs(
    path: Path, state: RunState, config: RunConfig, data: str, teacher: str, classes: dict[str, str]
) -> RunState:
    """What `path` says of itself, where it is of this run: `data` and `teacher` are the fingerprints here, `classes`
    the names of what is learned and of the kind of model.

    Raises:
        CheckpointError: it is of another one, and in what.
    """
    there, here = state.config, config.model_dump(mode="json")
    # A run from before a key was there had what is now its default.
    there = {**there, "model": ModelConfig.model_validate(there["model"]).model_dump(mode="json")}
    shape = _differences(there, here, [f"model.{key}" for key in here["model"]])
    if shape:
        raise CheckpointError(f"{path} is of another shape: {shape}; match it, or give the run another folder")
    if state.data_fingerprint != data or there["training"]["global_batch"] != here["training"]["global_batch"]:
        order = _differences(there, here, _DATA_ORDER) or "the token stores hold other tokens"
        raise CheckpointError(
            f"{path} was trained on other data, or on the same in another order: {order}; "
            "restore it, or give the run another folder"
        )
    _refuse_other_learning(path, state, config, teacher, classes)
    return state


def _refuse_other_learning(
    path: Path, state: RunState, config: RunConfig, teacher: str, classes: dict[str, str]
) -> None:
    """Another teacher, objective or kind of model; of one from before they were written down nothing is known."""
    before = state.teacher_fingerprint
    if teacher and before not in ("", teacher):
        raise CheckpointError(
            f"{path} learned from another teacher: the fingerprint of its weights was {before[:12]}, that of "
            f"objective.distill.teacher is {teacher[:12]}; name the one before, or give the run another folder and "
            f"training.start_from = '{config.folder}'"
        )
    for argument, kind in classes.items():
        if state.classes.get(argument, kind) != kind:
            raise CheckpointError(
                f"{path} was trained with {argument}={state.classes[argument]}, and this run has {kind}; give the "
                f"same, by zili.train({argument}=...) if it was given so, or give the run another folder"
            )


def _differences(there: dict[str, Any], here: dict[str, Any], keys: Iterable[str]) -> str:
    """`seed 0 there, 1 here, ...` of the dotted keys in which two configurations differ."""
    pairs = [(key, _at(there, key), _at(here, key)) for key in keys]
    return ", ".join(f"{key} {old} there, {new} here" for key, old, new in pairs if old != new)


def _at(config: dict[str, Any], key: str) -> Any:
    return reduce(lambda table, part: table.get(part, {}), key.split("."), config)
