"""Bodies of requests are read, and answers written, aside of the event loop, which serves everyone else meanwhile."""

from __future__ import annotations

import asyncio
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, get_type_hints

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json, to_json

from zili.serving.http.refusal import Refusal

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
