"""A folder of this user on this machine that keeps what later runs need not do again. Nothing needs it to be there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

VARIABLE = "ZILI_CACHE"
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def cache_folder(name: str) -> Path | None:
    """`name` in `$ZILI_CACHE`, else in `zili` in the user's own cache folder; made, and nobody else's to read or write.

    None where there is none to be had: no home, no room, or one that others can write to.
    """
    try:
        folder = _root() / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.getuid():
            return None
        if found.st_mode & _OTHERS:
            folder.chmod(0o700)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    return folder if os.access(folder, os.W_OK) else None


def _root() -> Path:
    own = os.environ.get(VARIABLE)
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zili"
