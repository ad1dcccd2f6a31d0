"""Making what was written survive a power cut, before it is given its name."""

from __future__ import annotations

import os
from pathlib import Path


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
