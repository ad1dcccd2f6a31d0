"""Callbacks that a recipe names: which there are, and what settings they take.

A callback that can be named is a `Callback` class, or a function that makes one. Its keyword arguments are its
settings: `[callbacks.NAME]` in a recipe gives them, checked against their annotations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zili.config import RunConfig
from zili.config.watch import WatchConfig
from zili.errors import ConfigError
from zili.plugins import CALLBACKS, OURS, checked, find, look_up
from zili.training.callbacks.base import Callback

OWN = {
    "tensorboard": "zili.training.callbacks.tensorboard:TensorBoardLog",
    "prometheus": "zili.training.callbacks.prometheus:PrometheusEndpoint",
    "wandb": "zili.training.callbacks.trackers:WandbLog",
    "swanlab": "zili.training.callbacks.trackers:SwanLabLog",
}
"""By name; packages bring more (`zili.plugins`)."""


def check_callbacks(config: RunConfig, *, imports: bool = False) -> None:
    """Look up what `config` names, and check its settings; nothing is made. Settings of what a package brings are
    checked where it may be imported: once the chip's environment is set.

    Raises:
        ConfigError: there is no such callback, or it takes other settings.
    """
    for name, settings in config.callbacks.items():
        found = look_up(CALLBACKS, name, OWN)
        if imports or found.package == OURS:
            checked(f"callbacks.{name}", found.load(), settings)


def named_callbacks(config: RunConfig) -> list[Callback]:
    """Those that `config` names; `logging.tensorboard` is short for `[callbacks.tensorboard]`.

    Raises:
        ConfigError: as `check_callbacks`, or a callback cannot be had here.
    """
    asked = {**({"tensorboard": {}} if config.logging.tensorboard else {}), **config.callbacks}
    return [_made(name, settings) for name, settings in asked.items()]


def watches(config: WatchConfig) -> list[Callback]:
    """Those by which a run watches its processes, as far as the recipe asks for them."""
    from zili.training.callbacks.corruption import CorruptionWatch
    from zili.training.callbacks.stragglers import StragglerWatch

    kinds = ((StragglerWatch, config.stragglers), (CorruptionWatch, config.corruption))
    return [kind(every) for kind, every in kinds if every]


def _made(name: str, settings: Mapping[str, Any]) -> Callback:
    make = find(CALLBACKS, name, OWN)
    made = make(**checked(f"callbacks.{name}", make, settings))
    if not isinstance(made, Callback):
        raise ConfigError(f"callbacks.{name}: {made!r:.60} is no zili.Callback")
    return made
