"""Recipes in and out: TOML to a validated `RunConfig`, with dotted overrides and named presets."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from zili.config.model import ModelConfig
from zili.config.presets import load_preset
from zili.config.run import RunConfig
from zili.config.scaling import scaled_down
from zili.errors import ConfigError

_BRANCH = re.compile(r"bool|constrained-int|literal\[.*\]")
"""What pydantic adds to the place of an error for each branch of a union; no key is called so."""


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a recipe, apply `table.key=value` overrides, validate.

    Raises:
        ConfigError: unreadable file, broken TOML, a malformed override, or an invalid configuration.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the recipe {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    return build_config(table, overrides, origin=str(path))


def build_config(table: Mapping[str, Any], overrides: Iterable[str] = (), *, origin: str) -> RunConfig:
    """Validate a raw table; `origin` names it in errors. `[model] preset = "..."` is filled in from the preset, and
    `folder = "..."` from an imported model."""
    table = _with_overrides(table, overrides)
    table["model"] = _with_preset(table.get("model", {}), origin)
    try:
        return RunConfig.model_validate(table)
    except ValidationError as error:
        raise ConfigError(_explain(error, origin)) from error


def dump_recipe(config: RunConfig) -> str:
    """The resolved configuration as TOML that `load_recipe` reads back to an equal one."""
    import tomli_w  # reading goes without: a chip is examined with what its vendor's environment has

    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _with_preset(model: Any, origin: str) -> Any:
    """The `[model]` table with its `preset` filled in, and made small where it says `scaled_to`."""
    named = [key for key in ("preset", "folder") if isinstance(model, dict) and key in model]
    if not named:
        return model
    own = {key: value for key, value in model.items() if key not in ("preset", "folder", "scaled_to")}
    if len(named) > 1 or not isinstance(model[named[0]], str):
        raise ConfigError(f"{origin}: give model.preset or model.folder, a name in quotes")
    preset = load_preset(model["preset"]) if named == ["preset"] else _model_of(Path(model["folder"]), origin)
    if "scaled_to" in model:
        preset = _scaled(preset, model["scaled_to"], origin)
    for table in ("rotary", "mixture", "latent"):
        if table in preset and isinstance(own.get(table, {}), dict):
            own[table] = {**preset[table], **own.get(table, {})}
    return {**preset, **own}


def _model_of(folder: Path, origin: str) -> dict[str, Any]:
    """The `[model]` table of a Zili model folder, as `zili import` makes them."""
    path = folder / "model.json"
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{origin}: model.folder = {str(folder)!r} is no Zili model folder ({error}); `zili import` makes one"
        ) from error
    return _without_none(model)


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }


def _scaled(preset: dict[str, Any], hidden_size: Any, origin: str) -> dict[str, Any]:
    if not isinstance(hidden_size, int) or hidden_size < 32 or hidden_size % 16:
        raise ConfigError(
            f"{origin}: model.scaled_to = {hidden_size!r}; give a hidden size, a multiple of 16 from 32 on"
        )
    return scaled_down(ModelConfig.model_validate(preset), hidden_size).model_dump(mode="json", exclude_none=True)


def _with_overrides(table: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A deep copy of `table` with each `a.b=value` set; the value is TOML, or a plain string where it is not."""
    result = _copied(table)
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"cannot read the override {override!r}; write --set table.key=value")
        place = result
        for part in parts[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ConfigError(f"override {override!r}: {part!r} is a value, not a table")
        place[parts[-1]] = _parsed(text.strip())
    return result


def _parsed(text: str) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if len(table) == 1 else text  # a line end may begin other keys


def _copied(value: Any) -> Any:
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _explain(error: ValidationError, origin: str) -> str:
    lines = [_explain_one(item) for item in error.errors()]
    return f"{origin} cannot be run:\n" + "\n".join(f"  {line}" for line in lines)


def _explain_one(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"] if not _BRANCH.fullmatch(str(part)))
    if item["type"] == "extra_forbidden":
        return f"unknown key {where}{_nearest(item['loc'])}"
    if item["type"] == "missing":
        return f"{where} is missing"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message} (got {item['input']!r})"


def _nearest(location: tuple[Any, ...]) -> str:
    """What the user may have meant: the same key of another table, the nearest of this table, the nearest of all."""
    known = _fields_at(RunConfig, location[:-1])
    wanted, here = str(location[-1]), ".".join(map(str, location[:-1]))
    elsewhere = {key: name for name in RunConfig.model_fields for key in _fields_at(RunConfig, (name,))}
    for table_of in ({wanted: elsewhere.get(wanted)}, dict.fromkeys(known, here), elsewhere):
        close = difflib.get_close_matches(wanted, [key for key, table in table_of.items() if table is not None], n=1)
        if close:
            return f"; did you mean {f'{table_of[close[0]]}.{close[0]}'.lstrip('.')}?"
    return f"; known keys here: {', '.join(sorted(known))}" if known else ""


def _fields_at(section: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        found = _section_in(field.annotation) if field else None
        if found is None:
            return []
        section = found
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)
