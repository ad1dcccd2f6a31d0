"""What the root keeps of a machine, of what it waits for, and of a process that ended."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from enum import Enum, auto
from typing import Any

from zili.parallel.control.links import Link
from zili.supervision.verdicts import Ending

_PHASES = {"init": "start", "warm_up": "compile", "data": "step"}
"""What rules call phases of a process's breadcrumbs."""


class Waiting(Enum):
    """What the root is waiting for."""

    GATHERING = auto()
    """Machines enough to begin a life."""
    PREPARING = auto()
    """The machines of a life, each to say where its node is."""
    RUNNING = auto()
    STOPPING = auto()
    """All processes of a life to have ended."""
    OVER = auto()


class Member:
    """A machine's agent, as the root knows it."""

    def __init__(self, name: str, link: Link) -> None:
        self.name = name
        self.link = link
        self.heard = time.monotonic()
        self.address = ""
        self.prepared = self.stopped = False
        self.draining = False

    def tell(self, **order: Any) -> None:
        self.link.send(json.dumps(order).encode())


class Refused(Exception):
    """What an agent says that this root does not take."""


def table_in(raw: bytes | None) -> dict[str, Any] | None:
    """What an agent says; None: its link has ended.

    Raises:
        Refused: it is no table of JSON.
    """
    if raw is None:
        return None
    try:
        said = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refused(f"no JSON: {error}") from error
    if not isinstance(said, dict):
        raise Refused("no table")
    return said


def as_ending(said: Mapping[str, Any], saved: int | None = None) -> Ending:
    """What an agent says of a process that ended; `saved`: the step of the run's newest checkpoint."""
    code = said["code"]
    return Ending(
        rank=said["rank"],
        machine=said["machine"],
        code=code if code >= 0 else None,
        signal=-code if code < 0 else None,
        error=said["error"] or None,
        log=said["log"],
        phase=_PHASES.get(said["phase"], said["phase"]),
        step=said["step"] or saved,
        stopped=said["stopped"],
    )
