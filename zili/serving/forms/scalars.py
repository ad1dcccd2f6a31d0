"""Strings and numbers of JSON schemas, in the words that xgrammar keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any, NoReturn

from zili.errors import ConfigError
from zili.serving.forms import patterns

Schema = dict[str, Any]

FARTHEST = 10**15
"""Bounds of numbers beyond are not exact everywhere."""
MOST_PARTS = 2**20
"""Items, properties and characters; no context has room for more."""
_MOST_MULTIPLE, _WIDEST = 1024, 10_000
"""Beyond, xgrammar passes over `multipleOf`."""

Bound = tuple[Decimal, bool] | None
"""A number, and whether it is excluded itself."""


def string(schema: Schema, at: str) -> Schema:
    least, most = count(schema, "minLength", at) or 0, count(schema, "maxLength", at)
    if least > MOST_PARTS or (most is not None and least > most):
        refuse("minLength", at, f"{least} are too many")
    pattern, form = schema.get("pattern"), schema.get("format")
    if not isinstance(pattern, str | None):
        refuse("pattern", at, "it must be text")
    if isinstance(form, str) and form in patterns.NOT_KEPT:
        refuse("format", at, f"{form} cannot be kept")
    known = patterns.FORMATS.get(form) if isinstance(form, str) else None
    if known is not None and pattern is not None:
        refuse("pattern", at, "it cannot be kept beside format")
    if known is not None or pattern is not None:
        return {"type": "string", "pattern": rewritten(known or pattern or "", at, least, most)}
    if not least and most is None:
        return {"type": "string"}
    return {"type": "string", "pattern": patterns.of_length(least, None if most is None else min(most, MOST_PARTS))}


def rewritten(pattern: str, at: str, least: int = 0, most: int | None = None) -> str:
    try:
        return patterns.rewritten(pattern, least, most)
    except ConfigError as error:
        raise ConfigError(f"{error}{where(at)}") from error


def number(type_: str, schema: Schema, at: str) -> Schema:
    multiple = schema.get("multipleOf", 1)
    if not is_number(multiple) or not 0 < multiple <= _MOST_MULTIPLE or multiple != math.floor(multiple):
        refuse("multipleOf", at, f"{multiple} cannot be kept; whole numbers up to {_MOST_MULTIPLE:,} can")
    low, high = _bound(schema, "minimum", at, max), _bound(schema, "maximum", at, min)
    if type_ == "integer" or "multipleOf" in schema:
        return _integer(low, high, int(multiple), _lowest(schema), at)
    # It writes six decimals and no powers of ten, and where none is between the bounds, nothing at all.
    step = Decimal("0.000001")
    lowest, highest = _within(low, high, step)
    if lowest is not None and highest is not None and lowest > highest:
        refuse(_lowest(schema), at, "there is no number of six decimals up to the maximum")
    made: Schema = {"type": "number"}
    for word, bound in (("inimum", low), ("aximum", high)):
        if bound is not None:
            made[f"exclusiveM{word}" if bound[1] else f"m{word}"] = float(bound[0])
    return made


def _lowest(schema: Schema) -> str:
    return "minimum" if "minimum" in schema else "exclusiveMinimum"


def _integer(low: Bound, high: Bound, multiple: int, lowest: str, at: str) -> Schema:
    least, most = _within(low, high, Decimal(1))
    if least is not None and most is not None:
        if least > most:
            refuse(lowest, at, "there is no whole number up to the maximum")
        if multiple > 1 and (most - least > _WIDEST or most // multiple * multiple < least):
            refuse("multipleOf", at, f"it can be kept for 1 to {_WIDEST:,} numbers, or without bounds")
    elif multiple > 1 and not (least is None and most is None):
        refuse("multipleOf", at, "it cannot be kept beside one bound")
    made: Schema = {"type": "integer"}
    made |= {} if least is None else {"minimum": int(least)}
    made |= {} if most is None else {"maximum": int(most)}
    return made | ({"multipleOf": multiple} if multiple > 1 else {})


def _bound(schema: Schema, word: str, at: str, stricter: Callable[..., Any]) -> Bound:
    """The stricter of `word` and its exclusive form."""
    found: list[tuple[Decimal, bool]] = []
    for name, excluded in ((word, False), (f"exclusive{word.capitalize()}", True)):
        if name not in schema:
            continue
        value = schema[name]
        if not is_number(value) or abs(value) > FARTHEST:
            refuse(name, at, f"{value!r} is no number up to {FARTHEST:,}")
        found.append((Decimal(repr(value)), excluded))
    # Of equal ones that which excludes.
    return stricter(found, key=lambda one: (one[0], one[1] == (stricter is max))) if found else None


def _within(low: Bound, high: Bound, step: Decimal) -> tuple[Decimal | None, Decimal | None]:
    """The first and the last multiple of `step` within bounds."""
    least = most = None
    if low is not None:
        least = (low[0] / step).to_integral_value(ROUND_CEILING) * step
        least += step if low[1] and least == low[0] else 0
    if high is not None:
        most = (high[0] / step).to_integral_value(ROUND_FLOOR) * step
        most -= step if high[1] and most == high[0] else 0
    return least, most


def is_number(value: Any) -> bool:
    # Some whole numbers are too large to be asked whether they are finite.
    return math.isfinite(value) if isinstance(value, float) else isinstance(value, int) and not isinstance(value, bool)


def count(schema: Schema, word: str, at: str) -> int | None:
    if word not in schema:
        return None
    value = schema[word]
    if not is_number(value) or value < 0 or value != math.floor(value):
        refuse(word, at, f"{value!r} is no count")
    return int(value)


def refuse(word: str, at: str, why: str) -> NoReturn:
    raise ConfigError(f"{word}{where(at)}: {why}")


def where(at: str) -> str:
    return f" (at #{at})" if at else ""
