"""Runs under `zili launch` on machines that are processes of this one, and faults that a test orders."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

from zili.config import RunConfig, dump_recipe
from zili.training.checkpoints import list_checkpoints

Launch = Callable[..., "Launched"]


class Plugin(NamedTuple):
    """A callback of this folder, as a recipe names it."""

    module: str
    callback: str
    options: dict[str, str]


class Launched:
    """A run that `zili launch` trains on machines that are processes here; each has an agent and a nursery."""

    def __init__(self, folder: Path, config: RunConfig, *words: str, plugin: Plugin | None = None) -> None:
        """`words` go to every machine's command."""
        self.config = config
        self.run = config.folder
        self._folder = folder
        self._recipe = folder / "launched.toml"
        plugin = plugin or Plugin("zili_faults", "Faults", {"folder": str(folder)})
        table = "".join(f'{key} = "{value}"\n' for key, value in plugin.options.items())
        self._recipe.write_text(f"{dump_recipe(config)}\n[callbacks.tested]\n{table}", encoding="utf-8")
        path = (_installed(plugin, folder / "site"), Path(__file__).parent, os.environ.get("PYTHONPATH", ""))
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, map(str, path))),
            "OMP_NUM_THREADS": "1",
            "ZILI_CACHE": str(folder / "cache"),
        }
        self._words = words
        self.agents: dict[str, subprocess.Popen[bytes]] = {}

    def begin(
        self,
        *machines: str,
        words: Iterable[str] = (),
        inside: Iterable[str] = (),
        zili: Iterable[str] = ("-m", "zili"),
    ) -> None:
        """Begin the agents of some machines; `inside`: the command that runs theirs, `zili`: what Python is to run."""
        for name in machines:
            command = [*inside, sys.executable, *zili, "launch", str(self._recipe), "--machine", name]
            with self.log(name).open("ab") as log:
                self.agents[name] = subprocess.Popen(
                    [*command, *self._words, *words],
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    env=self.environment,
                )

    def log(self, machine: str) -> Path:
        return self._folder / f"log-{machine}"

    def said(self) -> list[str]:
        """What the supervisors have said, on any machine."""
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in sorted(self._folder.glob("log-*"))]
        return re.findall(r"^zili launch: (.*)$", "\n".join(texts), flags=re.M)

    def steps(self) -> int:
        """Steps that the record of the run has."""
        with suppress(OSError, ValueError):
            lines = (self.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            return max((line["step"] for line in map(json.loads, lines) if line["kind"] == "train"), default=0)
        return 0

    def until(self, holds: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until it `holds`; on failure show what was said."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, self.everything()
            time.sleep(0.05)

    def events(self) -> str:
        """What the root has written down."""
        with suppress(OSError):
            return (self.run / "supervision/events.jsonl").read_text(encoding="utf-8")
        return ""

    def life(self) -> int:
        """Number of the newest life."""
        with suppress(OSError, ValueError):
            return int(json.loads((self.run / "supervision/state.json").read_text(encoding="utf-8"))["life"])
        return 0

    def await_life(self, number: int, steps: int) -> None:
        """Until life `number` trains and is at `steps`."""
        self.until(lambda: self.life() >= number and self.steps() >= steps)

    def nursery(self, machine: str) -> int:
        return next(pid for pid in children(self.agents[machine].pid) if b"nursery" in command_of(pid))

    def workers(self, machine: str) -> list[int]:
        """Process ids of a machine's workers, by rank."""
        return children(self.nursery(machine))

    def root(self) -> int:
        """Process id of the root, which some agent has begun."""
        marks = b"zili.supervision.root", str(self.run).encode()
        found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return next(pid for pid in found if all(mark in command_of(pid) for mark in marks))

    def fault(self, rank: int, what: str) -> None:
        """Let a process meet `what` after the step that it is at."""
        file = self._folder / f"fault-{rank}"
        file.with_suffix(".new").write_text(what, encoding="utf-8")
        file.with_suffix(".new").rename(file)

    def vanish(self, machine: str) -> None:
        """A machine loses its power: everything of it ends in one moment."""
        nursery = self.nursery(machine)
        for pid in (*self.workers(machine), nursery, self.agents[machine].pid):
            os.kill(pid, signal.SIGKILL)
        self.agents.pop(machine).wait()

    def codes(self, seconds: float = 120) -> set[int]:
        """Exit codes of all agents, when they have ended."""
        self.until(lambda: all(agent.poll() is not None for agent in self.agents.values()), seconds)
        return {agent.wait() for agent in self.agents.values()}

    def everything(self) -> str:
        """What a failed test should show."""
        files = [*sorted(self._folder.glob("log-*")), *sorted(self.run.glob("logs/*/*.log"))[-8:]]
        return "\n".join(f"== {file}\n{file.read_text(encoding='utf-8', errors='replace')[-3000:]}" for file in files)

    def end(self) -> None:
        """Leave nothing behind."""
        for agent in self.agents.values():
            agent.kill()
            agent.wait()
        end = time.monotonic() + 20
        while self.left() and time.monotonic() < end:
            time.sleep(0.1)
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)

    def left(self) -> list[int]:
        """Processes that belong to this run and live."""
        own = str(self._folder).encode()
        found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [pid for pid in found if pid != os.getpid() and own in (command_of(pid) + environment_of(pid))]


def at_work(launch: Launch) -> Launched:
    """A run that one machine, `a`, trains without end."""
    run: Launched = launch("training.steps=100000")
    run.begin("a")
    run.await_life(1, 3)
    return run


def _installed(plugin: Plugin, site: Path) -> Path:
    """A folder of packages from which a recipe may name the plugin's callback `tested`."""
    about = site / f"{plugin.module}-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Name: {plugin.module}\nVersion: 1\n", encoding="utf-8")
    points = f"[zili.callbacks]\ntested = {plugin.module}:{plugin.callback}\n"
    (about / "entry_points.txt").write_text(points, encoding="utf-8")
    return site


def children(pid: int) -> list[int]:
    """Process ids of a process's children, oldest first."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return sorted(found)


def command_of(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def environment_of(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes()
    return b""


def weights(run: Path) -> dict[str, bytes]:
    """Every tensor of a run's newest checkpoint as bytes, whole, by name and place."""
    found = {}
    for file in sorted(list_checkpoints(run / "checkpoints")[-1].glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                found[f"{file.name}:{name}"] = opened.get_tensor(name).numpy().tobytes()
    return found
