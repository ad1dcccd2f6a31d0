"""Files and folders that appear whole or not at all, and survive a power cut once they have their name."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zili.errors import CheckpointError, ConfigError, ZiliError


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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder to this process; the system lets go of it when the process ends, however it ends.

    Raises:
        ConfigError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another process trains in {folder}; wait for it, or give another folder") from error
        yield
    finally:
        os.close(handle)
