"""The run configuration: typed, loaded from TOML, known without torch."""

from zili.config.choices import Choice
from zili.config.loading import build_config, dump_recipe, load_recipe
from zili.config.mixture import LatentConfig, MixtureConfig
from zili.config.model import ModelConfig, RotaryConfig
from zili.config.presets import load_preset, preset_names
from zili.config.run import RunConfig

__all__ = [
    "Choice",
    "LatentConfig",
    "MixtureConfig",
    "ModelConfig",
    "RotaryConfig",
    "RunConfig",
    "build_config",
    "dump_recipe",
    "load_preset",
    "load_recipe",
    "preset_names",
]
