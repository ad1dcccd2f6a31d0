"""Published model shapes by name: a TOML each in `presets/`, with its source and its doubts written in it."""

from __future__ import annotations

import difflib
import tomllib
from importlib import resources
from typing import Any

from zili.errors import ConfigError

_FOLDER = resources.files("zili.config") / "presets"


def preset_names() -> list[str]:
    """The names `load_preset` takes, sorted."""
    return sorted(entry.name.removesuffix(".toml") for entry in _FOLDER.iterdir() if entry.name.endswith(".toml"))


def load_preset(name: str) -> dict[str, Any]:
    """The raw `[model]` table of a preset, to be overridden and then validated as a `ModelConfig`.

    Raises:
        ConfigError: no preset of that name; the message offers the nearest one.
    """
    names = preset_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known presets: {', '.join(names)}"
        raise ConfigError(f"there is no model preset {name!r}; {hint}")
    return tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
