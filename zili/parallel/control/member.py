"""A process's end of the control messages, and how the processes of a run find their nodes."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import threading
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from zili.errors import PeerError
from zili.parallel.control.links import PlainLink
from zili.parallel.control.messages import NOBODY, About, Message, entries, entry, unpacked
from zili.parallel.control.node import GONE, Node, above, below

if TYPE_CHECKING:
    from torch.distributed import Store

Result = TypeVar("Result")
AGENT, AGENT_SECRET = "ZILI_AGENT", "ZILI_AGENT_SECRET"
"""Variables in which `zili launch` gives its processes the address of their machine's node, and the run's secret."""
HELD_BYTES = "ZILI_HELD_BYTES"
"""Variable in which it says what states in memory take on this machine when a life begins."""
GENERATION = "ZILI_GENERATION"
"""Variable in which it gives them the number of their life."""
GENERATION_FILE = "supervision/generation"
"""File of a run that has the number of its newest life. A process of an older one writes no checkpoint any more."""
PATIENCE = 1800.0
"""Seconds that a process waits for the others in one turn, as in a collective."""
_LOOPBACK = "127.0.0.1"


class Control:
    """How one process speaks with all others of its run: in turns, which all of them take in the same order."""

    def __init__(self, address: str, secret: bytes, rank: int, hosted: Hosted | None = None) -> None:
        """`address`: the machine's node. `hosted`: that node, where this process has it."""
        self._address = address
        self._secret = secret
        self._rank = rank
        self._hosted = hosted
        self._links: dict[int, PlainLink] = {}
        self._turns: dict[int, int] = {}

    def turn(
        self,
        word: bytes | None = None,
        value: bytes | None = None,
        *,
        channel: int = 0,
        patience: float | None = PATIENCE,
    ) -> Heard:
        """Say a `word`, or nothing, and hear the first one that was said; send a `value` to the first process.

        `channel`: turns of threads beside one another must not meet. `patience`: seconds; None: without end.

        Raises:
            PeerError: a process is gone, or has not come within `patience`.
        """
        said = Message(
            About.TURN,
            channel,
            self._turns.get(channel, 0),
            spoke=int(word is not None),
            rank=NOBODY if word is None else self._rank,
            word=word or b"",
            list=b"" if value is None else entry(self._rank, value),
        )
        self._turns[channel] = said.number + 1
        try:
            link = self._link(channel)
            link.send(said.packed())
            heard = unpacked(link.receive(patience))
        except TimeoutError as error:
            raise PeerError(f"not all processes came to a control message within {patience:,.0f} s") from error
        except OSError as error:
            raise PeerError(f"the control messages of this machine have ended ({error})") from error
        if heard.word.startswith(GONE) and heard.rank != NOBODY:
            raise PeerError(f"{heard.word[1:].decode()}; it may have said why")
        return Heard(heard.spoke, heard.rank, heard.word, entries(heard.list))

    def _link(self, channel: int) -> PlainLink:
        if channel not in self._links:
            self._links[channel] = link = PlainLink(self._address, self._secret)
            link.send(Message(About.PROCESS, channel, rank=self._rank).packed())
        return self._links[channel]

    def close(self, patience: float) -> None:
        """Leave. A process that has the machine's node keeps it until the others have left, for `patience` seconds."""
        for link in self._links.values():
            link.close()
        if self._hosted is not None:
            self._hosted.close(patience)


class Heard(NamedTuple):
    """What a process hears in a turn."""

    spoke: int
    """How many processes said a word."""
    rank: int
    """The first of them; `NOBODY`."""
    word: bytes
    """What that one said."""
    values: list[bytes]
    """By rank, the values of those that sent one; on the first process, elsewhere empty."""


class Hosted:
    """A node in a thread of this process, where no agent has one."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="zili-control", daemon=True).start()

    def listen(self, host: str) -> int:
        """`Node.listen`."""
        return self._do(self._node.listen(host))

    def join(self, address: str) -> None:
        """`Node.join`."""
        self._do(self._node.join(address, PATIENCE))

    def close(self, patience: float) -> None:
        """`Node.close`."""
        self._do(self._node.close(patience))
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _do(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def meet(store: Store, rank: int, size: int) -> Control:
    """The control messages of `size` processes that have a store and no agents: the first process of each machine gets
    its node. All of them call it.

    Raises:
        OSError: a node cannot be reached.
    """
    machine, machines, ranks = _place(rank, size)
    hosted = _hosted(store, machine, machines, ranks) if rank == ranks[0] else None
    address = json.loads(store.get(f"control/{machine}"))["here"]
    return Control(address, bytes.fromhex(store.get("control/secret").decode()), rank, hosted)


def _hosted(store: Store, machine: int, machines: int, ranks: range) -> Hosted:
    """This machine's node; the store says where it is."""
    if machine == 0:
        store.set("control/secret", secrets.token_hex())
    secret = bytes.fromhex(store.get("control/secret").decode())
    hosted = Hosted(Node(machine, ranks, below(machine, machines), secret))
    host, bound = _own_host(machine) if machines > 1 else (_LOOPBACK, _LOOPBACK)
    port = hosted.listen(bound)
    store.set(f"control/{machine}", json.dumps({"here": f"{bound or _LOOPBACK}:{port}", "address": f"{host}:{port}"}))
    parent = above(machine)
    if parent is not None:
        hosted.join(json.loads(store.get(f"control/{parent}"))["address"])
    return hosted


def _place(rank: int, size: int) -> tuple[int, int, range]:
    """This process's machine, how many there are, and the ranks of its processes, as torchrun has told us. Where it has
    not, each process counts as a machine."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0")) if here > 1 else 0
    machine = int(os.environ.get("GROUP_RANK", rank // here))
    machines = int(os.environ.get("GROUP_WORLD_SIZE", -(-size // here)))
    return machine, machines, range(rank - local, rank - local + here)


def _own_host(machine: int) -> tuple[str, str]:
    """How other machines reach this one, and where it listens."""
    name, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with socket.create_connection((name, port)) as link:
        own = link.getsockname()[0]
    if machine:
        return own, own
    # The others reach the first machine by this name, which to itself may mean loopback (/etc/hosts).
    named_loopback = own.startswith("127.") and name not in (own, "localhost")
    return name, "" if named_loopback else own
