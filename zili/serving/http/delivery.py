"""Bringing answers to whoever waits for them: whole, or piece by piece as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.responses import StreamingResponse

from zili.errors import ConfigError
from zili.serving.generate.engine import Token
from zili.serving.http.refusal import Refusal
from zili.serving.http.streaming import Said, Stream


class Whole(NamedTuple):
    """An answer to its end."""

    text: str
    tokens: list[Token]
    finish: str


async def whole(streams: list[Stream], request: Request, seconds: float) -> list[Whole]:
    """All answers to their end. Whoever hangs up meanwhile frees the slots.

    Raises: Refusal, it took longer than `seconds`, or the answers cannot be given.
    """
    gone = asyncio.create_task(_gone(request))
    work = asyncio.create_task(_all(streams))
    # Where whoever asked has gone nobody looks at how it ended, of which asyncio would complain.
    work.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        await asyncio.wait((gone, work), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if gone.done() and not work.done():
            raise Refusal(499, "the client has gone")
        if not work.done():
            raise _too_long(seconds)
        return await work
    except Exception as error:
        raise _told(error) from error
    finally:
        gone.cancel()
        work.cancel()
        for stream in streams:
            stream.cancel()


def events(
    streams: list[Stream],
    request: Request,
    seconds: float,
    chunk: Callable[[int, Said, bool], dict[str, Any]],
    last: Callable[[], dict[str, Any]] | None,
) -> StreamingResponse:
    """Pieces as they come.

    Args:
        chunk: makes the event of a piece from the number of its stream, itself, and whether it is the first.
        last: makes one for the end.
    """

    async def written() -> AsyncIterator[str]:
        started: set[int] = set()
        # A server notices by what it cannot send, but who waits for a slot is sent nothing.
        watch = asyncio.create_task(_let_go(streams, request))
        try:
            async with aclosing(_merged(streams, seconds)) as merged:
                async for index, said in merged:
                    yield _event(chunk(index, said, index not in started))
                    started.add(index)
            if last is not None:
                yield _event(last())
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status was sent long ago
            yield _event(_told(error).body())
        finally:
            watch.cancel()
            for stream in streams:
                stream.cancel()

    # nginx keeps pieces back until it has many, unless it is asked not to.
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(written(), media_type="text/event-stream", headers=headers)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _told(error: Exception) -> Refusal:
    if isinstance(error, Refusal):
        return error
    return Refusal(400 if isinstance(error, ConfigError) else 500, str(error))


def _too_long(seconds: float) -> Refusal:
    return Refusal(504, f"the answer was not finished in {seconds:g} seconds", code="timeout")


async def _all(streams: list[Stream]) -> list[Whole]:
    return await asyncio.gather(*map(_whole, streams))


async def _whole(stream: Stream) -> Whole:
    text, tokens = [], []
    async for said in stream.pieces():
        text.append(said.text)
        tokens += said.tokens
    assert said.finish is not None
    return Whole("".join(text), tokens, said.finish)


async def _merged(streams: list[Stream], seconds: float) -> AsyncGenerator[tuple[int, Said], None]:
    """Pieces of all streams as they come, each with the number of its stream."""
    pieces: asyncio.Queue[tuple[int, Said | Exception]] = asyncio.Queue()
    end = asyncio.get_running_loop().time() + seconds

    async def pump(index: int, stream: Stream) -> None:
        try:
            async for said in stream.pieces():
                pieces.put_nowait((index, said))
        except Exception as error:
            pieces.put_nowait((index, error))

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            try:
                # Not around the loop: a timeout that ends while a piece is being sent would end the sending.
                async with asyncio.timeout_at(end):
                    index, said = await pieces.get()
            except TimeoutError as error:
                raise _too_long(seconds) from error
            if isinstance(said, Exception):
                raise said
            yield index, said
            left -= said.finish is not None
    finally:
        for task in pumps:
            task.cancel()


async def _let_go(streams: list[Stream], request: Request) -> None:
    await _gone(request)
    for stream in streams:
        stream.cancel()


async def _gone(request: Request) -> None:
    """Returns when whoever asked has hung up."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)
