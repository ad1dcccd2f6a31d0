"""`torchrun --max-restarts`: a worker is killed, all begin anew from the newest checkpoint, losses stay the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from many import free_port
from waiting import until

from zili.config import RunConfig, dump_recipe
from zili.training.checkpoints import list_checkpoints

STEPS = 120


@pytest.fixture
def torchrun(recipe: Callable[..., RunConfig], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`torchrun(run, *words)` starts one agent that trains the tiny recipe into the folder `run`."""
    started: list[subprocess.Popen[str]] = []
    plain = (f"chip.operations.{name}=reference" for name in ("linear", "attention"))
    file = tmp_path / "tiny.toml"
    file.write_text(dump_recipe(recipe(*plain, f"training.steps={STEPS}", "checkpoint.every=5")), encoding="utf-8")

    def start(run: Path, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torch.distributed.run", *words, "-m", "zili", "train", str(file)]
        with (tmp_path / f"log-{len(started)}").open("w") as log:
            process = subprocess.Popen(
                [*command, "--set", f"folder={run}"],
                stdout=log,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def worker_of(agent: subprocess.Popen[str]) -> int:
    """The last of an agent's processes."""
    children = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True, check=True).stdout
    return int(children.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("agents", "rendezvous"), [(1, ""), (2, "c10d"), (2, "static")])
def test_a_worker_that_is_killed_is_survived(torchrun, agents: int, rendezvous: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert torchrun(whole, "--nproc-per-node", "2").wait(300) == 0
    place = ["--nnodes", str(agents), "--nproc-per-node", str(2 // agents), "--max-restarts", "3"]
    if rendezvous:
        place += ["--rdzv-backend", rendezvous, "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "a-job"]
    own = [["--node-rank", str(number)] if rendezvous == "static" else [] for number in range(agents)]
    running = [torchrun(parts, *place, *words) for words in own]
    until(lambda: list_checkpoints(parts / "checkpoints"))
    os.kill(worker_of(running[-1]), signal.SIGKILL)
    assert [agent.wait(300) for agent in running] == [0] * agents
    told = "".join((tmp_path / f"log-{number}").read_text() for number in range(1, 1 + agents))
    assert told.count("resumed from") == 1 and told.count(f"Done: {STEPS} steps") == 1
    assert told.count("another process of the run is gone") <= 1, "once, unless the first was the one killed"
    assert losses(parts) == losses(whole)
