"""Keys: which clients may ask, how often, and how much."""

from __future__ import annotations

import secrets
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zili.errors import ConfigError


class Key(BaseModel):
    """One of the file's tables, named by whom it is for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: Annotated[str, Field(min_length=8, pattern=r"^[\x21-\x7e]+$")]
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    tokens_per_day: Annotated[int, Field(gt=0)] | None = None
    """Tokens of prompts and answers together; a day is 24 hours from the first request."""


class TooMuch(Exception):
    """A limit is reached."""

    def __init__(self, limit: str, seconds: float) -> None:
        super().__init__(f"{limit}; try again in {seconds:.0f} seconds")
        self.retry_after = max(1, int(seconds + 0.999))


class Holder:
    """A key and what its holder has used, since this server started."""

    def __init__(self, name: str, key: Key, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.key, self._clock = name, key, clock
        self._room = max(1.0, key.requests_per_minute or 1.0)
        self._seen = clock()
        self._day: float | None = None
        self.tokens = 0
        self._promised = 0
        """Tokens that answers under way may have yet."""

    def ask(self) -> None:
        """Count a request.

        Raises: TooMuch.
        """
        now = self._clock()
        seconds = self._left_of_day()
        if self.key.tokens_per_day is not None and self.tokens >= self.key.tokens_per_day:
            raise TooMuch(f"{self.key.tokens_per_day:,} tokens a day are used up", seconds)
        if self.key.requests_per_minute is not None:
            rate = self.key.requests_per_minute / 60
            self._room = min(max(1.0, self.key.requests_per_minute), self._room + (now - self._seen) * rate)
            self._seen = now
            if self._room < 1:
                limit = f"{self.key.requests_per_minute:g} requests a minute are allowed"
                raise TooMuch(limit, (1 - self._room) / rate)
            self._room -= 1

    def _left_of_day(self) -> float:
        """Seconds; the next day begins where none are left."""
        now = self._clock()
        if self._day is None or now - self._day >= 86_400:
            self._day, self.tokens = now, 0
        return self._day + 86_400 - now

    def free(self) -> int | None:
        """Tokens that are neither used nor promised; None: as many as anyone likes."""
        self._left_of_day()
        quota = self.key.tokens_per_day
        return None if quota is None else max(0, quota - self.tokens - self._promised)

    def promise(self, tokens: int) -> None:
        """Keep as many as a prompt and its answer may have, before it begins; `used` gives back what it had not.

        A request that is more than a whole day's is let through on a day when nothing else was asked.

        Raises: TooMuch.
        """
        quota, seconds = self.key.tokens_per_day, self._left_of_day()
        if quota is not None and self.tokens + self._promised + tokens > quota and self.tokens + self._promised:
            left = max(0, quota - self.tokens)
            said = f"of {quota:,} tokens a day {left:,} are left, and this may take {tokens:,}"
            if tokens > left:
                raise TooMuch(said, seconds)
            raise TooMuch(f"{said} beside {self._promised:,} of answers under way", 1)
        self._promised += tokens

    def used(self, tokens: int, promised: int = 0) -> None:
        """Count tokens of a prompt and an answer, for which so many were promised."""
        self._promised -= promised
        self.tokens += tokens


class Keys:
    """All holders; none: anyone may ask."""

    def __init__(self, holders: tuple[Holder, ...] = ()) -> None:
        self.holders = holders

    @classmethod
    def read(cls, path: Path) -> Keys:
        """A TOML file with a table for each holder: `[name]`, `key = "..."`, and limits.

        Raises:
            ConfigError: it cannot be read, others than its owner may read it, or a table is none of a key.
        """
        try:
            if path.stat().st_mode & 0o077:
                raise ConfigError(f"{path}: others can read the keys in it; chmod 600 {path}")
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
            found = {name: Key.model_validate(table) for name, table in tables.items()}
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: the keys cannot be read ({error})") from error
        except ValidationError as error:
            first = error.errors()[0]  # without what was given: it is a secret
            place = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{path}: {place or 'a table'}: {first['msg']}") from error
        if not found:
            raise ConfigError(f'{path}: no keys in it; [name], key = "..."')
        if len({key.key for key in found.values()}) < len(found):
            raise ConfigError(f"{path}: two holders have the same key")
        return cls(tuple(Holder(name, key) for name, key in found.items()))

    def find(self, given: str) -> Holder | None:
        """The holder of a key. Every key is compared, in constant time, so that the time gives nothing away."""
        matches = [secrets.compare_digest(given.encode(), holder.key.key.encode()) for holder in self.holders]
        return self.holders[matches.index(True)] if any(matches) else None
