"""Says what is wrong with a recipe, with the keys and values that its author wrote."""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic import ValidationError

from zili.config.fields import fields_at
from zili.config.hints import meant_key, meant_value
from zili.config.run import RunConfig

_BRANCH = re.compile(r"bool|constrained-int|literal\[.*\]")
"""What pydantic adds to the place of an error for each branch of a union; no key is called so."""
_NEAR = 0.75
"""How alike names are that are taken for each other: `learnig_rate`, and not `epochs` and `eps`."""
_PLAIN = (
    (r"Input should be a valid integer.*", "must be a whole number"),
    (r"Input should be a valid number.*", "must be a number"),
    (r"Input should be a valid boolean.*", "must be true or false"),
    (r"Input should be a valid string.*", "must be text"),
    (r"Input should be a valid (tuple|list).*", "must be a list"),
    (r"Input should be a valid dictionary.*", "must be a table"),
    (r"Input is not a valid path.*", "must be a path"),
    (r"Input should be (.*)", r"must be \1"),
    (r"(Tuple|List) should have at least (\d+) item.*", r"must have at least \2"),
    (r"String should match pattern (.*)", r"must match \1"),
)


def explain(error: ValidationError, origin: str) -> str:
    """Every flaw of a recipe, a line each."""
    flaws: dict[str, list[Any]] = {}
    for item in error.errors():
        flaws.setdefault(_where(item), []).append(item)
    lines = [_explain_one(where, items) for where, items in flaws.items()]
    return f"{origin} cannot be run:\n" + "\n".join(f"  {line}" for line in lines)


def _where(item: Any) -> str:
    return ".".join(str(part) for part in item["loc"] if not _BRANCH.fullmatch(str(part)))


def _explain_one(where: str, items: list[Any]) -> str:
    """What is wrong with one key; of a union, each branch has said what it wants."""
    first = items[0]
    if first["type"] == "extra_forbidden":
        return f"unknown key {where}{_nearest(first['loc'], first['input'])}"
    if first["type"] == "missing":
        return f"{where} is missing"
    said = ", or ".join(dict.fromkeys(_plain(item["msg"]) for item in items)).replace(", or must be ", ", or ")
    if first["type"] == "value_error":
        return f"{where}: {said}" if where else said
    hint = meant_value(where, first["input"])
    return f"{where}: {said} (got {first['input']!r})" + (f"; {hint}" if hint else "")


def _plain(message: str) -> str:
    """pydantic's sentence without its voice."""
    message = message.removeprefix("Value error, ").partition(", unable to parse")[0]
    for pattern, plain in _PLAIN:
        message = re.sub(f"^{pattern}$", plain, message)
    return message


def key_of_option(option: str) -> str | None:
    """What to say of `--steps` or `--lr` where overrides are taken; None: like no key."""
    name = option.lstrip("-").replace("-", "_")
    if name in RunConfig.model_fields:
        return f"did you mean {name}?"
    table = _tables().get(name)
    return meant_key(name) if table is None else f"did you mean {table}.{name}?"


def _tables() -> dict[str, str]:
    """The table of each key that is in one."""
    return {key: name for name in RunConfig.model_fields for key in fields_at((name,))}


def _nearest(location: tuple[Any, ...], given: Any) -> str:
    """What the user may have meant: the same key of another table, what it is called elsewhere, the nearest; in a table
    that there is none of, what its first key that is known is called here."""
    known, wanted = list(fields_at(location[:-1])), str(location[-1])
    elsewhere = _tables()
    meant = meant_key(".".join(map(str, location)))
    if meant is not None:
        return f"; {meant}"
    if wanted in elsewhere:
        return f"; did you mean {elsewhere[wanted]}.{wanted}?"
    meant = meant_key(wanted)
    if meant is not None:
        return f"; {meant}"
    here = ".".join(map(str, location[:-1]))
    for table_of in (dict.fromkeys(known, here), elsewhere):
        for key in difflib.get_close_matches(wanted, table_of, n=1, cutoff=_NEAR):
            return f"; did you mean {f'{table_of[key]}.{key}'.lstrip('.')}?"
    inside = [key for key in given if key not in RunConfig.model_fields] if isinstance(given, dict) else []
    for hint in filter(None, map(key_of_option, inside)):
        return f"; {hint}"
    return f"; known keys here: {', '.join(sorted(known))}" if known else ""
