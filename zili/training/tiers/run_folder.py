"""The run's folder as a tier: what is written aside appears by one rename, and every machine sees it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from safetensors import SafetensorError

from zili.checksums import SUMS_FILE, dealt, read_sums, sha256, verify_sums, write_sums
from zili.durable import soon, sync
from zili.errors import CheckpointError
from zili.parallel.world import World
from zili.training import checkpoints
from zili.training.checkpoints import RUN_FILE, RunState, SoundCheckpoint, list_checkpoints, step_of
from zili.training.fence import of_this_life, refuse_late_life
from zili.training.index import INDEX_FILE, index_of_told, read_header, told_of
from zili.training.parts import HeldPart, write_parts
from zili.training.restoring import Needs
from zili.training.tiers.tier import RUN_FOLDER, Copies, Offered, Tier, step_name

Result = TypeVar("Result")


class Written(NamedTuple):
    """A file of a checkpoint as the process sees it that wrote it."""

    name: str
    sha256: str
    bytes: int


class RunFolder(Tier):
    """The folder `checkpoints` of a run."""

    distance, durable = RUN_FOLDER, True

    def __init__(
        self, folder: Path, world: World, *, every: int, keep: int, keep_every: int, fence: Callable[[], bool]
    ) -> None:
        """`keep_every`: steps between those that stay for good; 0: none."""
        super().__init__("the run's folder", world, every=every, keep=keep, fence=fence)
        self.folder = folder
        self._keep_every = keep_every

    def offers(self) -> list[Offered]:
        steps = self._world.from_first(lambda: [step_of(path) for path in list_checkpoints(self.folder)])
        return [Offered(step) for step in steps]

    def opened(self, step: int, needs: Needs) -> SoundCheckpoint:
        path = self.folder / step_name(step)
        return SoundCheckpoint(path, checkpoints.verify(path, self._world, needs.files))

    def state_of(self, step: int) -> RunState:
        return checkpoints.read_state(self.folder / step_name(step))

    def set_aside(self, steps: Sequence[int], why: str = "damaged") -> None:
        def rename() -> None:
            for path in list_checkpoints(self.folder):
                if step_of(path) in steps:
                    checkpoints.set_aside(path, why)

        self._world.from_first(rename)

    def newest_state(self) -> RunState | None:
        return checkpoints.newest_state(self.folder)

    def where(self, step: int) -> str:
        return str(self.folder / step_name(step))

    def due(self, step: int) -> bool:
        return super().due(step) or (bool(self._keep_every) and step % self._keep_every == 0)

    def take(self, copies: Copies, channel: int) -> int:
        target = self.folder / copies.name
        with self._aside(target) as aside:
            self._together(target, lambda: self._make_room(aside), channel)
            own = self._together(target, lambda: self._write_own(aside, copies.parts), channel)
            every = self._world.gathered(json.dumps(own), channel)
            return self._together(target, lambda: self._appear(aside, target, copies.state, every), channel)

    def bring(self, step: int, sums: dict[str, str], sizes: dict[str, int], fetch: Callable[[str, Path], None]) -> Path:
        """Have the checkpoint of `step` here that lies elsewhere: each process writes its share of the files, hashes
        them, and the folder appears when all hold. `fetch` writes the file of a name to a path.

        Raises:
            CheckpointError: a file cannot be read, has another hash, or the disk refuses.
        """
        target, world = self.folder / step_name(step), self._world
        shares = dealt(sizes, world.size)
        own = {name: sums[name] for name in sorted(sums) if shares[name] == world.rank}
        with self._aside(target) as aside:
            self._together(target, lambda: self._make_room(aside))
            self._together(target, lambda: _fetched(own, aside, fetch))
            self._together(target, lambda: self._conclude(aside, target, sums, sizes))
        return target

    @contextmanager
    def _aside(self, target: Path) -> Iterator[Path]:
        """The folder that `target` is written in."""
        # One name for all processes of a life; what a killed run left under others is swept away first.
        aside = self.folder / f".{target.name}{of_this_life()}"
        try:
            yield aside
        finally:
            if self._world.is_first:
                shutil.rmtree(aside, ignore_errors=True)

    def _make_room(self, aside: Path) -> None:
        if self._world.is_first:
            refuse_late_life(self._fence, self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".step-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            aside.mkdir()

    def _write_own(self, aside: Path, parts: dict[str, HeldPart]) -> dict[str, Any] | None:
        """Write this process's file, if it has parts; what the first process has to know of it."""
        if not parts:
            return None
        file = aside / f"shard-{self._world.rank + 1:05d}.safetensors"
        _write_tensors(file, parts)
        return {**_written(file)._asdict(), **told_of(read_header(file))}

    def _appear(self, aside: Path, target: Path, state: RunState, every: list[str]) -> int:
        """The last of it, by the first process: until the rename there is no checkpoint, after it a whole one."""
        if not self._world.is_first:
            return 0
        said = [one for one in map(json.loads, every) if one is not None]
        files = [Written(one["name"], one["sha256"], one["bytes"]) for one in said]
        _refuse_missing(files, aside, lambda name: _size(aside / name))
        index = index_of_told(said, lambda name: read_header(aside / name))
        index.check_whole()
        (aside / INDEX_FILE).write_text(index.text(), encoding="utf-8")
        (aside / RUN_FILE).write_text(checkpoints.state_text(state), encoding="utf-8")
        listed = [*files, _written(aside / INDEX_FILE), _written(aside / RUN_FILE)]
        self._list_and_rename(aside, target, {file.name: file.sha256 for file in listed})
        self._forget()
        return sum(file.bytes for file in files)

    def _conclude(self, aside: Path, target: Path, sums: dict[str, str], sizes: dict[str, int]) -> None:
        """The same for one that was brought."""
        if self._world.is_first:
            brought = [Written(name, sums[name], sizes[name]) for name in sums]
            _refuse_missing(brought, aside, lambda name: _size(aside / name))
            if target.exists():  # of the same step, and passed over
                checkpoints.set_aside(target)
            self._list_and_rename(aside, target, sums)

    def _list_and_rename(self, aside: Path, target: Path, sums: dict[str, str]) -> None:
        write_sums(aside, sums)
        sync(aside / SUMS_FILE)
        sync(aside)
        refuse_late_life(self._fence, self.folder)
        # Left by a run that was resumed from an older checkpoint, or written by a life that began after that look.
        before = _moved_aside(target) if target.exists() else None
        aside.rename(target)
        try:
            refuse_late_life(self._fence, self.folder)
        except CheckpointError:
            target.rename(aside)
            if before is not None:
                before.rename(target)
            raise
        sync(self.folder)
        if before is not None:
            self._drop_or_tell(before)

    def _forget(self) -> None:
        # What lacks a file counts for nothing: it must not push out one that is whole.
        for old in [path for path in list_checkpoints(self.folder) if _is_whole(path)][: -self.keep]:
            if not (self._keep_every and step_of(old) % self._keep_every == 0):
                self._drop_or_tell(old)

    def _drop_or_tell(self, path: Path) -> None:
        """What cannot be deleted, since somebody reads it over NFS or it is write-protected, is no reason to stop."""
        try:
            _drop(path)
        except OSError as error:
            self.told.put(f"{path} is no longer needed and cannot be deleted: {error}")

    def _together(self, target: Path, work: Callable[[], Result], channel: int = 0) -> Result:
        return written_together(self._world, f"{target}", work, channel)


