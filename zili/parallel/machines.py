"""What the machines of a run must have in common: one run folder, and the same data."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from tempfile import mkdtemp

from zili.durable import soon
from zili.errors import ConfigError, DataError
from zili.parallel.world import World

_CURE = "put the run's folder on a file system that all machines share (docs/parallel.md, More than one machine)"


def check_shared_folder(world: World, folder: Path) -> None:
    """Try, both ways, whether all processes see one `folder`: every one finds what the first makes there, and the first
    what every other makes. Both, since a container's layer shows what lies below and keeps what is written to itself.

    Raises:
        ConfigError: a process sees another folder under this name, or cannot write there.
    """
    if world.size == 1:
        return
    # A name that nobody has asked for yet: no client of a network file system has kept that it is absent.
    name, host = world.from_first(lambda: (_made(folder), socket.gethostname()))
    try:
        world.agree(lambda: _sign(folder / name, world.rank, host))
        world.from_first(lambda: _all_signed(folder / name, world.size, host))
    finally:
        if world.is_first:
            shutil.rmtree(folder / name, ignore_errors=True)


def check_same(world: World, what: str, identity: str) -> None:
    """Refuse processes to which `what` is not what it is to the first. Copies will do, and copies grow old.

    Raises:
        DataError: `identity` is another one.
    """
    first = world.from_first(lambda: identity)
    world.agree(lambda: _refuse_other(what, world.rank, identity == first))


def own_place(world: World) -> str:
    """This process, its machine and its chip, for a person who has to find them."""
    device = world.device
    number = "" if device.torch.index is None else f" {device.torch.index}"
    return f"process {world.rank} on {socket.gethostname()} ({device.name()}{number})"


def _refuse_other(what: str, rank: int, same: bool) -> None:
    if not same:
        raise DataError(
            f"process {rank} on {socket.gethostname()} has other {what} than process 0; "
            "copy the same files to every machine, or share them"
        )


def _made(folder: Path) -> str:
    try:
        return Path(mkdtemp(prefix=".shared-", dir=folder)).name
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}; free some space or choose another folder") from error


def _sign(probe: Path, rank: int, host: str) -> None:
    here = f"process {rank} on {socket.gethostname()}"
    try:
        if not soon(lambda: probe.name in _names(probe.parent)):
            raise ConfigError(f"{here} does not see in {probe.parent} what process 0 on {host} wrote there; {_CURE}")
        (probe / str(rank)).touch()
    except OSError as error:
        raise ConfigError(f"{here} cannot write in {probe.parent}: {error}; {_CURE}") from error


def _all_signed(probe: Path, size: int, host: str) -> None:
    expected = {str(rank) for rank in range(size)}
    if not soon(lambda: expected <= _names(probe)):
        missing = sorted(expected - _names(probe), key=int)
        raise ConfigError(
            f"process 0 on {host} does not see in {probe.parent} what {len(missing)} of {size} processes wrote there "
            f"(the first is process {missing[0]}); {_CURE}"
        )


def _names(folder: Path) -> set[str]:
    """Listed, not looked up one by one: opening a folder asks the server again."""
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
