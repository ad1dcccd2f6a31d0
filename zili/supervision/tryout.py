"""What a process tries before a run has it: to open its device as a worker does, and to use it and the link.

    zili launch try-out CHIP [--host HOST]

It prints nothing where all is well. Errors end it as they end a worker.
"""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

from zili.chips import activate, find_backend
from zili.errors import ChipError, ConfigError
from zili.parallel.control.links import listening_at
from zili.parallel.layout import processes

if TYPE_CHECKING:
    import torch

_SIDE = 128
"""Of the matrices. With whole numbers up to 3 every sum is exact in fp16 too, and so in whatever a device sums in."""
_ROOM = 64 << 20
"""Bytes that a device must have free. What a run needs, it says itself."""
_PROBE = 1 << 20
"""Bytes that are moved to the device and back, and over the link."""
_PIECE = 64 << 10
"""Bytes that a connection holds while nobody reads."""
_SLOW = 10.0
"""Seconds for the link's probe, which takes milliseconds."""


def try_out(chip: str, host: str) -> None:
    """Use the device of this process, and as the first of its machine the link.

    Raises:
        ChipError: the device cannot be opened, has no room, computes wrongly, or gives back other bytes than it got.
        ConfigError: this machine cannot be reached at `host`.
    """
    here = processes()[2]
    device = activate(find_backend(chip), index=here).device
    try:
        wrong = _wrong(device)
    except Exception as error:  # a vendor's software may raise anything
        said = (str(error).strip().splitlines() or [""])[0]
        raise _of_this_device(f"{device} does not work: {type(error).__name__}: {said}") from error
    if wrong:
        raise _of_this_device(f"{device} {wrong}: look at its health")
    if here == 0:
        _try_link(host)


def _of_this_device(text: str) -> ChipError:
    error = ChipError(text)
    error.alone = True
    return error


def _wrong(device: torch.device) -> str:
    """What `device` does wrongly; "": nothing."""
    import torch

    room = torch.empty(_ROOM, dtype=torch.uint8, device=device)
    places = torch.arange(_SIDE * _SIDE).reshape(_SIDE, _SIDE)
    left, right = places * 5 % 7 - 3, places * 3 % 5 - 2
    product = (left.float().to(device) @ right.float().to(device)).cpu()
    off = int((product != left @ right).sum())
    if off:
        return f"multiplies wrongly: {off:,} of {_SIDE * _SIDE:,} sums of whole numbers are off"
    sent = torch.frombuffer(bytearray(os.urandom(_PROBE)), dtype=torch.uint8)
    room[-_PROBE:] = sent.to(device)
    if not torch.equal(room[-_PROBE:].cpu(), sent):
        return f"gave back other bytes than the {_PROBE >> 20} MiB that were moved to it"
    del room
    if device.type != "cpu":
        torch.accelerator.synchronize(device)  # what is wrong with freeing it is said here
    return ""


def _try_link(host: str) -> None:
    """Send bytes to this machine's own address, where the others will reach it."""
    begun, sent = time.monotonic(), os.urandom(_PROBE)
    try:
        with (
            listening_at(host) as listening,
            socket.create_connection((host, listening.getsockname()[1]), _SLOW) as ours,
        ):
            listening.settimeout(_SLOW)
            theirs, _ = listening.accept()
            theirs.settimeout(_SLOW)
            with theirs, theirs.makefile("rb") as reading:
                for start in range(0, _PROBE, _PIECE):
                    piece = sent[start : start + _PIECE]
                    ours.sendall(piece)
                    if reading.read(_PIECE) != piece:
                        raise ConfigError(f"--host {host}: bytes change on their way there; look at its network")
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"--host {host}: this machine cannot be reached there ({reason}); look at its firewall, or name another"
        ) from error
    seconds = time.monotonic() - begun
    if seconds > _SLOW:
        raise ConfigError(f"--host {host}: {_PROBE >> 20} MiB took {seconds:.0f} s to get there: look at its network")