def written_together(world: World, target: str, work: Callable[[], Result], channel: int) -> Result:
    """`work()` on every process; where it fails on one, all say so."""

    def attempt() -> Result:
        try:
            return work()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot write the checkpoint {target}: {error}; free some space or choose another folder"
            ) from error

    return world.agree(attempt, channel, patience=None)


def _refuse_missing(written: Iterable[Written], folder: object, size: Callable[[str], int | None]) -> None:
    """Raise unless this process sees every file that the processes wrote, with its size.

    The sums are of what each process sees. Where `folder` is not one for all, files are on other machines.
    """
    for file in written:
        if not soon(lambda: size(file.name) == file.bytes):  # noqa: B023 - called at once
            raise CheckpointError(
                f"cannot write the checkpoint {folder}: {file.name}, {file.bytes:,} bytes, was written by another "
                "process and is not here: the run's folder is not shared by all machines (docs/parallel.md)"
            )


def _fetched(sums: Mapping[str, str], folder: Path, fetch: Callable[[str, Path], None]) -> None:
    for name in sums:
        fetch(name, folder / name)
        sync(folder / name)
    verify_sums(folder, sums)


def _is_whole(path: Path) -> bool:
    """Whether all that it lists is there; nothing is hashed."""
    try:
        return read_sums(path, [RUN_FILE], others=True).keys() <= {entry.name for entry in path.iterdir()}
    except (CheckpointError, OSError):
        return False


def _write_tensors(file: Path, parts: dict[str, HeldPart]) -> None:
    # Where the folder is not one for all, the first process will say so; each goes on till then.
    file.parent.mkdir(parents=True, exist_ok=True)
    write_parts(file, parts)


def _written(file: Path) -> Written:
    """A file; it is on the disk afterwards."""
    sync(file)
    return Written(file.name, sha256(file), file.stat().st_size)


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
