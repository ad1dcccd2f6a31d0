"""What a drill can order a process to do to itself. Nothing orders it but the agent of a run that somebody drills."""

from __future__ import annotations

import os
import signal
from typing import Literal, NoReturn, get_args

Order = Literal["raise", "exit", "leak", "nan"]
"""Raise an error; end too early with exit code 0; take memory until it is killed; make a gradient NaN, which the
trainer does itself."""
ORDERS: tuple[Order, ...] = get_args(Order)
_LEAK = 256 << 20
"""Bytes of a leak, so that a drill harms nobody else on the machine."""
_PIECE = 16 << 20


class DrillError(RuntimeError):
    """The error that a drill ordered."""


def obey(order: Order) -> NoReturn:
    """Do what was ordered.

    Raises:
        DrillError, SystemExit: as ordered.
    """
    if order == "raise":
        raise DrillError("a drill ordered this error")
    if order == "leak":
        leaked = [bytes([1]) * _PIECE for _ in range(_LEAK // _PIECE)]
        os.kill(os.getpid(), signal.SIGKILL if leaked else 0)  # as the kernel does when memory is full
    raise SystemExit(0)
