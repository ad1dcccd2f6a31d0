"""What every request passes before it reaches its route: host and key, a body of some size in some time, its fields.

Bodies are read, and answers written, aside of the event loop, which serves everyone else meanwhile.
"""

from __future__ import annotations

import asyncio
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, TypeVar, get_type_hints

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json, to_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zili.serving.http.keys import Keys, TooMuch
from zili.serving.http.refusal import Refusal, busy

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)

_LARGE = 1 << 16
"""Bytes of a body that is worked on by itself, so that smaller ones do not wait for it."""
_MOST_PARTS = 1 << 16
"""Lists, objects and their keys in a body. Parsing holds Python's lock: so many take 30 ms, what fits into 4 MB 500."""
_MOST_ITEMS = (1 << 20) + _MOST_PARTS
"""Of all lists: a million ids, which no longer context holds, and others."""
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
"""A text in JSON. It is found in any body, also in one that is none, so that nothing is looked at twice."""
_PIECE = 256
_DEEPEST = 16
"""Keys that an error names."""
_OPEN = ("/health", "/metrics", "/openapi.json", "/", "/page")
"""Paths that need no key."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server, so that nobody can take all of it."""

    body_bytes: int = 4 << 20
    bodies_bytes: int = 256 << 20
    """Bytes of all bodies at once, also of those that wait for an answer; a body counts up to twice."""
    body_seconds: float = 30
    """A request's head, and then its body, must have come in whole by then."""
    waiting: int = 256
    """Answers that wait for a slot; further ones are refused."""
    answer_seconds: float = 600
    """An answer must be finished by then, its waiting included."""
    log_probabilities: int = 1 << 21
    """Log-probabilities that all answers may have at once, of tokens and of likely others: about 100 bytes each."""
    silent_seconds: float = 60
    """On Linux, a connection is closed whose client takes next to nothing of what is sent for so long."""


class Budget:
    """So much of something that requests may take together. For one thread."""

    def __init__(self, most: int) -> None:
        self.most = self._left = most

    def take(self, amount: int, held: ExitStack) -> bool:
        """Whether there is so much left. It is given back when `held` ends."""
        if amount > self._left:
            return False
        self._left -= amount
        held.callback(self._give_back, amount)
        return True

    def _give_back(self, amount: int) -> None:
        self._left += amount


