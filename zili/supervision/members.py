"""What the root keeps of a machine, of what it waits for, and of a process that ended."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from enum import Enum, auto
from typing import Any

from zili.parallel.control.links import Link
from zili.plurals import counted
from zili.supervision.state import Launch, State
from zili.supervision.verdicts import Ending

PATIENCE = 3.0
"""Seconds without a sign of life after which a machine counts as gone."""
_DEAF = 1.0
"""Seconds between two looks that count at most: a root that was itself stopped or starved has heard nothing of what
machines said meanwhile."""
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
        self.held: list[tuple[str, Any]] = []
        """Kinds and marks of the states that it had in memory when it last said so."""

    def tell(self, **order: Any) -> None:
        self.link.send(json.dumps(order).encode())


class Membership(dict[str, Member]):
    """The machines that are here, by name: who may come, who is heard of, who stays."""

    def __init__(self, launch: Launch) -> None:
        super().__init__()
        self._launch = launch
        self._identity: dict[str, str] = {}
        self._listened = time.monotonic()
        self._having: dict[str, dict[Any, list[str]]] = {}
        """By kinds and marks, who had a state in memory when the life began."""

    def refusal(self, name: str, identity: Any, state: State) -> str:
        """Why a machine may not take part; "": it may."""
        if not isinstance(identity, dict):
            return "another version of Zili than the others have: make them equal"
        if name in self:
            return f"machine {name} has a supervisor of this run already"
        if not self:
            self._identity = identity
        for what in (*self._identity, *identity):
            here, theirs = identity.get(what), self._identity.get(what)
            if here != theirs:
                return f"{name} has {what} {here}, the others have {theirs}: make them equal"
        if name in state.left_out:
            return f"machine {name} is left out of this run: {state.left_out[name]}"
        most = self._launch.most + self._launch.spares
        if len(self.staying(state)) >= most and name not in state.machines:
            return f"the run has its {counted(most, 'machine')}; --spares lets more stand by"
        return ""

    def learn_held(self) -> int:
        """Take down what all have in memory, for a life that begins; the newest life of which there is a state, 0:
        there is none."""
        self._having = defaultdict(dict)
        for member in self.values():
            for kind, mark in member.held:
                way, step = mark
                self._having[kind].setdefault((tuple(way), step), []).append(member.name)
        return max((way[0] for marks in self._having.values() for way, _ in marks), default=0)

    def having(self, kind: str) -> list[tuple[Any, list[str]]]:
        """Marks of the states of a kind that machines have in memory, each with their addresses."""
        found = self._having.get(kind, {})
        return [
            (mark, [member.address for member in self.of(names) if member.address]) for mark, names in found.items()
        ]

    def silent(self, now: float) -> list[Member]:
        """Those that say nothing any more. It is asked about twice a second."""
        slept = max(0.0, now - self._listened - _DEAF)
        self._listened = now
        for member in self.values():
            member.heard += slept  # what it said meanwhile is still to be read
        return [member for member in self.values() if now - member.heard > PATIENCE]

    def of(self, names: Iterable[str]) -> list[Member]:
        """Those of `names` that are here, in that order."""
        return [self[name] for name in names if name in self]

    def staying(self, state: State) -> list[str]:
        """Those that are not to be left."""
        return [name for name in self if name not in state.leaving]

    def sizes_without(self, name: str, state: State) -> list[int]:
        """Numbers of machines that a life could have if `name` was gone."""
        others = [other for other in self.staying(state) if other != name]
        return self._launch.sizes(len(others))

    def order(self, state: State) -> list[str]:
        """Who may work, the first ones first: those that worked keep their places, who stood by comes after them, and
        who failed is taken last."""
        fit = [name for name in self.staying(state) if name not in state.left_out]
        order = [name for name in state.machines if name in fit]
        order += [name for name in fit if name not in order]
        return sorted(order, key=lambda name: name in state.doubtful)


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
