"""What the links between processes and nodes carry."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

_HEAD = struct.Struct("!BBIIiI")
_ENTRY = struct.Struct("!iI")
NOBODY = -1


class About(IntEnum):
    """What a message is about."""

    PROCESS = 0
    """The first on a link: the process of this rank speaks on it, for this channel."""
    NODE = 1
    """The first on a link: the node of this number speaks on it, for all below it."""
    TURN = 2
    """What a process, or all below a node, say in a turn; or the answer to all of them."""
    STORE = 3
    """A question to the store of the run (`word`, `list`), or its answer (`list`)."""
    HELD = 4
    """Of states in memory: a question to the machine's agent or its answer (`word`), or a piece of one (`list`)."""


class Message(NamedTuple):
    """One message. Which fields matter depends on its kind."""

    kind: About
    channel: int = 0
    """Turns of one channel follow one another; a save in the background has a channel of its own."""
    number: int = 0
    """Which turn of the channel; or which question on this link."""
    spoke: int = 0
    """How many processes said a word."""
    rank: int = NOBODY
    """The first of those that did."""
    word: bytes = b""
    """What that one said: all processes get it."""
    list: bytes = b""
    """An `entry` of each process that has one: the first process gets them all."""

    def packed(self) -> bytes:
        head = _HEAD.pack(self.kind, self.channel, self.number, self.spoke, self.rank, len(self.word))
        return head + self.word + self.list


def unpacked(raw: bytes) -> Message:
    """The reverse of `Message.packed`.

    Raises:
        ValueError: it is none.
    """
    try:
        kind, channel, number, spoke, rank, size = _HEAD.unpack_from(raw)
    except struct.error as error:
        raise ValueError(f"{len(raw)} bytes are no message") from error
    body = raw[_HEAD.size :]
    return Message(About(kind), channel, number, spoke, rank, body[:size], body[size:])


def together(said: list[Message]) -> Message:
    """What several say in one turn, as one message: the word of the lowest rank, and all entries."""
    speakers = [one for one in said if one.rank != NOBODY]
    first = min(speakers, key=lambda one: one.rank, default=said[0])
    entries = b"".join(one.list for one in said)
    return first._replace(spoke=sum(one.spoke for one in said), list=entries)


def entry(rank: int, value: bytes) -> bytes:
    """One process's part of a `Message.list`."""
    return _ENTRY.pack(rank, len(value)) + value


def entries(raw: bytes) -> list[bytes]:
    """The values in a `Message.list`, that of the lowest rank first."""
    found, at = [], 0
    while at < len(raw):
        rank, size = _ENTRY.unpack_from(raw, at)
        at += _ENTRY.size + size
        found.append((rank, raw[at - size : at]))
    return [value for _, value in sorted(found)]
