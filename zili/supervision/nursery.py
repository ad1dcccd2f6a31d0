"""A process that has imported what a worker needs, and forks workers on request: they begin in a tenth of a second.

It has one thread and no device. Its agent sends lines of JSON over a socket, `{"do": "begin", ...}`; it answers the
same way. It alone ends its children: whoever else signals a number may hit another process that got it meanwhile. When
the agent is gone, so are they.

    python -m zili.supervision.nursery SOCKET CHIP [cold]

A vendor's plugin is imported by the worker, after the fork. Whether it works then, each machine tries (`proving`).
`cold` workers are a Python of their own, which imports everything itself.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import logging
import os
import runpy
import select
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

_WARM = (
    *("torch", "torch.distributed", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp"),
    *("torch.distributed.checkpoint", "torch.distributed.pipelining", "safetensors.torch", "multiprocessing.dummy"),
    *("zili.cli.app", "zili.cli.train", "zili.runs.running", "zili.parallel.control.store", "zili.training.trainer"),
    *("zili.training.setup", "zili.parallel.machines", "zili.planning.exact.memory", "numpy.ma"),
    *("zili.training.callbacks.named", "zili.evaluation.during_training", "zili.release"),
)
"""What a worker imports. `torch._dynamo` alone takes a second, which each would spend at its first DTensor."""
_COMPILER = ("torch._inductor.compile_fx", "torch._dynamo.backends.inductor", "torch._dynamo.repro.after_dynamo")
COMPILES = "ZILI_COMPILES"
"""Variable by which `zili launch` says that workers compile."""
_ASKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SET_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux."""
STACKS = "ZILI_STACKS"
"""Variable that names the file into which a worker writes its threads' stacks at SIGUSR1."""


def warm(*, compiles: bool = False) -> None:
    """Import what a worker imports, without opening a device; `compiles`: also what compiles."""
    for name in _WARM:
        import_module(name)
    if compiles:
        _warm_compiler()
    gc.collect()
    gc.freeze()  # a child's collector would touch, and so copy, everything that was imported


def _warm_compiler() -> None:
    """Import it, and find out what each worker would find out by itself: the versions by which kernels are kept, and
    the vector instructions of this CPU, for which torch compiles and runs programs."""
    os.environ.setdefault("TORCH_WARM_POOL", "0")  # of processes, and threads, for Triton: a fork would not have them
    with suppress(Exception):  # what is wrong a worker meets too, and says
        for name in _COMPILER:
            import_module(name)
        from zili.torch_private import compiler_version, triton_version, vector_instructions

        for find_out in (compiler_version, triton_version, vector_instructions):
            find_out()


class Nursery:
    """The loop: requests from the agent, ends of children."""

    def __init__(self, link: socket.socket, *, cold: bool) -> None:
        self._link = link
        self._cold = cold
        self._own = os.getpid()
        self._ranks: dict[int, int] = {}
        """Rank of each child that lives."""
        self._heard, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for asked in _ASKED:
            signal.signal(asked, signal.SIG_IGN)  # the agent decides, and its end is ours
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a child is asked for its stacks, maybe before it can tell them

    def run(self) -> list[str] | None:
        """Serve until the agent is gone: None then. In a child: the words of its command."""
        rest = b""
        while True:
            watched: list[Any] = [self._link, self._heard]
            ready, _, _ = select.select(watched, [], [])
            if self._heard in ready:
                os.read(self._heard, 4096)
                self._bury()
            if self._link not in ready:
                continue
            piece = self._link.recv(65536)
            if not piece:
                self._end_all()
                return None
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                words = self._obey(json.loads(line))
                if words is not None:
                    return words

    def _obey(self, order: dict[str, Any]) -> list[str] | None:
        if order["do"] == "begin":
            return self._begin(order)
        send = os.kill if order["alone"] else os.killpg
        for pid, rank in self._ranks.items():
            if order["rank"] in (None, rank):
                try:
                    send(pid, order["signal"])
                except ProcessLookupError:  # it has ended and is not yet buried, or has no group of its own yet
                    with suppress(ProcessLookupError):
                        os.kill(pid, order["signal"])
        return None

    def _begin(self, order: dict[str, Any]) -> list[str] | None:
        # A signal that is blocked waits until the child lets it through; one that is only ignored would be lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, _ASKED)
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKED)
            self._ranks[pid] = order["rank"]
            self._say(say="begun", rank=order["rank"], pid=pid)
            return None
        self._link.close()
        _become(order, self._own, cold=self._cold)
        words: list[str] = order["words"]
        if self._cold:
            os.execv(sys.executable, [sys.executable, "-m", "zili.supervision.nursery", "worker", *words])
        return words

    def _bury(self) -> None:
        while self._ranks:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._say(say="ended", rank=self._ranks.pop(pid), code=os.waitstatus_to_exitcode(status))

    def _end_all(self) -> None:
        for pid in self._ranks:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        for pid in tuple(self._ranks):
            os.waitpid(pid, 0)

    def _say(self, **thing: Any) -> None:
        with suppress(OSError):  # the agent is gone, which `run` reads next
            self._link.sendall(json.dumps(thing).encode() + b"\n")


def _become(order: dict[str, Any], parent: int, *, cold: bool) -> None:
    """Turn this fork of `parent` into the worker of `order`: a group, signals, environment and output of its own."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKED)
    _end_with(parent)
    os.environ.update(order["environment"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for output in (2,) if order["shown"] else (1, 2):
        os.dup2(log, output)
    os.close(log)
    if not cold:
        answer_with_stacks()


def _end_with(parent: int) -> None:
    """Have the kernel end this process when the nursery is killed, where it can (Linux). Who lived on would keep its
    device from the next life."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def answer_with_stacks() -> None:
    """At SIGUSR1 write the stacks of all threads into the file that `STACKS` names: also where the lock of Python is
    held by a call that does not return."""
    file = Path(os.environ[STACKS]).open("w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)


def main() -> None:
    """Serve the agent at the other end of a socket; in a child, run the command."""
    if sys.argv[1] == "worker":  # a cold one, in a Python of its own
        answer_with_stacks()
        _run(sys.argv[2:])
    number, chip, *options = sys.argv[1:]
    link, cold = socket.socket(fileno=int(number)), "cold" in options
    begun = time.monotonic()
    if not cold:
        from zili.chips import apply_environment, find_backend
        from zili.user_cache import keep_what_is_compiled

        apply_environment(find_backend(chip))
        keep_what_is_compiled()
        warm(compiles=COMPILES in os.environ)
    nursery = Nursery(link, cold=cold)
    nursery._say(say="ready", seconds=time.monotonic() - begun)
    words = nursery.run()
    if words is None:
        os._exit(0)  # some modules complain of being taken apart
    _run(words)


def _run(words: list[str]) -> NoReturn:
    """Run the command in this fork, and end it without taking apart what it shares with the nursery: that takes longer
    than many a run."""
    sys.argv, code = ["zili", *words], 1
    try:
        runpy.run_module("zili", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
