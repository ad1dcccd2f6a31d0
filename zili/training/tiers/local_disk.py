"""The local disk of each machine as a tier: a folder that only its own processes see.

    /scratch/mine/step-00000120/
      shard-00003.safetensors   all that process 3 holds, so that it can go on from it alone, in the same layout
      shard-00003.json          written last: its hash, of how many processes it is, and which save
      run.json

It counts where every process finds its own file of one and the same save on its machine.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from os.path import expandvars
from pathlib import Path
from typing import Any

from zili.checksums import sha256, verify_sums
from zili.durable import sync, write_whole
from zili.errors import CheckpointError, ConfigError
from zili.parallel.world import World
from zili.training.checkpoints import (
    RUN_FILE,
    RunState,
    SoundCheckpoint,
    list_checkpoints,
    read_state,
    state_text,
    step_of,
)
from zili.training.fence import refuse_late_life
from zili.training.index import index_of_one
from zili.training.parts import write_parts
from zili.training.restoring import Needs
from zili.training.tiers.run_folder import written_together
from zili.training.tiers.tier import LOCAL_DISK, Copies, Offered, Tier, refuse_other_run, step_name


class LocalDisk(Tier):
    """A folder of each machine."""

    distance, durable, takes_own = LOCAL_DISK, False, True

    def __init__(
        self, place: str, world: World, *, every: int, keep: int, fence: Callable[[], bool], run: Path
    ) -> None:
        """`place`: the folder; `$NAME` is what it is on each machine. `run`: the run's folder, by whose name a
        checkpoint is known for its own."""
        super().__init__(f"the local disk {place}", world, every=every, keep=keep, fence=fence)
        self._place = place
        self._run = run
        self._file = f"shard-{world.rank + 1:05d}"

    @cached_property
    def folder(self) -> Path:
        """Here, on this machine.

        Raises:
            ConfigError: a variable of it is not set here.
        """
        found = expandvars(self._place)
        if "$" in found:
            raise ConfigError(
                f"checkpoint.tiers: {self._place} names a variable that is not set on {socket.gethostname()}"
            )
        return Path(found).expanduser()

    def where(self, step: int) -> str:
        return str(self.folder / step_name(step))

    def offers(self) -> list[Offered]:
        here = self._world.agree(self._checked_marks)
        said = self._world.gathered(json.dumps([socket.gethostname(), here]))
        return self._world.from_first(lambda: _joined([json.loads(one) for one in said]))

    def opened(self, step: int, needs: Needs) -> SoundCheckpoint:
        return self._world.agree(lambda: self._own(step, needs), patience=None)

    def take(self, copies: Copies, channel: int) -> int:
        # Whatever may fail does so inside of a turn: who leaves one out would meet the others in another one.
        world, name = self._world, f"{self._place}/{copies.name}"
        save = world.from_first(self._new_save, channel, None)
        mark = written_together(world, name, lambda: self._write(copies, save), channel)
        written_together(world, name, lambda: self._mark(copies, mark), channel)
        said = world.gathered(json.dumps([mark["bytes"], self._forget(copies.step)]), channel)
        each = [json.loads(one) for one in said]
        for line in sorted({line for _, lines in each for line in lines}):
            self.told.put(line)
        return sum(size for size, _ in each)

    def state_of(self, step: int) -> RunState:
        return read_state(self.folder / step_name(step))

    def set_aside(self, steps: Sequence[int], why: str = "damaged") -> None:
        for path in self._steps():
            if step_of(path) in steps:
                with suppress(OSError):
                    self._drop(path)

    def newest_state(self) -> RunState | None:
        for step in sorted(self._marks(), reverse=True):
            with suppress(CheckpointError):
                return read_state(self.folder / step_name(step))
        return None

    def _new_save(self) -> str:
        """A name of this save: files of two saves of one step, of two lives, do not belong together."""
        refuse_late_life(self._fence, self.title)
        return secrets.token_hex(8)

    def _write(self, copies: Copies, save: str) -> dict[str, Any]:
        folder = self.folder / copies.name
        folder.mkdir(parents=True, exist_ok=True)
        mark, file = folder / f"{self._file}.json", folder / f"{self._file}.safetensors"
        mark.unlink(missing_ok=True)
        write_parts(file, copies.own)
        sync(file)
        size = file.stat().st_size
        return {"sha256": sha256(file), "bytes": size, "processes": self._world.size, "save": save}

    def _mark(self, copies: Copies, mark: Mapping[str, Any]) -> None:
        """Now that all have written: say so."""
        folder = self.folder / copies.name
        write_whole(folder / RUN_FILE, state_text(copies.state))
        write_whole(folder / f"{self._file}.json", json.dumps(mark) + "\n")
        sync(folder)

    def _forget(self, step: int) -> list[str]:
        """Remove what is not among the newest that are whole, and what is newer than `step`: of a run that went back.
        Returns what could not be."""
        try:
            there = self._steps()
        except OSError as error:
            return [f"what is no longer needed in {self.title} cannot be listed: {error}"]
        whole = [path for path in there if self._mark_in(path) is not None and step_of(path) <= step]
        stay, failed = whole[-self.keep :], []
        for path in there:
            if path not in stay:
                try:
                    self._drop(path)
                except OSError as error:
                    failed.append(f"{path} is no longer needed and cannot be deleted: {error}")
        return failed

    def _drop(self, path: Path) -> None:
        """Remove this process's files; one process of the machine also what others left that are elsewhere now."""
        for ending in ("json", "safetensors"):
            (path / f"{self._file}.{ending}").unlink(missing_ok=True)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            shutil.rmtree(path, ignore_errors=True)  # the others are deleting in it

    def _steps(self) -> list[Path]:
        """Folders of steps, oldest first."""
        return list_checkpoints(self.folder)

    def _checked_marks(self) -> dict[int, dict[str, Any]]:
        """`_marks`, where they are of this run."""
        try:
            refuse_other_run(self.newest_state(), self._run, self._place)
            return self._marks()
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be read: {error}") from error

    def _marks(self) -> dict[int, dict[str, Any]]:
        """What this process has, by step."""
        found = {step_of(path): self._mark_in(path) for path in self._steps()}
        return {step: mark for step, mark in found.items() if mark is not None}

    def _mark_in(self, path: Path) -> dict[str, Any] | None:
        try:
            mark = json.loads((path / f"{self._file}.json").read_text(encoding="utf-8"))
            return {key: mark[key] for key in ("sha256", "bytes", "processes", "save")}
        except (OSError, ValueError, TypeError, LookupError):
            return None

    def _own(self, step: int, needs: Needs) -> SoundCheckpoint:
        path = self.folder / step_name(step)
        mark, file = self._mark_in(path), path / f"{self._file}.safetensors"
        if mark is None:
            raise CheckpointError(f"{file} has no mark any more")
        verify_sums(path, {file.name: mark["sha256"]})
        index = index_of_one(file)
        needs.refuse_parts_of_others(file, index)
        return SoundCheckpoint(path, index, alone=True)


def _joined(said: list[tuple[str, dict[str, dict[str, Any]]]]) -> list[Offered]:
    """From what every process has, by rank: each step that any of them has."""
    steps = sorted({int(step) for _, here in said for step in here})
    return [Offered(step, _flaw([(host, here.get(str(step))) for host, here in said])) for step in steps]


def _flaw(marks: list[tuple[str, dict[str, Any] | None]]) -> str:
    lacking = [f"process {rank} on {host}" for rank, (host, mark) in enumerate(marks) if mark is None]
    there = [mark for _, mark in marks if mark is not None]
    processes = {mark["processes"] for mark in there}
    if processes != {len(marks)}:
        return f"it is of {max(processes)} processes, and there are {len(marks)}"
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        return f"{lacking[0]}{more} has no file of it: local disks give back what each has written itself"
    if len({mark["save"] for mark in there}) > 1:
        return "its files are of different saves"
    return ""