_LEAST = 1024
"""Bytes that any body counts for."""
_CLOSE = {"Connection": "close"}
"""The rest of a body that is refused is not read."""
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
        """Checks the host of a client that came from this machine and needs no key.

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
        told = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        self._check_size(int(told))
        body, taken = bytearray(), 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while (message := await receive())["type"] != "http.disconnect":
                    body += message.get("body", b"")
                    self._check_size(len(body))
                    taken = self._take_room(len(body), taken, held)
                    if not message.get("more_body", False):
                        return bytes(body)
                return None
        except TimeoutError as error:
            seconds = f"{self._limits.body_seconds:g}"
            raise Refusal(408, f"the body did not come in {seconds} seconds", headers=_CLOSE) from error

    def _check_size(self, size: int) -> None:
        if size > (most := self._limits.body_bytes):
            message = f"the body has more than {most:,} bytes"
            raise Refusal(413, message, code="request_too_large", headers=_CLOSE)

    def _take_room(self, size: int, taken: int, held: ExitStack) -> int:
        """How much is taken for a body of which `size` bytes have come, after `taken` was."""
        while taken < size:
            step = max(_LEAST, taken)  # twice as much each time: a body may come byte by byte
            if not self._bodies.take(step, held):
                raise busy(f"bodies of requests take {self._bodies.most:,} bytes already", **_CLOSE)
            taken += step
        return taken


class Intake:
    """Threads for what takes long; work in them must let go of Python's lock."""

    def __init__(self) -> None:
        self._quick = ThreadPoolExecutor(2, "zili-intake")
        self._slow = ThreadPoolExecutor(1, "zili-intake-large")

    async def aside(self, size: int, work: Callable[..., T], *given: Any) -> T:
        """What `work(*given)` returns, for a body of `size` bytes."""
        pool = self._slow if size > _LARGE else self._quick
        return await asyncio.get_running_loop().run_in_executor(pool, work, *given)

    async def read(self, request: Request, model: type[Model]) -> Model:
        """What is asked; `request.state.size` are the body's bytes afterwards.

        Raises: Refusal, it is no JSON, or not what the model says.
        """
        kind = request.headers.get("content-type", "")
        subtype = kind.partition(";")[0].strip().lower()
        if not subtype.startswith("application/") or not subtype.endswith(("/json", "+json")):
            # Whatever page a browser shows may send other types anywhere, unasked.
            raise Refusal(400, f"the Content-Type is {kind[:80]!r}; application/json is read")
        if (coding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
            raise Refusal(400, f"the Content-Encoding is {coding[:80]!r}; bodies are read as they are")
        body = await request.body()
        request.state.size = len(body)
        return await self.aside(len(body), parsed, body, model)


class Aside(APIRoute):
    """A route whose handler takes `asked`, a model of the body, and `request`, and returns what is written as JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """By the threads of `app.state.intake`."""
        model = get_type_hints(self.endpoint).get("asked")
        if model is None:
            return super().get_route_handler()

        async def handle(request: Request) -> Response:
            intake: Intake = request.app.state.intake
            asked = await intake.read(request, model)
            answer = await self.endpoint(asked, request)
            if isinstance(answer, Response):
                return answer
            body = await intake.aside(request.state.size, _whole, answer)
            return Response(body, media_type="application/json")

        return handle


def parsed(body: bytes, model: type[Model]) -> Model:
    """A body as `model` has it.

    Raises: Refusal.
    """
    _check_size(body)
    try:
        value = from_json(body.removeprefix(BOM_UTF8), allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(400, f"the body is no JSON that can be read: {error}") from error
    try:
        return model.model_validate(value)
    except ValidationError as error:
        # Where a field may be one of several things, what came closest.
        found = max(error.errors(include_url=False, include_context=False, include_input=False), key=_depth)
        place, message = ".".join(_place(found, value)), found["msg"].removeprefix("Value error, ")
        if not place and (name := message.partition(":")[0]) in model.model_fields:  # of two fields together
            raise Refusal(400, message, param=name) from error
        raise Refusal(400, f"{place}: {message}" if place else message, param=place or None) from error


def _check_size(body: bytes) -> None:
    if _parts(body) <= _MOST_PARTS and body.count(b",") <= _MOST_ITEMS:
        return
    bare = _TEXT.sub(b"", body)
    if _parts(bare) > _MOST_PARTS:
        raise Refusal(400, f"the body has more than {_MOST_PARTS:,} lists, objects and keys")
    if bare.count(b",") > _MOST_ITEMS:
        raise Refusal(400, f"the body has more than {_MOST_ITEMS:,} items")


def _place(error: ErrorDetails, value: Any) -> Iterator[str]:
    """Keys and numbers that lead to what is wrong; among them pydantic has others, of what it might be."""
    for part in error["loc"][:_DEEPEST]:
        there = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if there:
            value = value[part]
        if there or (error["type"] == "missing" and part == error["loc"][-1]):
            yield str(part)[:80]


def _depth(error: ErrorDetails) -> int:
    return len(error["loc"])


def _parts(body: bytes) -> int:
    return sum(map(body.count, (b"[", b"{", b":")))


def _whole(answer: Any) -> bytes:
    return b"".join(written(answer))


def written(value: Any) -> Iterator[bytes]:
    """JSON in pieces, none of which takes long: what writes it holds Python's lock. An iterator is a list."""
    if isinstance(value, dict):
        for number, (key, inner) in enumerate(value.items()):
            yield (b"," if number else b"{") + to_json(key) + b":"
            yield from written(inner)
        yield b"}" if value else b"{}"
    elif isinstance(value, list) and len(value) > _PIECE:
        for start in range(0, len(value), _PIECE):
            yield (b"," if start else b"[") + to_json(value[start : start + _PIECE], inf_nan_mode="null")[1:-1]
        yield b"]"
    elif isinstance(value, list | Iterator):
        yield b"["
        for number, inner in enumerate(value):
            yield b"," if number else b""
            yield from written(inner)
        yield b"]"
    else:
        yield to_json(value, inf_nan_mode="null")
