"""What an examination found, and how bad it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum


class Severity(IntEnum):
    """The worst of all findings is the exit code's."""

    GOOD = 0
    FALLBACK = 1
    """Works another way, or is not there and not needed."""
    DEGRADED = 2
    """Works, but slowly, or not repeatably."""
    BROKEN = 3
    """A run would give wrong numbers, or stop."""


AREAS = ("numbers", "capabilities", "speed", "repeatability", "disk", "collectives", "workers")
"""What can be examined; what is here always is."""
EXIT_CODES = {Severity.GOOD: 0, Severity.FALLBACK: 0, Severity.DEGRADED: 9, Severity.BROKEN: 10}


@dataclass(frozen=True)
class Finding:
    """One capability, what was seen of it, and what to do."""

    area: str
    """One of `AREAS`, or "here"."""
    name: str
    severity: Severity
    seen: str
    fix: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    """Measured, by name; the unit is part of the name."""


def worst(findings: Sequence[Finding]) -> Severity:
    """How bad the worst of `findings` is."""
    return max((finding.severity for finding in findings), default=Severity.GOOD)
