"""States of processes in memory that outlives them: a life begins from where the one before was, not from a disk.

A process copies its state into memory of its machine's agent, and says when it is whole. Of each process there are
three such memories: one that is being written, and the two newest whole ones, since others may be a step behind when
one is killed. Which one is free never follows from a step's number: steps are skipped. Where no process on another
machine has the same state, the agent sends it on to another machine's, which keeps the two newest.

States that are alike have the same `kind`: the tensors and the parts of them that a process holds. Who needs a state
asks for its kind, whichever process kept it.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import zlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

from zili.parallel.control.links import Link, connect
from zili.parallel.control.messages import About, Message, unpacked

_OWN, _KEPT = 3, 2
"""Memories of a process of this machine, and of another's."""
_PIECE = 4 << 20
"""Bytes sent at once: the loop goes on in between."""
_REACH = 5.0
"""Seconds for a connection to another machine's agent."""
_STILL = 20.0
"""Seconds in which nothing of a state gets further, after which its way counts as broken."""
_WAIT = 5.0
"""Seconds that a process waits at most until its last state is where it was sent: it must not pass for a hang."""
_LARGEST = 1 << 44
"""Bytes of a state; what claims to be larger is garbage."""
_GARBAGE = (LookupError, TypeError, ValueError, AttributeError)
_serial = count()


class StateMark(NamedTuple):
    """Which state it is: two of the same mark are of one history of the run."""

    way: tuple[int, int]
    """The life that made it, and how often that had gone back by itself before."""
    step: int
    """Steps done."""


class Owner(NamedTuple):
    """Whose memories some are."""

    kind: str
    local: int | None
    """The process's local number; None: it is of another machine."""
    name: str = ""
    """Of another machine's: which process it is."""


@dataclass
class _Memory:
    """One state, or room for one."""

    handle: int
    size: int
    number: int = field(default_factory=lambda: next(_serial))
    """No other memory of this agent ever has it, as numbers of handles are given again."""
    mark: StateMark | None = None
    """None: it is not whole."""
    said: str = ""
    """What its process said of it, for the one that takes it up."""
    busy: int = 0
    """Who sends or receives it at the moment."""

    @property
    def rank(self) -> tuple[int, Any]:
        """The oldest first, those that are not whole before."""
        return (-1, ()) if self.mark is None else (self.mark.step, self.mark.way)

    def close(self) -> None:
        os.close(self.handle)


