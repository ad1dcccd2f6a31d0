"""Runs under `zili launch` on machines that are processes of this one, and faults that a test orders."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open

from zili.config import RunConfig, dump_recipe
from zili.training.checkpoints import list_checkpoints

_PACKAGE = '''
import os
from pathlib import Path
import time
import zili

class Faults(zili.Callback):
    """After a step: what the file `fault-RANK` of a folder says, once."""
    everywhere = True

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_start(self, trainer):
        """A batch whose gradient is no number: its position is in the file `nan-batch`."""
        bad, accumulate = self.folder / "nan-batch", trainer.parallel.accumulate

        def accumulated(batch):
            own = accumulate(batch)
            if bad.exists() and trainer.watch.position(trainer.step) == int(bad.read_text()):
                for parameter in trainer.parallel.parameters():
                    parameter.grad.mul_(float("nan"))
            return own

        trainer.parallel.accumulate = accumulated

    def before_step(self, trainer, batch):
        """A batch on which the last process fails whenever it meets it: its position is in the file `bad-batch`."""
        bad = self.folder / "bad-batch"
        if trainer.world.rank and bad.exists() and trainer.watch.position(trainer.step) == int(bad.read_text()):
            raise IndexError("index out of range in self")

    def after_step(self, trainer):
        file = self.folder / f"fault-{trainer.world.rank}"
        if trainer.world.rank == 0:
            time.sleep(0.002)  # the faults come from outside, and steps of this size take no time
        if not file.exists():
            return
        what = file.read_text()
        file.unlink()
        if what == "raise":
            raise ValueError("the callback does not like this step")
        if what == "die in the optimizer":
            optimizer, step = trainer.optimizers[-1], trainer.optimizers[-1].step

            def die():
                step()  # weights have moved, the step is not counted
                os.kill(os.getpid(), 9)

            optimizer.step = die
'''


class Launched:
    """A run that `zili launch` trains on machines that are processes here; each has an agent and a nursery."""

    def __init__(self, folder: Path, config: RunConfig, *words: str) -> None:
        """`words` go to every machine's command."""
        self.config = config
        self.run = config.folder
        self._folder = folder
        site = folder / "site"
        (site / "zili_faults-1.dist-info").mkdir(parents=True)
        (site / "zili_faults.py").write_text(_PACKAGE, encoding="utf-8")
        (site / "zili_faults-1.dist-info" / "METADATA").write_text("Name: zili-faults\nVersion: 1\n", encoding="utf-8")
        points = "[zili.callbacks]\nfaults = zili_faults:Faults\n"
        (site / "zili_faults-1.dist-info" / "entry_points.txt").write_text(points, encoding="utf-8")
        self._recipe = folder / "launched.toml"
        table = f'\n[callbacks.faults]\nfolder = "{folder}"\n'
        self._recipe.write_text(dump_recipe(config) + table, encoding="utf-8")
        path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
        self._environment = {
            **os.environ,
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "ZILI_CACHE": str(folder / "cache"),
        }
        self._words = words
        self.agents: dict[str, subprocess.Popen[bytes]] = {}

    def begin(self, *machines: str, words: tuple[str, ...] = ()) -> None:
        """Begin the agents of some machines."""
        for name in machines:
            command = [
                sys.executable,
                "-m",
                "zili",
                "launch",
                str(self._recipe),
                "--machine",
                name,
                *self._words,
                *words,
            ]
            with self.log(name).open("ab") as log:
                self.agents[name] = subprocess.Popen(
                    command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self._environment
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
        files = [*sorted(self._folder.glob("log-*")), *sorted(self.run.glob("logs/*/*.log"))]
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
