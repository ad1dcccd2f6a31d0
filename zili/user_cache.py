"""Folders of this user on this machine: one that keeps what later runs need not do again, which nothing needs to be
there, and one for what processes share while they live."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from zili.errors import ConfigError

VARIABLE = "ZILI_CACHE"
_COMPILED = "TORCHINDUCTOR_CACHE_DIR"
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def cache_folder(name: str) -> Path | None:
    """`name` in `$ZILI_CACHE`, else in `zili` in the user's own cache folder; made, and nobody else's to read or write.

    None where there is none to be had: no home, no room, or one that others can write to.
    """
    try:
        folder = _root() / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if _is_private(folder, folder.stat()) else None
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None


def keep_what_is_compiled() -> None:
    """Let torch keep here what it compiles, before `torch._dynamo` is imported, which settles the place: torch's own is
    below /tmp, which is everybody's and empty after each start of the machine."""
    if (folder := cache_folder("compiled")) is not None:
        os.environ.setdefault(_COMPILED, str(folder))


def machine_folder() -> Path:
    """A folder on this machine's own disk for files of processes that live: locks, sockets and memory that they share.
    Nobody else can read or write it. It may be gone after the machine starts anew.

    Raises:
        ConfigError: there is none to be had.
    """
    folder = Path(tempfile.gettempdir()) / f"zili-{os.getuid()}"
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        if _is_private(folder, folder.lstat()):  # anybody may make one of this name there, or a link
            return folder
        reason = "it is somebody else's"
    except OSError as error:
        reason = str(error)
    raise ConfigError(f"{folder} cannot be used: {reason}; name a folder of yours on this machine in TMPDIR")


def _is_private(folder: Path, found: os.stat_result) -> bool:
    """Whether it is this user's and can be written; others are shut out of it."""
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
        return False
    if found.st_mode & _OTHERS:
        folder.chmod(0o700)
    return os.access(folder, os.W_OK)


def _root() -> Path:
    own = os.environ.get(VARIABLE)
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zili"
