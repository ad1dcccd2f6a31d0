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
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter

from zili.checksums import SUMS_FILE, sha256, write_sums
from zili.durable import soon, sync
from zili.errors import CheckpointError
from zili.parallel.world import World
from zili.training.checkpoints import RUN_FILE, RunState, list_checkpoints, one_process, step_of

Result = TypeVar("Result")
_LOG = logging.getLogger(__name__)
_SLOWEST = timedelta(days=1)
_CHANNEL = 1
"""A save in the background says its control messages beside those of the steps."""


class _Written(NamedTuple):
    """A file of a checkpoint as the process sees it that wrote it."""

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
    ) -> None:
        """`keep`: newest checkpoints that stay, beside those of every `keep_every`-th step, if any. `asynchronous`: a
        save returns when its tensors are copied.
        `patience`: saves in a row that may fail, after which `lost` is true. `note` is told of what went wrong, `saved`
        of what is whole; both by the thread that calls."""
        self.folder = folder
        self._world = world
        self._keep = keep
        self._keep_every = keep_every
        self._asynchronous = asynchronous
        self._patience = patience
        self._note = note
        self._saved = saved
        self._group: dist.ProcessGroup | None = None
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
        if self._world.size > 1 and self._group is None:
            # A group of its own: the messages of a save in the background must not meet those of the step. And patient:
            # the disk of one process may be slower than any step.
            self._group = dist.new_group(backend="gloo", timeout=_SLOWEST)
        target = self.folder / f"step-{state.step:08d}"
        self._at_hand, self._whole, self._failure = True, None, None
        begun = time.perf_counter()
        if not self._asynchronous:
            self._attempt(target, state, tensors, begun)
            self.settle()
            return target
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
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

    def _attempt(self, target: Path, state: RunState, tensors: dict[str, Tensor], begun: float) -> None:
        try:
            size = self._write(target, state, tensors)
            self._whole = Saved(target, size, time.perf_counter() - begun)
            _LOG.debug("%s is whole: %d bytes in %.2f s", *self._whole)
        except BaseException as error:
            self._failure = error

    def _write(self, target: Path, state: RunState, tensors: dict[str, Tensor]) -> int:
        """The checkpoint's bytes."""
        # One name for all processes; what a killed run left under it is swept away first.
        aside = self.folder / f".{target.name}"
        try:
            self._together(target, lambda: self._make_room(aside))
            self._together(target, lambda: _write_tensors(aside, tensors, self._group))
            written = self._together(target, lambda: _written(aside, f"shard-{self._world.rank + 1:05d}-*"))
            every = self._gathered(written)
            self._together(target, lambda: self._appear(aside, target, state, every))
            return sum(file.bytes for file in every.values())
        finally:
            if self._world.is_first:
                shutil.rmtree(aside, ignore_errors=True)

    def _make_room(self, aside: Path) -> None:
        if self._world.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".step-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            aside.mkdir()

    def _appear(self, aside: Path, target: Path, state: RunState, every: dict[str, _Written]) -> None:
        """The last of it, by the first process: until the rename there is no checkpoint, after it a whole one."""
        if not self._world.is_first:
            return
        _refuse_missing(aside, every)
        (aside / RUN_FILE).write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
        every = {**every, **_written(aside, RUN_FILE)}
        write_sums(aside, {name: file.sha256 for name, file in every.items()})
        sync(aside / SUMS_FILE)
        sync(aside)
        if target.exists():  # left by a run that was resumed from an older checkpoint
            self._drop_or_tell(target)
        aside.rename(target)
        sync(self.folder)
        for old in list_checkpoints(self.folder)[: -self._keep]:
            if not (self._keep_every and step_of(old) % self._keep_every == 0):
                self._drop_or_tell(old)

    def _drop_or_tell(self, path: Path) -> None:
        """What cannot be deleted, since somebody reads it over NFS or it is write-protected, is no reason to stop."""
        try:
            _drop(path)
        except OSError as error:
            self._told.put(f"{path} is no longer needed and cannot be deleted: {error}")

    def _gathered(self, written: dict[str, _Written]) -> dict[str, _Written]:
        everyones = self._world.gathered(json.dumps(written), _CHANNEL)
        return {name: _Written(*file) for own in everyones for name, file in json.loads(own).items()}

    def _together(self, target: Path, work: Callable[[], Result]) -> Result:
        """`work()` on every process; where it fails on one, all say so."""

        def attempt() -> Result:
            try:
                return work()
            except (OSError, SafetensorError, CheckpointException) as error:
                raise CheckpointError(
                    f"cannot write the checkpoint {target}: {_cause(error)}; free some space or choose another folder"
                ) from error

        return self._world.agree(attempt, _CHANNEL, patience=None)


def _write_tensors(aside: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
    with one_process():
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)


def _written(folder: Path, pattern: str) -> dict[str, _Written]:
    """The files that match, by name; they are on the disk afterwards."""
    files = sorted(folder.glob(pattern))
    for file in files:
        sync(file)
    return {file.name: _Written(sha256(file), file.stat().st_size) for file in files}


def _refuse_missing(folder: Path, written: dict[str, _Written]) -> None:
    """Raise unless this process sees every file that the processes wrote, with its size.

    The sums are of what each process sees. Where `folder` is not one for all, files are on other machines.
    """
    for name, file in written.items():
        if not soon(lambda: _size(folder / name) == file.bytes):  # noqa: B023 - called at once
            raise CheckpointError(
                f"cannot write the checkpoint {folder}: {name}, {file.bytes:,} bytes, was written by another process "
                "and is not here: the run's folder is not shared by all machines (docs/parallel.md)"
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
    # The name is new: a folder that could not be deleted may lie there still.
    aside = path.with_name(f".{path.name}-dropped-{secrets.token_hex(4)}")
    path.rename(aside)
    shutil.rmtree(aside)


def _cause(error: BaseException) -> BaseException:
    """What went wrong inside torch.distributed.checkpoint, which wraps it with a traceback a rank."""
    if isinstance(error, CheckpointException):
        return next((cause for cause, _ in error.failures.values()), error)
    return error
