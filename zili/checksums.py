"""`SHA256SUMS`: one line a file of a folder, as `sha256sum -c` reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from zili.errors import CheckpointError

SUMS_FILE = "SHA256SUMS"


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    """`sums`: names of files of `folder` and their hashes."""
    lines = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    (folder / SUMS_FILE).write_text(lines, encoding="utf-8")


def verify_sums(folder: Path, required: Iterable[str] = ()) -> dict[str, str]:
    """Hash every file again; returns the hashes by name.

    Raises:
        CheckpointError: a file is missing, truncated, changed, or not listed; the message names it.
    """
    try:
        lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / SUMS_FILE} cannot be read: {error}") from error
    sums = {name: expected for expected, _, name in (line.partition("  ") for line in lines)}
    unlisted = sorted({*required, *(entry.name for entry in folder.iterdir())} - {*sums, SUMS_FILE})
    if unlisted:
        raise CheckpointError(f"{folder / SUMS_FILE} is cut short or older than the rest: it lacks {unlisted[0]}")
    for name, expected in sums.items():
        if Path(name).name != name:
            raise CheckpointError(f"{folder / SUMS_FILE} names {name!r}, which is not a file of this folder")
        try:
            found = sha256(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error}") from error
        if found != expected:
            raise CheckpointError(f"{folder / name} is damaged: sha256 {found[:12]}..., expected {expected[:12]}...")
    return sums
