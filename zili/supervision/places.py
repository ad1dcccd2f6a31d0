"""Where the files of a machine's processes are: logs in the run's folder, the rest on the machine's own disk."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

_TAIL = 16_384
"""Bytes of a log's end that are read for why a process ended."""
_LARGEST_ERROR = 1 << 20
"""Bytes of an error file that are read."""


class Places:
    """Those of one run on one machine, by ranks."""

    def __init__(self, run: Path, own: Path) -> None:
        """`own`: a folder on this machine's disk."""
        self._run, self._own = run, own

    def logs(self, life: int) -> Path:
        """Folder of a life's logs."""
        return self._run / "logs" / f"life-{life:04d}"

    def log(self, life: int, rank: int) -> Path:
        return self.logs(life) / f"rank-{rank:05d}.log"

    def hang(self, life: int, rank: int) -> Path:
        """Where the stacks of a process are kept for people."""
        return self.logs(life) / "hang" / f"rank-{rank:05d}.txt"

    def stacks(self, rank: int) -> Path:
        return self._own / f"stacks-{rank}"

    def recorder(self, rank: int) -> Path:
        return self._own / f"asked-{rank}"

    def error(self, rank: int) -> Path:
        """Its error file, as torchrun's workers write it."""
        return self._own / f"error-{rank}.json"

    def crumbs(self, rank: int) -> Path:
        return self._own / f"crumbs-{rank}"

    def said(self, rank: int) -> str:
        """What a process's error file says; "": nothing."""
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            said = json.loads(end_of(self.error(rank), _LARGEST_ERROR))["message"]
            return str(said["message"] if isinstance(said, dict) else said)[-_TAIL:]
        return ""


def end_of(file: Path, most: int = _TAIL) -> str:
    """Its last `most` bytes.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as opened:
        opened.seek(max(0, os.fstat(opened.fileno()).st_size - most))
        return opened.read(most).decode("utf-8", "replace")
