"""Recipes as they are given: a TOML file, a run's folder, a table, or a configuration; and what overrides them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zili.config import ModelConfig, RunConfig, build_config, load_recipe
from zili.config.loading import Overrides
from zili.config.model_folder import shape_in
from zili.errors import CheckpointError, ConfigError
from zili.plugins import OBJECTIVES, look_up
from zili.training.callbacks.named import check_callbacks

RECIPE_FILE = "recipe.toml"
RecipeLike = str | Path | Mapping[str, Any] | RunConfig
"""A TOML file or a run's folder, a table as TOML would have it, or a configuration."""
_SHOWN_RECIPES = 8


def read_recipe(recipe: RecipeLike, overrides: Overrides = ()) -> RunConfig:
    """The configuration that `recipe` and `overrides` make, validated whole. It does not import torch.

    Args:
        recipe: what to read. `[model] folder` in it may be any folder that holds a model.
        overrides: as of `zili.config.build_config`.
    Raises:
        ConfigError: there is no such recipe, or it cannot be run.
    """
    config = _configuration(recipe, overrides)
    check_callbacks(config)
    for name in config.objective.brought:
        look_up(OBJECTIVES, name, {})
    return config


def _configuration(recipe: RecipeLike, overrides: Overrides) -> RunConfig:
    if isinstance(recipe, RunConfig):
        table = recipe.model_dump(exclude_unset=True)
        return build_config(table, overrides, origin="the configuration", shape_in=_shape_in) if overrides else recipe
    if isinstance(recipe, Mapping):
        return build_config(recipe, overrides, origin="the recipe", shape_in=_shape_in)
    return load_recipe(_file_of(Path(recipe)), overrides, shape_in=_shape_in)


def _file_of(path: Path) -> Path:
    own = path / RECIPE_FILE
    if path.is_dir() and not own.is_file():
        raise ConfigError(f"{path} is a folder, and no run: it holds no recipe.toml; name a recipe{_recipes()}")
    if not path.exists():
        raise ConfigError(
            f"there is no recipe {path}{_recipes()}; `zili quickstart` makes one for your text, "
            "`zili config presets` lists shapes for a [model] table, docs/training.md has a whole recipe"
        )
    return own if path.is_dir() else path


def _recipes() -> str:
    """Those in recipes/, for the end of a sentence."""
    found = sorted(str(file) for file in Path("recipes").glob("*.toml"))[:_SHOWN_RECIPES]
    return f"; there are {', '.join(found)}" if found else ""


def _shape_in(folder: Path) -> ModelConfig | None:
    own = shape_in(folder)
    if own is not None or not folder.exists():
        return own
    if "torch" in sys.modules:
        from zili.release.shape import any_shape_in

        return any_shape_in(folder)
    # In a process of its own, without a chip's plugin: reading published layouts takes torch, which must not be here
    # before the chip is chosen and its environment set.
    asked = [sys.executable, "-m", "zili.release.shape", str(folder)]
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    answer = subprocess.run(asked, capture_output=True, text=True, check=False, env=environment)
    if answer.returncode:
        kind = ConfigError if answer.returncode == ConfigError.exit_code else CheckpointError
        raise kind(answer.stderr.strip())
    return None if answer.stdout == "null\n" else ModelConfig.model_validate_json(answer.stdout)
