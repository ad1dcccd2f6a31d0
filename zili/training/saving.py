"""Saving a run: its tensors are copied in the step, and each tier writes them beside the steps."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from torch import Tensor

from zili.errors import CheckpointError
from zili.parallel.world import World
from zili.training.checkpoints import RunState, is_of_one_process
from zili.training.parts import held_parts, parts_to_write
from zili.training.tiers.run_folder import RunFolder
from zili.training.tiers.tier import Copies, Tier, step_name

_LOG = logging.getLogger(__name__)
_CHANNEL = 1
"""A save in the background says its control messages beside those of the steps; each further tier has the next one."""


class Saved(NamedTuple):
    """A checkpoint that is whole."""

    path: Path
    """Its folder; of a store, its URL as a path would have it."""
    bytes: int
    """Size of weights, optimizer state and generators there."""
    seconds: float
    """From the call that began it; training goes on meanwhile where saving is asynchronous."""
    where: str
    """How a user names it."""


class _Ended(NamedTuple):
    """How a tier's save went."""

    step: int
    saved: Saved | None
    failure: BaseException | None


class _Lane:
    """One tier, and the thread that writes there: one save at a time."""

    def __init__(self, tier: Tier, channel: int) -> None:
        self.tier = tier
        self.given: int | None = None
        """The last step that was given to it."""
        self.newest: int | None = None
        """The last step that is whole there, as far as is known."""
        self.failed = 0
        """Saves in a row that failed."""
        self.failure: BaseException | None = None
        """Of the last one."""
        self.told_slow = False
        self.began = 0.0
        self._channel = channel
        self._thread: threading.Thread | None = None
        self._ended: SimpleQueue[_Ended] = SimpleQueue()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def begin(self, copies: Copies, begun: float) -> None:
        """Write beside what this process does."""
        self._give(copies.step)
        before = self._thread

        def work() -> None:
            if before is not None:
                before.join()  # where the first process's is over, this one's is about to be
            self._write(copies, begun)

        # A daemon: a store that does not answer keeps no process from its end. The run's folder is not in here.
        self._thread = threading.Thread(target=work, name="zili-tier", daemon=True)
        self._thread.start()

    def write(self, copies: Copies, begun: float) -> None:
        """Write, and come back when it is done."""
        self._give(copies.step)
        self._write(copies, begun)

    def _give(self, step: int) -> None:
        self.given, self.began, self.told_slow = step, time.perf_counter(), False

    def _write(self, copies: Copies, begun: float) -> None:
        try:
            size = self.tier.take(copies, self._channel)
            where = self.tier.where(copies.step)
            saved = Saved(Path(where), size, time.perf_counter() - begun, where)
            _LOG.debug("%s is whole: %d bytes in %.2f s", where, saved.bytes, saved.seconds)
            self._ended.put(_Ended(copies.step, saved, None))
        except BaseException as error:
            self.fail(copies.step, error)

    def fail(self, step: int, error: BaseException) -> None:
        self._ended.put(_Ended(step, None, error))

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def heard(self) -> Iterable[_Ended]:
        """What has ended since this was asked last."""
        while not self._ended.empty():
            ended = self._ended.get()
            self.failure = ended.failure
            if ended.saved is None:
                self.failed += 1
            else:
                self.failed, self.newest = 0, ended.step
            yield ended


