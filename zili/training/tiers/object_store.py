"""An object store as a tier: what a run's folder has, under a URL, for all machines.

A store has no rename. `SHA256SUMS` is put last, so there is a checkpoint when it is there, and none before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from zili.checksums import SUMS_FILE, parsed_sums, sums_text
from zili.errors import CheckpointError
from zili.parallel.world import World
from zili.training.checkpoints import RUN_FILE, RunState, SoundCheckpoint, parsed_state, state_text
from zili.training.fence import refuse_late_life
from zili.training.index import INDEX_FILE, Place, header_places, index_of_told, read_index, told_of
from zili.training.parts import places, streamed
from zili.training.restoring import Needs
from zili.training.tiers.run_folder import RunFolder, Written, written_together
from zili.training.tiers.store import Store
from zili.training.tiers.tier import STORE, Copies, Offered, Tier, refuse_other_run, step_name

_STEP = re.compile(r"step-(\d{8})")
_SET_ASIDE = f"damaged-{SUMS_FILE}"
_LONGEST_HEADER = 100_000_000
"""Bytes; safetensors itself reads no longer one."""


class _Contents(NamedTuple):
    """What a checkpoint in the store lists."""

    sums: dict[str, str]
    sizes: dict[str, int]


class ObjectStore(Tier):
    """A store by its URL."""

    distance, durable = STORE, True

    def __init__(
        self,
        url: str,
        world: World,
        *,
        every: int,
        keep: int,
        fence: Callable[[], bool],
        run: Path,
        folder: RunFolder,
    ) -> None:
        """`run`: the run's folder, by whose name a checkpoint is known for its own. `folder`: where one is brought
        before it is restored."""
        super().__init__(f"the store {url}", world, every=every, keep=keep, fence=fence)
        self._run = run
        self._folder = folder
        self._store = Store(url)

    def where(self, step: int) -> str:
        return f"{self._store.url}/{step_name(step)}"

    def probe(self) -> None:
        self._world.from_first(self._store.probe)

    def offers(self) -> list[Offered]:
        return [Offered(step) for step in self._world.from_first(self._whole_steps_of_this_run)]

    def _whole_steps_of_this_run(self) -> list[int]:
        refuse_other_run(self.newest_state(), self._run, self._store.url)
        return self._steps(SUMS_FILE)

    def opened(self, step: int, needs: Needs) -> SoundCheckpoint:
        """Brought into the run's folder first: whoever hashes a file has read it, and nobody reads it twice."""
        listed = self._world.from_first(lambda: self._listed(step))
        name = step_name(step)

        def fetch(file: str, path: Path) -> None:
            self._store.fetch(f"{name}/{file}", path)

        path = self._folder.bring(step, listed.sums, listed.sizes, fetch)
        return SoundCheckpoint(path, self._world.from_first(lambda: read_index(path)))

    def take(self, copies: Copies, channel: int) -> int:
        def together(work: Callable[[], Any]) -> Any:
            return written_together(self._world, self.where(copies.step), work, channel)

        together(lambda: self._make_room(copies.step))
        own = together(lambda: self._put_own(copies))
        every = self._world.gathered(json.dumps(own), channel)
        return int(together(lambda: self._appear(copies, every)))

    def state_of(self, step: int) -> RunState:
        return parsed_state(self._store.text(f"{step_name(step)}/{RUN_FILE}"), self.where(step))

    def set_aside(self, steps: Sequence[int], why: str = "damaged") -> None:
        self._world.from_first(lambda: self._set_aside(steps))

    def newest_state(self) -> RunState | None:
        for step in reversed(self._steps(SUMS_FILE)):
            with suppress(CheckpointError):
                return self.state_of(step)
        return None

    def _steps(self, having: str) -> list[int]:
        """Steps whose folder has a file of that name, oldest first."""
        found = (_STEP.fullmatch(name) for name in self._store.sizes())
        steps = sorted(int(one[1]) for one in found if one)
        return [step for step in steps if having in self._store.sizes(step_name(step))]

    def _listed(self, step: int) -> _Contents:
        name = step_name(step)
        sums = parsed_sums(self._store.text(f"{name}/{SUMS_FILE}"), f"{self.where(step)}/{SUMS_FILE}")
        there = self._store.sizes(name)
        for file in (RUN_FILE, *sums):
            if file not in there or file not in sums:
                raise CheckpointError(f"{self.where(step)} lacks {file}")
        return _Contents(sums, {file: there[file] for file in sums})

    def _make_room(self, step: int) -> None:
        if self._world.is_first:
            refuse_late_life(self._fence, self._store.url)
            self._store.remove(f"{step_name(step)}/{SUMS_FILE}")  # of a run that went back: no longer whole

    def _set_aside(self, steps: Sequence[int]) -> None:
        for step in steps:
            self._store.rename(f"{step_name(step)}/{SUMS_FILE}", f"{step_name(step)}/{_SET_ASIDE}")

    def _put_own(self, copies: Copies) -> dict[str, Any] | None:
        """Put this process's file, if it has parts; what the first process has to know of it."""
        if not copies.parts:
            return None
        name = f"shard-{self._world.rank + 1:05d}.safetensors"
        digest, size = self._store.put(f"{copies.name}/{name}", streamed(copies.parts))
        return {**Written(name, digest, size)._asdict(), **told_of(places(copies.parts))}

    def _appear(self, copies: Copies, every: list[str]) -> int:
        """The last of it, by the first process: the sums make it a checkpoint."""
        if not self._world.is_first:
            return 0
        said = [one for one in map(json.loads, every) if one is not None]
        files = [Written(one["name"], one["sha256"], one["bytes"]) for one in said]
        index = index_of_told(said, lambda name: self._header(f"{copies.name}/{name}"))
        index.check_whole()
        for name, text in ((INDEX_FILE, index.text()), (RUN_FILE, state_text(copies.state))):
            files.append(Written(name, *self._store.put_text(f"{copies.name}/{name}", text)))
        self._refuse_missing(copies, files)
        refuse_late_life(self._fence, self._store.url)
        # Not before: until this one is whole, they may be the only ones.
        self._set_aside([newer for newer in self._steps(SUMS_FILE) if newer > copies.step])
        self._store.put_text(f"{copies.name}/{SUMS_FILE}", sums_text({file.name: file.sha256 for file in files}))
        self._forget(copies.step)
        return sum(file.bytes for file in files if file.name.endswith(".safetensors"))

    def _refuse_missing(self, copies: Copies, files: list[Written]) -> None:
        """Raise unless the store has every file with its size: the sums are of what each process sent."""
        there = self._store.sizes(copies.name)
        for file in files:
            if there.get(file.name) != file.bytes:
                raise CheckpointError(
                    f"{self.where(copies.step)}/{file.name} has {there.get(file.name, 0):,} of {file.bytes:,} bytes "
                    "that were written: the store keeps less than it says"
                )

    def _header(self, name: str) -> Mapping[str, Place]:
        """The header of a file in the store."""
        size = int.from_bytes(self._store.part(name, 0, 8), "little")
        if size > _LONGEST_HEADER:
            raise CheckpointError(f"{self._store.url}/{name} gives back something else than was written")
        with self._store.asked(f"{name} gives back something else than was written"):
            return header_places(self._store.part(name, 8, 8 + size))

    def _forget(self, step: int) -> None:
        """Delete what is older than the newest that are whole, and what was never completed. What is set aside as
        damaged stays."""
        try:
            there = [int(one[1]) for one in map(_STEP.fullmatch, self._store.sizes()) if one]
            whole = self._steps(SUMS_FILE)
            stay = {*whole[-self.keep :], *self._steps(_SET_ASIDE)}
        except CheckpointError as error:
            self.told.put(f"what is no longer needed cannot be listed: {error}")
            return
        for old in there:
            if old not in stay and old != step:
                self._delete(step_name(old))

    def _delete(self, name: str) -> None:
        try:
            self._store.remove(f"{name}/{SUMS_FILE}")  # first: what is half deleted is none
            self._store.remove(name)
        except CheckpointError as error:
            self.told.put(f"{self._store.url}/{name} is no longer needed and cannot be deleted: {error}")
