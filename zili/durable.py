"""Files and folders that appear whole or not at all, and survive a power cut once they have their name."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zili.errors import CheckpointError, ConfigError, ZiliError

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
"""What file systems without locks answer."""


def sync(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Force everything in and below `folder` to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def write_whole(path: Path, text: str) -> None:
    """Write a small UTF-8 file so that a reader finds the old one or the new one, never half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    aside.replace(path)


@contextmanager
def whole_folder(target: Path, refused: type[ZiliError] = CheckpointError) -> Iterator[Path]:
    """Yield an empty folder beside `target`; renamed to it on success, removed on failure.

    Raises:
        ZiliError: `refused`, where `target` exists and is not an empty folder.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise refused(f"{target} exists already; name another folder or remove it first")
    aside = target.parent / f".{target.name}.partial-{os.getpid()}"
    aside.mkdir(parents=True)
    try:
        yield aside
        sync_tree(aside)
        aside.replace(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def soon(holds: Callable[[], bool], patience: float = 10.0) -> bool:
    """Whether `holds()` within `patience` seconds: what another machine wrote may take a few to show, since clients of
    network file systems keep names and sizes for a while."""
    end = time.monotonic() + patience
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@contextmanager
def locked(folder: Path) -> Iterator[str | None]:
    """Keep a folder to this process; the system lets go of it when the process ends, however it ends.

    Yields None, or what the file system says that has no locks: Lustre mounted without `flock`, some NFS.

    Raises:
        ConfigError: another process holds it, or it cannot be made or opened.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be used: {error}; choose another folder") from error
    try:
        yield _lock(handle, folder)
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> str | None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"another process trains in {folder}; wait for it, or give another folder") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise ConfigError(f"{folder} cannot be locked: {error}; choose another folder") from error
        return str(error)
    return None
