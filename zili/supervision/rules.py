"""The table of rules: what an ending of a process looks like, what that means, and what is to be done. No torch.

The rules are data: `zili/supervision/rules.toml` has what is general, `zili/chips/faults.toml` what vendors print.
"""

from __future__ import annotations

import json
import re
import signal as signals
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

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
_RAISED = re.compile(r"(?<![a-z0-9_.])(?:[a-z_][a-z0-9_.]{0,80}(?:error|exception)|exception)(?= ?:| $)")
"""The name of an exception in front of its message, or at the end, in small letters."""
_IGNORED = "exception ignored in"
"""What Python prints before exceptions in destructors, which end nothing."""
_OF_LAUNCHERS = (
    "childfailederror",
    "calledprocesserror",
    "processraisedexception",
    "processexitedexception",
    "fatalerror",
)
"""Exceptions by which a launcher says that another process ended, or a handler that a signal did."""
_MESSAGE = 1_000
"""Characters of an exception's message, its name included, that count."""


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


class FaultRule(Section):
    """What an ending has to look like, and what it then means. Texts are small letters with single spaces."""

    name: str
    kind: Kind
    action: Action
    at_start: Action | None = None
    """What is done instead while the run has no finished step: what cannot cure itself then never could."""
    also_in: tuple[str, ...] = ()
    """Phases in which that holds after a step as well: what they do is done the same way each time."""
    from_outside: bool = False
    """Whether it comes at any moment from outside the program, so that two at one step are chance."""
    consequence: bool = False
    """Whether it only says that another process is gone or late, so that the cause is to be sought elsewhere."""
    in_error: bool = False
    """Whether its texts are such as programs also print about what they survive. Then they count in the error alone,
    where there is one, and without one not where a signal ended the process."""
    exception: bool = False
    """Whether its texts are everyday words. Then they are sought in the last exception's message alone; where the error
    names no exception, in the whole error, but never in a whole log. A launcher's exception does not count."""
    turn: Literal[1, 2, 3, 4, 5] | None = None
    """When it is asked. 1: exit codes that leave no doubt. 2: texts that name a fault. 3: texts that name a
    consequence, then everyday words. 4: codes, signals and words that say little. 5: what is left. Rules of one turn
    are asked in the order of the tables."""
    all: tuple[str, ...] = ()
    any: tuple[str, ...] = ()
    """One of them, or one of `numbers`, is to be there."""
    none: tuple[str, ...] = ()
    numbers: dict[str, tuple[int | tuple[int, int], ...]] = Field(default_factory=dict)
    """Error numbers, or first and last of a range, by the family that `[numbers]` in the tables describes."""
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
        if self.also_in and self.at_start is None:
            raise ValueError(f"rule {self.name}: also_in says where at_start holds, and there is none")
        return self

    @property
    def order(self) -> int:
        """The turn that is written, or the one that follows from what the rule looks at."""
        return self.turn or (3 if self.consequence else 2 if self.weight == 2 else 4)

    @property
    def weight(self) -> int:
        """How specific it is: 2 it knows a text, 1 a code or a signal, 0 nothing, or everyday words."""
        if self.turn == 5:
            return 0
        return 2 if self.all or self.any or self.numbers else 1 if self.codes or self.signals or self.phases else 0

    def fits(self, ending: Ending, text: str) -> bool:
        """Whether the ending looks so; `text` is what it said, in small letters with single spaces."""
        return (
            not self.seen
            and (not self.codes or ending.code in self.codes)
            and (not self.signals or ending.killed_by in self.signals)
            and (not self.phases or ending.phase in self.phases)
            and all(word in text for word in self.all)
            and (not (self.any or self.numbers) or any(word in text for word in self.any) or self._numbered(text))
            and not any(word in text for word in self.none)
        )

    def _numbered(self, text: str) -> bool:
        return any(
            first <= number <= last
            for family, ranges in self.numbers.items()
            for number in _numbers_in(text, family)
            for first, last in ((one, one) if isinstance(one, int) else one for one in ranges)
        )


class Numbers(Section):
    """How the error numbers of one family are printed."""

    pattern: str
    """Regular expression without unbounded repeats; its group is the number."""
    example: str
    """A text with a number, for `str.format`."""


@cache
def rules() -> tuple[FaultRule, ...]:
    """All rules, in the order in which they are asked.

    Raises:
        ConfigError: a table is faulty, or two rules have one name.
    """
    try:
        found = [FaultRule.model_validate(table) for table in _written()]
        families = number_families()
    except (ValidationError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"the table of verdicts is faulty: {error}") from error
    names = [rule.name for rule in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"the table of verdicts has two rules of one name: {', '.join(sorted(twice))}")
    if strange := {family for rule in found for family in rule.numbers} - families.keys():
        raise ConfigError(f"the table of verdicts does not describe numbers of {', '.join(sorted(strange))}")
    return tuple(sorted(found, key=lambda rule: rule.order))


@cache
def number_families() -> dict[str, Numbers]:
    """How numbers are printed, by family."""
    return {name: Numbers.model_validate(one) for table in _tables() for name, one in table.get("numbers", {}).items()}


@lru_cache(maxsize=32)
def _numbers_in(text: str, family: str) -> frozenset[int]:
    """A text is asked for the same numbers by many rules."""
    return frozenset(int(number) for number in re.findall(number_families()[family].pattern, text))


def rule_named(name: str) -> FaultRule:
    """The rule of that name. Raises LookupError where there is none."""
    for rule in rules():
        if rule.name == name:
            return rule
    raise LookupError(f"there is no rule {name!r}")


def rule_for(ending: Ending) -> FaultRule:
    """The first rule that the ending fits. The last of all fits everything.

    A process that left an error says in it what it met. Its log may speak of lost peers because of what it did itself,
    and of things that it survived, so such words are sought in the log only where there is no error.
    """
    error, log = _plain(error_text(ending.error)), _plain(ending.log)
    raised = _raised(error, bare=True) if error else _raised(log)
    for rule in rules():
        if _is_out_of_question(rule, ending):
            continue
        said = (error or log) if rule.consequence or rule.in_error else f"{error}{log}"
        if rule.fits(ending, raised if rule.exception else said):
            return rule
    raise LookupError("the table of verdicts has no rule for what is left")


def _is_out_of_question(rule: FaultRule, ending: Ending) -> bool:
    """Whether the signal that ended it says more than such words in its log."""
    ended_by = _BLUNT if rule.consequence else _WORDLESS if rule.in_error else ()
    return ending.killed_by in ended_by and not ending.error


def _plain(text: str) -> str:
    """The end of a text, in small letters; what was spaces and line ends is one space, the last one included."""
    return "".join(f"{word} " for word in text[-TAIL:].lower().split())


def _raised(text: str, bare: bool = False) -> str:
    """Name and message of the last exception in it, "" where there is none; the whole text, if `bare`, where no
    exception is named at all."""
    told, ignored, _ = text.partition(_IGNORED)
    names = list(_RAISED.finditer(told))
    for found in reversed(names):
        if not found[0].endswith(_OF_LAUNCHERS):
            return told[found.start() : found.start() + _MESSAGE]
    return "" if names or ignored or not bare else text


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
    for table in _tables():
        yield from table["rule"]


def _tables() -> Iterator[dict[str, Any]]:
    for package, name in _TABLES:
        yield tomllib.loads(files(package).joinpath(name).read_text(encoding="utf-8"))
