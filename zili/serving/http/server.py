"""Listening for HTTP: connections that end where nobody asks or takes, and an end that lets answers be finished."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from zili.errors import ConfigError
from zili.serving.http.api import Served, make_app
from zili.serving.http.gate import Limits

_SECONDS_TO_FINISH = 30
_EVENTS_A_TURN = 256


def with_engine(served: Served) -> FastAPI:
    """The application for another server, which closes the engine when it shuts the application down."""
    app = make_app(served)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with served.engine:
            yield

    app.router.lifespan_context = lifespan
    return app


def listen(served: Served, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve until interrupted (Ctrl-C, SIGTERM); answers that have begun are finished, for half a minute at most.

    Raises:
        ConfigError: the address cannot be listened at.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    place = socket.socket(family)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
        place.listen(2048)  # who has read the address may come at once
    except OSError as error:
        place.close()
        raise ConfigError(f"{host}:{port} cannot be listened at: {error.strerror}; give another --port") from error
    shown = f"[{host}]" if family == socket.AF_INET6 else host
    # What was made by now stays: the collector need not look through it, for a tenth of a second, while others wait.
    gc.freeze()
    say(f"{served.name}: http://{shown}:{place.getsockname()[1]}/v1, context {served.engine.context:,} tokens")
    with place:
        make_server(served).run(sockets=[place])


def make_server(served: Served) -> uvicorn.Server:
    """What is run with a socket that listens."""
    return uvicorn.Server(
        uvicorn.Config(
            make_app(served),
            http=partial(_Connection, served.limits),  # type: ignore[arg-type]  # it is called, no more
            ws="none",  # nothing here speaks it
            log_level="warning",
            timeout_graceful_shutdown=_SECONDS_TO_FINISH,
            server_header=False,
        )
    )


class _Connection(H11Protocol):
    """Closes a connection whose client does not finish its request, or takes nothing of what is sent."""

    def __init__(self, limits: Limits, **given: Any) -> None:
        super().__init__(**given)
        self._limits = limits
        self._asking: asyncio.TimerHandle | None = None
        self._events = 0
        """Of h11, since the loop's others had their turn."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._next_event = self.conn.next_event
        self.conn.next_event = self._event_or_later  # type: ignore[method-assign]
        self._await_head()
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # The kernel's, since megabytes fit into its buffers before anybody here learns that they are not taken.
            milliseconds = round(self._limits.silent_seconds * 1000)
            line = transport.get_extra_info("socket")
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def data_received(self, data: bytes) -> None:
        if self._asking is None:
            self._await_head()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_awaiting()

    def handle_events(self) -> None:
        self._events = 0
        super().handle_events()

    def _event_or_later(self) -> Any:
        """What h11 reads next. A body in chunks of a byte has several turns: it would keep the loop for seconds."""
        self._events += 1
        if self._events <= _EVENTS_A_TURN:
            return self._next_event()
        if self._events == _EVENTS_A_TURN + 1:
            self.loop.call_soon(self._go_on)
        return h11.NEED_DATA

    def _go_on(self) -> None:
        if not self.transport.is_closing():
            self.handle_events()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_awaiting()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._asking = self.loop.call_later(self._limits.body_seconds, self.transport.abort)

    def _stop_awaiting(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None
