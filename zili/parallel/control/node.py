"""A machine's place in the tree through which processes agree: those below speak, and the answer goes back to all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any

from zili.parallel.control.keys import KeyValues, Reply, waits
from zili.parallel.control.links import Link, Unproven, connect
from zili.parallel.control.messages import NOBODY, About, Message, together, unpacked

FAN = 8
"""Nodes directly below one, at most: with the processes of a machine a node has a few dozen connections."""
GONE = b"G"
"""First byte of the word that a node says for a process that is gone."""
_BETWEEN = 0.05
"""Seconds between two attempts to reach the node above, which may not be there yet."""
Place = tuple[About, int]
"""A process or node directly below a node: `(About.PROCESS, rank)` or `(About.NODE, number)`."""
TurnOf = tuple[int, int]
"""Channel and number."""
Held = Callable[[Link, Message], Awaitable[None]]
"""Takes a message of states in memory, and answers on the same link."""


def above(number: int) -> int | None:
    """The node above node `number`; None: it is the first."""
    return (number - 1) // FAN if number else None


def below(number: int, count: int) -> range:
    """The nodes directly below node `number` of `count`."""
    return range(min(count, FAN * number + 1), min(count, FAN * number + FAN + 1))


class Node:
    """One machine's node, in one life of a run. Its methods belong to one loop of asyncio."""

    def __init__(
        self, number: int, ranks: Iterable[int], nodes: Iterable[int], secret: bytes, held: Held | None = None
    ) -> None:
        """`ranks`: the processes of this machine. `nodes`: the numbers of those directly below. `held` takes what comes
        of states in memory, where this machine's agent keeps some."""
        self.number = number
        self._secret = secret
        self._held_states = held
        self._lowest: dict[Place, int] = {(About.PROCESS, rank): rank for rank in ranks}
        self._own = min(self._lowest.values())
        self._lowest |= dict.fromkeys([(About.NODE, node) for node in nodes], NOBODY)  # each will say it
        self._links: dict[tuple[Place, int], Link] = {}
        self._gone: set[Place] = set()
        self._all_gone = asyncio.Event()
        self._turns: dict[TurnOf, dict[Place, Message]] = {}
        self._sent: set[TurnOf] = set()
        """TurnOf that wait for the answer of the node above."""
        self._keys = KeyValues()
        self._asked: dict[int, list[Reply]] = {}
        """Questions that went to the node above, by their numbers."""
        self._awaited: dict[bytes, int] = {}
        self._questions = 0
        self._parent: Link | None = None
        self._held: list[Message] = []
        """What is for the node above, until it is there."""
        self._server: asyncio.Server | None = None
        self._open: set[Link] = set()
        self._work: set[asyncio.Task[None]] = set()

    async def listen(self, host: str) -> int:
        """Take the processes of this machine and the nodes below, at any address of this machine where `host` is "";
        returns the port."""
        self._server = await asyncio.start_server(self._take, host, 0, backlog=256)
        return int(self._server.sockets[0].getsockname()[1])

    async def join(self, address: str, patience: float) -> None:
        """Take `address` as the node above.

        Raises:
            OSError: it is not there within `patience` seconds, or does not know the run's secret.
        """
        self._parent = await _reached(address, self._secret, patience)
        for message in (Message(About.NODE, number=self._own, rank=self.number), *self._held):
            self._parent.send(message.packed())
        self._begin(self._hear_parent(self._parent))

    async def close(self, patience: float) -> None:
        """End it when all below have left, at the latest after `patience` seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._all_gone.wait(), patience)
        if self._server is not None:
            self._server.close()
        for task in tuple(self._work):
            task.cancel()
        for link in (*self._open, *filter(None, [self._parent])):
            await link.closed()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._work.add(task)  # the loop itself holds no reference
        task.add_done_callback(self._work.discard)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link, place = Link(reader, writer), None
        self._open.add(link)
        try:
            await link.prove(self._secret, above=True)
            while (raw := await link.receive()) is not None:
                message = unpacked(raw)
                if message.kind is About.HELD and self._held_states is not None:
                    await self._held_states(link, message)
                elif message.kind in (About.PROCESS, About.NODE) and place is None:
                    place = self._welcome(link, message)
                else:
                    self._hear(place, link, message)
        except (OSError, ValueError):
            pass  # a stranger, or garbage: its link ends, and with it whoever it said to be
        finally:
            self._open.discard(link)
            link.close()
            if place is not None:
                self._lose(place)

    def _welcome(self, link: Link, hello: Message) -> Place:
        place = (hello.kind, hello.rank)
        if place not in self._lowest or place in self._gone or (place, hello.channel) in self._links:
            raise ValueError(f"{place} is not one that is still to come")
        self._links[place, hello.channel] = link
        if hello.kind is About.NODE:
            self._lowest[place] = hello.number
        return place

    def _hear(self, place: Place | None, link: Link, message: Message) -> None:
        if message.kind is About.TURN and place is not None:
            turn = (message.channel, message.number)
            self._turns.setdefault(turn, {})[place] = message
            self._conclude(turn)
        elif message.kind is About.STORE:
            self._ask(message, lambda value: link.send(message._replace(word=b"", list=value).packed()))
        else:
            raise ValueError(f"{message.kind!r} has no place here")

    def _lose(self, place: Place) -> None:
        self._gone.add(place)
        for turn in tuple(self._turns):
            self._conclude(turn)
        if self._gone >= self._lowest.keys():
            self._all_gone.set()

    def _conclude(self, turn: TurnOf) -> None:
        """When all below have spoken or are gone: pass on what they said, or answer."""
        heard = self._turns[turn]
        if turn in self._sent or not heard.keys() | self._gone >= self._lowest.keys():
            return
        self._sent.add(turn)
        said = together([*heard.values(), *(self._epitaph(turn, place) for place in self._gone - heard.keys())])
        if self.number == 0:
            self._answer(said)
        else:
            self._send_up(said)

    def _send_up(self, message: Message) -> None:
        if self._parent is None:
            self._held.append(message)
        else:
            self._parent.send(message.packed())

    def _epitaph(self, turn: TurnOf, place: Place) -> Message:
        kind, rank = place[0], self._lowest[place]
        who = f"process {rank}" if kind is About.PROCESS else f"the machine of process {rank}"
        return Message(About.TURN, *turn, spoke=1, rank=rank, word=GONE + f"{who} is gone".encode())

    def _answer(self, said: Message) -> None:
        short, turn = said._replace(list=b"").packed(), (said.channel, said.number)
        self._sent.discard(turn)
        for place in self._turns.pop(turn):
            link = self._links[place, said.channel if place[0] is About.PROCESS else 0]
            link.send(said.packed() if place == (About.PROCESS, 0) else short)

    async def _hear_parent(self, link: Link) -> None:
        try:
            while (raw := await link.receive()) is not None:
                self._take_answer(unpacked(raw))
        finally:
            for open_link in tuple(self._open):  # nothing can be agreed on any more, and all below are to know
                open_link.close()

    def _take_answer(self, message: Message) -> None:
        if message.kind is About.TURN:
            self._answer(message)
            return
        self._awaited = {word: number for word, number in self._awaited.items() if number != message.number}
        for reply in self._asked.pop(message.number):
            reply(message.list)

    def _ask(self, message: Message, reply: Reply) -> None:
        if self.number == 0:
            self._keys.ask(message.word, message.list, reply)
            return
        # Of those who wait for the same, one question goes up.
        shared = waits(message.word)
        number = self._awaited.get(message.word) if shared else None
        if number is not None:
            self._asked[number].append(reply)
            return
        self._questions += 1
        self._asked[self._questions] = [reply]
        if shared:
            self._awaited[message.word] = self._questions
        self._send_up(message._replace(number=self._questions))


async def _reached(address: str, secret: bytes, patience: float) -> Link:
    end = asyncio.get_running_loop().time() + patience
    while True:
        try:
            return await connect(address, secret)
        except Unproven:
            raise
        except OSError:
            if asyncio.get_running_loop().time() > end:
                raise
        await asyncio.sleep(_BETWEEN)
