"""How much memory this process may still take on the host, and how much it has taken."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Bytes that can be allocated without swapping: what Linux estimates, or less where a container's limit is less.

    None where the system does not say (no /proc, as on macOS).
    """
    figures = [figure for figure in (_system(), _container()) if figure is not None]
    return min(figures) if figures else None


def peak_bytes() -> int | None:
    """Most that this process has had resident; None where the system does not say."""
    # Not getrusage's: that one begins with what the process had that started this one.
    return _kib(_STATUS, "VmHWM:")


def _system() -> int | None:
    return _kib(_MEMINFO, "MemAvailable:")


def _kib(table: Path, name: str) -> int | None:
    """Bytes of a line such as `VmHWM:     123456 kB`."""
    try:
        lines = table.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith(name)), None)
    return int(kib) * 1024 if kib else None


def _container() -> int | None:
    """Room under the control group's limit (cgroup v2); page cache counts as used there, but gives way."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        figures = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    cache = int(figures.get("inactive_file", 0)) + int(figures.get("active_file", 0))
    return None if limit == "max" else max(0, int(limit) - used + cache)