@dataclass
class HeldStates:
    """The states that one agent has. Its methods belong to one loop of asyncio."""

    machine: str
    secret: bytes
    elsewhere: Callable[[str], Awaitable[dict[StateMark, list[str]]]]
    """Finds out which agents, by their addresses, have states of a kind, by their marks."""
    partner: str = ""
    """Address of the agent that keeps what nobody else has; "": there is none."""
    newest: int = 0
    """The newest life of which any machine has a state; 0: none has one."""
    _known: dict[str, Awaitable[dict[StateMark, list[str]]]] = field(default_factory=dict)
    """What was found out in this life."""
    _memories: dict[Owner, list[_Memory]] = field(default_factory=dict)
    _sending: dict[Owner, asyncio.Task[None]] = field(default_factory=dict)
    _links: dict[Owner, Link] = field(default_factory=dict)
    """To the partner."""
    _took: dict[str, float] = field(default_factory=dict)
    """By kind, seconds that sending it on took the last time."""
    _fetching: dict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))

    def inventory(self) -> list[tuple[str, StateMark]]:
        """Kinds and marks of the whole states that are here."""
        return sorted({(owner.kind, one.mark) for owner, one in self._all() if one.mark is not None})

    @property
    def bytes(self) -> int:
        """What they take of this machine's memory."""
        return sum(one.size for _, one in self._all())

    def begin(self, partner: str, newest: int) -> None:
        """A life begins in which `partner` keeps what no other machine has. `newest`: the newest life of which any
        machine has a state that is to be gone on from; 0: there is none."""
        for task in self._sending.values():
            task.cancel()  # of processes that are no more, to a machine that may be another one now
        self._sending = {}
        self._hang_up()
        self.partner, self.newest, self._known = partner, newest, {}

    def _all(self) -> Iterator[tuple[Owner, _Memory]]:
        return ((owner, one) for owner, memories in self._memories.items() for one in memories)

    # ---------------------------------------------------------------- what is asked

    async def take(self, link: Link, message: Message) -> None:
        """Answer a message of `About.HELD`.

        Raises:
            OSError, ValueError: what comes on this link is none, or ends.
        """
        orders: dict[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]] = {
            "offer": self._offer,
            "settle": self._settle,
            "room": self._room,
            "whole": self._whole,
            "forget": self._forget,
            "find": self._find,
        }
        try:
            asked = json.loads(message.word)
            if asked["do"] == "give":
                await self._give(link, asked)
            elif asked["do"] == "keep":
                await self._keep(link, asked)
            else:
                _say(link, **await _answered(orders[asked["do"]], asked))
        except _GARBAGE as error:
            raise ValueError(f"no question about states: {error!r}") from error

    async def _offer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The states that a process which begins can have."""
        kind = asked["kind"]
        marks = {mark for known, mark in self.inventory() if known == kind} if self.newest else set()
        if self.newest and not any(mark.way[0] == self.newest for mark in marks):
            if kind not in self._known:
                self._known[kind] = asyncio.ensure_future(self.elsewhere(kind))
            marks |= set(await self._known[kind])
        return {"marks": sorted(marks), "machine": self.machine}

    async def _room(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Room for a process's next state: its path, and how long sending the last one on took."""
        memories = self._memories.setdefault(Owner(asked["kind"], asked["local"]), [])
        room = self._free(memories, asked["size"], _OWN)
        return {"path": _path(room), "number": room.number, "took": self._took.get(asked["kind"], 0.0)}

    def _free(self, memories: list[_Memory], size: int, most: int) -> _Memory:
        """One that is neither the newest whole one nor on its way; it is not whole from here on."""
        newest = max(memories, key=lambda one: one.rank, default=None)
        free = [one for one in memories if one is not newest and not one.busy]
        if len(memories) < most or not free:
            memories.append(_Memory(_made(size), size))
            return memories[-1]
        room = min(free, key=lambda one: one.rank)
        room.mark = None
        if room.size != size:
            os.ftruncate(room.handle, size)
            room.size, room.number = size, next(_serial)
        return room

    async def _whole(self, asked: dict[str, Any]) -> dict[str, Any]:
        """A process has written its state."""
        owner = Owner(asked["kind"], asked["local"])
        memory = next(one for one in self._memories[owner] if one.number == asked["number"])
        memory.mark, memory.said = mark_of(asked["mark"]), asked["said"]
        if asked["alone"] and self.partner and (owner not in self._sending or self._sending[owner].done()):
            self._sending[owner] = asyncio.ensure_future(self._send_on(owner, memory))
        return {}

    async def _settle(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Answer when a process's last state is where it was sent, or is late."""
        task = self._sending.get(Owner(asked["kind"], asked["local"]))
        if task is not None:
            await asyncio.wait([task], timeout=_WAIT)
        return {"late": task is not None and not task.done()}

    async def _forget(self, asked: dict[str, Any]) -> dict[str, Any]:
        """All processes of the run go on after `step`: later states are of a way that it did not take, and earlier ones
        of other machines are of no use any more. This process was of another kind in an earlier life, if at all."""
        step, kind, local = asked["step"], asked["kind"], asked["local"]
        for owner, memories in tuple(self._memories.items()):
            for one in tuple(memories):
                if one.mark is not None and one.mark.step > step:
                    one.mark = None
                useless = one.mark is None or one.mark.step < step if owner.local is None else False
                if not one.busy and (useless or (owner.local == local and owner.kind != kind)):
                    memories.remove(one)
                    one.close()
            if not memories:
                del self._memories[owner]
        return {}

    async def _find(self, asked: dict[str, Any]) -> dict[str, Any]:
        """A state of a kind and mark: its path, and what was said of it; fetched from another machine, if need be."""
        kind, mark = asked["kind"], mark_of(asked["mark"])
        async with self._fetching[kind]:
            for address in (await self._known[kind]).get(mark, []) if kind in self._known else ():
                if self._here(kind, mark, asked["local"]) is None:
                    with suppress(OSError, TimeoutError, *_GARBAGE):
                        await self._fetch(address, kind, mark)
        memory = self._here(kind, mark, asked["local"])
        return {} if memory is None else {"path": _path(memory), "said": memory.said}

    def _here(self, kind: str, mark: StateMark, local: int | None = None) -> _Memory | None:
        """A process's own, which has its generators, before that of another one that holds the same."""
        found = [(owner, one) for owner, one in self._all() if owner.kind == kind and one.mark == mark]
        return min(found, key=lambda pair: pair[0].local != local, default=(None, None))[1]

    # ---------------------------------------------------------------- between machines

    async def _send_on(self, owner: Owner, memory: _Memory) -> None:
        """Have the partner keep a state too. One that is gone is no reason to stop."""
        begun = time.monotonic()
        memory.busy += 1
        try:
            if owner not in self._links:
                self._links[owner] = await asyncio.wait_for(connect(self.partner, self.secret), _REACH)
            link = self._links[owner]
            await _send(link, memory, do="keep", kind=owner.kind, of=f"{self.machine} {owner.local}")
            await asyncio.wait_for(_next(link), _STILL)  # it is whole there
        except (OSError, TimeoutError):
            if owner in self._links:
                self._links.pop(owner).close()
        finally:
            self._took[owner.kind] = time.monotonic() - begun
            memory.busy -= 1

    async def _keep(self, link: Link, asked: dict[str, Any]) -> None:
        """Take a state that another machine's agent sends. What others had of its kind before is of no use then."""
        owner = Owner(asked["kind"], None, asked["of"])
        room = self._free(self._memories.setdefault(owner, []), _size(asked), _KEPT)
        await self._receive(link, asked, room)
        for other, memories in tuple(self._memories.items()):
            if other.kind == owner.kind and other.local is None and other != owner:
                for one in [one for one in memories if not one.busy]:
                    memories.remove(one)
                    one.close()
        _say(link)

    async def _give(self, link: Link, asked: dict[str, Any]) -> None:
        memory = self._here(asked["kind"], mark_of(asked["mark"]))
        if memory is None:
            _say(link)
            return
        memory.busy += 1
        try:
            await _send(link, memory)
        finally:
            memory.busy -= 1

    async def _fetch(self, address: str, kind: str, mark: StateMark) -> None:
        """Raises: OSError, TimeoutError, ValueError, LookupError, TypeError: it is not to be had there."""
        link = await asyncio.wait_for(connect(address, self.secret), _REACH)
        try:
            _say(link, do="give", kind=kind, mark=mark)
            said = json.loads((await asyncio.wait_for(_next(link), _STILL)).word)
            memories = self._memories.setdefault(Owner(kind, None, "fetched"), [])
            await self._receive(link, said, self._free(memories, _size(said), 1))
        finally:
            link.close()

    async def _receive(self, link: Link, about: dict[str, Any], room: _Memory) -> None:
        """Take what `_send` sends, after its first message. Raises: OSError, TimeoutError, the link ended or stands
        still; ValueError, it is damaged."""
        room.busy += 1
        try:
            for start in range(0, room.size, _PIECE):
                message = await asyncio.wait_for(_next(link), _STILL)
                if zlib.crc32(message.list) != message.number:
                    raise ValueError("a piece of a state is damaged")
                os.pwrite(room.handle, message.list, start)
            room.mark, room.said = mark_of(about["mark"]), str(about["said"])  # only now
        finally:
            room.busy -= 1

    def close(self) -> None:
        """Let go of everything."""
        for task in self._sending.values():
            task.cancel()
        self._hang_up()
        for _, one in self._all():
            one.close()
        self._memories = {}

    def _hang_up(self) -> None:
        for link in self._links.values():
            link.close()
        self._links = {}


async def _answered(
    order: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]], asked: dict[str, Any]
) -> dict[str, Any]:
    """What a process is answered. That this machine has no such memory, or no more of it, ends no run."""
    try:
        return await order(asked)
    except (OSError, AttributeError) as error:  # os.memfd_create is not everywhere
        return {"refused": str(error)}


