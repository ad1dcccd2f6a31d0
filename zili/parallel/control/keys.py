"""Names with values that all processes of a run see, as torch's groups find each other by: torch's TCPStore needs a
connection of every process to one machine."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Reply = Callable[[bytes], None]


def waits(question: bytes) -> bool:
    """Whether its answer comes when all its keys are there, and is the same for all who ask."""
    return json.loads(question)[0] in ("wait", "get")


@dataclass
class _Waiter:
    missing: set[str]
    key: str | None
    """Whose value is wanted."""
    reply: Reply


class KeyValues:
    """The names and values of one life of a run; they are where the first node is."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._waiters: dict[str, list[_Waiter]] = defaultdict(list)

    def ask(self, question: bytes, value: bytes, reply: Reply) -> None:
        """`question` is `[operation, *arguments]` as JSON, about the operations of `torch.distributed.Store`.

        Raises:
            ValueError: there is no such operation.
        """
        operation, *arguments = json.loads(question)
        if operation in ("wait", "get"):
            self._wait(arguments, reply, arguments[0] if operation == "get" else None)
            return
        known: dict[str, Callable[..., bytes]] = {
            "set": self._set,
            "add": self._add,
            "append": self._append,
            "compare_set": self._compare_set,
            "check": self._check,
            "delete": self._delete,
            "count": self._count,
        }
        if operation not in known:
            raise ValueError(f"{operation!r} is no operation of a store")
        reply(known[operation](value, *arguments))

    def _wait(self, keys: list[str], reply: Reply, key: str | None) -> None:
        missing = {name for name in keys if name not in self._values}
        if not missing:
            reply(b"" if key is None else self._values[key])
            return
        waiter = _Waiter(missing, key, reply)
        for name in missing:
            self._waiters[name].append(waiter)

    def _set(self, value: bytes, key: str) -> bytes:
        self._values[key] = value
        for waiter in self._waiters.pop(key, ()):
            waiter.missing.discard(key)
            if not waiter.missing:
                waiter.reply(b"" if waiter.key is None else self._values[waiter.key])
        return b""

    def _add(self, _: bytes, key: str, amount: int) -> bytes:
        total = int(self._values.get(key, b"0")) + amount
        self._set(str(total).encode(), key)
        return self._values[key]

    def _append(self, value: bytes, key: str) -> bytes:
        return self._set(self._values.get(key, b"") + value, key)

    def _compare_set(self, value: bytes, key: str, expected: str) -> bytes:
        """As torch's: an absent key is set where nothing is expected, and what is there comes back."""
        there = self._values.get(key)
        if (there is None and not expected) or there == expected.encode():
            self._set(value, key)
        return self._values.get(key, expected.encode())

    def _check(self, _: bytes, *keys: str) -> bytes:
        return _said(all(key in self._values for key in keys))

    def _delete(self, _: bytes, key: str) -> bytes:
        return _said(self._values.pop(key, None) is not None)

    def _count(self, _: bytes) -> bytes:
        return _said(len(self._values))


def _said(value: Any) -> bytes:
    return str(int(value)).encode()
