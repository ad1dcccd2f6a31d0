"""What is here, found without importing torch or a plugin: files, package metadata, the environment.

Deliberately shallow. An import can fail, hang, or open a device; looking at files cannot. `activate` opens
the device and has the last word.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from zili.chips.backend import Backend
from zili.chips.registry import find_backend, registry
from zili.errors import ChipError
from zili.plurals import counted

_LINKER_CACHE = Path("/etc/ld.so.cache")


@dataclass(frozen=True, slots=True)
class Presence:
    """Whether one backend can be used here."""

    backend: Backend
    here: bool
    count: int | None
    """Devices; None where that is known only after activation."""
    reason: str
    fix: str = ""
    """What to do about it where it is not here."""


class Selection(NamedTuple):
    """A backend and why it was taken."""

    backend: Backend
    reason: str


def detect() -> list[Presence]:
    """One row a backend, in the order automatic choice tries them. Never raises, never imports torch."""
    return [presence(backend) for backend in registry().backends]


def presence(backend: Backend) -> Presence:
    """Whether `backend` can be used here, by the first thing that is missing."""
    try:
        missing = _missing(backend)
        count = _device_count(backend)
    except Exception as error:  # a broken installation may raise anything; the other rows still matter
        return Presence(backend, False, 0, f"cannot be examined: {type(error).__name__}: {error}")
    if missing:
        return Presence(backend, False, 0, *missing)
    if count is None:
        return Presence(backend, True, None, "installed; its devices are counted when it is used")
    if backend.device_type == "cpu":
        return Presence(backend, True, 1, "always here")
    return Presence(backend, True, count, counted(count, "device"))


def choose(name: str = "auto") -> Selection:
    """The backend a run should use. A name is taken at its word; `activate` says whether it is true.

    Raises:
        ChipError: no such backend, or what `choose` can see already rules it out.
    """
    if name != "auto":
        backend = find_backend(name)
        # Devices may be there without files under /dev (WSL, emulated ones), but never without the software.
        if missing := _missing_software(backend):
            raise ChipError(f"chip {backend.name} cannot be used here: {'; '.join(missing)}")
        return Selection(backend, "asked for")
    here = [found for found in detect() if found.here]
    first, others = here[0], [found.backend.name for found in here[1:] if found.backend.device_type != "cpu"]
    if first.backend.device_type == "cpu":
        return Selection(first.backend, "no other chip was found (`zili chips` says what is missing)")
    also = f"; also here: {', '.join(others)}" if others else ""
    return Selection(first.backend, f"the first chip found, {first.reason}{also}")


def installed_versions(backend: Backend) -> dict[str, str]:
    """What driver and runtime say of themselves, by name; those that say nothing are left out."""
    found = {}
    for file in backend.version_files:
        patterns = (os.path.expandvars(pattern).lstrip("/") for pattern in file.paths)
        paths = (path for pattern in patterns for path in sorted(Path("/").glob(pattern)))
        with suppress(OSError):
            if path := next(paths, None):
                text = path.read_text(encoding="utf-8", errors="replace")
                if match := re.search(file.pattern, text):
                    found[file.what] = match.group(1)
    return found


def _missing(backend: Backend) -> tuple[str, str] | None:
    """The first thing missing and its fix: software, then driver and devices, then the runtime library."""
    software = _missing_software(backend)
    if software:
        return software
    if _device_count(backend) == 0:
        return f"no device ({backend.device_nodes}): no card, no driver, or hidden from this container", (
            "install the driver or pass the devices to the container" + _visible_hint(backend)
        )
    library = backend.runtime_library
    if library and not _library_found(library):
        return f"{library} is not on LD_LIBRARY_PATH", backend.runtime_fix
    return None


def _missing_software(backend: Backend) -> tuple[str, str] | None:
    if backend.torch_build and not _torch_built_with(backend.torch_build):
        return f"this torch ({_version('torch')}) was built without {backend.torch_build}", backend.install
    if backend.plugin is None:
        return None
    if not _installed(backend.plugin):
        return f"{backend.plugin} is not installed", backend.install
    ours, torchs = _minor(_version(backend.plugin)), _minor(_version("torch"))
    if backend.plugin_pairs and ours and torchs and ours != torchs:
        return f"{backend.plugin} {ours} does not pair with torch {torchs}", backend.install
    return None


def _installed(module: str) -> bool:
    # find_spec raises for a module that was made by hand, as emulated plugins are.
    return module in sys.modules or importlib.util.find_spec(module) is not None


def _visible_hint(backend: Backend) -> str:
    variable = backend.visible_devices
    if variable is None or variable not in os.environ:
        return ""
    return f" ({variable}={os.environ[variable]!r} is set)"


def _device_count(backend: Backend) -> int | None:
    if backend.device_type == "cpu":
        return 1
    if backend.device_nodes is None:
        return None
    pattern = Path(backend.device_nodes)
    nodes = len(list(pattern.parent.glob(pattern.name)))
    visible = os.environ.get(backend.visible_devices or "")
    if visible is None:
        return nodes
    listed = [part for part in visible.split(",") if part.strip() and not part.strip().startswith("-")]
    return min(nodes, len(listed))


def _torch_built_with(name: str) -> bool:
    """Reads torch/version.py as text: importing torch here would come before the environment is set."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    return re.search(rf"^{name}\b[^=\n]*=\s*['\"]", text, re.MULTILINE) is not None


def _library_found(library: str) -> bool:
    folders = [folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    if any(Path(folder, library).exists() for folder in folders):
        return True
    # The linker's cache is binary, with library names as plain text in it; ldconfig would be a subprocess.
    return _LINKER_CACHE.exists() and library.encode() in _LINKER_CACHE.read_bytes()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _minor(version: str | None) -> str | None:
    return ".".join(version.split(".")[:2]) if version else None
