"""Hangs: seen by what processes do not do, and named by process and line."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from stuck import PLAN, Stuck

from zili.config import RunConfig, dump_recipe

RANKS = 4
BEGINS = 6
PLAIN = ("chip.operations.linear=reference", "chip.operations.attention=reference")
IN_STEPS = ("loop", "sleep", "gil", "stop", "lock", "data", "skip", "save", "evaluate")
KINDS = ((*IN_STEPS, "join"), (*IN_STEPS, "imports"))
PHASES = {"data": "data", "save": "save", "evaluate": "evaluate", "imports": "join", "join": "join", "skip": r"\w+"}
SETTINGS = (
    *("checkpoint.every=1", "evaluation.every=1", "training.steps=400", "training.micro_batch=1"),
    *("data.prefetch=1", "checkpoint.asynchronous=false"),
)


class Run:
    """A run on machines of two processes, each life of which hangs as planned."""

    def __init__(self, folder: Path, config: RunConfig, plan: list[Stuck], machines: str, patience: float) -> None:
        """`machines`: a letter each."""
        self._folder, self._plan, self._machines = folder, plan, machines
        site = folder / "site" / "stuck-1.dist-info"
        site.mkdir(parents=True)
        (site / "METADATA").write_text("Name: stuck\nVersion: 1\n", encoding="utf-8")
        (site / "entry_points.txt").write_text("[zili.callbacks]\nstuck = stuck:callback\n", encoding="utf-8")
        (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        recipe = folder / "stuck.toml"
        recipe.write_text(dump_recipe(config) + "\n[callbacks.stuck]\n", encoding="utf-8")
        path = (site.parent, Path(__file__).parent, os.environ.get("PYTHONPATH", ""))
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "OMP_NUM_THREADS": "1",
            PLAN: str(folder / "plan.json"),
        }
        words = ["--processes", "2", "--machines", str(len(machines)), "--patience", str(patience)]
        self._command = [sys.executable, "-m", "zili", "launch", str(recipe), *words]
        self._agents: dict[str, subprocess.Popen[bytes]] = {}
        self._begins = 0

    def hangs(self, count: int, seconds: float) -> dict[str, Stuck]:
        """The first `count` hangs that are said, each a line, and what was done in that life.

        A machine so busy that an agent says nothing for seconds costs a life, or ends the run: then it is begun again.
        """
        end = time.monotonic() + seconds
        try:
            while len(found := self._said()) < count and time.monotonic() < end:
                self._begin()
                time.sleep(0.2)
        finally:
            for agent in self._agents.values():
                agent.kill()  # its nursery ends the processes
                agent.wait()
        assert len(found) >= count, self._everything()
        return dict(list(found.items())[:count])

    def _begin(self) -> None:
        for name in self._machines:
            if name not in self._agents or self._agents[name].poll() is not None:
                self._begins += 1
                assert self._begins <= BEGINS, self._everything()
                with (self._folder / f"said-{name}").open("ab") as said:
                    self._agents[name] = subprocess.Popen(
                        [*self._command, "--machine", name], stdout=said, stderr=said, env=self._environment
                    )

    def _said(self) -> dict[str, Stuck]:
        files = sorted(self._folder.glob("said-*"))
        text = "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
        lines = re.findall(r"^zili launch: (process \d+ on \w+ hangs .*life-(\d+)/hang)$", text, flags=re.M)
        return {line: self._plan[int(life) - 1] for line, life in lines}

    def _everything(self) -> str:
        files = [*sorted(self._folder.glob("said-*")), *sorted(self._folder.glob("run/logs/*/*.log"))[-4:]]
        return "\n".join(f"== {file}\n{file.read_text(encoding='utf-8', errors='replace')[-4000:]}" for file in files)


def wrong(line: str, stuck: Stuck) -> str:
    """What a line does not say of a hang; empty: it says all."""
    at = r"zili/\S+\.py:\d+ in \w+" if stuck.kind in ("skip", "mismatch") else rf"/stuck\.py:\d+ in {stuck.kind}\b"
    phase = PHASES.get(stuck.kind, "(step|warm_up)")
    patterns = (rf"^process {stuck.rank} on [ab] hangs in {phase} after step \d+", at)
    return "".join(f"{stuck}: {line}\n" for pattern in patterns if not re.search(pattern, line))[:2000]


def drawn(seed: int) -> list[Stuck]:
    """Each kind in a process that is drawn, in an order that is drawn; twice, as some lives may be lost otherwise."""
    draw, kinds, step = random.Random(seed), list(KINDS[seed % 2]), 0
    plan = []
    for _ in range(2):
        for kind in draw.sample(kinds, len(kinds)):
            step += draw.randrange(2, 5)
            plan.append(Stuck(kind, draw.randrange(RANKS), step))
    return plan


@pytest.mark.slow
def test_hangs_are_named_by_process_and_line(recipe: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A C call that keeps Python's lock, a stopped process, and a batch that never comes, each in another life."""
    plan = [Stuck("gil", 1, 3), Stuck("stop", 0, 5), Stuck("data", 1, 8)]
    config = recipe(
        *PLAIN, "checkpoint.every=1", "training.micro_batch=1", "training.steps=40", f"folder={tmp_path / 'run'}"
    )
    found = Run(tmp_path, config, plan, "a", patience=1).hangs(3, seconds=120)
    assert not "".join(wrong(line, stuck) for line, stuck in found.items())
    assert "last collective: gloo:" in next(iter(found)), "also while Python's lock is held"
    kept = sorted(path.name for path in (tmp_path / "run/logs/life-0001/hang").iterdir())
    assert kept == [f"rank-{rank:05d}.txt" for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_fifty_hangs_are_named_by_process_and_line(recipe: Callable[..., RunConfig], tmp_path: Path, seed: int) -> None:
    """Ten in each run, some of which have two mesh dimensions."""
    data = recipe().data.tokenizer.parent
    config = recipe(
        *SETTINGS,
        f"parallel.tensor={1 + seed % 2}",
        "model.kv_heads=2",
        f"data.held_out={data / 'held_out'}",
        f"folder={tmp_path / 'run'}",
    )
    found = Run(tmp_path, config, drawn(seed), "ab", patience=2).hangs(10, seconds=900)
    print("\n".join(f"{stuck}: {line}" for line, stuck in found.items()))
    wrongs = [text for line, stuck in found.items() if (text := wrong(line, stuck))]
    assert not wrongs, f"{len(wrongs)} of 10:\n" + "".join(wrongs)


@pytest.mark.slow
def test_a_collective_of_another_kind_than_the_others_is_named(
    recipe: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """All wait, and each in its own collective: what a process asks for in place of the one that it left out."""
    plan = [Stuck("mismatch", 2, 3), Stuck("mismatch", 0, 6)]
    config = recipe(*SETTINGS, f"folder={tmp_path / 'run'}")
    found = Run(tmp_path, config, plan, "ab", patience=2).hangs(2, seconds=300)
    print("\n".join(found))
    assert not "".join(wrong(line, stuck) for line, stuck in found.items())
