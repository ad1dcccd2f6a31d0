"""Waiting for what comes about in another thread or process, however slow the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def until(look: Callable[[], Found], seconds: float = 120) -> Found:
    """What `look()` gives as soon as it is true. `seconds` guard against a hang; they are no measure of speed."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found
