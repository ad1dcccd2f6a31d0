"""Writing checkpoints: aside and renamed, every byte hashed, in the background while training goes on."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

from safetensors import SafetensorError
from torch import Tensor

from zili.checksums import SUMS_FILE, sha256, write_sums
from zili.durable import soon, sync
from zili.errors import CheckpointError
from zili.parallel.control.member import GENERATION, GENERATION_FILE
from zili.parallel.world import World
from zili.training.checkpoints import RUN_FILE, RunState, is_of_one_process, list_checkpoints, step_of
from zili.training.index import (
    INDEX_FILE,
    Names,
    TensorIndex,
    flat_places,
    places_of,
    read_header,
    shard_of,
    table_digest,
)
from zili.training.parts import HeldPart, parts_to_write, write_parts

Result = TypeVar("Result")
_LOG = logging.getLogger(__name__)
_CHANNEL = 1
"""A save in the background says its control messages beside those of the steps."""


class _Written(NamedTuple):
    """A file of a checkpoint as the process sees it that wrote it."""

    name: str
    sha256: str
    bytes: int


class Saved(NamedTuple):
    """A checkpoint that is whole."""

    path: Path
    bytes: int
    """Size of weights, optimizer state and generators on the disk."""
    seconds: float
    """From the call that began it; training goes on meanwhile where saving is asynchronous."""


class Saver:
    """Writes the checkpoints of a run, one at a time. Every process of the world calls it alike."""

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        keep: int,
        keep_every: int = 0,
        asynchronous: bool,
        patience: int = 1,
        note: Callable[[str], None] = print,
        saved: Callable[[Saved], None] = lambda saved: None,
        fence: Callable[[], bool] = lambda: True,
    ) -> None:
        """`keep`: newest checkpoints that stay, beside those of every `keep_every`-th step, if any. `asynchronous`: a
        save returns when its tensors are copied.
        `patience`: saves in a row that may fail, after which `lost` is true. `note` is told of what went wrong, `saved`
        of what is whole; both by the thread that calls. `fence`: whether this life of the run is still the newest; the
        first process asks it before it changes anything that others see."""
        self.folder = folder
        self._world = world
        self._keep = keep
        self._keep_every = keep_every
        self._asynchronous = asynchronous
        self._patience = patience
        self._note = note
        self._saved = saved
        self._fence = fence
        self._thread: threading.Thread | None = None
        self._at_hand = False
        self._whole: Saved | None = None
        self._failure: BaseException | None = None
        self._failed = 0
        self._told: SimpleQueue[str] = SimpleQueue()

    @property
    def lost(self) -> bool:
        """Whether `patience` saves in a row failed, or one met a defect; as far as this process knows yet."""
        return self._failed >= self._patience or not isinstance(self._failure, CheckpointError | None)

    def save(self, state: RunState, tensors: dict[str, Tensor]) -> Path:
        """Begin to write `folder/step-XXXXXXXX`, after the save before is done. Returns its path.

        Where the disk refuses nothing half-written is left; `look` and `settle` tell it to `note`, `wait` raises it.
        """
        self.settle()
        target = self.folder / f"step-{state.step:08d}"
        self._at_hand, self._whole, self._failure = True, None, None
        begun = time.perf_counter()
        parts = parts_to_write(tensors, self._world, is_of_one_process)
        if not self._asynchronous:
            self._attempt(target, state, parts, begun)
            self.settle()
            return target
        copies = {name: part.copied() for name, part in parts.items()}
        # Not a daemon: a process that ends lets the checkpoint at hand be finished.
        self._thread = threading.Thread(
            target=self._attempt, args=(target, state, copies, begun), name="zili-checkpoint"
        )
        self._thread.start()
        return target

    def look(self) -> None:
        """`settle`, if that takes no waiting."""
        if self._thread is None or not self._thread.is_alive():
            self.settle()

    def settle(self) -> None:
        """Wait until the save at hand has ended. One that failed is told to `note`, unless the run is `lost`."""
        if self._ended() and self._failure is not None and not self.lost:
            self._note(f"{self._failure}. Trying again ({self._failed} of checkpoint.patience {self._patience})")

    def wait(self) -> None:
        """Until the save at hand is whole. Raises what it failed with."""
        self._ended()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _ended(self) -> bool:
        """Wait until the save at hand has ended; whether there was one that nobody had waited for."""
        if not self._at_hand:
            return False
        if self._thread is not None:
            self._thread.join()
        self._thread, self._at_hand = None, False
        self._failed = 0 if self._failure is None else self._failed + 1
        while not self._told.empty():
            self._note(self._told.get())
        if self._whole is not None:
            self._saved(self._whole)
        return True

    def _attempt(self, target: Path, state: RunState, parts: dict[str, HeldPart], begun: float) -> None:
        try:
            size = self._write(target, state, parts)
            self._whole = Saved(target, size, time.perf_counter() - begun)
            _LOG.debug("%s is whole: %d bytes in %.2f s", *self._whole)
        except BaseException as error:
            self._failure = error

    def _write(self, target: Path, state: RunState, parts: dict[str, HeldPart]) -> int:
        """Bytes of weights, optimizer state and generators, on the first process."""
        # One name for all processes of a life; what a killed run left under others is swept away first.
        aside = self.folder / f".{target.name}{_of_this_life()}"
        try:
            self._together(target, lambda: self._make_room(aside))
            own = self._together(target, lambda: self._write_own(aside, parts))
            every = self._world.gathered(json.dumps(own), _CHANNEL)
            return self._together(target, lambda: self._appear(aside, target, state, every))
        finally:
            if self._world.is_first:
                shutil.rmtree(aside, ignore_errors=True)

    def _make_room(self, aside: Path) -> None:
        if self._world.is_first:
            self._refuse_late_life()
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".step-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            aside.mkdir()

    def _refuse_late_life(self) -> None:
        if not self._fence():
            raise CheckpointError(
                f"a newer life of this run writes in {self.folder}: this process was taken for dead and replaced"
            )

    def _write_own(self, aside: Path, parts: dict[str, HeldPart]) -> dict[str, Any] | None:
        """Write this process's file, if it has parts; what the first process has to know of it."""
        if not parts:
            return None
        file = aside / f"shard-{self._world.rank + 1:05d}.safetensors"
        _write_tensors(file, parts)
        written = _written(file)
        shard = shard_of(read_header(file))
        # The names are many and the same for many processes: the first reads them in the file of one.
        held = {"table": table_digest(shard.cut), "whole": shard.whole, "places": flat_places(shard.places)}
        return {**written._asdict(), **held}

    def _appear(self, aside: Path, target: Path, state: RunState, every: list[str]) -> int:
        """The last of it, by the first process: until the rename there is no checkpoint, after it a whole one."""
        if not self._world.is_first:
            return 0
        said = [one for one in map(json.loads, every) if one is not None]
        files = [_Written(one["name"], one["sha256"], one["bytes"]) for one in said]
        _refuse_missing(aside, files)
        index = _index(aside, said)
        index.check_whole()
        (aside / INDEX_FILE).write_text(index.text(), encoding="utf-8")
        (aside / RUN_FILE).write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
        listed = [*files, _written(aside / INDEX_FILE), _written(aside / RUN_FILE)]
        write_sums(aside, {file.name: file.sha256 for file in listed})
        sync(aside / SUMS_FILE)
        sync(aside)
        self._rename(aside, target)
        return sum(file.bytes for file in files)

    def _rename(self, aside: Path, target: Path) -> None:
        self._refuse_late_life()
        # Left by a run that was resumed from an older checkpoint, or written by a life that began after that look.
        before = _moved_aside(target) if target.exists() else None
        aside.rename(target)
        try:
            self._refuse_late_life()
        except CheckpointError:
            target.rename(aside)
            if before is not None:
                before.rename(target)
            raise
        sync(self.folder)
        if before is not None:
            self._drop_or_tell(before)
        for old in list_checkpoints(self.folder)[: -self._keep]:
            if not (self._keep_every and step_of(old) % self._keep_every == 0):
                self._drop_or_tell(old)

    def _drop_or_tell(self, path: Path) -> None:
        """What cannot be deleted, since somebody reads it over NFS or it is write-protected, is no reason to stop."""
        try:
            _drop(path)
        except OSError as error:
            self._told.put(f"{path} is no longer needed and cannot be deleted: {error}")

    def _together(self, target: Path, work: Callable[[], Result]) -> Result:
        """`work()` on every process; where it fails on one, all say so."""

        def attempt() -> Result:
            try:
                return work()
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"cannot write the checkpoint {target}: {error}; free some space or choose another folder"
                ) from error

        return self._world.agree(attempt, _CHANNEL, patience=None)


