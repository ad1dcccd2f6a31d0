"""Ctrl-C, SIGTERM and a lost terminal end a run after the current step, with a checkpoint; a second one at once.

One request is often heard twice: a job manager signals every process of a job, and torchrun passes on what it hears.
So a SIGTERM that follows within `grace_seconds` is the same request. What ends a run at once, without a checkpoint, is
a second Ctrl-C, or a SIGTERM after that time.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from zili.errors import ConfigError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def grace_seconds() -> float:
    """How long after a request a SIGTERM or SIGHUP is still the same one.

    As long as torchrun waits between passing a signal on and SIGKILL, by the same variable: 30 s, which Slurm
    (KillWait) and Kubernetes (terminationGracePeriodSeconds) wait as well.

    Raises:
        ConfigError: the variable is not a number.
    """
    value = os.environ.get(_GRACE, "30")
    try:
        return float(value)
    except ValueError as error:
        raise ConfigError(f"{_GRACE} is {value!r}, which is no number of seconds; unset it") from error


def ignore_repeats() -> None:
    """For a process that was asked to end and is about to: torchrun may yet pass on what it was told itself."""
    if "TORCHELASTIC_RUN_ID" in os.environ and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)


class Interruption:
    """While entered, `requested` turns true at the first signal; one that insists is delivered as usual."""

    def __init__(self) -> None:
        self.requested = False
        self._grace = grace_seconds()
        self._first: float | None = None
        self._ctrl_c = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        # Python delivers signals to the main thread alone and refuses handlers set elsewhere.
        if threading.current_thread() is threading.main_thread():
            # One that is ignored stays so: the shell did that to keep a job in the background from Ctrl-C.
            heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._insists(number):
            self._restore()
            signal.raise_signal(number)
        self.requested = True

    def _insists(self, number: int) -> bool:
        now = time.monotonic()
        if self._first is None:
            self._first = now
        if number == signal.SIGINT:
            self._ctrl_c += 1
            return self._ctrl_c > 1
        return now - self._first > self._grace

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
