"""What the stacks of a process say: at which line it is, and whether it only waits for other processes there.

They are read from the text that `faulthandler` writes at a signal: threads, each with its frames, the innermost first.
"""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import zili

_THREAD = re.compile(r"(?:Current thread|Thread) 0x[0-9a-f]{1,16}[^\n]{0,80}:")
_FRAME = re.compile(r'  File "([^"\n]{1,4096})", line (\d{1,9}) in ([^\n]{1,400})')
_OURS = str(Path(zili.__file__).parent)
_PYTHON = sysconfig.get_paths()["stdlib"]
_PACKAGES = ("/site-packages/", "/dist-packages/")
_TORCH = re.compile(r"/(?:site|dist)-packages/torch/")
_AMONG_PROCESSES = re.compile(
    r"/torch/distributed/(?!checkpoint/|tensor/(?!_collective_utils))|^"
    + re.escape(f"{_OURS}/parallel/")
    + r"(?:control/|world\.py)"
)
"""Where code does nothing but have processes meet; writing a checkpoint and sharded arithmetic do other things too."""
_ON_THREADS = {"threading.py", "queue.py", "_base.py"}
"""Files of the standard library in which one thread waits for another."""
_IDLE = {*_ON_THREADS, "thread.py", "selectors.py", "socketserver.py", "connection.py"}
"""Files of the standard library in which a thread waits for something to do."""
_BACKWARD = "_engine_run_backward"
"""Where the main thread waits while threads of autograd, one a device, walk backward."""


class Frame(NamedTuple):
    """A line that a thread is at."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"

    @property
    def is_python(self) -> bool:
        """Whether it is of the standard library, or of no file."""
        inside = self.file.startswith(_PYTHON) and not any(part in self.file for part in _PACKAGES)
        return inside or self.file.startswith("<")

    @property
    def is_torch(self) -> bool:
        return _TORCH.search(self.file) is not None

    @property
    def waits_for_processes(self) -> bool:
        return _AMONG_PROCESSES.search(self.file) is not None


Thread = list[Frame]


class Whereabouts(NamedTuple):
    """Where a process is."""

    frame: Frame
    waits: bool
    """Whether it only waits for other processes there."""

    def as_table(self) -> dict[str, Any]:
        return {"frame": list(self.frame), "waits": self.waits}


def place_in(text: str) -> Whereabouts | None:
    """Where the process is whose stacks these are; None: they say nothing."""
    threads = threads_in(text)
    if not threads:
        return None
    main, others = threads[-1], threads[:-1]
    thread = main
    if _waits_for_a_thread(main):
        at_work = [other for other in others if _is_at_work(other)]
        alone = [other for other in at_work if not _waits(other)]
        thread = next(iter(alone or at_work), main)
    return Whereabouts(_line(thread), _waits(thread))


def threads_in(text: str) -> list[Thread]:
    """The threads that have frames, the main one last, as faulthandler writes them."""
    found: list[Thread] = []
    for line in text.splitlines():
        if _THREAD.match(line):
            found.append([])
        elif (frame := _FRAME.fullmatch(line)) and found:
            found[-1].append(Frame(frame[1], int(frame[2]), frame[3]))
    return [thread for thread in found if thread]


def _line(thread: Thread) -> Frame:
    """The innermost line of whoever wrote the program, else of torch, else of Python."""
    own = (frame for frame in thread if not frame.is_python and not frame.is_torch and not frame.waits_for_processes)
    return next(own, None) or next((frame for frame in thread if not frame.is_python), thread[0])


def _waits(thread: Thread) -> bool:
    """Whether it waits for other processes: the innermost code that is not Python's or torch's own is what lets
    processes meet."""
    for frame in thread:
        if frame.waits_for_processes:
            return True
        if not (frame.is_python or frame.is_torch):
            return False
    return False


def _waits_for_a_thread(thread: Thread) -> bool:
    first = thread[0]
    return (first.is_python and Path(first.file).name in _ON_THREADS) or first.function == _BACKWARD


def _is_at_work(thread: Thread) -> bool:
    """Whether it is neither idle nor one of Python's or torch's own that only stand by."""
    first = thread[0]
    if first.is_python and Path(first.file).name in _IDLE:
        return False
    return any(frame.waits_for_processes or not (frame.is_python or frame.is_torch) for frame in thread)
