"""Processes forked from one that has imported torch: they begin in a tenth of a second, where a fresh Python that
imports it takes three to six."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zili.chips import find_backend

_PRELOADED = [
    *(
        "zili.rehearsal",
        "zili.runs.running",
        "zili.release",
        "zili.cli.app",
        "zili.planning",
        "torch.utils.tensorboard",
    ),
    *(
        "pytest",
        "hypothesis",
        "numpy.ma",
        "numpy.ctypeslib",
        "multiprocessing.dummy",
        "rich.markdown",
        "typer.rich_utils",
    ),
    *("many", "tiny_models"),
]
"""Imported once a session, also what test files import: half a second in each process. No plugin of a chip is: those
on a process's own path are its own alone."""


def context() -> Any:
    """What makes processes; one server a session forks all of them."""
    forks: Any = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(_PRELOADED)
    return forks


def take_environment(variables: Mapping[str, str]) -> None:
    """In a process of its own: have `variables`, and find the modules of their PYTHONPATH, as if begun with them."""
    os.environ.update(variables)
    # Python read PYTHONPATH when the process that this one is a fork of began.
    sys.path += [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder not in sys.path]


class Zili:
    """The command `zili WORDS`, begun in a process of its own."""

    def __init__(self, *words: object, environment: Mapping[str, str] | None = None) -> None:
        self.words = [str(word) for word in words]
        self._said = tempfile.TemporaryDirectory(prefix="zili-said-")
        self._files = [Path(self._said.name, name) for name in ("out", "err")]
        for file in self._files:
            file.touch()
        # Those that a command sets before it imports torch, which here is there already.
        before = {one.name: one.value for one in find_backend("cpu").environment if one.value is not None}
        variables = {**before, **os.environ, **(environment or {})}
        self.process = context().Process(target=_command, args=(self.words, variables, self._files, Path.cwd()))
        self.process.start()

    def end(self, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for it; it is killed, and the test fails, if it takes longer than `seconds`."""
        self.process.join(seconds)
        late = self.process.exitcode is None
        self.kill()
        out, err = (file.read_text(encoding="utf-8", errors="replace") for file in self._files)
        self._said.cleanup()
        assert not late, f"zili {self.words} did not end in {seconds} s: {out}{err}"
        return subprocess.CompletedProcess(["zili", *self.words], self.process.exitcode, out, err)

    def kill(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


def zili(*words: object, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """What `zili WORDS` prints, and its exit code."""
    return Zili(*words, environment=environment).end()


def _command(words: Sequence[str], variables: Mapping[str, str], files: Sequence[Path], folder: Path) -> None:
    take_environment(variables)
    os.chdir(folder)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = ["zili", *words]
    from zili.cli import main

    main()
