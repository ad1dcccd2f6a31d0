"""Regular expressions of JSON schemas, written anew in the few words that engines agree on.

A grammar's automaton ignores what it does not know (lookahead, anchors inside) and says what a JSON string must escape
where a class allows it. So an expression is read by Python's parser, and is kept only if a text that matches it as a
whole matches it in every engine. What is left is groups, alternatives, repetitions and classes of plain characters.
"""

from __future__ import annotations

import re
import re._constants as sre
import re._parser as parser
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from zili.errors import ConfigError

Ranges = list[tuple[int, int]]
"""Of code points, both ends included."""

_LAST = 0x10FFFF
_IN_STRINGS: Ranges = [(0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7F)]
"""Characters of one byte that stand in a JSON string as they are."""
_LONGER: list[Ranges] = [[(0x80, 0x7FF)], [(0x800, 0xD7FF), (0xE000, 0xFFFF)], [(0x10000, _LAST)]]
"""Those of two, three and four bytes. They stay apart: of a range that has characters of two lengths xgrammar makes an
automaton that lets some through that are no UTF-8."""
_LINES: Ranges = [(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)]
_SPACES: Ranges = [
    *((9, 13), (28, 32), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A)),
    *((0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)),
]
_DIGITS: Ranges = [(0x30, 0x39)]
_WORD: Ranges = [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
_ELSEWHERE = re.compile(r"\\(?:[^dDwWsSnrtfvxu\W]|\Z)|\[\^?\]|\{,|\(\?P?[#(>=i-]")
"""What other engines read otherwise than Python."""
_LONGEST = 65_536

_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_DATE = (
    r"[1-9]\d{3}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
    r"|([1-9]\d(0[48]|[2468][048]|[13579][26])|([2468][048]|[13579][26])00)-02-29"
)
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,20}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(\.{_LABEL}){{0,8}}"
_PATH = r"([A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-F][0-9A-F])*"
_HEX = r"[0-9a-fA-F]"
_GROUP = rf"{_HEX}{{1,4}}"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": rf"({_DATE})T{_TIME}",
    "duration": r"P((\d+D|\d+M(\d+D)?|\d+Y(\d+M(\d+D)?)?)(T(\d+H(\d+M(\d+S)?)?|\d+M(\d+S)?|\d+S))?"
    r"|T(\d+H(\d+M(\d+S)?)?|\d+M(\d+S)?|\d+S)|\d+W)",
    "email": rf"[A-Za-z0-9_+-]{{1,20}}(\.[A-Za-z0-9_+-]{{1,20}}){{0,2}}@{_LABEL}(\.{_LABEL}){{0,4}}\.[A-Za-z]{{2,20}}",
    "hostname": _HOST,
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "ipv6": rf"({_GROUP}:){{7}}{_GROUP}|::|({_GROUP}(:{_GROUP}){{0,2}})?::{_GROUP}(:{_GROUP}){{0,3}}",
    "uuid": rf"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}",
    "uri": rf"[A-Za-z][A-Za-z0-9+.-]*:(//{_HOST}(:[1-9]\d{{0,3}})?(/{_PATH})?|[A-Za-z0-9]{_PATH})"
    rf"(\?{_PATH})?(#{_PATH})?",
}
"""Those of JSON schema that are kept, in part narrower than they might be: no leap second, no year below 1000."""
NOT_KEPT = {
    *("uri-reference", "uri-template", "iri", "iri-reference", "idn-email", "idn-hostname"),
    *("json-pointer", "relative-json-pointer", "regex"),
}
"""Its other ones. What is in neither says nothing to a validator."""


def of_length(least: int, most: int | None) -> str:
    """An expression for so many characters of a JSON string."""
    return _Writer("pattern", _IN_STRINGS).characters([(0, _LAST)]) + _times(least, most)


def rewritten(pattern: str, least: int = 0, most: int | None = None) -> str:
    """An expression for what is in a JSON string of `least` to `most` characters that `pattern` matches as a whole.

    Raises:
        ConfigError: no expression, or one that cannot be kept; it begins with the keyword of the schema.
    """
    writer = _Writer("pattern", _IN_STRINGS)
    read = writer.read(pattern)
    shortest, longest = read.getwidth()
    if least > shortest:
        raise ConfigError("minLength cannot be kept beside a pattern that has shorter texts")
    if most is not None and most < longest:
        raise ConfigError("maxLength cannot be kept beside a pattern that has longer texts")
    return writer.sequence(read, True, True)


def of_text(pattern: str) -> str:
    """As `rewritten`, for a text of its own."""
    writer = _Writer("regex", [(0, 0x7F)])
    return writer.sequence(writer.read(pattern), True, True)


