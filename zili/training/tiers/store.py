"""An object store by fsspec, and its refusals in plain words."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from zili.checksums import several_at_once
from zili.errors import CheckpointError, ConfigError

_OPTIONS: dict[str, dict[str, Any]] = {
    # s3fs asks again by itself, five times, and the client below it would each time again: half an hour in all.
    "s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 1}}},
    "file": {"auto_mkdir": True},
}
_SAME = {"s3a": "s3", "local": "file"}
_PIECE = 1 << 24
"""Bytes of one question."""
_AT_ONCE = 4
"""Questions that are open at once."""
_LONGEST = 300
"""Characters of a client's message that are passed on."""
_CURES = (
    ("NoCredentials", "give credentials in the environment or in the client's own files"),
    ("PermissionError", "these credentials may not do that"),
    ("NoSuchBucket", "make the bucket, or mend the URL"),
    ("bucket does not exist", "make the bucket, or mend the URL"),
    ("region", "name the bucket's region, for S3 by AWS_DEFAULT_REGION"),
    ("PermanentRedirect", "name the bucket's region, for S3 by AWS_DEFAULT_REGION"),
    ("Timeout", "it answers too slowly or not at all"),
    ("Connect", "see whether it can be reached from here"),
)


class Store:
    """Files below a URL."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    @cached_property
    def _root(self) -> str:
        return str(self._system._strip_protocol(self.url))

    @cached_property
    def _system(self) -> Any:
        """The client. Made in the process that asks, since none outlives a fork.

        Raises:
            ConfigError: its package is not installed.
        """
        import fsspec

        scheme = self.url.partition("://")[0]
        try:
            kind = fsspec.get_filesystem_class(scheme)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"checkpoint.tiers: {self.url} needs a package that is not here ({error}); for S3: "
                "pip install 'zili[store]'"
            ) from error
        options = _OPTIONS.get(_SAME.get(scheme, scheme), {})
        return kind(**options, use_listings_cache=False, skip_instance_cache=True)

    @contextmanager
    def asked(self, what: str) -> Iterator[None]:
        """Whatever a client raises, as one line; `what` could not be done.

        Raises:
            CheckpointError: in place of it.
        """
        try:
            yield
        except (CheckpointError, ConfigError):
            raise
        except Exception as error:  # clients have classes of their own, or none
            raise CheckpointError(f"{self.url}: {what}: {_said(error)}") from error

    def put(self, name: str, pieces: Iterable[memoryview]) -> tuple[str, int]:
        """Write a file; its hash and its bytes. One that is cut short may be left, never under a hash that holds.

        Raises:
            CheckpointError: the store refuses.
        """
        hashed, size = hashlib.sha256(), 0
        with self.asked(f"cannot write {name}"):
            file = self._opened(f"{self._root}/{name}")
            try:
                for piece in pieces:
                    hashed.update(piece)
                    size += len(piece)
                    file.write(piece)
                file.close()
            except BaseException:
                _give_up(file)
                raise
        return hashed.hexdigest(), size

    def _opened(self, path: str) -> Any:
        try:
            return self._system.open(path, "wb")
        except FileNotFoundError:  # a file system with folders
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            return self._system.open(path, "wb")

    def put_text(self, name: str, text: str) -> tuple[str, int]:
        """`put` of a small text."""
        return self.put(name, [memoryview(text.encode())])

    def text(self, name: str) -> str:
        """A small file.

        Raises:
            CheckpointError: it is missing, or the store refuses.
        """
        with self.asked(f"cannot read {name}"):
            return str(self._system.cat_file(f"{self._root}/{name}").decode())

    def part(self, name: str, begin: int, end: int) -> bytes:
        """Bytes of a file; raises as `text`."""
        with self.asked(f"cannot read {name}"):
            return bytes(self._system.cat_file(f"{self._root}/{name}", start=begin, end=end))

    def fetch(self, name: str, path: Path) -> None:
        """Write a file of the store to `path`. A store that gives half of it is found out by its hash.

        Raises:
            CheckpointError: it is missing, or the store refuses.
            OSError: the disk does.
        """
        with path.open("wb") as target:
            size = self.sizes(name.rpartition("/")[0]).get(name.rpartition("/")[2], 0)
            begins = list(range(0, size, _PIECE))
            for few in (begins[at : at + _AT_ONCE] for at in range(0, len(begins), _AT_ONCE)):
                for piece in several_at_once(lambda begin: self.part(name, begin, min(begin + _PIECE, size)), few):
                    target.write(piece)

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Names in a folder, each with its bytes; of a folder 0. Nothing where there is none.

        Raises:
            CheckpointError: the store refuses.
        """
        path = f"{self._root}/{folder}".rstrip("/")
        with self.asked(f"cannot list {folder or 'it'}"):
            self._system.invalidate_cache()
            try:
                found = self._system.ls(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
        names = ((str(one["name"]).rstrip("/").rpartition("/")[2], int(one.get("size") or 0)) for one in found)
        return {name: size for name, size in names if name}

    def remove(self, name: str) -> None:
        """Delete a file or a folder with all in it; one that is not there is no matter.

        Raises:
            CheckpointError: the store refuses.
        """
        with self.asked(f"cannot delete {name}"), suppress(FileNotFoundError):
            self._system.rm(f"{self._root}/{name}", recursive=True)

    def rename(self, name: str, to: str) -> None:
        """Move a small file; raises as `remove`."""
        with self.asked(f"cannot rename {name}"), suppress(FileNotFoundError):
            self._system.mv(f"{self._root}/{name}", f"{self._root}/{to}")

    def probe(self) -> None:
        """Write something, read it and delete it.

        Raises:
            CheckpointError: the store refuses, or gives something else back.
        """
        name = f".zili-probe-{secrets.token_hex(4)}"
        self.put_text(name, name)
        if self.text(name) != name:
            raise CheckpointError(f"{self.url}: gives back something else than was written")
        self.remove(name)


def _give_up(file: Any) -> None:
    """Close a file whose writing has failed. What closes it in the usual way completes it, half as it is."""
    try:
        file.discard()
        file.closed = True
    except Exception:  # a file of the disk has no other way
        with suppress(Exception):
            file.close()


def _said(error: Exception) -> str:
    kind, text = type(error).__name__, " ".join(str(error).split())
    cure = next((cure for word, cure in _CURES if word.lower() in f"{kind} {text}".lower()), "")
    said = text[:_LONGEST] if kind in ("OSError", "Exception") and text else f"{kind}: {text[:_LONGEST]}"
    return f"{said}; {cure}" if cure else said
