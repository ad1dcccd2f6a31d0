"""Hangs: seen by what processes do not do, and named by process and line."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import Launched, Plugin
from stuck import PLAN, Stuck

from zili.config import RunConfig
from zili.parallel.control import recorder
from zili.supervision import reports

Hangs = Callable[..., dict[str, Stuck]]
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


@pytest.fixture
def hangs(recipe: Callable[..., RunConfig], tmp_path: Path) -> Iterator[Callable[..., dict[str, Stuck]]]:
    """`hangs(3, plan, "ab", "training.steps=9", patience=1, seconds=60)`: the first 3 that are said by a run on a
    machine of two processes a letter, each life of which hangs as planned."""
    runs: list[Launched] = []

    def make(count: int, plan: list[Stuck], machines: str, *overrides: str, patience: float, seconds: float) -> Any:
        words = ("--processes", "2", "--machines", str(len(machines)), "--patience", str(patience))
        run = Launched(tmp_path, recipe(*overrides), *words, plugin=Plugin("stuck", "callback", {}))
        runs.append(run)
        (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        run.environment |= {PLAN: str(tmp_path / "plan.json")}
        return said_in_time(run, plan, machines, count, seconds)

    yield make
    for run in runs:
        run.end()
        assert not run.left(), "nothing is left behind"


def said_in_time(run: Launched, plan: list[Stuck], machines: str, count: int, seconds: float) -> dict[str, Stuck]:
    """The first `count` hangs that are said, each a line, and what was done in that life.

    A machine so busy that an agent says nothing for seconds costs a life, or ends the run: then it is begun again.
    """
    begins, end = 0, time.monotonic() + seconds
    while len(found := said_by(run, plan)) < count and time.monotonic() < end:
        ended = [name for name in machines if name not in run.agents or run.agents[name].poll() is not None]
        begins += len(ended)
        assert begins <= BEGINS, run.everything()
        run.begin(*ended)
        time.sleep(0.2)
    assert len(found) >= count, run.everything()
    return dict(list(found.items())[:count])


def said_by(run: Launched, plan: list[Stuck]) -> dict[str, Stuck]:
    lines = [re.fullmatch(r"process \d+ on \w+ hangs .*life-(\d+)/hang", line) for line in run.said()]
    return {line[0]: plan[int(line[1]) - 1] for line in lines if line}


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


def test_a_recorder_answers_in_a_folder_that_lies_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of a socket has 107 bytes."""
    deep = tmp_path / ("deep" * 30)
    deep.mkdir()
    monkeypatch.setenv(recorder.RECORDER, str(deep / "asked-0"))
    monkeypatch.setattr(recorder, "_server", None)
    recorder.answer_for_collectives()
    assert b"200 OK" in asyncio.run(asyncio.wait_for(reports._answer(deep / "asked-0"), 20))


@pytest.mark.slow
def test_hangs_are_named_by_process_and_line(hangs: Hangs, tmp_path: Path) -> None:
    """A C call that keeps Python's lock, a stopped process, and a batch that never comes, each in another life."""
    plan = [Stuck("gil", 1, 3), Stuck("stop", 0, 5), Stuck("data", 1, 8)]
    settings = (*PLAIN, "checkpoint.every=1", "training.micro_batch=1", "training.steps=40")
    found = hangs(3, plan, "a", *settings, patience=1, seconds=120)
    assert not "".join(wrong(line, stuck) for line, stuck in found.items())
    assert "last collective: gloo:" in next(iter(found)), "also while Python's lock is held"
    kept = sorted(path.name for path in (tmp_path / "run/logs/life-0001/hang").iterdir())
    assert kept == [f"rank-{rank:05d}.txt" for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_fifty_hangs_are_named_by_process_and_line(hangs: Hangs, tiny_data: Path, seed: int) -> None:
    """Ten in each run, some of which have two mesh dimensions."""
    mesh = (f"parallel.tensor={1 + seed % 2}", "model.kv_heads=2", f"data.held_out={tiny_data / 'held_out'}")
    found = hangs(10, drawn(seed), "ab", *SETTINGS, *mesh, patience=2, seconds=900)
    print("\n".join(f"{stuck}: {line}" for line, stuck in found.items()))
    wrongs = [text for line, stuck in found.items() if (text := wrong(line, stuck))]
    assert not wrongs, f"{len(wrongs)} of 10:\n" + "".join(wrongs)


@pytest.mark.slow
def test_a_collective_of_another_kind_than_the_others_is_named(hangs: Hangs) -> None:
    """All wait, and each in its own collective: what a process asks for in place of the one that it left out."""
    plan = [Stuck("mismatch", 2, 3), Stuck("mismatch", 0, 6)]
    found = hangs(2, plan, "ab", *SETTINGS, patience=2, seconds=300)
    print("\n".join(found))
    assert not "".join(wrong(line, stuck) for line, stuck in found.items())
