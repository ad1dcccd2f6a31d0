"""Whether a checkpoint is of this run: the same shape, the same data in the same order, the same thing to learn."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from zili.config import ModelConfig, RunConfig
from zili.errors import CheckpointError
from zili.training.checkpoints import RunState

_DATA_ORDER = ("seed", "training.global_batch", "training.sequence_length", "data.sources")


class Belonging(NamedTuple):
    """What a checkpoint has to agree with."""

    config: RunConfig
    data_fingerprint: str
    teacher_fingerprint: str
    classes: dict[str, str]

    def refuse_others(self, path: Path, state: RunState) -> None:
        """See that a checkpoint is one to go on from; `state` is what it says of itself, `path` what an error names.

        Raises:
            CheckpointError: it is of another model, order of data, teacher or objective.
        """
        there, here = state.config, self.config.model_dump(mode="json")
        # A run from before a key was there had what is now its default.
        there = {**there, "model": ModelConfig.model_validate(there["model"]).model_dump(mode="json")}
        shape = _differences(there, here, [f"model.{key}" for key in here["model"]])
        if shape:
            raise CheckpointError(f"{path} is of another shape: {shape}; match it, or give the run another folder")
        same_data = state.data_fingerprint == self.data_fingerprint
        if not same_data or there["training"]["global_batch"] != here["training"]["global_batch"]:
            order = _differences(there, here, _DATA_ORDER) or "the token stores hold other tokens"
            raise CheckpointError(
                f"{path} was trained on other data, or on the same in another order: {order}; "
                "restore it, or give the run another folder"
            )
        self._refuse_other_learning(path, state)

    def _refuse_other_learning(self, path: Path, state: RunState) -> None:
        """Another teacher, objective or kind of model; of one from before they were written down nothing is known."""
        before, here = state.teacher_fingerprint, self.teacher_fingerprint
        if here and before not in ("", here):
            raise CheckpointError(
                f"{path} learned from another teacher: the fingerprint of its weights was {before[:12]}, that of "
                f"objective.distill.teacher is {here[:12]}; name the one before, or give the run another folder and "
                f"training.start_from = '{self.config.folder}'"
            )
        for argument, kind in self.classes.items():
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
