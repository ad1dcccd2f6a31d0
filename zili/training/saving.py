"""Writing checkpoints: aside and renamed, every byte hashed, in the background while training goes on."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter

from zili.checksums import SUMS_FILE, sha256, write_sums
from zili.durable import sync
from zili.errors import CheckpointError
from zili.parallel.world import World
from zili.training.checkpoints import RUN_FILE, RunState, list_checkpoints, one_process

Result = TypeVar("Result")


class Saver:
    """Writes the checkpoints of a run, one at a time. Every process of the world calls it alike."""

    def __init__(self, folder: Path, world: World, *, keep: int, asynchronous: bool) -> None:
        """`keep`: newest checkpoints that stay. `asynchronous`: a save returns when its tensors are copied."""
        self.folder = folder
        self._world = world
        self._keep = keep
        self._asynchronous = asynchronous
        self._group: dist.ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, state: RunState, tensors: dict[str, Tensor]) -> Path:
        """Begin to write `folder/step-XXXXXXXX`, after the save before is done. Returns its path.

        Raises:
            CheckpointError: the disk refused, now or in the save before; nothing half-written is left.
        """
        self.wait()
        if self._world.size > 1 and self._group is None:
            # Of its own: the messages of a save in the background must not meet those of the step.
            self._group = dist.new_group(backend="gloo")
        target = self.folder / f"step-{state.step:08d}"
        if not self._asynchronous:
            self._write(target, state, tensors)
            return target
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        # Not a daemon: a process that ends lets the checkpoint at hand be finished.
        self._thread = threading.Thread(target=self._attempt, args=(target, state, copies), name="zili-checkpoint")
        self._thread.start()
        return target

    def wait(self) -> None:
        """Until the save at hand is whole. Raises what it failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _attempt(self, target: Path, state: RunState, tensors: dict[str, Tensor]) -> None:
        try:
            self._write(target, state, tensors)
        except BaseException as error:
            self._failure = error

    def _write(self, target: Path, state: RunState, tensors: dict[str, Tensor]) -> None:
        # One name for all processes; what a killed run left under it is swept away first.
        aside = self.folder / f".{target.name}"
        try:
            self._together(target, lambda: self._make_room(aside))
            self._together(target, lambda: _write_tensors(aside, tensors, self._group))
            sums = self._together(target, lambda: _sums(aside, f"shard-{self._world.rank + 1:05d}-*"))
            every = self._gathered(sums)
            self._together(target, lambda: self._appear(aside, target, state, every))
        finally:
            if self._world.is_first:
                shutil.rmtree(aside, ignore_errors=True)

    def _make_room(self, aside: Path) -> None:
        if self._world.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".step-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            aside.mkdir()

    def _appear(self, aside: Path, target: Path, state: RunState, sums: dict[str, str]) -> None:
        """The last of it, by the first process: until the rename there is no checkpoint, after it a whole one."""
        if not self._world.is_first:
            return
        (aside / RUN_FILE).write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
        write_sums(aside, {**sums, **_sums(aside, RUN_FILE)})
        sync(aside / SUMS_FILE)
        sync(aside)
        if target.exists():  # left by a run that was resumed from an older checkpoint
            _drop(target)
        aside.rename(target)
        sync(self.folder)
        for old in list_checkpoints(self.folder)[: -self._keep]:
            _drop(old)

    def _gathered(self, sums: dict[str, str]) -> dict[str, str]:
        if self._group is None:
            return sums
        everyones: list[dict[str, str] | None] = [None] * self._world.size
        dist.all_gather_object(everyones, sums, group=self._group)
        return {name: digest for own in everyones if own for name, digest in own.items()}

    def _together(self, target: Path, work: Callable[[], Result]) -> Result:
        """`work()` on every process; where it fails on one, all say so."""

        def attempt() -> Result:
            try:
                return work()
            except (OSError, SafetensorError, CheckpointException) as error:
                raise CheckpointError(
                    f"cannot write the checkpoint {target}: {_cause(error)}; free some space or choose another folder"
                ) from error

        return self._world.agree(attempt, self._group)


def _write_tensors(aside: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
    with one_process():
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)


def _sums(folder: Path, pattern: str) -> dict[str, str]:
    """sha256 of the files that match, by name; they are on the disk afterwards."""
    files = sorted(folder.glob(pattern))
    for file in files:
        sync(file)
    return {file.name: sha256(file) for file in files}


def _drop(path: Path) -> None:
    """Remove a checkpoint so that it is never seen half there."""
    aside = path.with_name(f".{path.name}-dropped")
    path.rename(aside)
    shutil.rmtree(aside)


def _cause(error: BaseException) -> BaseException:
    """What went wrong inside torch.distributed.checkpoint, which wraps it with a traceback a rank."""
    if isinstance(error, CheckpointException):
        return next((cause for cause, _ in error.failures.values()), error)
    return error
