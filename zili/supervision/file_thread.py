"""Files beside a loop: a shared folder may take a minute to answer, or for ever, and who waits for a sign of life would
take this machine for dead meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

from zili.errors import ConfigError

Result = TypeVar("Result")
PATIENCE = 60.0
"""Seconds for which a folder that refuses is asked again: a file server that starts anew answers with ESTALE, EIO or
ENOENT meanwhile."""
_BETWEEN = 0.5
_MOST = 100_000
"""Pieces of work that wait at most: behind a folder that never answers they would fill the memory."""


class FileThread:
    """One thread that does what it is given, in turn. It keeps no process from ending."""

    def __init__(self) -> None:
        self._given: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._since: float | None = None
        threading.Thread(target=self._run, name="files", daemon=True).start()

    @property
    def busy(self) -> float:
        """Seconds that the piece of work at hand has taken; 0: there is none."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def put(self, work: Callable[[], object]) -> None:
        """Do it after what was given before. What the disk refuses is lost; who needs to know uses `do`."""
        if self._given.qsize() < _MOST:
            self._given.put(work)

    async def do(self, work: Callable[[], Result]) -> Result:
        """Do it, and wait for its result while the loop goes on; what it raises is raised here."""
        future: Future[Result] = Future()

        def attempt() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        self._given.put(attempt)
        return await asyncio.wrap_future(future)

    async def patiently(self, work: Callable[[], Result], patience: float = PATIENCE) -> Result:
        """As `do`; where the folder refuses, again and again for `patience` seconds.

        Raises:
            OSError, ConfigError: what it refused with at last.
        """
        end: float | None = None
        while True:
            try:
                return await self.do(work)
            except (OSError, ConfigError):
                end = end or time.monotonic() + patience
                if time.monotonic() > end:
                    raise
            await asyncio.sleep(_BETWEEN)

    def _run(self) -> None:
        while True:
            work = self._given.get()
            self._since = time.monotonic()
            try:
                work()
            except OSError:
                pass
            except Exception:
                traceback.print_exc()  # a defect of ours: what comes after is to be done nevertheless
            self._since = None
