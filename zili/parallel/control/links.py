"""Connections that carry messages whole, between ends that prove to each other that they know the run's secret."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import socket
import struct
from contextlib import suppress

LARGEST = 1 << 27
"""Bytes of one message. A save of ten thousand processes gathers a few MB; what claims to be larger is garbage."""
PATIENCE = 10.0
"""Seconds in which the other end has to say who it is."""
_LENGTH = struct.Struct("!I")
_NONCE = 32
_BELOW, _ABOVE = b"below", b"above"
_QUIET = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 5))
"""When a connection counts as lost on which nothing comes any more: 20 s, where the system's own would be two hours."""


class Unproven(ConnectionError):
    """The other end does not know the run's secret, or is nothing of ours."""


def _proof(secret: bytes, nonce: bytes, end: bytes) -> bytes:
    return hmac.digest(secret, end + nonce, hashlib.sha256)


class Link:
    """One end of a connection, for a loop of asyncio."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        quick(writer.get_extra_info("socket"))

    def send(self, message: bytes) -> None:
        """Put a message on its way. To an end that is gone it is lost, which the next `receive` tells."""
        if not self._writer.is_closing():
            self._writer.write(_LENGTH.pack(len(message)) + message)

    async def sent(self) -> None:
        """Wait until most of what was sent is on its way: who sends much would fill the memory.

        Raises:
            OSError: the other end is gone.
        """
        await self._writer.drain()

    async def receive(self, largest: int = LARGEST) -> bytes | None:
        """The next message; None when the other end is gone, or sends what no end of ours would."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            return await self._reader.readexactly(length) if length <= largest else None
        except (OSError, asyncio.IncompleteReadError):
            return None

    def close(self) -> None:
        with suppress(RuntimeError):  # the loop may have ended
            self._writer.close()

    async def closed(self) -> None:
        """Close, after what is on its way has left."""
        self.close()
        with suppress(OSError, TimeoutError):
            await asyncio.wait_for(self._writer.wait_closed(), PATIENCE)

    async def prove(self, secret: bytes, *, above: bool) -> None:
        """Both ends call it first, one of them as the one that is `above`.

        Raises:
            Unproven: the other end does not know `secret`, or does not say so within `PATIENCE`.
        """
        own, end, other = secrets.token_bytes(_NONCE), *((_ABOVE, _BELOW) if above else (_BELOW, _ABOVE))
        self.send(own)
        try:
            async with asyncio.timeout(PATIENCE):
                nonce = await self.receive(_NONCE)  # of a stranger, not more is taken than a proof has
                if nonce is None:
                    raise Unproven("the other end is gone, or nothing of ours")
                self.send(_proof(secret, nonce, end))
                said = await self.receive(_NONCE) or b""
        except TimeoutError as error:
            raise Unproven("the other end says nothing") from error
        if not hmac.compare_digest(said, _proof(secret, own, other)):
            raise Unproven("the other end does not know the run's secret")


class PlainLink:
    """The end below of a connection, for a process that waits for each answer."""

    def __init__(self, address: str, secret: bytes) -> None:
        """`address`: `HOST:PORT`.

        Raises:
            OSError: nobody listens there, or `Unproven`.
        """
        self._socket = socket.create_connection(_host_and_port(address), PATIENCE)
        quick(self._socket)
        own = secrets.token_bytes(_NONCE)
        self._socket.settimeout(PATIENCE)
        self.send(own)
        self.send(_proof(secret, self.receive(), _BELOW))
        if not hmac.compare_digest(self.receive(), _proof(secret, own, _ABOVE)):
            raise Unproven(f"{address} does not know the run's secret")

    def send(self, message: bytes) -> None:
        self._socket.sendall(_LENGTH.pack(len(message)) + message)

    def receive(self, patience: float | None = PATIENCE) -> bytes:
        """The next message.

        Raises:
            TimeoutError: none within `patience` seconds.
            ConnectionError: the other end is gone.
        """
        self._socket.settimeout(patience)
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > LARGEST:
            raise Unproven(f"a message of {length} bytes is none of ours")
        return self._exactly(length)

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, count: int) -> bytes:
        got = bytearray()
        while len(got) < count:
            piece = self._socket.recv(min(count - len(got), 1 << 20))
            if not piece:
                raise ConnectionError("the other end is gone")
            got += piece
        return bytes(got)


async def connect(address: str, secret: bytes) -> Link:
    """Reach `address`, `HOST:PORT`, as the end below.

    Raises:
        OSError: nobody listens there, or `Unproven`.
    """
    link = Link(*await asyncio.open_connection(*_host_and_port(address)))
    try:
        await link.prove(secret, above=False)
    except BaseException:
        link.close()
        raise
    return link


def quick(link: socket.socket) -> None:
    """Send small messages at once, and notice within seconds that the other machine is gone."""
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _QUIET:
        if hasattr(socket, option):  # macOS lacks one
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def address_of(host: str, port: int) -> str:
    """As `connect` takes it; an address of IPv6 has colons of its own."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listening_at(host: str, port: int = 0, backlog: int | None = None) -> socket.socket:
    """A socket that listens at a name or address of this machine.

    Raises:
        OSError: it is none, or the port is taken.
    """
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, port), family=family, backlog=backlog)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
