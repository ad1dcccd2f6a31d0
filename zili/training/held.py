"""This process's state in memory of its machine's agent, which outlives it: kept every few steps, taken up by the next
life of the run. A run without an agent has none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import mmap
import os
import struct
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from zili.errors import CheckpointError, PeerError
from zili.parallel.control.links import PlainLink
from zili.parallel.control.member import AGENT, AGENT_SECRET, GENERATION
from zili.parallel.control.messages import About, Message, unpacked
from zili.parallel.world import World
from zili.plurals import counted
from zili.training.checkpoints import RunState, SoundCheckpoint
from zili.training.index import DTYPES, SHARDING, Box, Place, TensorIndex, read_header, shard_of
from zili.training.parts import HeldPart, held_parts
from zili.training.restoring import restore

_LOG = logging.getLogger(__name__)
_DECIDED = (4, 40)
"""Copies after which their cost is known."""
_ANSWER = 600.0
"""Seconds for the agent to answer, which may fetch a state from another machine."""
_ALIGNED = 64
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ELSEWHERE = "elsewhere"
"""Stands for the files of other processes."""


class StateMemory:
    """Keeps this process's state. Every process of the world calls it alike."""

    def __init__(self, world: World, every: int, share: float) -> None:
        """`every`: least steps between copies; 0: none are kept. `share`: the largest of the time that they
        may take."""
        self._world = world
        self._every = every
        self._share = share
        self._link: PlainLink | None = None
        self._kind = ""
        self._alone = False
        """Whether no process on another machine has the same state."""
        self._on_its_way = self._late = False
        self._chosen: tuple[list[int], int] | None = None
        """Mark of the state that all take up."""
        self._back = -1
        """How often this life has gone back by itself."""
        self._rooms: dict[int, dict[str, Tensor]] = {}
        self._kept = 0
        self._copying = self._steps = math.inf
        """Seconds of the fastest copy and of the fastest step since it was last decided: slower ones were held up."""
        self._ended = time.perf_counter()
        """When the last copy was whole."""

    @property
    def is_kept(self) -> bool:
        """Whether there is an agent, and states are to be kept."""
        return self._every != 0 and AGENT in os.environ

    @property
    def _about(self) -> dict[str, Any]:
        return {"kind": self._kind, "local": int(os.environ.get("LOCAL_RANK", "0"))}

    def offered(self, tensors: Mapping[str, Tensor]) -> int | None:
        """The newest step of which every process can take up its state; None: there is none.

        `tensors`: the weights that this process has a part of. Called before the first step.
        """
        if not self.is_kept:
            return None
        self._kind = kind_of(tensors)
        found = self._ask(do="offer", kind=self._kind)
        told = self._world.gathered(json.dumps([self._kind, found.get("machine", ""), found.get("marks", [])]))
        alone, self._chosen = self._world.from_first(lambda: _common([json.loads(one) for one in told]))
        self._alone = self._kind in alone
        return None if self._chosen is None else self._chosen[1]

    def take_up(self, wanted: Mapping[str, tuple[int, ...]]) -> tuple[SoundCheckpoint, RunState]:
        """The state that was offered, as a checkpoint of one file. `wanted`: shapes of all weights of the model.

        Raises:
            CheckpointError: it is not there any more.
        """
        assert self._chosen is not None
        found = self._ask(do="find", mark=self._chosen, **self._about)
        if "path" not in found:
            raise CheckpointError(f"the state after step {self._chosen[1]} is in no machine's memory any more")
        file = Path(found["path"])
        return SoundCheckpoint(file.parent, _index(file, wanted)), RunState(**json.loads(found["said"]))

    def forget_after(self, step: int) -> None:
        """The run goes on after `step`, and makes states of another history from here on."""
        if self.is_kept:
            self._back += 1
            self._rooms = {}
            self._ask(do="forget", step=step, **self._about)

    def is_due(self, step: int) -> bool:
        """Whether the state after `step` is to be kept."""
        return self.is_kept and step % self._every == 0

    def settle(self) -> None:
        """Wait until the state that was kept last is where it was sent. All call it before the sum of a step: so when
        one has finished a step, the state before it outlives every machine."""
        if self._on_its_way:
            self._on_its_way = False
            if self._ask(do="settle", **self._about).get("late") and not self._late:
                self._late = True
                _LOG.warning("a state takes longer to another machine than steps do: with this one more is lost")

    def keep(self, state: RunState, tensors: Mapping[str, Tensor]) -> str:
        """Copy `tensors`, this process's part of the run's state, into memory that outlives it. Returns a line for the
        user where copies follow one another less often from now on."""
        begun = time.perf_counter()
        parts = {name: part for name, part in held_parts(tensors).items() if part.tensor.numel()}
        room = self._ask(do="room", size=_laid_out(parts).size, **self._about)
        if "path" in room:
            for name, view in self._views(room["path"], room["number"], parts).items():
                view.copy_(parts[name].tensor)
            said, mark = json.dumps(asdict(state)), ((_life(), self._back), state.step)
            self._ask(do="whole", number=room["number"], mark=mark, said=said, alone=self._alone, **self._about)
            self._on_its_way = self._alone
        elif not self._kept:
            _LOG.warning("no state is kept in memory: %s", room.get("refused"))
        self._kept += 1
        if self._kept > 1:  # the first one faults pages in
            self._copying = min(self._copying, time.perf_counter() - begun)
            self._steps = min(self._steps, (begun - self._ended) / self._every)
        line = self._decide(room.get("took", 0.0)) if self._kept in _DECIDED else ""
        self._ended = time.perf_counter()
        return line

    def _decide(self, sending: float) -> str:
        """Find out every how many steps all keep their states from now on: as often as copying takes little of the
        time, and one state has left for another machine before the next one follows."""
        told = self._world.gathered(json.dumps([self._copying, sending, self._steps]))
        copying, sending, step = self._world.from_first(lambda: _slowest(told))
        self._copying = self._steps = math.inf
        before = self._every
        self._every = max(before, math.ceil(copying / (self._share * step)), math.ceil(sending / step))
        if self._every == before:
            return ""
        cost = f"a copy takes {1e3 * copying:.0f} ms, a step {1e3 * step:.0f} ms"
        cost += f", sending it to another machine {sending:.1f} s" if sending else ""
        return f"state kept in memory every {counted(self._every, 'step')}: {cost}"

    def _views(self, path: str, number: int, parts: Mapping[str, HeldPart]) -> dict[str, Tensor]:
        """The tensors of memory `number`, which is at `path`, to write into."""
        if self._rooms.get(number, {}).keys() != parts.keys():
            layout = _laid_out(parts)
            with Path(path).open("r+b") as file:
                room = mmap.mmap(file.fileno(), layout.size)
            room[: len(layout.header)] = layout.header
            self._rooms[number] = {
                name: torch.frombuffer(room, dtype=part.tensor.dtype, count=part.tensor.numel(), offset=start).view(
                    part.tensor.shape
                )
                for (name, part), start in zip(layout.parts.items(), layout.starts, strict=True)
            }
        return self._rooms[number]

    def _ask(self, **question: Any) -> dict[str, Any]:
        try:
            if self._link is None:
                self._link = PlainLink(os.environ[AGENT], bytes.fromhex(os.environ[AGENT_SECRET]))
            self._link.send(Message(About.HELD, word=json.dumps(question).encode()).packed())
            return dict(json.loads(unpacked(self._link.receive(_ANSWER)).word))
        except OSError as error:
            raise PeerError(f"the agent of this machine does not answer ({error})") from error


