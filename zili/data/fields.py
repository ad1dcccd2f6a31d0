"""A JSON object of a record that notes which keys were read, so that unread ones can be named."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import isnan
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
_DEEPEST = 64
"""Levels of lists and tables; more makes whatever calls itself for each of them fail."""


class Unfit(Exception):
    """A record that is no conversation to learn from: a reason to count it by, and what is wrong with it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and isnan(value))


_EMPTY: tuple[Any, ...] = ("", [], {})
"""What says nothing."""


class Fields(Mapping[str, Any]):
    """`values` without those that are null, or NaN, as pandas has it: a table's empty cell is a key that is not there.

    Looking a value up marks it as used; asking whether it is there does not.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {key: value for key, value in values.items() if not _is_null(value)}
        self.not_numbers = {key for key, value in values.items() if value is not None and _is_null(value)}
        """Names of values that are NaN: they count as absent, except where a number is needed."""
        self._used: set[str] = set()
        self.lost: dict[str, Any] = {}
        """What lay in a value that was used, and is not used itself, by a name for it."""

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        self._used.add(key)
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def peek(self, key: str) -> Any:
        """The value of a key, or None, without having used it."""
        return self._values.get(key)

    def first(self, *names: str) -> Any:
        """The value of one thing by any of its names; None: none is there.

        Raises:
            Unfit: two of the names say different things.
        """
        there = {name: self[name] for name in names if name in self}
        told = {name: value for name, value in there.items() if value not in _EMPTY}
        values = list((told or there).values())
        if any(value != values[0] for value in values):
            raise Unfit("of an unknown form", f"{' and '.join(told)} are names for one thing, and say different things")
        return values[0] if values else None

    def unused(self) -> dict[str, Any]:
        """What was not looked up and says something."""
        rest = {key: value for key, value in self._values.items() if key not in self._used} | self.lost
        return {key: value for key, value in rest.items() if value not in _EMPTY}


def check_sound(value: Any) -> None:
    """Whether a value can be written out again.

    Raises:
        Unfit: half of a surrogate pair in a text, which is in no encoding, or lists in lists without end.
    """
    waiting = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        if depth > _DEEPEST:
            raise Unfit("nested too deep", f"it is nested deeper than {_DEEPEST} levels")
        if isinstance(one, str):
            if not one.isascii() and (found := _SURROGATE.search(one)):
                raise Unfit("broken UTF-8", f"lone surrogate U+{ord(found[0]):04X} in {one[:40]!a}")
        elif isinstance(one, Mapping):
            waiting += [(inner, depth + 1) for pair in one.items() for inner in pair]
        elif isinstance(one, list | tuple):
            waiting += [(inner, depth + 1) for inner in one]
