"""What is asked of every request before it reaches a route: a key, a body of some size, in some time."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zili.serving.http.budget import Budget
from zili.serving.http.keys import Keys, TooMuch
from zili.serving.http.refusal import Refusal, busy

_OPEN = ("/health", "/metrics", "/openapi.json", "/", "/page")
"""Paths that need no key."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server, so that nobody can take all of it."""

    body_bytes: int = 4 << 20
    bodies_bytes: int = 256 << 20
    """Of all bodies at once, those that wait for an answer included; each takes up to twice its size of it."""
    body_seconds: float = 30
    """A request's head, and then its body, must have come in whole by then."""
    waiting: int = 256
    """Answers that wait for a slot; further ones are refused."""
    answer_seconds: float = 600
    """An answer must be finished by then, its waiting included."""
    log_probabilities: int = 1 << 21
    """That all answers may have at once, each token its own and those of likely others: about 100 bytes each."""
    silent_seconds: float = 60
    """Who takes next to nothing of what is sent for so long is hung up on, where the system can tell: Linux."""


_LEAST = 1024
"""Bytes that any body counts for."""
_PORT = re.compile(rb":\d{0,5}\Z")


def _is_address(name: str) -> bool:
    try:
        return bool(ip_address(name))
    except ValueError:
        return False


def _is_loopback(name: str) -> bool:
    if not _is_address(name):
        return False
    address = ip_address(name)
    return (
        getattr(address, "ipv4_mapped", None) or address
    ).is_loopback  # a socket of both kinds says ::ffff:127.0.0.1


def too_much(error: TooMuch) -> Refusal:
    """As it is told."""
    return Refusal(429, str(error), code="rate_limit_exceeded", headers={"Retry-After": str(error.retry_after)})


def _replayed(body: bytes, receive: Receive) -> Receive:
    """As if it had not been read."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return left.pop() if left else await receive()

    return replay


class Gate:
    """An ASGI application before another."""

    def __init__(self, app: ASGIApp, keys: Keys, limits: Limits, hosts: Sequence[str] = ()) -> None:
        """`hosts`: names by which whoever needs no key may ask on this machine, besides its own."""
        self._app, self._keys, self._limits = app, keys, limits
        self._hosts = {name.rstrip(".").lower() for name in hosts}
        self._bodies = Budget(limits.bodies_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with ExitStack() as held:  # what is given back once all is answered
            scope.setdefault("state", {})["held"] = held
            try:
                self._check_host(scope)
                self._check_key(scope)
                body = await self._body(scope, receive, held)
            except Refusal as error:
                await error.response()(scope, receive, send)
                return
            if body is not None:
                await self._app(scope, _replayed(body, receive), send)

    def _check_host(self, scope: Scope) -> None:
        """Of who came from this machine and needs no key.

        A page of any site may have its name lead to 127.0.0.1 (DNS rebinding), and its script then asks as if it were
        this server's own page. Its name stays in the header: an address, or localhost, is nobody's to rebind.
        """
        here = scope.get("server") or ("", None)
        given = next((value for name, value in scope["headers"] if name == b"host"), b"")
        if self._keys.holders or not _is_loopback(here[0]) or not given:  # without one it is no browser
            return
        name = given.decode("latin-1").rpartition(":")[0] if _PORT.search(given) else given.decode("latin-1")
        name = name.rstrip(".").lower()
        ours = name == "localhost" or name.endswith(".localhost") or name in self._hosts
        if not ours and not _is_address(name.strip("[]")):
            raise Refusal(
                403,
                f"the Host is {name[:100]!r}, and who asks without a key on this machine says localhost or an address; "
                "start the server with --allow-host NAME, or --keys, to be asked by another name",
                code="unknown_host",
            )

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"]
        if not self._keys.holders or path in _OPEN or path.startswith("/page/"):
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        holder = self._keys.find(given.decode("latin-1").removeprefix("Bearer "))
        if holder is None:
            message = "the key is not known; send it as Authorization: Bearer KEY"
            raise Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        try:
            holder.ask()
        except TooMuch as error:
            raise too_much(error) from error
        scope.setdefault("state", {})["holder"] = holder

    async def _body(self, scope: Scope, receive: Receive, held: ExitStack) -> bytes | None:
        """All of it; None where whoever asked has gone."""
        most = self._limits.body_bytes
        told = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        too_much = Refusal(413, f"the body has more than {most:,} bytes", code="request_too_large")
        too_much.headers = {"Connection": "close"}  # the rest of it is not read
        if int(told) > most:
            raise too_much
        body, taken = bytearray(), 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_much
                    while taken < len(body):
                        step = max(_LEAST, taken)  # twice as much each time: a body may come byte by byte
                        if not self._bodies.take(step, held):
                            raise busy(
                                f"bodies of requests take {self._bodies.most:,} bytes already", Connection="close"
                            )
                        taken += step
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            seconds = f"{self._limits.body_seconds:g}"
            raise Refusal(
                408, f"the body did not come in {seconds} seconds", headers={"Connection": "close"}
            ) from error
