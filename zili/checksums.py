"""`SHA256SUMS`: one line a file of a folder, as `sha256sum -c` reads it."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TypeVar

from zili.errors import CheckpointError

SUMS_FILE = "SHA256SUMS"
_THREADS = 4
"""Each hashes a file: one reads while another computes. A process is rarely given more cores than this."""
Item = TypeVar("Item")
Made = TypeVar("Made")


def sha256(path: Path) -> str:
    """The SHA-256 sum of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    """`sums`: names of files of `folder` and their hashes."""
    (folder / SUMS_FILE).write_text(sums_text(sums), encoding="utf-8")


def sums_text(sums: Mapping[str, str]) -> str:
    """What `write_sums` writes."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def parsed_sums(text: str, where: object) -> dict[str, str]:
    """The hashes in such a text, by name; `where` it is, for an error.

    Raises:
        CheckpointError: it names a file that is not beside it.
    """
    sums = {name: expected for expected, _, name in (line.partition("  ") for line in text.splitlines())}
    for name in sums:
        if not name or Path(name).name != name:
            raise CheckpointError(f"{where} names {name!r}, which is not a file of this folder")
    return sums


def several_at_once(work: Callable[[Item], Made], items: Sequence[Item]) -> Iterator[Made]:
    """`work` of each of `items`, in their order, on a few threads: hashlib lets the others run while it hashes."""
    # Its threads are daemons, so that Ctrl-C need not wait for the end of a large file.
    with ThreadPool(max(1, min(_THREADS, len(items)))) as pool:
        yield from pool.imap(work, items)


def share_of(sizes: Mapping[Item, int], part: int, parts: int) -> list[Item]:
    """Which of the files with `sizes`, bytes, process `part` of `parts` hashes. The same on every process."""
    return [name for name, number in dealt(sizes, parts).items() if number == part]


def dealt(sizes: Mapping[Item, int], parts: int, near: Mapping[Item, Sequence[int]] | None = None) -> dict[Item, int]:
    """Which of `parts` processes hashes each of the files with `sizes`, bytes: from the largest to the smallest, each
    goes to the process that has fewest bytes.

    `near`: the processes that read a file anyway. It goes to one of them, and then those are dealt out that nobody
    reads; but no process gets a second file that would make it more than twice its part of all bytes.
    """
    near = near or {}
    names: list[Any] = sorted(sizes, key=lambda name: (not near.get(name), -sizes[name], str(name)))
    loads, most = [0] * parts, 2 * sum(sizes.values()) / parts
    # A process's entry is right if it is the newest; the others are dropped when they come up.
    least = [(0, number) for number in range(parts)]
    found = {}
    for name in names:
        number = min(near.get(name, ()), key=lambda reader: (loads[reader], reader), default=None)
        if number is None or (loads[number] and loads[number] + sizes[name] > most):
            while least[0][0] != loads[least[0][1]]:
                heapq.heappop(least)
            number = least[0][1]
        loads[number] += sizes[name]
        heapq.heappush(least, (loads[number], number))
        found[name] = number
    return found


def read_sums(folder: Path, required: Iterable[str] = (), *, others: bool = False) -> dict[str, str]:
    """The hashes that `folder` lists, by name. `others`: files that are not listed may be there.

    Raises:
        CheckpointError: there is no list, or it lacks a file of the folder, or one that is `required`.
    """
    try:
        text = (folder / SUMS_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / SUMS_FILE} cannot be read: {error}") from error
    sums = parsed_sums(text, folder / SUMS_FILE)
    there = () if others else (entry.name for entry in folder.iterdir())
    unlisted = sorted({*required, *there} - {*sums, SUMS_FILE})
    if unlisted:
        raise CheckpointError(f"{folder / SUMS_FILE} is cut short or older than the rest: it lacks {unlisted[0]}")
    return sums


def verify_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Hash the files in `sums` again: all that `read_sums` gave, or a share of them.

    Raises:
        CheckpointError: a file is missing, truncated or changed; the message names it.
    """
    for name, found in changed(folder, sums):
        raise CheckpointError(f"{folder / name} is damaged: sha256 {found[:12]}..., expected {sums[name][:12]}...")


def changed(folder: Path, sums: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Files in `sums` that have another hash, each with that hash. Raises: CheckpointError, a file is missing."""
    names = sorted(sums)
    for name, found in zip(names, several_at_once(lambda name: _sha256_in(folder, name), names), strict=True):
        if found != sums[name]:
            yield name, found


def _sha256_in(folder: Path, name: str) -> str:
    try:
        return sha256(folder / name)
    except OSError as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error}") from error