class Saver:
    """Writes the checkpoints of a run, in each tier one at a time. Every process of the world calls it alike."""

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        keep: int,
        keep_every: int = 0,
        every: int = 0,
        asynchronous: bool,
        patience: int = 1,
        note: Callable[[str], None] = print,
        saved: Callable[[Saved], None] = lambda saved: None,
        fence: Callable[[], bool] = lambda: True,
        tiers: Callable[[RunFolder], Sequence[Tier]] = lambda folder: (),
    ) -> None:
        """`keep`: newest checkpoints that stay, beside those of every `keep_every`-th step, if any; `every`: steps
        between them. `asynchronous`: a save returns when its tensors are copied.
        `patience`: saves in a row that may fail, after which `lost` is true. `note` is told of what went wrong, `saved`
        of what is whole; both by the thread that calls. `fence`: whether this life of the run is still the newest; the
        first process asks it before it changes anything that others see. `tiers`: those beside the folder."""
        self.folder = folder
        self._world = world
        self._asynchronous = asynchronous
        self._patience = patience
        self._note = note
        self._saved = saved
        own = RunFolder(folder, world, every=every, keep=keep, keep_every=keep_every, fence=fence)
        self.tiers: tuple[Tier, ...] = (own, *tiers(own))
        self._lanes = [_Lane(tier, _CHANNEL + number) for number, tier in enumerate(self.tiers)]
        self._own = self._lanes[0]
        self._thread: threading.Thread | None = None

    @property
    def lost(self) -> bool:
        """Whether `patience` saves in a row failed in every tier that all machines read, or the folder's met a defect;
        as far as this process knows yet."""
        defect = not isinstance(self._own.failure, CheckpointError | None)
        return defect or all(lane.failed >= self._patience for lane in self._lanes if lane.tier.durable)

    def found(self, step: int, tiers: Iterable[Tier]) -> None:
        """`tiers` have the checkpoint of `step` already, from which this process goes on."""
        for lane in self._lanes:
            if lane.tier in tiers:
                lane.given = lane.newest = step

    def due(self, step: int) -> bool:
        """Whether a checkpoint of `step` is asked for, by its number."""
        return any(tier.due(step) for tier in self.tiers)

    def due_in_folder(self, step: int) -> bool:
        """Whether the run's folder is among those that it is asked for."""
        return self._own.tier.due(step)

    def lacks(self, step: int) -> bool:
        """Whether a tier was not given `step`. Waits until the save at hand has been dealt out to them."""
        if self._thread is not None:
            self._thread.join()
        return any(lane.given != step for lane in self._lanes)

    def save(
        self,
        state: RunState,
        tensors: dict[str, Tensor],
        held: Mapping[str, Tensor] | None = None,
        *,
        everywhere: bool = True,
        last: bool = False,
    ) -> Path:
        """Begin to write `state.step` into each tier, after the folder's save before is done. Returns its path in the
        folder. `held`: all that this process holds, if that is more. `everywhere`: not only where it is due by its
        number; a tier that has it already is left out, and so is one that still writes another, but for the `last`.

        Where a disk refuses nothing half-written is left; `look` and `settle` tell it to `note`, `wait` raises it.
        """
        self.settle()
        begun = time.perf_counter()
        copies = self._copied(state, tensors, held or tensors, everywhere)
        if self._asynchronous:
            # Not a daemon: a process that ends lets the checkpoint at hand be finished.
            self._thread = threading.Thread(
                target=self._deal_out, args=(copies, everywhere, last, begun), name="zili-checkpoint"
            )
            self._thread.start()
        else:
            self._deal_out(copies, everywhere, last, begun)
            self._hear()
        return self.folder / step_name(state.step)

    def _copied(
        self, state: RunState, tensors: dict[str, Tensor], held: Mapping[str, Tensor], everywhere: bool
    ) -> Copies:
        parts = parts_to_write(tensors, self._world, is_of_one_process)
        asked = [tier for tier in self.tiers if tier.takes_own and (everywhere or tier.due(state.step))]
        own = held_parts(held) if asked else {}
        if self._asynchronous:
            if asked:
                own = {name: part.copied() for name, part in own.items()}
                parts = {name: own[name] for name in parts}
            else:
                parts = {name: part.copied() for name, part in parts.items()}
        return Copies(state, parts, own)

    def _deal_out(self, copies: Copies, everywhere: bool, last: bool, begun: float) -> None:
        """By the thread of the folder's save: give the copies to those tiers that are free, and to the folder."""
        try:
            numbers = [0]
            if len(self._lanes) > 1:
                numbers = self._world.from_first(lambda: self._takers(copies.step, everywhere, last), _CHANNEL, None)
            for number in numbers:
                lane = self._lanes[number]
                if lane is not self._own and self._asynchronous:
                    lane.begin(copies, begun)
            for number in numbers:
                lane = self._lanes[number]
                if lane is self._own or not self._asynchronous:
                    lane.write(copies, begun)
        except BaseException as error:
            self._own.fail(copies.step, error)

    def _takers(self, step: int, everywhere: bool, last: bool) -> list[int]:
        """Numbers of the tiers that take `step`, as the first process sees them: it knows who is still writing."""
        # While the folder fails, the next place that all machines read stands in for it.
        stands_in = self._own.failed > 0
        found = []
        for number, lane in enumerate(self._lanes):
            tier = lane.tier
            wanted = everywhere or tier.due(step) or (tier.durable and stands_in)
            if not wanted or lane.given == step:
                continue
            if lane.busy and not last:
                self._tell_slow(lane, step)
                continue
            found.append(number)
        return found

    def _tell_slow(self, lane: _Lane, step: int) -> None:
        if not lane.told_slow:
            lane.told_slow = True
            lane.tier.told.put(
                f"{lane.tier.title} still writes step {lane.given} after {time.perf_counter() - lane.began:.0f} s: "
                f"step {step} is left out there, as is what comes before it is done"
            )

    def look(self) -> None:
        """Tell what has ended since; takes no waiting."""
        self._hear()

    def settle(self) -> None:
        """Wait until the folder's save at hand has ended. One that failed is told to `note`, unless the run is `lost`.
        Other tiers are not waited for."""
        self._join()
        self._hear()

    def rest(self) -> None:
        """Wait until no tier writes any more, and tell how it went."""
        self._join()
        for lane in self._lanes:
            lane.wait()
        self._hear()

    def wait(self) -> None:
        """Until every save at hand is whole. Raises what the folder's failed with, unless another tier that all
        machines read has the same step."""
        self._join()
        for lane in self._lanes:
            lane.wait()
        self._hear(last=True)
        failure, self._own.failure = self._own.failure, None
        elsewhere = any(lane.newest == self._own.given for lane in self._lanes if lane.tier.durable)
        if failure is not None and not (elsewhere and isinstance(failure, CheckpointError)):
            raise failure

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _hear(self, last: bool = False) -> None:
        for lane in self._lanes:
            for ended in lane.heard():
                if ended.saved is not None:
                    self._saved(ended.saved)
                elif lane is not self._own or not (self.lost or (last and len(self._lanes) == 1)):
                    self._note(self._said_of(lane, ended))
            while not lane.tier.told.empty():
                self._note(lane.tier.told.get())

    def _said_of(self, lane: _Lane, ended: _Ended) -> str:
        error = ended.failure
        said = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        if len(self._lanes) == 1:
            return f"{said}. Trying again ({lane.failed} of checkpoint.patience {self._patience})"
        kept = [f"step {one.newest} in {one.tier.title}" for one in self._lanes if one.newest is not None]
        left = ", ".join(kept) or "no checkpoint yet"
        tried = f"{lane.failed} in a row; checkpoint.patience {self._patience}"
        return f"{lane.tier.title} has not taken step {ended.step}: {said} ({tried}). There is: {left}"
