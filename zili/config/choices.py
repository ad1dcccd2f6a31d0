"""Automatic choices: what was chosen, and why. Promise 3: nothing is silent."""

from __future__ import annotations

from typing import NamedTuple


class Choice(NamedTuple):
    """One setting that was left to us."""

    name: str
    """Dotted name of the setting."""
    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} = {self.value}: {self.reason}"
