"""Recipes in and out: TOML to a validated `RunConfig`, with dotted overrides and named presets."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from zili.config.explaining import explain
from zili.config.fields import takes_none
from zili.config.model import ModelConfig
from zili.config.model_folder import shape_in
from zili.config.presets import load_preset
from zili.config.run import RunConfig
from zili.config.scaling import scaled_down
from zili.errors import ConfigError

_WHOLE_SHAPES = ("preset", "folder", "shape_of")
_NOTHING = ("none", "None", "null")

Overrides = Iterable[str] | Mapping[str, Any]
"""What is set over a recipe: `table.key=value` as `--set` takes it, or values by dotted key, of which None unsets."""
ShapeIn = Callable[[Path], ModelConfig | None]
"""The shape of the model in a folder; None: there is none that it knows."""


def load_recipe(path: Path, overrides: Overrides = (), *, shape_in: ShapeIn = shape_in) -> RunConfig:
    """Read a recipe, apply overrides, validate. `shape_in` as in `build_config`.

    Raises:
        ConfigError: unreadable file, broken TOML, a malformed override, or an invalid configuration.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the recipe {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    return build_config(table, overrides, origin=str(path), shape_in=shape_in)


def build_config(
    table: Mapping[str, Any], overrides: Overrides = (), *, origin: str, shape_in: ShapeIn = shape_in
) -> RunConfig:
    """Validate a raw table; `origin` names it in errors.

    `[model] preset = "..."` is filled in from the preset. `folder = "..."` names a model: its shape is filled in, and
    its weights are what `training.start_from` is where the recipe does not say. `shape_of = "..."` is the shape alone.
    `shape_in` reads it: Zili's own folders without torch, by default; `zili.release.shape` has one for any.
    """
    table = _with_overrides(table, overrides)
    model, training = table.get("model", {}), table.get("training")
    table["model"] = _with_preset(model, origin, shape_in)
    if isinstance(training, dict) and isinstance(model, dict) and "folder" in model and "scaled_to" not in model:
        training.setdefault("start_from", model["folder"])
    _fill_in_teacher(table, origin, shape_in)
    try:
        return RunConfig.model_validate(table)
    except ValidationError as error:
        raise ConfigError(explain(error, origin)) from error


def dump_recipe(config: RunConfig) -> str:
    """The resolved configuration as TOML that `load_recipe` reads back to an equal one."""
    import tomli_w  # reading goes without: a chip is examined with what its vendor's environment has

    tables = config.model_dump(mode="json", exclude_none=True)
    return tomli_w.dumps({name: table for name, table in tables.items() if table != {}})


def _with_preset(model: Any, origin: str, shape_in: ShapeIn) -> Any:
    """The `[model]` table with its `preset` filled in, and made small where it says `scaled_to`."""
    named = [key for key in _WHOLE_SHAPES if isinstance(model, dict) and key in model]
    if not named:
        return model
    own = {key: value for key, value in model.items() if key not in (*_WHOLE_SHAPES, "scaled_to")}
    if len(named) > 1 or not isinstance(model[named[0]], str):
        raise ConfigError(f"{origin}: give one of model.{', model.'.join(_WHOLE_SHAPES)}: a name in quotes")
    name = model[named[0]]
    preset = load_preset(name) if named == ["preset"] else _shape_of(f"model.{named[0]}", Path(name), origin, shape_in)
    if "scaled_to" in model:
        preset = _scaled(preset, model["scaled_to"], origin)
    for table in ("rotary", "mixture", "latent"):
        if table in preset and isinstance(own.get(table, {}), dict):
            own[table] = {**preset[table], **own.get(table, {})}
    return {**preset, **own}


def _fill_in_teacher(table: dict[str, Any], origin: str, shape_in: ShapeIn) -> None:
    """The shape of `[objective.distill]`'s model, from its folder."""
    objective = table.get("objective")
    distill = objective.get("distill") if isinstance(objective, dict) else None
    if isinstance(distill, dict) and isinstance(distill.get("teacher"), str) and "model" not in distill:
        distill["model"] = _shape_of("objective.distill.teacher", Path(distill["teacher"]), origin, shape_in)


def _shape_of(key: str, folder: Path, origin: str, shape_in: ShapeIn) -> dict[str, Any]:
    shape = shape_in(folder)
    if shape is None and not folder.exists():
        raise ConfigError(f"{origin}: {key} = {str(folder)!r} does not exist (looked for from {Path.cwd()})")
    if shape is None:
        raise ConfigError(
            f"{origin}: {key} = {str(folder)!r} is no Zili model folder, run or checkpoint, and no published "
            "model; see `zili import`"
        )
    return shape.model_dump(mode="json", exclude_none=True)


def _scaled(preset: dict[str, Any], hidden_size: Any, origin: str) -> dict[str, Any]:
    if not isinstance(hidden_size, int) or hidden_size < 32 or hidden_size % 16:
        raise ConfigError(
            f"{origin}: model.scaled_to = {hidden_size!r}; give a hidden size, a multiple of 16 from 32 on"
        )
    return scaled_down(ModelConfig.model_validate(preset), hidden_size).model_dump(mode="json", exclude_none=True)


def _with_overrides(table: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    """A deep copy of `table` with each override in it."""
    result = _copied(table)
    for parts, value in _assignments(overrides):
        place = result
        for part in parts[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ConfigError(f"override {'.'.join(parts)!r}: {part!r} is a value, not a table")
        if value is None:
            place.pop(parts[-1], None)
        if value is not None or takes_none(parts) == "nothing":  # None also over a preset, or what is there by default
            place[parts[-1]] = value
    return result


def _assignments(overrides: Overrides) -> Iterator[tuple[list[str], Any]]:
    """The parts of each key, and its value. Of text it is TOML, or a plain string where it is not, and `none` is
    None."""
    if isinstance(overrides, Mapping):
        yield from ((key.split("."), value) for key, value in overrides.items())
        return
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"cannot read the override {override!r}; write --set table.key=value")
        none = text.strip() in _NOTHING and takes_none(parts) != "text"
        yield parts, None if none else _parsed(text.strip())


def _parsed(text: str) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if len(table) == 1 else text  # a line end may begin other keys


def _copied(value: Any) -> Any:
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, Mapping) else value
