"""What the fixture `zili` is, and gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Outcome(NamedTuple):
    """What a user sees of a command."""

    code: int
    out: str
    err: str


Zili = Callable[..., Outcome]
