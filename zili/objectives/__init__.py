"""What a model learns: the next token, tokens after it, preferences, what a teacher says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zili.config import RunConfig
from zili.config.model import ModelConfig
from zili.errors import ConfigError
from zili.models.decoder import Decoder
from zili.objectives.distillation import Distillation
from zili.objectives.next_token import MultiToken, NextToken
from zili.objectives.objective import Alone, Objective, Peers, Terms
from zili.objectives.preference import Preference
from zili.plugins import OBJECTIVES, checked, find

__all__ = ["Alone", "Objective", "Peers", "Terms", "learner", "objective_of"]


def objective_of(config: RunConfig) -> Objective:
    """What a recipe says is learned.

    Raises:
        ConfigError: no package brings the objective that it names, or with other settings.
    """
    for name, settings in config.objective.brought.items():
        return _brought(name, settings)
    distill = config.objective.distill
    if distill is not None:
        assert distill.model is not None, "the configuration was loaded"
        return Distillation(distill.model, distill.weight, distill.temperature)
    if config.preference is not None:
        return Preference(config.preference.beta, config.preference.likelihood)
    return of_text(config.model)


def _brought(name: str, settings: Mapping[str, Any]) -> Objective:
    make = find(OBJECTIVES, name, {})
    made = make(**checked(f"objective.{name}", make, settings))
    if not isinstance(made, Objective):
        raise ConfigError(f"objective.{name}: {made!r:.60} is no zili.objectives.Objective")
    return made


def of_text(model: ModelConfig) -> Objective:
    """What a model learns of plain text."""
    return MultiToken(model.mtp_loss_weight) if model.mtp_layers else NextToken()


def learner(
    model: ModelConfig,
    objective: Objective | None = None,
    layers: range | None = None,
    decoder: type[Decoder] = Decoder,
) -> Decoder:
    """A decoder, or some layers of it, with what the objective (by default that of plain text) has beside it.

    On the `meta` device it has shapes only; elsewhere its weights are those of seed 0.
    """
    part = decoder(model, layers)
    if part.norm is not None:
        _attach(objective or of_text(model), part)
    if not next(part.parameters()).is_meta:
        part.init_weights(0)
    return part


def _attach(objective: Objective, part: Decoder) -> None:
    """Give the part with the last layer what is learned beside it. What else the model has there, a block for
    multi-token prediction, is kept as it is."""
    published, own = of_text(part.config).modules(part.config), objective.modules(part.config)
    for name, module in {**published, **own}.items():
        kept = name not in own or (name in published and part.config.lora is not None)
        part.add_beside(name, module.requires_grad_(not kept))
