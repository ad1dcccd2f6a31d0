"""What a process has asked of its collectives, told to its machine's agent when the run hangs.

torch records each collective of every group, for Gloo too, and a thread of C++ answers for it: also where Python's lock
is held by a call that does not return.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RECORDER = "ZILI_RECORDER"
"""Variable in which `zili launch` names the socket at which a worker answers its agent."""
_LONGEST = 104
"""Bytes that macOS has for a socket's name; Linux has 108."""
_server: Any = None
"""It answers for as long as somebody holds it."""


def answer_for_collectives() -> None:
    """Answer at the socket that `RECORDER` names; nothing where there is none. A torch without this costs only that a
    hang is explained by stacks alone."""
    global _server  # noqa: PLW0603 - as there is one process
    path = os.environ.get(RECORDER)
    if path and _server is None:
        try:
            from zili.torch_private import WorkerServer

            with socket_name(Path(path)) as name:
                _server = WorkerServer(name)
        except (ImportError, RuntimeError, OSError):
            return


@contextmanager
def socket_name(path: Path) -> Iterator[str]:
    """A name for the socket at `path`, whose folder may lie deep: a system has little room for it."""
    if len(os.fsencode(path)) < _LONGEST:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
