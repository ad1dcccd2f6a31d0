"""torch's store over a machine's node: one connection a machine leads to the values, where TCPStore has one a process.

Of 32 processes that connect to one TCPStore at once, some wait five seconds (torch 2.13).
"""

from __future__ import annotations

import json
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any

import torch.distributed as dist

from zili.parallel.control.links import PlainLink
from zili.parallel.control.messages import About, Message, unpacked

_PATIENCE = timedelta(minutes=30)


class NodeStore(dist.Store):
    """The store of one life of a run, for `init_process_group`. Threads may ask at the same time.

    Who makes one keeps it: torch holds only its C++ half, which can do nothing without this one.
    """

    def __init__(self, address: str, secret: bytes) -> None:
        """`address`: the machine's node."""
        super().__init__()
        self._node = address, secret
        self._patience = _PATIENCE
        # A thread that waits for a key holds its link; torch's own threads cannot keep one each.
        self._free: SimpleQueue[PlainLink] = SimpleQueue()

    def _ask(self, *question: Any, value: bytes = b"", patience: timedelta | None = None) -> bytes:
        asked = Message(About.STORE, word=json.dumps(question).encode(), list=value)
        try:
            link = self._free.get_nowait()
        except Empty:
            link = PlainLink(*self._node)
        try:
            link.send(asked.packed())
            answer = unpacked(link.receive((patience or self._patience).total_seconds()))
        except TimeoutError as error:
            link.close()
            raise dist.DistStoreError(
                f"wait timeout after {patience or self._patience}, keys: {question[1:]}"
            ) from error
        except OSError as error:
            link.close()
            raise dist.DistNetworkError(f"the store of the run has ended: {error}") from error
        self._free.put(link)
        return answer.list

    def set(self, key: str, value: bytes | str) -> None:
        self._ask("set", key, value=_raw(value))

    def get(self, key: str) -> bytes:
        return self._ask("get", key)

    def add(self, key: str, amount: int) -> int:
        return int(self._ask("add", key, amount))

    def append(self, key: str, value: bytes | str) -> None:
        self._ask("append", key, value=_raw(value))

    def compare_set(self, key: str, expected: bytes | str, desired: bytes | str) -> bytes:
        return self._ask("compare_set", key, _raw(expected).decode(), value=_raw(desired))

    def check(self, keys: list[str]) -> bool:
        return self._ask("check", *keys) == b"1"

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._ask("wait", *keys, patience=timeout)

    def delete_key(self, key: str) -> bool:
        return self._ask("delete", key) == b"1"

    def num_keys(self) -> int:
        return int(self._ask("count"))

    def set_timeout(self, timeout: timedelta) -> None:
        self._patience = timeout

    @property
    def timeout(self) -> timedelta:
        return self._patience


def _raw(value: bytes | str) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
