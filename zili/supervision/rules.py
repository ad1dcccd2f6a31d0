"""The table of rules: what an ending of a process looks like, what that means, and what is to be done. No torch.

The rules are data: `zili/supervision/rules.toml` has what is general, `zili/chips/faults.toml` what vendors print.
"""

from __future__ import annotations

import json
import signal as signals
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, Self

from pydantic import ValidationError, model_validator

from zili.config.section import Section
from zili.errors import ConfigError

Action = Literal["restart", "replace", "roll_back", "stop"]
ACTIONS: dict[Action, str] = {
    "restart": "restart where it was",
    "replace": "restart without this machine",
    "roll_back": "go back to the checkpoint before and skip the data that follows it",
    "stop": "stop: going on makes no sense",
}
Kind = Literal[
    "device",
    "host",
    "memory",
    "network",
    "storage",
    "checkpoint",
    "data",
    "numerics",
    "code",
    "configuration",
    "preemption",
    "unknown",
]

TAIL = 16_384
"""Characters at the end of an error file's text, and of a log, in which rules look. A cause is printed last, and a
process that prints without end must not cost its supervisor more than this."""
_LARGEST_ERROR_FILE = 1_000_000
"""Characters of an error file that are read as JSON; of a larger one only the end counts."""
_FROM_SHELLS = range(129, 160)
"""Exit codes by which a shell says 128 + signal."""
_BLUNT = {signals.SIGKILL, signals.SIGBUS, signals.SIGILL, signals.SIGFPE}
"""Signals that do not come of a lost peer. Of SIGABRT and SIGSEGV one never knows: libraries of collectives abort a
process whose peer is gone, and a group that is taken apart under a process can take it along."""
_WORDLESS = _BLUNT | {signals.SIGTERM, signals.SIGINT, signals.SIGHUP}
"""Signals that end a process whatever it raised and caught before."""
_TABLES = (("zili.chips", "faults.toml"), ("zili.supervision", "rules.toml"))


@dataclass(frozen=True)
class Ending:
    """How one process of a run ended."""

    rank: int
    machine: str
    code: int | None = None
    """Exit code; None where a signal ended it."""
    signal: int | None = None
    error: str | None = None
    """Text of torchrun's error file, as `cli/ending.py` or torch's `@record` writes it."""
    log: str = ""
    """The last lines that it printed."""
    phase: str | None = None
    """What it was at: start, join, load, compile, step, save, evaluate."""
    step: int | None = None
    """Last finished step of the run; the checkpoint's where this life had none yet, None before the run's first."""
    stopped: bool = False
    """Whether the supervisor had told it to end before it ended."""

    @property
    def killed_by(self) -> int | None:
        """The signal, also where it comes as a negative exit code (Python), or as 128 and more (shells)."""
        if self.signal is not None or self.code is None:
            return self.signal
        if self.code < 0:
            return -self.code
        return self.code - 128 if self.code in _FROM_SHELLS else None


