"""A run under `zili launch` on machines that are processes of this one, for a drill of a recipe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zili.errors import ConfigError

NAMES = "abcdefgh"
_BEGINNING = 180.0
"""Seconds until the first step."""
_ENDING = 60.0


class OwnMachines:
    """Agents named a, b, c ... on loopback. One that is killed is begun again."""

    def __init__(
        self, words: Sequence[str], count: int, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """`words`: of `zili launch`. `log`: where all they print goes."""
        self._words = [sys.executable, "-m", "zili", "launch", *words, "--machines", str(count)]
        self._log, self._environment = log, environment
        self._agents: dict[str, subprocess.Popen[bytes]] = {}
        self.codes: dict[str, int] = {}
        """Of those that have ended by themselves."""
        log.parent.mkdir(parents=True, exist_ok=True)
        for name in NAMES[:count]:
            self._begin(name)

    def _begin(self, name: str) -> None:
        with self._log.open("ab") as log:
            self._agents[name] = subprocess.Popen(
                [*self._words, "--machine", name],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                start_new_session=True,
            )

    def tend(self) -> None:
        """Begin agents again that were killed, and note those that ended by themselves."""
        for name, agent in tuple(self._agents.items()):
            code = agent.poll()
            if code is not None and code < 0:
                self._begin(name)
            elif code is not None:
                self.codes[name] = code
                del self._agents[name]

    def await_steps(self, newest: Any, steps: int) -> None:
        """Until `newest()` is `steps`. Raises: ConfigError, the run ended before."""
        end = time.monotonic() + _BEGINNING
        while newest() < steps:
            self.tend()
            if not self._agents or time.monotonic() > end:
                raise ConfigError(f"the run made no step; {self._log} says why: {_last_line(self._log)}")
            time.sleep(0.1)

    def await_end(self, seconds: float) -> set[int]:
        """Exit codes of all agents, when they have ended. An empty set: not within so many seconds."""
        end = time.monotonic() + seconds
        while self._agents:
            self.tend()
            if time.monotonic() > end:
                return set()
            time.sleep(0.1)
        return set(self.codes.values())

    def close(self) -> None:
        """End what is left: by Ctrl-C, then at once."""
        for number, seconds in ((signal.SIGINT, _ENDING), (signal.SIGKILL, _ENDING)):
            for agent in self._agents.values():
                if agent.poll() is None:
                    agent.send_signal(number)
            end = time.monotonic() + seconds
            for agent in self._agents.values():
                try:
                    agent.wait(max(0.1, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    continue
        self._agents = {}


def different_weights(one: Path, other: Path) -> tuple[int, list[str]]:
    """Compare the newest checkpoints of two runs bit by bit: how many tensors there are, and which differ.

    Raises:
        ConfigError: they are not of one step.
    """
    from zili.training.checkpoints import list_checkpoints

    newest = [list_checkpoints(run / "checkpoints")[-1] for run in (one, other)]
    if newest[0].name != newest[1].name:
        raise ConfigError(f"{newest[0]} and {newest[1]} are of different steps")
    ours, theirs = map(_tensors, newest)
    differ = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    return len(ours), sorted(differ)


def _tensors(checkpoint: Path) -> dict[str, bytes]:
    from safetensors import safe_open

    found = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                found[f"{file.name}:{name}"] = bytes(opened.get_tensor(name).contiguous().flatten().view(-1).numpy())
    return found


def _last_line(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing"


def environment() -> dict[str, str]:
    """Of agents: machines that share cores gain nothing from threads."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}
