"""Files and folders that appear whole or not at all, and survive a power cut once they have their name."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zili.errors import CheckpointError, ConfigError, ZiliError

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
"""What file systems without locks answer."""
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
"""What a disk answers that is full, over a quota, read-only or broken."""
_CURES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, or name another place") | dict.fromkeys(
    (errno.EACCES, errno.EPERM), "change who may do that, or name another place"
)
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP}
"""What is said of a file that nobody can have named rightly; of other things it may be a defect."""


def refused_by_disk(error: BaseException) -> ConfigError | None:
    """What a user can cure, where `error` is how a disk said no; None where it is something else."""
    said = re.search(r"\(os error (\d+)\)", str(error))  # safetensors raises an error of its own
    number = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
    forbidden = number in _FORBIDDEN and getattr(error, "filename", None) is not None
    if number in _REFUSALS or forbidden:
        return ConfigError(f"the disk refuses: {error}; {_CURES.get(number or 0, 'name another place')}")
    return None


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
    """Write a small UTF-8 file so that a reader finds the old one or the new one, never half of it.

    Raises:
        OSError: it cannot be written; nothing of it is left, and the error names it.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        sync(aside)
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise _naming(path, error) from error


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
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None and refused_by_disk(error):
            raise _naming(target, error) from error
        raise


def _naming(path: Path, error: OSError) -> OSError:
    """The error with the name of its file, which only errors of opening have."""
    return OSError(error.errno, error.strerror, str(path))


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
def locked(folder: Path, *, shared: bool = False) -> Iterator[str | None]:
    """Keep a folder to this process; the system lets go of it when the process ends, however it ends. `shared`: to this
    one and others that share it.

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
        yield _lock(handle, folder, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path, kind: int) -> str | None:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"another process trains in {folder}; wait for it, or give another folder") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise ConfigError(f"{folder} cannot be locked: {error}; choose another folder") from error
        return str(error)
    return None
