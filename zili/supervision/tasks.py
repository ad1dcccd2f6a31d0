"""What is done beside a loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class Tasks:
    """Work that nobody awaits. A loop itself keeps no reference to it, and what it fails with would be lost."""

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        """`failed` is told of each that ends by an error."""
        self._failed = failed
        self._work: set[asyncio.Task[None]] = set()

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._work.add(task)
        task.add_done_callback(self._ended)
        return task

    def cancel(self) -> None:
        """End all that is not done."""
        for task in tuple(self._work):
            task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)
