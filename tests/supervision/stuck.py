"""A callback that lets a process hang, each life of a run in another way, at another step."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PLAN = "STUCK_PLAN"
"""Variable that names a file: for each life of the run what happens, in which process, at which step."""


class Stuck(NamedTuple):
    kind: str
    rank: int
    step: int
    """Steps that are done when it happens."""


def own() -> Stuck:
    """What happens in this life to this process."""
    plan = json.loads(Path(os.environ[PLAN]).read_text(encoding="utf-8"))
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    here = Stuck(*plan[life]) if life < len(plan) else Stuck("nothing", 0, 0)
    return here if here.kind in ("skip", "mismatch") or here.rank == int(os.environ["RANK"]) else Stuck("nothing", 0, 0)


def loop() -> None:
    while True:
        sum(range(10_000))


def sleep() -> None:
    time.sleep(3600)


def gil() -> None:
    while True:
        ctypes.PyDLL(None).usleep(600_000_000)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(3600)


def lock() -> None:
    taken = threading.Lock()
    with taken, taken:
        pass


def data() -> None:
    time.sleep(3600)


def fifo() -> None:
    """A file system that does not take what is written, in a thread that the step waits for."""
    file = Path(os.environ[PLAN]).with_suffix(".fifo")
    if not file.exists():
        os.mkfifo(file)
    writing = threading.Thread(target=save, args=(file,), daemon=True)
    writing.start()
    writing.join()


def save(file: Path) -> None:
    file.write_bytes(b"a checkpoint")


def evaluate() -> None:
    time.sleep(3600)


def imports() -> None:
    time.sleep(3600)


def join() -> None:
    time.sleep(3600)


IN_A_STEP = {"loop": loop, "sleep": sleep, "gil": gil, "stop": stop, "lock": lock}
if PLAN in os.environ and "RANK" in os.environ and own().kind == "imports":
    imports()


def callback() -> Any:
    """The callback; where it is only imported to be checked, nothing of Zili's is."""
    import torch
    import torch.distributed as dist

    import zili

    class Callback(zili.Callback):
        everywhere = True

        def __init__(self) -> None:
            self.own = own()
            if self.own.kind == "join":
                join()

        def on_start(self, trainer: Any) -> None:
            self.at = trainer
            self._before(trainer.loader, "batch", "data", data)
            self._before(trainer.parallel, "accumulate", "mismatch", self._meet)
            self._before(trainer.saver, "save", "save", fifo)
            self._before(trainer.parallel, "evaluate", "evaluate", evaluate)

        def _before(self, owner: Any, name: str, kind: str, hang: Callable[[], None]) -> None:
            if self.own.kind == kind:
                original = getattr(owner, name)

                def stuck(*given: Any, **named: Any) -> Any:
                    if self.at.step >= self.own.step:
                        hang()
                    return original(*given, **named)

                object.__setattr__(owner, name, stuck)

        def after_step(self, trainer: Any) -> None:
            if trainer.step != self.own.step:
                return
            if self.own.kind in IN_A_STEP:
                IN_A_STEP[self.own.kind]()
            elif self.own.kind == "skip":
                self._meet()

        def _meet(self) -> None:
            """A collective that one process leaves out."""
            if self.at.world.rank != self.own.rank:
                dist.all_reduce(torch.ones(7))

    return Callback()
