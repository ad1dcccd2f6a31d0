"""Callbacks, objectives and chips by name: those that installed packages bring by entry point, and Zili's own."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ValidationError, create_model

from zili.config.section import Section
from zili.errors import ConfigError

CALLBACKS, OBJECTIVES, CHIPS = "zili.callbacks", "zili.objectives", "zili.chips"
"""Groups of entry points, as a package's pyproject.toml names them."""


OURS = "zili"
"""The package of what this house has itself."""


@dataclass(frozen=True)
class Plugin:
    """Something that can be loaded by its name."""

    entry: EntryPoint
    package: str

    @property
    def name(self) -> str:
        """By which it is asked for."""
        return self.entry.name

    def load(self) -> Any:
        """The object itself; its module is imported.

        Raises:
            ConfigError: it cannot be imported.
        """
        try:
            return self.entry.load()
        except Exception as error:  # a third party's module may raise anything
            raise ConfigError(
                f"{_kind(self.entry.group)} {self.name!r} of package {self.package} cannot be loaded from "
                f"{self.entry.value}: {type(error).__name__}: {error}; repair or uninstall {self.package}"
            ) from error


def installed(group: str) -> list[Plugin]:
    """What packages bring; none of it is imported."""
    return [Plugin(entry, entry.dist.name if entry.dist else entry.value) for entry in entry_points(group=group)]


def find(group: str, name: str, own: Mapping[str, str]) -> Any:
    """The object of that name, loaded; see `look_up`."""
    return look_up(group, name, own).load()


def look_up(group: str, name: str, own: Mapping[str, str]) -> Plugin:
    """What has that name: one of this house's `own`, each given as "module:object", or an installed package's. It is
    not imported: a package may import torch, which has to wait until the chip's environment is set.

    Raises:
        ConfigError: there is none, or there are several.
    """
    known = [Plugin(EntryPoint(key, place, group), OURS) for key, place in own.items()] + installed(group)
    found = [plugin for plugin in known if plugin.name == name]
    if not found:
        names = sorted({plugin.name for plugin in known})
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names)}" if names else ""
        raise ConfigError(f"there is no {_kind(group)} {name!r}{hint} (packages bring more by the entry point {group})")
    if len({(plugin.package, plugin.entry.value) for plugin in found}) > 1:
        packages = ", ".join(plugin.package for plugin in found)
        raise ConfigError(f"several packages bring a {_kind(group)} {name!r}: {packages}; uninstall or rename one")
    return found[0]


def checked(place: str, make: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` of `place` in a recipe, as the keyword arguments that `make`, a class or a function, is annotated to
    take.

    Raises:
        ConfigError: it takes others.
    """
    taken = _settings_of(make)
    try:
        return dict(taken.model_validate(settings))
    except ValidationError as error:
        flaws = "; ".join(f"{'.'.join(map(str, flaw['loc']))}: {flaw['msg']}" for flaw in error.errors())
        known = ", ".join(taken.model_fields) or "none"
        raise ConfigError(f"{place}: {flaws}. Its settings: {known}") from error


def place_of(kind: type) -> str:
    """The name by which a class is imported, "module:class". Zili's own have the package alone, since modules move."""
    module = kind.__module__
    if module == "__main__":  # a script: what it is called when it is imported
        main = sys.modules[module]
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        module = spec.name if spec else Path(file).stem if file else module
    return f"{OURS if module.startswith(f'{OURS}.') else module}:{kind.__qualname__}"


def _settings_of(make: Any) -> type[Section]:
    """The keyword arguments of a class or a function, as a table that is checked."""
    hints = get_type_hints(vars(make).get("__init__", make) if isinstance(make, type) else make)
    fields: dict[str, Any] = {
        name: (hints.get(name, Any), ... if argument.default is argument.empty else argument.default)
        for name, argument in inspect.signature(make).parameters.items()
    }
    return create_model(f"{make.__name__} settings", __base__=Section, **fields)


def _kind(group: str) -> str:
    return group.removeprefix("zili.").removesuffix("s")