@dataclass(frozen=True)
class _Writer:
    """Writes what was parsed, in classes of characters that may be said."""

    word: str
    """What errors begin with."""
    plain: Ranges
    """Characters of one byte that may be said."""

    def refused(self, why: str) -> ConfigError:
        return ConfigError(f"{self.word}: {why}")

    def read(self, pattern: str) -> Any:
        if len(pattern) > _LONGEST:
            raise self.refused(f"longer than {_LONGEST:,} characters")
        try:
            read = parser.parse(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise self.refused(str(error) or "nested too deep") from error
        other = _ELSEWHERE.search(pattern.replace("\\\\", "  "))
        if other or read.state.flags != re.UNICODE.value:
            raise self.refused(f"{other[0] if other else 'flags'} cannot be kept")
        return read

    def sequence(self, parts: Iterable[Any], starts: bool, ends: bool) -> str:
        """Of parsed `parts`, before which and after which there may be nothing else."""
        parts = list(parts)
        said = [number for number, (op, _) in enumerate(parts) if op is not sre.AT]
        first, last = (said[0], said[-1]) if said else (len(parts), -1)
        written = []
        for number, (op, value) in enumerate(parts):
            if op is not sre.AT:
                written.append(self.part(op, value, starts and number == first, ends and number == last))
            elif not (value is sre.AT_BEGINNING and starts and number < first) and not (
                value is sre.AT_END and ends and number > last
            ):
                raise self.refused("^ or $ inside, or the border of a word, cannot be kept")
        return "".join(written)

    def part(self, op: Any, value: Any, starts: bool, ends: bool) -> str:
        if op is sre.SUBPATTERN and not value[1] and not value[2]:
            return f"(?:{self.sequence(value[3], starts, ends)})"
        if op is sre.BRANCH:
            return f"(?:{'|'.join(self.sequence(one, starts, ends) for one in value[1])})"
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            least, most, inner = value
            times = _times(int(least), None if most is sre.MAXREPEAT else int(most))
            return f"(?:{self.sequence(inner, False, False)}){times}" if times != "{0}" else ""
        if op in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN):
            return self.characters(_matched(op, value))
        raise self.refused(f"{str(op).lower().replace('_', ' ')} cannot be kept")

    def characters(self, ranges: Ranges) -> str:
        """One of `ranges`, of what may be said."""
        written = []
        for plain in (self.plain, *_LONGER):
            common = [(max(low, first), min(high, last)) for low, high in ranges for first, last in plain]
            kept = "".join(_range(low, high) for low, high in common if low <= high)
            written += [f"[{kept}]"] if kept else []
        if not written:
            raise self.refused("a character that JSON must escape (a quote, a backslash, a control) cannot be kept")
        return written[0] if len(written) == 1 else f"(?:{'|'.join(written)})"


def _times(least: int, most: int | None) -> str:
    return f"{{{least}}}" if least == most else f"{{{least},{'' if most is None else most}}}"


def _matched(op: Any, value: Any) -> Ranges:
    if op is sre.LITERAL:
        return [(value, value)]
    if op is sre.NOT_LITERAL:
        return _without([(value, value)])
    if op is sre.ANY:
        return _without(_LINES)
    negated = value[0][0] is sre.NEGATE
    # What one engine or another takes for a digit, a letter or a space is in no class that excludes them.
    found = [one for inner in value[negated:] for one in _in_class(*inner, widest=negated)]
    return _without(found) if negated else found


def _in_class(op: Any, value: Any, *, widest: bool) -> Ranges:
    if op is sre.LITERAL:
        return [(value, value)]
    if op is sre.RANGE:
        return [value]
    plain = {sre.CATEGORY_DIGIT: _DIGITS, sre.CATEGORY_WORD: _WORD, sre.CATEGORY_SPACE: [(0x20, 0x20)]}
    opposites = {
        sre.CATEGORY_NOT_DIGIT: sre.CATEGORY_DIGIT,
        sre.CATEGORY_NOT_WORD: sre.CATEGORY_WORD,
        sre.CATEGORY_NOT_SPACE: sre.CATEGORY_SPACE,
    }
    if value in opposites:
        kind = opposites[value]
        return _without(plain[kind] if widest else _widest(kind))
    return _widest(value) if widest else plain[value]


@cache
def _widest(category: Any) -> Ranges:
    """What an engine may take for a space, a digit, or a letter: these are too many to leave each alone out."""
    if category is sre.CATEGORY_SPACE:
        return _SPACES
    if category is sre.CATEGORY_DIGIT:
        return [(code, code) for code in range(_LAST + 1) if chr(code).isdecimal()]
    return [*_WORD, (0x80, _LAST)]


def _without(ranges: Ranges) -> Ranges:
    left, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            left.append((start, low - 1))
        start = max(start, high + 1)
    return [*left, (start, _LAST)] if start <= _LAST else left


def _range(low: int, high: int) -> str:
    return _code(low) if low == high else f"{_code(low)}-{_code(high)}"


def _code(code: int) -> str:
    return chr(code) if code < 0x80 and chr(code).isalnum() else f"\\u{{{code:x}}}"
