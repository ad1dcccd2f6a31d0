"""What a process has asked of its collectives, told to its machine's agent when the run hangs.

torch records each collective of every group, for Gloo too, and a thread of C++ answers for it: also where Python's lock
is held by a call that does not return.
"""

from __future__ import annotations

import os
from typing import Any

RECORDER = "ZILI_RECORDER"
"""Variable in which `zili launch` names the socket at which a worker answers its agent."""
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

            _server = WorkerServer(path)
        except (ImportError, RuntimeError):
            return
