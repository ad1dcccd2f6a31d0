"""What a plan is asked for: a model, its batch and sequence, and a layout where one is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from pathlib import Path

from zili.chips.catalog import Chip, find_chip
from zili.config import ModelConfig, RunConfig, build_config
from zili.config.loading import Overrides
from zili.config.presets import load_preset
from zili.errors import ConfigError
from zili.planning.search.goodput import Failures
from zili.planning.search.hyperparameters import flops
from zili.planning.search.plan import Setting, setting_config, usual_batch
from zili.runs.recipes import RecipeLike, read_recipe


class NoChip(ConfigError):
    """Nobody said which chips."""


def setting_of(
    model: RecipeLike,
    chips: int,
    tokens: float | None = None,
    sequence: int | None = None,
    batch: int | None = None,
    layout: str | None = None,
    overrides: Overrides = (),
) -> Setting:
    """`model`, a preset or a recipe, as it is to be planned: on `tokens`, in `sequence` tokens and `batch` sequences a
    step, and as `layout` says. What is None is the recipe's, or chosen.

    Raises:
        ConfigError: it was not understood, or cannot be run.
    """
    if chips < 1:
        raise ConfigError(f"a plan is for 1 chip or more, not for {chips}")
    if isinstance(model, str) and not model.endswith(".toml") and not Path(model).is_dir():
        setting = _of_preset(model, chips, tokens or 1e12, sequence, batch, overrides)
    else:
        setting = _of_recipe(model, tokens, sequence, batch, overrides)
    return replace(setting, config=_laid_out(setting.config, layout))


def chip_of(name: str | None, config: RunConfig) -> Chip:
    """The chip of that name, or else the one that the recipe names.

    Raises:
        NoChip: neither is given.
        ChipError: it is not known.
    """
    name = name or config.chip.model
    if name is None:
        raise NoChip("name the model of the chips, as `zili chips` lists them, here or in the recipe's chip.model")
    return find_chip(name)


def _of_recipe(
    recipe: RecipeLike, tokens: float | None, sequence: int | None, batch: int | None, overrides: Overrides
) -> Setting:
    given = {"training.sequence_length": sequence, "training.global_batch": batch}
    named = {key: value for key, value in given.items() if value}
    if isinstance(overrides, Mapping):
        config = read_recipe(recipe, {**overrides, **named})
    else:
        config = read_recipe(recipe, [*overrides, *(f"{key}={value}" for key, value in named.items())])
    training = config.training
    a_step = training.global_batch * training.sequence_length
    if tokens:
        config = config.changed(training={"steps": max(1, ceil(tokens / a_step))})
    return Setting(_in_bf16(config), tokens or float(training.steps * a_step), Failures())


def _of_preset(
    name: str, chips: int, tokens: float, sequence: int | None, batch: int | None, overrides: Overrides
) -> Setting:
    table = load_preset(name)
    length = sequence or min(4096, int(table.get("max_length", 4096)))
    compute = flops(ModelConfig.model_validate(table), length, tokens)
    config = setting_config(table, length, batch or usual_batch(chips, length, compute), tokens, f"{name}-{chips}")
    keys = (override.partition("=")[0].strip() for override in overrides)  # of a table each is its key
    taken = batch is None and "training.global_batch" not in keys
    return Setting(_in_bf16(read_recipe(config, overrides)), tokens, Failures(), batch_taken=taken)


def _in_bf16(config: RunConfig) -> RunConfig:
    """`config` with nothing left open that a plan needs."""
    if config.chip.precision == "fp32":
        raise ConfigError("a plan is for products in bf16, and chip.precision is fp32")
    fixed = {"micro_batch": 1} if config.training.micro_batch == "auto" else {}
    return config.changed(chip={"precision": "bf16"}, training=fixed)


def _laid_out(config: RunConfig, text: str | None) -> RunConfig:
    """`config` with "tensor=8 pipeline=4 recompute=full": of the layout, what is not named is as it is by default.
    "recipe": as it is."""
    if text is None or text == "recipe":
        return config
    inside = {"micro_batch": "training", "recompute": "training"}
    overrides = []
    for part in text.replace(",", " ").split():
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"layout {part!r}: write it as tensor=8 pipeline=4 recompute=full")
        overrides.append(f"{inside.get(key, 'parallel')}.{key}={value}")
    table = config.model_dump(mode="json", exclude_unset=True)
    table["parallel"] = {}
    table["training"].pop("recompute", None)
    return _in_bf16(build_config(table, overrides, origin="the layout"))
