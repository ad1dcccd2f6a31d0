"""Guides: which tokens may come next in an answer with a form, as the processes of `form_process` say."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary, finalize

import numpy as np
import torch
from torch import Tensor

import zili
from zili.errors import ConfigError
from zili.serving.forms.form_process import (
    ACCEPT,
    CLOSE,
    COMPILING_SECONDS,
    FAILED,
    FREE,
    MASK_SECONDS,
    MEMORY,
    OPEN,
    ORDER,
    REPLY,
)

_KEPT = 8
"""Forms whose process stays though nobody uses it: most clients ask for the same again and again."""
_MOST = 48
_PATIENCE = 60.0
"""Seconds for a form to be compiled, whatever else the machine does."""
_ENDED = (
    f"the form takes too long or too much memory: {COMPILING_SECONDS:g} seconds of a CPU may be had to compile it, "
    f"{MASK_SECONDS:g} for each token of an answer, and {MEMORY >> 20:,} MB"
)


class TooManyForms(ConfigError):
    """Others may end soon."""


class Guide:
    """Where in its form one answer is. Whoever has one must `close` it."""

    def __init__(self, form: Form) -> None:
        self._form, self._number = form, next(form.numbers)
        form.order(OPEN, self._number)

    @property
    def ready(self) -> bool:
        """Whether `allowed` does not wait."""
        return self._form.has(self._number)

    def allowed(self, scores: Tensor) -> Tensor:
        """`scores [V]`, minus infinity where a token cannot come next.

        Raises: ConfigError, no token can, or it takes too long to tell.
        """
        kind, bits = self._form.reply(self._number)
        if kind == FREE:
            return scores
        may = torch.from_numpy(np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[: len(scores)]).bool()
        scores = scores.masked_fill(~may, -torch.inf)
        if not may.any() or scores.max() == -float("inf"):
            raise ConfigError("the tokenizer has no token that goes on with the form that was asked for")
        return scores

    def accept(self, token: int) -> None:
        """It has come. Raises: ConfigError, the form's process has ended."""
        self._form.order(ACCEPT, self._number, token)

    def close(self) -> None:
        """No more is asked."""
        self._form.forget(self._number)


class Form:
    """One form, and the process that knows it. Called it makes a `Guide`; but for that, for one thread."""

    def __init__(self, line: Connection) -> None:
        self._line = line
        self._replies: dict[int, tuple[int, bytes]] = {}
        self.numbers = count()
        self.alive = True
        finalize(self, line.close)  # which ends the process

    def __call__(self) -> Guide:
        return Guide(self)

    def order(self, what: int, number: int, token: int = 0) -> None:
        """Tell the process, which answers in time."""
        self._replies.pop(number, None)
        try:
            self._line.send_bytes(ORDER.pack(what, number, token))
        except OSError as error:
            self._end(error)

    def has(self, number: int) -> bool:
        """Whether there is an answer, or will never be one."""
        try:
            while self.alive and number not in self._replies and self._line.poll(0):
                self._take()
        except ConfigError:
            return True
        return not self.alive or number in self._replies

    def reply(self, number: int) -> tuple[int, bytes]:
        """The answer to the last order, waited for."""
        while number not in self._replies:
            self._take()
        kind, said = self._replies[number]
        if kind == FAILED:
            raise ConfigError(said.decode())
        return kind, said

    def forget(self, number: int) -> None:
        """Free the memory of an answer that has ended."""
        with suppress(ConfigError):
            self.order(CLOSE, number)

    def _take(self) -> None:
        try:
            said = self._line.recv_bytes(1 << 20)
        except (EOFError, OSError) as error:
            self._end(error)
        kind, number = REPLY.unpack_from(said)
        self._replies[number] = kind, said[REPLY.size :]

    def _end(self, error: Exception) -> None:
        self.alive = False
        raise ConfigError(_ENDED) from error


class Processes:
    """Makes forms of one vocabulary; from any thread."""

    def __init__(self, vocabulary: Callable[[], dict[str, Any]]) -> None:
        """`vocabulary` is asked for once, for the first form."""
        self._vocabulary, self._lock = vocabulary, threading.Lock()
        self._parent: _Parent | None = None
        self._forms: WeakValueDictionary[str, Form] = WeakValueDictionary()
        self._kept: deque[Form] = deque(maxlen=_KEPT)

    def form(self, asked: dict[str, Any]) -> Form:
        """A form, compiled.

        Raises: ConfigError, as `Forms`.
        """
        key = json.dumps(asked)
        form = self._forms.get(key)
        if form is None or not form.alive:
            form = self._compiled(key)
        with self._lock:
            if form in self._kept:
                self._kept.remove(form)
            self._kept.append(form)
            self._forms[key] = form
        return form

    def _compiled(self, key: str) -> Form:
        if len(self._forms) >= _MOST:
            raise TooManyForms(f"{_MOST} different forms are in use already")
        with self._lock:
            if self._parent is None or not self._parent.alive:
                self._parent = _Parent.of(json.dumps(self._vocabulary()))
            line = self._parent.fork()
        form = Form(line)
        try:
            line.send_bytes(key.encode())
        except OSError as error:
            raise ConfigError(_ENDED) from error
        if not line.poll(_PATIENCE):
            raise TooManyForms(f"the machine had no time to compile the form within {_PATIENCE:g} seconds")
        form.reply(0)
        return form


class _Parent:
    """The process that knows a vocabulary."""

    _known: dict[str, _Parent] = {}  # noqa: RUF012  (of the class: starting one takes seconds)

    def __init__(self, vocabulary: str) -> None:
        here, there = socket.socketpair()
        self._home = here
        # It finds this package where this process found it, and is no part of a terminal's Ctrl-C.
        places = [str(Path(zili.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", "zili.serving.forms.form_process", str(there.fileno())]
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            pass_fds=[there.fileno()],
            start_new_session=True,
        )
        there.close()
        line = Connection(os.dup(here.fileno()))
        line.send_bytes(vocabulary.encode())
        line.close()

    @classmethod
    def of(cls, vocabulary: str) -> _Parent:
        """The one there is. Raises: ConfigError, xgrammar is not installed."""
        if importlib.util.find_spec("xgrammar") is None:
            raise ConfigError("forms need xgrammar: pip install 'zili[serve]'")
        found = cls._known.get(vocabulary)
        if found is None or not found.alive:
            cls._known.clear()
            found = cls._known[vocabulary] = cls(vocabulary)
        return found

    @property
    def alive(self) -> bool:
        """Whether it can fork."""
        return self._process.poll() is None

    def fork(self) -> Connection:
        """The end of a new process, which takes a form."""
        here, there = socket.socketpair()
        with there:
            try:
                socket.send_fds(self._home, [b"+"], [there.fileno()])
            except OSError as error:
                here.close()
                raise ConfigError("the process that knows the vocabulary has ended; ask again") from error
        return Connection(here.detach())
