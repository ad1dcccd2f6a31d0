"""All backends: Zili's four, and those that installed packages bring by entry point."""

from __future__ import annotations

from dataclasses import dataclass, field

from zili.chips.ascend import ASCEND
from zili.chips.backend import Backend, nearest
from zili.chips.cambricon import CAMBRICON
from zili.chips.cpu import CPU
from zili.chips.nvidia import NVIDIA
from zili.errors import ChipError, ConfigError
from zili.plugins import CHIPS, installed

_BUILT_IN = (ASCEND, CAMBRICON, NVIDIA, CPU)


@dataclass(slots=True)
class Registry:
    """Backends in the order automatic choice tries them (the CPU last), and plugins that were refused."""

    backends: list[Backend] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    """Why a backend is not used, by the name that it claims."""


def registry() -> Registry:
    """Everything known now. A faulty plugin is refused with its reason, and never hides the others."""
    known = Registry(list(_BUILT_IN[:-1]))
    for plugin in installed(CHIPS):
        try:
            record = plugin.load()
        except ConfigError as error:
            known.refused[plugin.name] = str(error)
            continue
        problem = _problem(record, known)
        if problem:
            name = record.name if isinstance(record, Backend) else plugin.name
            refusal = f"chip {name!r} of package {plugin.package} is refused: {problem}; uninstall or rename it"
            known.refused[name] = refusal
        elif record not in known.backends:
            known.backends.append(record)
    known.backends.append(CPU)
    return known


def _problem(record: object, known: Registry) -> str | None:
    if not isinstance(record, Backend):
        return f"{record!r:.60} is not a zili.chips.Backend"
    for other in (*known.backends, CPU):
        if record == other:
            return None
        for claim in (record.name, record.device_type):
            if claim in (other.name, other.device_type):
                return f"{other.name} ({other.device_type}) has {claim!r} already"
    return None


def find_backend(name: str) -> Backend:
    """The backend of that name, or of that torch device type.

    Raises:
        ChipError: unknown (the message has the nearest names), or claimed by a plugin that was refused.
    """
    known, wanted = registry(), name.lower()
    if wanted in known.refused:
        raise ChipError(known.refused[wanted])
    for backend in known.backends:
        if wanted in (backend.name, backend.device_type):
            return backend
    from zili.chips.catalog import identify

    chip = identify(name)
    names = [backend.name for backend in known.backends]
    near = f"; {chip.name} is driven by {chip.backend}" if chip and chip.backend else nearest(name, names)
    raise ChipError(f"no backend is named {name!r}{near} (`zili chips` lists them)")
