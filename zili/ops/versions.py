"""What a faster form of an operation is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

EAGER = "eager"
"""A condition of a version: blocks run eagerly. It gains nothing where torch.compile fuses the plain form."""


@dataclass(frozen=True)
class Version:
    """A faster form of one operation: the same arguments and results as the reference's."""

    operation: str
    name: str
    function: Callable[..., Any]
    lacks: Callable[[str, str], str | None]
    """Device type and precision to what is missing for it to run there; None: nothing."""
    needs: str = ""
    """Capability, or `EAGER`, that it needs, unless the recipe asks for it by name; empty: none."""
    reason: str = ""
    """Why it is taken without timing; empty: it is timed against the reference, and taken if it is faster."""
