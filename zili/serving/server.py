"""Listening for HTTP, and an end that lets answers be finished."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from zili.errors import ConfigError
from zili.serving.api import Served, make_app

_SECONDS_TO_FINISH = 30


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
    say(f"{served.name}: http://{shown}:{place.getsockname()[1]}/v1, context {served.engine.context:,} tokens")
    options = uvicorn.Config(
        make_app(served), log_level="warning", timeout_graceful_shutdown=_SECONDS_TO_FINISH, server_header=False
    )
    with place:
        uvicorn.Server(options).run(sockets=[place])
