"""Recognises Git LFS pointers: a clone without Git LFS has a few lines in place of each large file."""

from __future__ import annotations

from pathlib import Path

_BEGIN = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS keeps in place of another."""
    try:
        with path.open("rb") as file:
            return file.read(len(_BEGIN)) == _BEGIN
    except OSError:
        return False


def what_it_is(path: Path, otherwise: str) -> str:
    """What to say of a file that cannot be read: that it is a pointer, and what to do; or `otherwise`."""
    if not is_lfs_pointer(path):
        return otherwise
    return (
        f"{path} is a Git LFS pointer and not the file itself: run `git lfs install` and `git lfs pull` in its folder"
    )
