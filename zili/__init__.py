"""Zili trains, checks, releases and serves TeleChat-class language models on whatever chips a team can get."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zili.api import evaluate, export, generate, plan, rehearse, serve, setup, train
    from zili.config import Choice, ModelConfig, RunConfig
    from zili.data.loader import Batch
    from zili.data.prepare import Prepared, prepare
    from zili.errors import ZiliError
    from zili.evaluation.bits_per_byte import Score
    from zili.models.decoder import Decoder
    from zili.models.outputs import Outputs
    from zili.objectives import Objective, Peers, Terms
    from zili.ops import IGNORE_INDEX
    from zili.planning.search.goodput import Failures
    from zili.planning.search.plan import Plan
    from zili.rehearsal import Rehearsal
    from zili.release import load
    from zili.release.record import Release
    from zili.runs.opening import OpenedRun
    from zili.serving.model_folder import OpenedModel
    from zili.training.callbacks import Callback, StepRecord
    from zili.training.trainer import Trainer

__version__ = "0.1.0"
_PLACES = {
    "zili.api": ("evaluate", "export", "generate", "plan", "rehearse", "serve", "setup", "train"),
    "zili.config": ("Choice", "ModelConfig", "RunConfig"),
    "zili.data.loader": ("Batch",),
    "zili.data.prepare": ("Prepared", "prepare"),
    "zili.errors": ("ZiliError",),
    "zili.evaluation.bits_per_byte": ("Score",),
    "zili.models.decoder": ("Decoder",),
    "zili.models.outputs": ("Outputs",),
    "zili.objectives": ("Objective", "Peers", "Terms"),
    "zili.ops": ("IGNORE_INDEX",),
    "zili.planning.search.goodput": ("Failures",),
    "zili.planning.search.plan": ("Plan",),
    "zili.rehearsal": ("Rehearsal",),
    "zili.release": ("load",),
    "zili.release.record": ("Release",),
    "zili.runs.opening": ("OpenedRun",),
    "zili.serving.model_folder": ("OpenedModel",),
    "zili.training.callbacks": ("Callback", "StepRecord"),
    "zili.training.trainer": ("Trainer",),
}
"""Where each public name lives. Lazy: `import zili` must not import torch, whose plugins read the environment as they
are imported."""
_PLACE = {name: place for place, names in _PLACES.items() for name in names}
__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Callback",
    "Choice",
    "Decoder",
    "Failures",
    "ModelConfig",
    "Objective",
    "OpenedModel",
    "OpenedRun",
    "Outputs",
    "Peers",
    "Plan",
    "Prepared",
    "Rehearsal",
    "Release",
    "RunConfig",
    "Score",
    "StepRecord",
    "Terms",
    "Trainer",
    "ZiliError",
    "__version__",
    "evaluate",
    "export",
    "generate",
    "load",
    "plan",
    "prepare",
    "rehearse",
    "serve",
    "setup",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACE:
        raise AttributeError(f"module 'zili' has no attribute {name!r}")
    found = getattr(import_module(_PLACE[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
