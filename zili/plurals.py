"""Counts in words: one chip, 1,024 chips."""

from __future__ import annotations

_SIBILANTS = ("s", "x", "ch", "sh")


def counted(number: int, thing: str) -> str:
    """`1 chip`, `1,024 chips`, `1 process`, `2 processes`; `thing` is one of them."""
    if number == 1:
        return f"1 {thing}"
    return f"{number:,} {thing}{'es' if thing.endswith(_SIBILANTS) else 's'}"
