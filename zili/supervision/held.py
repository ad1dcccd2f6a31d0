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
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from zili.parallel.control.links import Link, connect
from zili.parallel.control.messages import About, Message, unpacked

_OWN, _KEPT = 3, 2
"""Memories of a process of this machine, and of another's."""
_PIECE = 4 << 20
"""Bytes sent at once: the loop goes on in between."""
_REACH = 5.0
"""Seconds for a connection to another machine's agent."""
_PARTNER = 60.0
"""Seconds for another machine to take a state. A run does not wait longer for one that does not."""
Owner = tuple[str, str]
"""A kind of state, and whose it is: a local number of this machine, or another machine's name and number."""


@dataclass
class _Memory:
    """One state, or room for one."""

    handle: int
    size: int
    step: int | None = None
    """Steps done; None: it is not whole."""
    said: str = ""
    """What its process said of it, for the one that takes it up."""
    readers: int = 0
    """Who sends it at the moment."""

    def close(self) -> None:
        os.close(self.handle)


@dataclass
class HeldStates:
    """The states that one agent has. Its methods belong to one loop of asyncio."""

    machine: str
    secret: bytes
    elsewhere: Callable[[str], Awaitable[dict[int, list[str]]]]
    """Finds out which agents, by their addresses, have states of a kind, by their steps."""
    partner: str = ""
    """Address of the agent that keeps what nobody else has; "": there is none."""
    _known: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    """What it found out in this life."""
    _memories: dict[Owner, list[_Memory]] = field(default_factory=dict)
    _sending: dict[Owner, asyncio.Task[None]] = field(default_factory=dict)
    _links: dict[Owner, Link] = field(default_factory=dict)
    """To the partner."""
    _took: dict[str, float] = field(default_factory=dict)
    """By kind, seconds that sending it on took the last time."""

    def inventory(self) -> list[tuple[str, int]]:
        """Kinds and steps of the whole states that are here."""
        return sorted({(kind, one.step) for (kind, _), one in self._all() if one.step is not None})

    def begin(self, partner: str) -> None:
        """A life begins in which `partner` keeps what no other machine has."""
        self.partner, self._known = partner, {}
        self._hang_up()

    def _all(self) -> Iterator[tuple[Owner, _Memory]]:
        return ((owner, one) for owner, memories in self._memories.items() for one in memories)

    # ---------------------------------------------------------------- what is asked

    async def take(self, link: Link, message: Message) -> None:
        """Answer a message of `About.HELD`."""
        asked = json.loads(message.word)
        orders = {
            "offer": self._offer,
            "settle": self._settle,
            "room": self._room,
            "whole": self._whole,
            "forget": self._forget,
            "find": self._find,
        }
        if asked["do"] == "give":
            await self._give(link, asked)
        elif asked["do"] == "keep":
            await self._keep(link, asked)
        else:
            answer = await orders[asked["do"]](asked)
            _say(link, **answer)

    async def _offer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The steps of which a process that begins can have its state."""
        kind = asked["kind"]
        steps = [step for known, step in self.inventory() if known == kind]
        if not steps:
            self._known[kind] = await self.elsewhere(kind)
            steps = list(self._known[kind])
        return {"steps": steps, "machine": self.machine}

    async def _room(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Room for a process's next state: its path, and how long sending the last one on took."""
        owner = (asked["kind"], f"own {asked['local']}")
        memories = self._memories.setdefault(owner, [])
        room = self._free(memories, asked["size"], _OWN)
        return {"path": _path(room), "number": memories.index(room), "took": self._took.get(asked["kind"], 0.0)}

    async def _settle(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Answer when a process's last state is where it was sent."""
        owner = (asked["kind"], f"own {asked['local']}")
        if owner in self._sending:
            await asyncio.wait([self._sending[owner]], timeout=_PARTNER)
        return {}

    def _free(self, memories: list[_Memory], size: int, most: int) -> _Memory:
        """One that is neither the newest whole one nor being sent; it is not whole from here on."""
        if len(memories) < most:
            memories.append(_Memory(_made(size), size))
            return memories[-1]
        newest = max(memories, key=lambda one: -1 if one.step is None else one.step)
        free = [one for one in memories if one is not newest and not one.readers] or [newest]
        room = min(free, key=lambda one: -1 if one.step is None else one.step)
        room.step = None
        if room.size != size:
            os.ftruncate(room.handle, size)
            room.size = size
        return room

    async def _whole(self, asked: dict[str, Any]) -> dict[str, Any]:
        """A process has written its state."""
        owner = (asked["kind"], f"own {asked['local']}")
        memory = self._memories[owner][asked["number"]]
        memory.step, memory.said = asked["step"], asked["said"]
        if asked["alone"] and self.partner and (owner not in self._sending or self._sending[owner].done()):
            self._sending[owner] = asyncio.ensure_future(self._send_on(owner, memory))
        return {}

    async def _forget(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The run goes on after `step`: later states are of a way that it did not take; other kinds are of processes
        that are no more, but for those of other machines."""
        kept = set(asked["kinds"])
        for owner, memories in tuple(self._memories.items()):
            for one in memories:
                if one.step is not None and one.step > asked["step"]:
                    one.step = None
            if owner[0] not in kept and owner[1].startswith("own"):
                for one in self._memories.pop(owner):
                    one.close()
        return {}

    async def _find(self, asked: dict[str, Any]) -> dict[str, Any]:
        """A state of a kind and step: its path, and what was said of it; fetched from another machine, if need be."""
        kind, step = asked["kind"], asked["step"]
        for address in self._known.get(kind, {}).get(step, []):
            if self._here(kind, step) is None:
                with suppress(OSError, ValueError, TimeoutError, LookupError):
                    await self._fetch(address, kind, step)
        memory = self._here(kind, step)
        return {} if memory is None else {"path": _path(memory), "said": memory.said}

    def _here(self, kind: str, step: int) -> _Memory | None:
        return next((one for owner, one in self._all() if owner[0] == kind and one.step == step), None)

    # ---------------------------------------------------------------- between machines

    async def _send_on(self, owner: Owner, memory: _Memory) -> None:
        """Have the partner keep a state too. One that is gone is no reason to stop."""
        begun = time.monotonic()
        memory.readers += 1
        try:
            async with asyncio.timeout(_PARTNER):
                if owner not in self._links:
                    self._links[owner] = await connect(self.partner, self.secret)
                link = self._links[owner]
                await _send(link, memory, do="keep", kind=owner[0], of=f"{self.machine} {owner[1]}")
                await _next(link)  # it is whole there
            self._took[owner[0]] = time.monotonic() - begun
        except (OSError, TimeoutError):
            if owner in self._links:
                self._links.pop(owner).close()
        finally:
            memory.readers -= 1

    async def _keep(self, link: Link, asked: dict[str, Any]) -> None:
        """Take a state that another machine's agent sends."""
        memories = self._memories.setdefault((asked["kind"], asked["of"]), [])
        room = self._free(memories, asked["size"], _KEPT)
        await _receive(link, asked, room)
        _say(link)

    async def _give(self, link: Link, asked: dict[str, Any]) -> None:
        memory = self._here(asked["kind"], asked["step"])
        if memory is None:
            _say(link)
            return
        memory.readers += 1
        try:
            await _send(link, memory)
        finally:
            memory.readers -= 1

    async def _fetch(self, address: str, kind: str, step: int) -> None:
        """Raises: OSError, TimeoutError, ValueError, LookupError: it is not to be had there."""
        link = await asyncio.wait_for(connect(address, self.secret), _REACH)
        try:
            link.send(
                Message(About.HELD, word=json.dumps({"do": "give", "kind": kind, "step": step}).encode()).packed()
            )
            said = json.loads((await _next(link)).word)
            memories = self._memories.setdefault((kind, f"fetched {address}"), [])
            await _receive(link, said, self._free(memories, said["size"], 1))
        finally:
            link.close()

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
    """Send a state in pieces, each with its checksum. Raises: OSError, the other end is gone."""
    _say(link, **about, size=memory.size, step=memory.step, said=memory.said)
    for start in range(0, memory.size, _PIECE):
        piece = os.pread(memory.handle, min(_PIECE, memory.size - start), start)
        link.send(Message(About.HELD, number=zlib.crc32(piece), list=piece).packed())
        await link.sent()


async def _receive(link: Link, about: dict[str, Any], room: _Memory) -> None:
    """Take what `_send` sends, after its first message. Raises: OSError, the link ended; ValueError, it is damaged."""
    for start in range(0, about["size"], _PIECE):
        message = await _next(link)
        if zlib.crc32(message.list) != message.number:
            raise ValueError("a piece of a state is damaged")
        os.pwrite(room.handle, message.list, start)
    room.step, room.said = about["step"], about["said"]  # only now


async def _next(link: Link) -> Message:
    raw = await link.receive()
    if raw is None:
        raise ConnectionError("the other agent is gone")
    return unpacked(raw)