class _LaidOut(NamedTuple):
    """A file of safetensors, before its tensors are in it."""

    header: bytes
    parts: dict[str, HeldPart]
    starts: list[int]
    """Where each part's bytes begin."""
    size: int


def _laid_out(parts: Mapping[str, HeldPart]) -> _LaidOut:
    # The largest kinds of numbers first, so that each lies where a processor reads it at once.
    ordered = dict(sorted(parts.items(), key=lambda item: -item[1].tensor.element_size()))
    info = {name: {"saved_offsets": part.box.offset, "size": tuple(part.size)} for name, part in ordered.items()}
    table: dict[str, Any] = {"__metadata__": {"format": "pt", SHARDING: json.dumps(info)}}
    end, starts = 0, []
    for name, part in ordered.items():
        starts.append(end)
        end += part.tensor.nbytes
        shape = list(part.tensor.shape)
        table[name] = {"dtype": _NAMES[part.tensor.dtype], "shape": shape, "data_offsets": [starts[-1], end]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % _ALIGNED)
    header = struct.pack("<Q", len(text)) + text
    return _LaidOut(header, ordered, [len(header) + start for start in starts], len(header) + end)


def restored_from_memory(found: SoundCheckpoint, *given: Any) -> dict[str, Tensor]:
    """`restoring.restore` of a state in memory.

    Raises:
        CheckpointError: it cannot be read, for whatever reason: then there are checkpoints.
    """
    try:
        return restore(found, *given)
    except (CheckpointException, SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the state in memory cannot be read: {error}") from error


def kind_of(tensors: Mapping[str, Tensor]) -> str:
    """The same for processes that hold the same parts of the same weights, and for no others."""
    held = [(name, str(part.tensor.dtype), tuple(part.size), *part.box) for name, part in held_parts(tensors).items()]
    return hashlib.sha256(json.dumps(sorted(held)).encode()).hexdigest()[:32]


def _common(told: list[tuple[str, str, list[Any]]]) -> tuple[list[str], Any]:
    """Kinds that one machine alone has, and the mark of the newest state that every process can have."""
    machines: dict[str, set[str]] = defaultdict(set)
    for kind, machine, _ in told:
        machines[kind].add(machine)
    marks = set.intersection(*({(tuple(way), step) for way, step in marks} for _, _, marks in told))
    newest = max(marks, key=lambda mark: (mark[1], mark[0]), default=None)
    return [kind for kind, having in machines.items() if len(having) == 1], newest


def _life() -> int:
    return int(os.environ.get(GENERATION, "0"))


def _slowest(told: list[str]) -> tuple[float, float, float]:
    """Of seconds for copying, sending and a step: the largest, as all processes keep their states at the same steps."""
    copying, sending, step = map(max, zip(*map(json.loads, told), strict=True))
    return copying, sending, step


def _index(file: Path, wanted: Mapping[str, tuple[int, ...]]) -> TensorIndex:
    """What a state's file has. Other processes have the rest of the model, which this one does not ask for."""
    shard = shard_of(read_header(file))
    missing = sorted(f"model.{name}" for name in wanted if f"model.{name}" not in {**shard.cut, **shard.whole})
    places = [Place("F32", tuple(wanted[name.removeprefix("model.")]), Box((), ())) for name in missing]
    others = {name: number for number, name in enumerate(missing)}
    return TensorIndex([shard.cut, {}], {file.name: (0, shard.whole, shard.places), _ELSEWHERE: (1, others, places)})
