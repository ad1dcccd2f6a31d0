"""Forms are compiled, and their masks made, in processes of their own.

What a form costs is not seen from it: a short expression may take minutes, or gigabytes, at some token of an answer.
So one process knows the vocabulary, and forks another for each form, which the kernel ends when it has had its share.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zili.errors import ConfigError

if TYPE_CHECKING:
    import xgrammar

COMPILING_SECONDS, MASK_SECONDS = 5.0, 0.25
"""Time of a CPU for a form, and for what may come after one token of an answer."""
MEMORY = 512 << 20
"""Bytes beyond those of the process that is forked."""
LONGEST = 65_536
"""Characters of a form."""
OPEN, ACCEPT, CLOSE = range(3)
ORDER = struct.Struct("<BII")
"""What is to be done, for which answer, and with which token."""
MADE, FREE, MASK, FAILED = range(4)
REPLY = struct.Struct("<BI")
"""What it is, and for which answer; a mask's bits or an error's words follow."""
_SLOW = 0.05


def main(descriptor: int) -> None:
    """Take a vocabulary, and then a socket for each form, of which a child takes care, until the other end is gone."""
    import zili.serving.http.protocol  # noqa: F401  (what children use is there before they are)

    with socket.socket(fileno=descriptor) as home:
        line = Connection(os.dup(home.fileno()))
        info, stop_ids = _vocabulary(json.loads(line.recv_bytes()))
        line.close()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
        gc.collect()
        gc.freeze()
        while True:
            byte, sockets, *_ = socket.recv_fds(home, 1, 1)
            if not byte:
                return
            if os.fork() == 0:
                home.close()
                with suppress(EOFError, OSError):
                    _one_form(Connection(sockets[0]), info, stop_ids)
                os._exit(0)
            os.close(sockets[0])


def _vocabulary(given: dict[str, Any]) -> tuple[xgrammar.TokenizerInfo, list[int]]:
    import xgrammar

    kind = xgrammar.VocabType[given["kind"]]
    return xgrammar.TokenizerInfo(given["texts"], kind, stop_token_ids=given["stop_ids"]), given["stop_ids"]


def _one_form(line: Connection, info: xgrammar.TokenizerInfo, stop_ids: list[int]) -> None:
    """Compile the form that comes first, then tell what may come next in each answer, until the other end is gone."""
    _limit_memory()
    asked = json.loads(line.recv_bytes())
    try:
        with _seconds(COMPILING_SECONDS):
            compiled = _compiled(asked, info)
    except Exception as error:  # whatever its C++ finds
        line.send_bytes(REPLY.pack(FAILED, 0) + _first_line(error).encode(errors="replace"))
        return
    line.send_bytes(REPLY.pack(MADE, 0))
    answers = _Answers(compiled, stop_ids)
    while True:
        order, number, token = ORDER.unpack(line.recv_bytes())
        if order == CLOSE:
            answers.close(number)
            continue
        with _seconds(MASK_SECONDS):
            said = answers.reply(order, number, token)
        line.send_bytes(said)


class _Answers:
    """Answers that are held to one form, by their numbers."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, stop_ids: list[int]) -> None:
        import xgrammar

        self._matcher = partial(xgrammar.GrammarMatcher, compiled, override_stop_tokens=stop_ids)
        self._bits = xgrammar.allocate_token_bitmask(1, compiled.tokenizer_info.vocab_size)
        self._matchers: dict[int, xgrammar.GrammarMatcher] = {}

    def reply(self, order: int, number: int, token: int) -> bytes:
        """What may come next in an answer that begins, or that has had a token."""
        try:
            if order == OPEN:
                self._matchers[number] = self._matcher()
            else:
                self._matchers[number].accept_token(token)
            some = self._matchers[number].fill_next_token_bitmask(self._bits)
        except Exception as error:  # it ends this answer
            return REPLY.pack(FAILED, number) + _first_line(error).encode(errors="replace")
        return REPLY.pack(MASK if some else FREE, number) + (self._bits.numpy().tobytes() if some else b"")

    def close(self, number: int) -> None:
        self._matchers.pop(number, None)


def _compiled(asked: dict[str, Any], info: xgrammar.TokenizerInfo) -> xgrammar.CompiledGrammar:
    import xgrammar

    parts = asked["parts"] if "parts" in asked else [_part(asked["request"], asked["calls"])]
    if len(json.dumps(parts)) > LONGEST:
        raise ConfigError(f"the form is longer than {LONGEST:,} characters")
    thoughts = {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": asked["thinking"]}
    whole = {"type": "sequence", "elements": [*([thoughts] if asked["thinking"] else []), *parts]}
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    try:
        return compiler.compile_structural_tag({"type": "structural_tag", "format": whole})
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"the form cannot be compiled: {_first_line(error)}") from error


def _part(request: dict[str, Any], style: dict[str, Any]) -> Any:
    from pydantic import TypeAdapter

    from zili.data.reply import CallStyle
    from zili.serving.http.protocol import ChatRequest

    turn = {"role": "user", "content": "."}
    called = TypeAdapter(CallStyle).validate_python(style)
    return ChatRequest.model_validate({**request, "messages": [turn]}).form_with_calls(called)


@contextmanager
def _seconds(most: float) -> Iterator[None]:
    """What takes more of a CPU ends the process; what takes much has the CPU after everyone else from then on."""
    began = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, most)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    if time.process_time() - began > _SLOW and most == MASK_SECONDS:
        os.nice(19)


def _limit_memory() -> None:
    with suppress(ImportError, OSError, ValueError):  # where the system can: Linux
        import resource

        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^(\[[\d:]{8}\] )?\S{1,200}:\d+: ", "", lines[0])[:1000]  # without the place in xgrammar's source


if __name__ == "__main__":
    main(int(sys.argv[1]))