def generation_fence(run: Path) -> Callable[[], bool]:
    """The fence of a run that `zili launch` started: whether no later life is written into the run's folder. True
    where nobody gave this process the number of its life.

    The fence raises CheckpointError where that cannot be read.
    """

    def newest() -> bool:
        own = os.environ.get(GENERATION)
        if own is None:
            return True
        file = run / GENERATION_FILE
        try:
            return int(own) >= int(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read, so nothing of the run is changed: {error}") from error

    return newest


def _of_this_life() -> str:
    """The end of a name that no other life uses, which may be asleep and write on when it wakes."""
    own = os.environ.get(GENERATION)
    return "" if own is None else f"-life-{own}"


def _write_tensors(file: Path, parts: dict[str, HeldPart]) -> None:
    # Where the folder is not one for all, the first process will say so; each goes on till then.
    file.parent.mkdir(parents=True, exist_ok=True)
    write_parts(file, parts)


def _written(file: Path) -> _Written:
    """A file; it is on the disk afterwards."""
    sync(file)
    return _Written(file.name, sha256(file), file.stat().st_size)


def _index(folder: Path, said: list[dict[str, Any]]) -> TensorIndex:
    """The index of the files that all processes told of; of those that share a table, one is opened for it."""
    numbers: dict[str, int] = {}
    tables: list[Names] = []
    files = {}
    for one in said:
        if one["table"] not in numbers:
            numbers[one["table"]] = len(tables)
            tables.append(shard_of(read_header(folder / one["name"])).cut)
        files[one["name"]] = (numbers[one["table"]], one["whole"], places_of(one["places"]))
    return TensorIndex(tables, files)


def _refuse_missing(folder: Path, written: list[_Written]) -> None:
    """Raise unless this process sees every file that the processes wrote, with its size.

    The sums are of what each process sees. Where `folder` is not one for all, files are on other machines.
    """
    for file in written:
        if not soon(lambda: _size(folder / file.name) == file.bytes):  # noqa: B023 - called at once
            raise CheckpointError(
                f"cannot write the checkpoint {folder}: {file.name}, {file.bytes:,} bytes, was written by another "
                "process and is not here: the run's folder is not shared by all machines (docs/parallel.md)"
            )


def _size(path: Path) -> int | None:
    """Bytes, asked of the server: a network file system asks it again when a file is opened."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size
    except OSError:
        return None


def _drop(path: Path) -> None:
    """Remove a checkpoint so that it is never seen half there."""
    shutil.rmtree(_moved_aside(path))


def _moved_aside(path: Path) -> Path:
    # The name is new: a folder that could not be deleted may lie there still.
    aside = path.with_name(f".{path.name.removeprefix('.')}-dropped-{secrets.token_hex(4)}")
    path.rename(aside)
    return aside
