"""Names of keys in other trainers, and what Zili calls them."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib import resources
from typing import Any

_KEY = re.compile(r"[a-z_]+(\.[a-z_]+)*")


def meant_key(typed: str) -> str | None:
    """The key that is meant by `lr` or `num-train-epochs`, as the end of a message; None: not in the table."""
    said = _table()["keys"].get(re.sub(r"[-_]", "", typed.lower()))
    if said is None:
        return None
    return f"did you mean {said}?" if _KEY.fullmatch(said) else f"here it is {said}"


def meant_value(key: str, value: object) -> str | None:
    """What to say of a value that a key of this name has elsewhere."""
    return _table()["values"].get(key, {}).get(str(value).lower())


@cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(resources.files("zili.config").joinpath("typed.toml").read_text(encoding="utf-8"))