class Rule(Section):
    """What an ending has to look like, and what it then means. Texts are small letters with single spaces."""

    name: str
    kind: Kind
    action: Action
    at_start: Action | None = None
    """What is done instead while the run has no finished step: what cannot cure itself then never could."""
    consequence: bool = False
    """Whether it only says that another process is gone or late, so that the cause is to be sought elsewhere."""
    in_error: bool = False
    """Whether its texts are such as programs also print about what they survive. Then they count in the error alone,
    where there is one, and without one not where a signal ended the process."""
    turn: Literal[1, 2, 3, 4] | None = None
    """When it is asked. 1: exit codes that leave no doubt. 2: texts that name a fault. 3: texts that name a
    consequence. 4: what is left. Rules of one turn are asked in the order of the tables."""
    all: tuple[str, ...] = ()
    any: tuple[str, ...] = ()
    none: tuple[str, ...] = ()
    codes: tuple[int, ...] = ()
    signals: tuple[int, ...] = ()
    phases: tuple[str, ...] = ()
    seen: bool = False
    """Whether the supervisor itself sees it. Then no ending matches, and it is asked for by its name."""
    says: str
    """One sentence for a person."""
    hint: str
    source: str
    """Where the knowledge comes from."""

    @model_validator(mode="after")
    def _texts_can_match(self) -> Self:
        for text in (*self.all, *self.any, *self.none):
            if not text or text != text.lower() or "  " in text or text.isspace():
                raise ValueError(f"rule {self.name}: {text!r} is to be small letters with single spaces")
        return self

    @property
    def order(self) -> int:
        """The turn that is written, or the one that follows from what the rule looks at."""
        return self.turn or (3 if self.consequence else 2 if self.weight == 2 else 4)

    @property
    def weight(self) -> int:
        """How specific it is: 2 it knows a text, 1 a code or a signal, 0 nothing."""
        return 2 if self.all or self.any else 1 if self.codes or self.signals or self.phases else 0

    def fits(self, ending: Ending, text: str) -> bool:
        """Whether the ending looks so; `text` is what it said, in small letters with single spaces."""
        return (
            not self.seen
            and (not self.codes or ending.code in self.codes)
            and (not self.signals or ending.killed_by in self.signals)
            and (not self.phases or ending.phase in self.phases)
            and all(word in text for word in self.all)
            and (not self.any or any(word in text for word in self.any))
            and not any(word in text for word in self.none)
        )


@cache
def rules() -> tuple[Rule, ...]:
    """All rules, in the order in which they are asked.

    Raises:
        ConfigError: a table is faulty, or two rules have one name.
    """
    try:
        found = [Rule.model_validate(table) for table in _written()]
    except (ValidationError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"the table of verdicts is faulty: {error}") from error
    names = [rule.name for rule in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"the table of verdicts has two rules of one name: {', '.join(sorted(twice))}")
    return tuple(sorted(found, key=lambda rule: rule.order))


def rule_named(name: str) -> Rule:
    """The rule of that name. Raises LookupError where there is none."""
    for rule in rules():
        if rule.name == name:
            return rule
    raise LookupError(f"there is no rule {name!r}")


def rule_for(ending: Ending) -> Rule:
    """The first rule that the ending fits. The last of all fits everything.

    A process that left an error says in it what it met. Its log may speak of lost peers because of what it did itself,
    and of things that it survived, so such words are sought in the log only where there is no error.
    """
    error, log = _plain(error_text(ending.error)), _plain(ending.log)
    for rule in rules():
        if _is_out_of_question(rule, ending):
            continue
        if rule.fits(ending, (error or log) if rule.consequence or rule.in_error else f"{error}{log}"):
            return rule
    raise LookupError("the table of verdicts has no rule for what is left")


def _is_out_of_question(rule: Rule, ending: Ending) -> bool:
    """Whether the signal that ended it says more than such words in its log."""
    ended_by = _BLUNT if rule.consequence else _WORDLESS if rule.in_error else ()
    return ending.killed_by in ended_by and not ending.error


def _plain(text: str) -> str:
    """The end of a text, in small letters; what was spaces and line ends is one space, the last one included."""
    return "".join(f"{word} " for word in text[-TAIL:].lower().split())


def error_text(raw: str | None) -> str:
    """The end of what an error file says: message and traceback, where it is JSON as torch writes it."""
    raw = raw or ""
    if len(raw) > _LARGEST_ERROR_FILE:
        return raw[-TAIL:]
    try:
        said = json.loads(raw)["message"]
        parts = [said] if isinstance(said, str) else [said["extraInfo"]["py_callstack"], said["message"]]
        return "\n".join(str(part)[-TAIL // 2 :] for part in parts)
    except (ValueError, LookupError, TypeError, RecursionError):
        return raw[-TAIL:]


def _written() -> Iterator[dict[str, Any]]:
    for package, name in _TABLES:
        yield from tomllib.loads(files(package).joinpath(name).read_text(encoding="utf-8"))["rule"]