def mark_of(raw: Any) -> StateMark:
    """Through JSON. Raises: TypeError, ValueError, it is none."""
    (life, back), step = raw
    return StateMark((int(life), int(back)), int(step))


def _size(about: dict[str, Any]) -> int:
    """Raises: ValueError, no state of ours has it."""
    size = int(about["size"])
    if not 0 < size < _LARGEST:
        raise ValueError(f"{size} bytes are no state")
    return size


def _made(size: int) -> int:
    """A file without a name, in memory: it is gone with the process, and no limit of /dev/shm counts for it."""
    handle = os.memfd_create("zili-state", os.MFD_CLOEXEC)
    os.ftruncate(handle, size)
    return handle


def _path(memory: _Memory) -> str:
    """By which other processes of this user on this machine open it."""
    return f"/proc/{os.getpid()}/fd/{memory.handle}"


def _say(link: Link, **thing: Any) -> None:
    link.send(Message(About.HELD, word=json.dumps(thing).encode()).packed())


async def _send(link: Link, memory: _Memory, **about: Any) -> None:
    """Send a state in pieces, each with its checksum. Raises: OSError, TimeoutError, the other end is gone or stands
    still."""
    _say(link, **about, size=memory.size, mark=memory.mark, said=memory.said)
    for start in range(0, memory.size, _PIECE):
        piece = os.pread(memory.handle, min(_PIECE, memory.size - start), start)
        link.send(Message(About.HELD, number=zlib.crc32(piece), list=piece).packed())
        await asyncio.wait_for(link.sent(), _STILL)


async def _next(link: Link) -> Message:
    raw = await link.receive()
    if raw is None:
        raise ConnectionError("the other agent is gone")
    return unpacked(raw)
