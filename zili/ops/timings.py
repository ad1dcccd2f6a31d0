"""What was measured on this machine, kept for its next runs: they start sooner, and choose the same."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from zili import __version__
from zili.chips.cpu import cpu_name
from zili.chips.device import Device
from zili.durable import write_whole
from zili.user_cache import VARIABLE, cache_folder

_ROUNDS = 9
_RESTARTS = "TORCHELASTIC_RESTART_COUNT"
"""Variable in which torchrun and `zili launch` count the lives before this one."""
_SECONDS = 0.5
"""For the rounds together; the first always runs."""


def fastest_in_turns(ways: Sequence[Callable[[], object]], *, on_host: bool) -> list[float]:
    """Seconds of the fastest call of each of `ways`: of a few, in turns. `on_host`: a call is done when it returns."""
    best, end = [math.inf] * len(ways), time.perf_counter() + _SECONDS
    for _ in range(_ROUNDS):
        for number, way in enumerate(ways):
            started = time.perf_counter()
            way()
            if not on_host:
                torch.accelerator.synchronize()
            best[number] = min(best[number], time.perf_counter() - started)
        if time.perf_counter() > end:
            break
    return best


class Timings:
    """Figures by name, in a file of this user's for each machine, software, number of threads and precision.

    A figure is measured once and then stands: of two runs on a machine that other programs use, both would otherwise
    find their own. Who removes the file has all measured anew.
    """

    def __init__(self, key: Mapping[str, str]) -> None:
        """`key`: all that a figure depends on beside its name."""
        self.problem: str | None = None
        """Why the file was of no use, for the user; None: nothing is the matter."""
        self._key = dict(key)
        folder, name = cache_folder("timings"), hashlib.sha256(json.dumps(self._key, sort_keys=True).encode())
        self.path = None if folder is None else folder / f"{name.hexdigest()[:16]}.json"
        self._kept = self._read()

    @classmethod
    def of(cls, device: Device, precision: str) -> Timings:
        """Those of runs like this one."""
        threads = str(torch.get_num_threads())
        here = {"cpu": cpu_name(), "threads": threads, "device": device.name(), "precision": precision}
        return cls({**device.versions, "zili": __version__, **here})

    def known(self, name: str) -> bool:
        """Whether `name` was measured before."""
        return name in self._kept

    def measured(self, name: str, measure: Callable[[], float]) -> float:
        """The figure `name`; `measure` is called where it is not known yet."""
        if name not in self._kept:
            found = measure()
            # Another run may have measured while this one did: what stands first stays.
            self._kept = {**self._kept, name: found, **self._read()}
            self._write()
        return self._kept[name]

    def agreed(self, name: str) -> bool:
        """Whether `name` was found right on this machine, by an earlier life of the job that this process is of: what a
        life found, the next one need not find again."""
        return int(os.environ.get(_RESTARTS, "0")) > 0 and self.known(f"agrees {name}")

    def agrees(self, name: str) -> None:
        """Keep that `name` was found right here."""
        self.measured(f"agrees {name}", time.time)

    def _read(self) -> dict[str, float]:
        if self.path is None or not self.path.exists():
            return {}
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            figures = {str(name): float(figure) for name, figure in kept["figures"].items()}
            if kept["key"] != self._key or not all(0 < figure < math.inf for figure in figures.values()):
                raise ValueError("it is not of this machine, or holds no figures")
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            self.problem = f"{self.path} cannot be used ({error!r}); measured anew"
            return {}
        return figures

    def _write(self) -> None:
        if self.path is None:
            self.problem = f"there is no folder to keep what is measured; {VARIABLE} names one"
            return
        try:
            write_whole(self.path, json.dumps({"key": self._key, "figures": self._kept}, indent=1) + "\n")
        except OSError as error:
            self.problem = f"{self.path} cannot be written ({error}); the next run measures again"
