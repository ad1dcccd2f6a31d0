"""Backends and chip figures. Importing this does not import torch; only `activate` and `Device` do."""

from zili.chips.activation import Activation, SetVariable, activate, apply_environment
from zili.chips.backend import CAPABILITIES, Backend, Capability, RefusedCall, Variable, VersionFile
from zili.chips.catalog import Chip, catalog, find_chip
from zili.chips.device import Device
from zili.chips.presence import Presence, Selection, choose, detect
from zili.chips.registry import find_backend, registry

__all__ = [
    "CAPABILITIES",
    "Activation",
    "Backend",
    "Capability",
    "Chip",
    "Device",
    "Presence",
    "RefusedCall",
    "Selection",
    "SetVariable",
    "Variable",
    "VersionFile",
    "activate",
    "apply_environment",
    "catalog",
    "choose",
    "detect",
    "find_backend",
    "find_chip",
    "registry",
]
