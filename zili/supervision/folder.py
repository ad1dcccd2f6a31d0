"""What machines find one another by: files in the run's folder, which all of them see.

- `secret`: what only those know who can read the run's folder as this user.
- `root-NNNNNN.json`: who became the root, by terms. The one with the highest term counts. A term is taken once: the
  file appears whole, or not at all, or somebody else has it (`os.link`, on a network file system too).
- `sign`: other at each look, as long as the root lives, for machines that see the folder and do not reach it.
- `state.json`: what the root knew; its agents have copies.
- `generation`: the newest life. A worker of an older one writes no checkpoint any more.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zili.durable import sync, write_whole
from zili.errors import ConfigError
from zili.parallel.control.links import PlainLink
from zili.parallel.control.member import GENERATION_FILE
from zili.user_cache import machine_folder

_CLAIM = re.compile(r"root-(\d{6})\.json")
_KEPT = 3
_TERM = 1_000_000
"""Generations of a term: a root that lost its term cannot pass off an old life as a newer one."""


class SupervisionFolder:
    """`RUN/supervision`, readable by this user alone."""

    def __init__(self, run: Path) -> None:
        """Raises: ConfigError, it cannot be made."""
        self.run = run
        self.path = run / "supervision"
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.secret = self._secret()
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be used: {error}; choose another folder for the run") from error

    def _secret(self) -> bytes:
        file = self.path / "secret"
        if not file.exists():
            with suppress(FileExistsError):  # another machine was first
                self._appear(file, secrets.token_hex())
        try:
            return bytes.fromhex(file.read_text(encoding="ascii"))
        except ValueError as error:
            raise ConfigError(f"{file} is damaged; end all supervisors of this run, and remove it") from error

    def root(self) -> tuple[int, dict[str, Any]]:
        """Term and record of the newest root; 0 and nothing where there has been none."""
        newest = max(self._terms(), default=0)
        if not newest:
            return 0, {}
        with suppress(FileNotFoundError):
            return newest, json.loads(self._claim(newest).read_text(encoding="utf-8"))
        return self.root()  # a newer one has swept it away

    def become_root(self, term: int, record: dict[str, Any]) -> bool:
        """Take `term`; whether nobody else had."""
        if term <= max(self._terms(), default=0):
            return False
        try:
            self._appear(self._claim(term), json.dumps(record))
        except FileExistsError:
            return False
        for old in sorted(self._terms())[:-_KEPT]:
            self._claim(old).unlink(missing_ok=True)
        return True

    def lay_down(self, term: int, code: int, text: str) -> None:
        """Say that this term's root has ended in order, and with what: for machines that its last word did not reach,
        and so that nobody waits for it."""
        with suppress(OSError):
            write_whole(self._claim(term), json.dumps({"over": {"code": code, "text": text}}))

    def hand_over(self, term: int, machines: list[str]) -> None:
        """Let others than these machines, which are cut off from most, have the next root."""
        with suppress(OSError):
            write_whole(self._claim(term), json.dumps({"cut_off": machines}))

    def give_sign(self) -> None:
        """Show machines that do not reach the root that it lives."""
        (self.path / "sign").write_text(secrets.token_hex(4), encoding="ascii")

    def sign(self) -> tuple[str, int]:
        """A root's last sign of life, and the newest generation."""
        sign, generation = "", 0
        with suppress(OSError):
            sign = (self.path / "sign").read_text(encoding="ascii")
        with suppress(OSError, ValueError):
            generation = int((self.run / GENERATION_FILE).read_text(encoding="ascii"))
        return sign, generation

    def look(self) -> tuple[int, int | None]:
        """Term of the newest root, 0: there was none; step of the newest checkpoint, as far as names tell."""
        names = [path.name.removeprefix("step-") for path in (self.run / "checkpoints").glob("step-*")]
        steps = [int(name) for name in names if name.isdecimal()]
        return max(self._terms(), default=0), max(steps, default=None)

    def read_state(self) -> dict[str, Any]:
        """What the last root knew; empty where that cannot be read."""
        with suppress(OSError, ValueError):
            found = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
        return {}

    def write_state(self, state: dict[str, Any]) -> None:
        """Keep what the root knows. Where the disk refuses, the agents' copies are left."""
        with suppress(OSError):
            write_whole(self.path / "state.json", json.dumps(state))

    def begin(self, generation: int) -> bool:
        """A new life is the newest from now on; False: a later root has begun one meanwhile."""
        if self.sign()[1] > generation:
            return False
        write_whole(self.run / GENERATION_FILE, str(generation))
        return True

    @contextmanager
    def machine(self, name: str) -> Iterator[Path]:
        """Be the one supervisor of this run on machine `name`; yields an empty folder on the machine's own disk, which
        is for this user alone, and gone afterwards.

        Raises:
            ConfigError: there is one already.
        """
        # Some network file systems have no locks, and none is for memory that processes share.
        own = machine_folder() / hashlib.sha256(f"{self.path.resolve()}\n{name}".encode()).hexdigest()[:24]
        try:
            handle = _held(own)
        except BlockingIOError as error:
            raise ConfigError(
                f"machine {name} has a supervisor of {self.path.parent} already; stop that one first, or give this "
                "run another folder"
            ) from error
        try:
            yield own
        finally:
            shutil.rmtree(own, ignore_errors=True)
            os.close(handle)

    def _terms(self) -> list[int]:
        try:
            names = [entry.name for entry in self.path.iterdir()]
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read any more: {error}; the run has no folder") from error
        return [int(found[1]) for name in names if (found := _CLAIM.fullmatch(name))]

    def _claim(self, term: int) -> Path:
        return self.path / f"root-{term:06d}.json"

    def _appear(self, file: Path, text: str) -> None:
        """Make a file that is whole when it is there. Raises: FileExistsError, it is there already."""
        aside = self.path / f".{secrets.token_hex(8)}"
        try:
            aside.touch(mode=0o600, exist_ok=False)
            aside.write_text(text, encoding="utf-8")
            sync(aside)
            os.link(aside, file)
        finally:
            aside.unlink(missing_ok=True)


class Signs:
    """A root's signs of life in the run's folder."""

    def __init__(self) -> None:
        self._last: str | None = None
        self._count = 0
        self.generation = 0
        """Of the newest life."""

    def come(self, sign: str, generation: int) -> bool:
        """Whether there was another one since the last look."""
        moved = self._last is not None and sign != self._last
        self._last, self.generation = sign, generation
        self._count += moved
        return moved

    @property
    def first(self) -> bool:
        """Whether the last look was the first to find one."""
        return self._count == 1


def _held(folder: Path) -> int:
    """Make a folder, empty, that is this process's until it closes the handle. Raises: BlockingIOError, it is not."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), folder.stat()):  # not one that another process removes
                    for left in folder.iterdir():  # by one that was killed
                        left.unlink()
                    return handle
        except OSError:
            os.close(handle)
            raise
        os.close(handle)


def generation_of(term: int, life: int) -> int:
    """The number of a life that the root of `term` begins."""
    return term * _TERM + life


def ask_root(folder: SupervisionFolder, question: dict[str, Any]) -> str:
    """What the root of a run says to somebody who is no machine of it.

    Raises:
        ConfigError: no root answers.
    """
    _, record = folder.root()
    try:
        link = PlainLink(record["address"], folder.secret)
        link.send(json.dumps(question).encode())
        return str(json.loads(link.receive())["text"])
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"nobody supervises {folder.run} at the moment ({error!r})") from error
