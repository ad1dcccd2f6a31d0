"""The faults of a drill: their kinds, and the schedule that a seed makes of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from zili.errors import ConfigError
from zili.parallel.control.crumbs import PHASES, Phase

LARGEST_SEED = 2**63 - 1
MOST_FAULTS = 100_000
AT_A_BEGINNING: frozenset[Phase] = frozenset({"init", "join", "load", "warm_up"})
"""Phases that a process passes once: a fault in them needs a life that begins, so a kill comes before it."""
_LOOP: tuple[Phase, ...] = ("data", "step")
_EVERYWHERE: tuple[Phase, ...] = ("init", "join", "load", "warm_up", *_LOOP, "copy", "save")
_ORDERED: tuple[Phase, ...] = ("join", "load", "warm_up", *_LOOP)
"""A process meets an order when it enters a phase, and `init` it is in from the beginning. What it raises in a save
stops the run."""


class FaultKind(NamedTuple):
    """One way to break a run."""

    text: str
    phases: tuple[Phase, ...]
    follows: str = "started"
    """The event of the ledger that has to follow: the next life, or the next root. "": none, a step is enough."""
    ends_run: tuple[int, ...] = ()
    """Exit codes with which the run may end by it."""
    usual: bool = True
    """Whether a drill has it without being asked."""


# fmt: off
KINDS: dict[str, FaultKind] = {
    "kill": FaultKind("SIGKILL to a process", _EVERYWHERE),
    "hang": FaultKind("SIGSTOP to a process", _LOOP),
    "pause": FaultKind("SIGSTOP to a process, and SIGCONT a second later", _EVERYWHERE, follows=""),
    "term": FaultKind("SIGTERM to a process", _EVERYWHERE),
    "nursery": FaultKind("SIGKILL to a machine's nursery", _EVERYWHERE),
    "root": FaultKind("SIGKILL to the root", _EVERYWHERE, follows="root"),
    "agent": FaultKind("SIGKILL to a machine's agent: somebody has to begin it again", _EVERYWHERE, usual=False),
    "raise": FaultKind("a process raises an error", _ORDERED),
    "exit": FaultKind("a process ends too early, with exit code 0", _ORDERED),
    "leak": FaultKind("a process takes 256 MiB more and is killed", _ORDERED),
    "truncate": FaultKind("a file of the newest checkpoint is cut to half, and a process killed", ("step",)),
    "flip": FaultKind("a bit of a file of the newest checkpoint is flipped, and a process killed", ("step",)),
    "remove": FaultKind("a file of the newest checkpoint is removed, and a process killed", ("step",)),
    "nan": FaultKind("a gradient becomes NaN: the run ends", ("step",), ends_run=(8, 12), usual=False),
}
# fmt: on
DAMAGES = ("truncate", "flip", "remove")
"""Kinds that damage a checkpoint first."""


@dataclass(frozen=True)
class Fault:
    """One fault of a schedule."""

    number: int
    kind: str
    machine: str
    process: int
    """Of the machine, from 0."""
    phase: Phase
    draw: int
    """What else is left to chance goes by it: which file, which bit."""

    def as_table(self) -> dict[str, Any]:
        return asdict(self)


def kinds_named(text: str | None) -> list[str]:
    """`kill,hang` as kinds; all usual ones where nothing is said.

    Raises:
        ConfigError: there is no such kind.
    """
    names = [name for name, kind in KINDS.items() if kind.usual] if text is None else _words(text)
    for name in names:
        if name not in KINDS:
            raise ConfigError(f"--kinds: there is no fault {name!r}; there are {', '.join(KINDS)}")
    if not names:
        raise ConfigError(f"--kinds: name some of {', '.join(KINDS)}")
    return names


def phases_named(text: str | None, kinds: Sequence[str]) -> list[Phase]:
    """`save,load` as phases; all where nothing is said.

    Raises:
        ConfigError: there is no such phase, or a kind has none of them.
    """
    names = list(_EVERYWHERE) if text is None else _words(text)
    for name in names:
        if name not in _EVERYWHERE:
            raise ConfigError(f"--phases: no fault is made in {name!r}, but in {', '.join(_EVERYWHERE)}")
    found = [phase for phase in PHASES if phase in names]
    for kind in kinds:
        if not set(found) & set(KINDS[kind].phases):
            raise ConfigError(f"--phases: {kind} is made in {', '.join(KINDS[kind].phases)}, and in no other phase")
    return found


def schedule(
    seed: int, count: int, kinds: Sequence[str], phases: Sequence[Phase], machines: Sequence[str], processes: int
) -> list[Fault]:
    """`count` faults on `processes` of each of `machines`; the same arguments make the same ones.

    Each kind comes about as often as any other. One that ends the run comes last, and once.
    Raises:
        ConfigError: the seed is none.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise ConfigError(f"--seed {seed}: give a whole number from 0 to {LARGEST_SEED}")
    random_numbers = random.Random(seed)
    last = [name for name in kinds if KINDS[name].ends_run]
    others = [name for name in kinds if name not in last]
    chosen: list[str] = []
    while others and len(chosen) < count - bool(last):
        chosen += random_numbers.sample(others, len(others))
    chosen = [*chosen[: count - bool(last)], *(random_numbers.choice(last) for _ in last[:1])]
    return [
        Fault(
            number,
            kind,
            random_numbers.choice(sorted(machines)),
            random_numbers.randrange(processes),
            random_numbers.choice([phase for phase in KINDS[kind].phases if phase in phases]),
            random_numbers.getrandbits(32),
        )
        for number, kind in enumerate(chosen, 1)
    ]


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
