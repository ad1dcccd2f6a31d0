"""The processes of one machine, begun and ended through its nursery."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Variable that names the file into which a process writes what ended it; torchrun's."""
_ENDING = 10.0
"""Seconds in which a nursery ends its children and itself."""


class LocalProcesses:
    """One life's processes of this machine. `ended(rank, code)` is called when one has."""

    def __init__(self, chip: str, *, cold: bool, ended: Callable[[int, int], None]) -> None:
        self._ended = ended
        self._apart: dict[int, asyncio.Future[int]] = {}
        self.alive: dict[int, int] = {}
        """Process id by rank; 0 until the nursery has said it."""
        self.over = False
        """Whether the nursery is gone, so that it begins no more of them."""
        self.none = asyncio.Event()
        self.none.set()
        own, theirs = socket.socketpair()
        words = [sys.executable, "-m", "zili.supervision.nursery", str(theirs.fileno()), chip, *(["cold"] * cold)]
        # In a group of its own: Ctrl-C is for the agent, which lets the workers save.
        self._nursery = subprocess.Popen(words, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        self._socket = own
        self._writer: asyncio.StreamWriter | None = None
        self.ready = asyncio.get_running_loop().create_future()
        """Seconds that the nursery needed to import, once it is ready."""
        self._reading = asyncio.ensure_future(self._read())

    def begin(self, rank: int, words: list[str], environment: dict[str, str], log: Path, *, shown: bool) -> None:
        """Begin one. Its output goes to `log`; that of a `shown` one to the terminal, except errors."""
        self.alive[rank] = 0
        self.none.clear()
        self._say(do="begin", rank=rank, words=words, environment=environment, log=str(log), shown=shown)

    def begin_apart(self, key: int, words: list[str], environment: dict[str, str], log: Path) -> asyncio.Future[int]:
        """Begin one that is not of the life, by the same way; its exit code is to come. `key`: no rank of the life."""
        self._apart[key] = asyncio.get_running_loop().create_future()
        self._say(do="begin", rank=key, words=words, environment=environment, log=str(log), shown=False)
        return self._apart[key]

    def signal(self, number: signal.Signals, rank: int | None = None, *, alone: bool = False) -> None:
        """Send a signal to one process, or to all that the nursery has; also to what they began, unless `alone`."""
        self._say(do="signal", rank=rank, signal=int(number), alone=alone)

    def kill_nursery(self) -> None:
        """Kill it as a fault would; its children end with it."""
        self._nursery.kill()

    def close(self) -> None:
        """End the nursery, which ends its children first."""
        self._reading.cancel()
        if self._writer is not None:
            self._writer.close()
        self._socket.close()
        with suppress(subprocess.TimeoutExpired):  # a child of it may wait for a dead disk
            self._nursery.wait(_ENDING)

    def _say(self, **order: Any) -> None:
        assert self._writer is not None, "the nursery is ready first"
        self._writer.write(json.dumps(order).encode() + b"\n")

    async def _read(self) -> None:
        reader, self._writer = await asyncio.open_unix_connection(sock=self._socket)
        while line := await reader.readline():
            said = json.loads(line)
            if said["say"] == "ready":
                self.ready.set_result(said["seconds"])
            elif said["say"] == "begun":
                if said["rank"] not in self._apart:
                    self.alive[said["rank"]] = said["pid"]
            else:
                self._bury(said["rank"], said["code"])
        self.over = True
        if not self.ready.done():
            self.ready.set_exception(RuntimeError("the nursery ended before it was ready"))
        for rank in (*self.alive, *self._apart):  # killed with all its children
            self._bury(rank, -signal.SIGKILL)

    def _bury(self, rank: int, code: int) -> None:
        if (apart := self._apart.pop(rank, None)) is not None:
            apart.set_result(code)
            return
        del self.alive[rank]
        if not self.alive:
            self.none.set()
        self._ended(rank, code)
