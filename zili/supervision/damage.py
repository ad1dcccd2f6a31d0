"""What disks do to a checkpoint, done on purpose: a file of the newest one is cut, changed or removed."""

from __future__ import annotations

import os
from pathlib import Path

from zili.errors import CheckpointError


def damage(run: Path, how: str, draw: int) -> str:
    """Damage a file of a run's newest checkpoint; `draw` says which, and where. Returns its path within the run.

    Args:
        how: truncate, flip or remove.
    Raises:
        CheckpointError: there is no checkpoint.
        OSError: the disk refuses.
    """
    found = max((path for path in (run / "checkpoints").glob("step-*") if _is_whole(path)), default=None)
    if found is None:
        raise CheckpointError(f"{run} has no checkpoint to damage")
    files = sorted(path for path in found.iterdir() if path.is_file() and path.stat().st_size)
    file = files[draw % len(files)]
    size = file.stat().st_size
    if how == "remove":
        file.unlink()
    elif how == "truncate":
        os.truncate(file, size // 2)
    else:
        _flip(file, draw % size, draw % 8)
    return str(file.relative_to(run))


def _is_whole(path: Path) -> bool:
    return path.name.removeprefix("step-").isdecimal() and (path / "SHA256SUMS").is_file()


def _flip(file: Path, place: int, bit: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(place)
        byte = opened.read(1)[0]
        opened.seek(place)
        opened.write(bytes([byte ^ (1 << bit)]))
