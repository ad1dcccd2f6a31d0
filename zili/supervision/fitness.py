"""A short look at a machine before it joins a run, or takes another's place: devices, memory, link and disk.

It opens no device: try-outs do that next (`proving`). It looks at what a worker would only meet in the middle of a run.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path

from zili.chips import Backend
from zili.chips.host_memory import available_bytes
from zili.chips.presence import presence
from zili.durable import sync
from zili.errors import ChipError, ConfigError
from zili.parallel.control.links import listening_at
from zili.plurals import counted

_PROBE = 1 << 20
"""Bytes that are written and read back."""
_LEAST_DISK = 100 << 20
"""Bytes of free disk, below which a checkpoint's files cannot even begin."""
_LEAST_MEMORY = 300 << 20
"""Bytes of host memory for one process: what torch itself takes."""
_SLOW = 10.0
"""Seconds for the probe: a disk that needs them hangs or is about to."""


def refuse_unfit(run: Path, backend: Backend, processes: int) -> None:
    """Raise what keeps `processes` of a run in the folder `run` from this machine; at most seconds.

    Raises:
        ChipError: its devices are not there, or are too few.
        ConfigError: its disk or its memory is too small, or does not give back what was written.
    """
    found = presence(backend)
    if not found.here:
        raise ChipError(f"this machine has no {backend.name}: {found.reason}; {found.fix}")
    if found.count is not None and backend.device_type != "cpu" and found.count < processes:
        raise ChipError(f"this machine has {counted(found.count, backend.name)} for {counted(processes, 'process')}")
    memory = available_bytes()
    if memory is not None and memory < processes * _LEAST_MEMORY:
        raise ConfigError(
            f"this machine has {memory >> 20:,} MiB of free memory for {counted(processes, 'process')}, each of which "
            f"takes {_LEAST_MEMORY >> 20} MiB before a model is there; begin fewer here, or end what else runs"
        )
    _try_disk(run)


def listening_here(host: str, backlog: int | None = None) -> socket.socket:
    """A socket that listens at `host`, which is an address or name of this machine.

    Raises:
        ConfigError: it is another machine's, or no address, or no port is free.
    """
    try:
        return listening_at(host, backlog=backlog)
    except OSError as error:
        raise cannot_listen(host, error) from error


def cannot_listen(host: str, error: OSError) -> ConfigError:
    """What to say of it."""
    reason = error.strerror or error
    return ConfigError(f"--host {host}: this machine cannot listen there ({reason}); name one of its own")


def _try_disk(run: Path) -> None:
    """Write, read back, and see how long that takes and what room is left."""
    probe = run / f".probe-{os.getpid()}"
    written, begun = os.urandom(_PROBE), time.monotonic()
    try:
        probe.write_bytes(written)
        sync(probe)
        same, free = probe.read_bytes() == written, shutil.disk_usage(run).free
    except OSError as error:
        raise ConfigError(f"{run} cannot be written from this machine: {error}") from error
    finally:
        probe.unlink(missing_ok=True)
    seconds = time.monotonic() - begun
    if not same:
        raise ConfigError(f"{run} gives back other bytes than were written there: look at this machine's disk or mount")
    if free < _LEAST_DISK:
        raise ConfigError(f"{run} has {free >> 20:,} MiB free; make room for checkpoints")
    if seconds > _SLOW:
        raise ConfigError(f"{run} took {seconds:.0f} s for {_PROBE >> 20} MiB: its disk or mount hangs")
