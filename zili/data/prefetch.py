"""Batches made ahead of the step that needs them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol

from zili.data.loader import Batch


class BatchSource(Protocol):
    """What the prefetcher asks of a loader."""

    def batch(self, step: int, rows: slice = ...) -> Batch: ...


class Prefetcher:
    """Iterates `(step, batch)` from `start` on, without end, `depth` batches ahead in one thread.

        with Prefetcher(loader, start=step) as batches:
            for step, batch in batches: ...

    An exception in the loader is raised to the consumer at the step it belongs to. `close` (or leaving the
    block) ends the thread. `waited` is the seconds the consumer stood still: near 0 when the data keeps up.
    """

    def __init__(
        self,
        loader: BatchSource,
        start: int = 0,
        rows: slice = slice(None),
        depth: int = 4,
        position: Callable[[int], int] = lambda step: step,
    ) -> None:
        """`position`: which of the loader's batches is a step's, where some are left out."""
        self._loader = loader
        self._position = position
        self._rows = rows
        self._ready: queue.Queue[tuple[int, Batch | BaseException]] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self.waited = 0.0
        self._thread = threading.Thread(target=self._work, args=(start,), name="zili-prefetch", daemon=True)
        self._thread.start()

    def _work(self, step: int) -> None:
        item: Batch | BaseException
        while not self._closed.is_set():
            try:
                item = self._loader.batch(self._position(step), self._rows)
            except BaseException as error:
                item = error
            self._put((step, item))
            if isinstance(item, BaseException):
                return
            step += 1

    def _put(self, item: tuple[int, Batch | BaseException]) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self

    def __next__(self) -> tuple[int, Batch]:
        if self._closed.is_set():
            raise StopIteration
        started = time.perf_counter()
        step, item = self._ready.get()
        self.waited += time.perf_counter() - started
        if isinstance(item, BaseException):
            self.close()
            raise item
        return step, item

    def close(self) -> None:
        """End the thread and drop what was made ahead; iteration stops. May be called again."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
