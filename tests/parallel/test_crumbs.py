"""Breadcrumbs: what a process is at, as its agent sees it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from zili.parallel.control.crumbs import PHASES, Crumbs


def test_the_agent_sees_what_the_process_left(tmp_path: Path) -> None:
    process, agent = Crumbs(tmp_path / "crumbs"), Crumbs(tmp_path / "crumbs")
    assert (agent.phase, agent.step, agent.micro_batch) == ("init", 0, 0)
    before = agent.changes
    process.enter("step")
    process.at_micro_batch(3)
    process.done(17)
    assert (agent.phase, agent.step, agent.micro_batch) == ("step", 17, 3)
    assert agent.changes == before + 3 and agent.since == process.since


def test_where_a_process_began_and_how_long_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    anew, resumed = Crumbs(), Crumbs()
    assert anew.begun_after is None and anew.stood == 0
    anew.enter("save")
    resumed.resumed(20)
    now += 3.0
    assert anew.stood == resumed.stood == 3.0
    for process, step in ((anew, 1), (anew, 2), (resumed, 21)):
        process.done(step)
    assert (anew.begun_after, resumed.begun_after) == (0, 20)
    anew.enter("step")
    assert anew.stood == 0 and anew.times()["save"] == 1 and anew.times()["step"] == 0


def test_every_second_is_in_one_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    crumbs = Crumbs()
    for phase, seconds in (("data", 1.0), ("step", 2.0), ("data", 4.0), ("save", 8.0)):
        crumbs.enter(phase)  # type: ignore[arg-type]
        now += seconds
    found = crumbs.seconds()
    assert sum(found.values()) == now - 100.0
    assert {phase: found[phase] for phase in PHASES if found[phase]} == {"data": 5.0, "step": 2.0, "save": 8.0}
    assert crumbs.longest()["data"] == 4.0 and crumbs.longest()["save"] == 0, "the one at hand has not ended"


def test_a_phase_within_another_gives_way_to_it_again() -> None:
    crumbs = Crumbs()
    crumbs.enter("step")
    with pytest.raises(RuntimeError), crumbs.within("evaluate"):
        assert crumbs.phase == "evaluate"
        raise RuntimeError
    assert crumbs.phase == "step"


def test_what_a_killed_process_left_is_there(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        crumbs = Crumbs(tmp_path / "crumbs")
        crumbs.enter("save")
        crumbs.done(5)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    left = Crumbs(tmp_path / "crumbs")
    assert (left.phase, left.step) == ("save", 5)
