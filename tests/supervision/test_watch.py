"""Which processes count as late, in a time that the test tells."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
from waiting import until

from zili.parallel.control.crumbs import Crumbs, Phase
from zili.supervision.watch import PATIENCE, UNMEASURED, Late, ProgressWatch, state_of_process

BEAT = 0.5


class Machine:
    """Two processes, their watch, and the time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.watch = ProgressWatch()
        self.begin()

    def begin(self, world: int = 2) -> None:
        self.crumbs = {rank: Crumbs() for rank in range(2)}
        self.watch.begin(world)

    def enter(self, phase: Phase, *ranks: int) -> None:
        for rank in ranks or self.crumbs:
            self.crumbs[rank].enter(phase)

    def wait(self, seconds: float, held: bool = False) -> list[Late]:
        """Let time pass, with a look at each beat; who was late first."""
        end = self.now + seconds
        while self.now < end:
            self.now += BEAT
            if late := self.watch.late(self.crumbs, self.now, held):
                return late
        return []

    def steps(self, count: int, seconds: float) -> list[Late]:
        for _ in range(count):
            self.enter("data")
            self.enter("step")
            if late := self.wait(seconds):
                return late
        self.enter("data")
        return []


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    yield Machine(monkeypatch)


def test_a_step_without_end_is_late_by_what_steps_took(machine: Machine) -> None:
    assert not machine.steps(5, seconds=4)
    machine.enter("step", 0)
    (late,) = machine.wait(1000)
    assert (late.rank, late.phase, late.limit) == (0, "step", PATIENCE + 40)
    assert late.quiet == late.limit + BEAT


@pytest.mark.parametrize("seconds", [0.5, 20, 100, 400])
def test_a_machine_that_is_loaded_tenfold_is_not_late(machine: Machine, seconds: float) -> None:
    assert not machine.steps(3, seconds)
    slow = 10 * seconds if seconds < 100 else 4 * seconds
    assert not machine.steps(2, min(slow, UNMEASURED * PATIENCE))


def test_a_long_step_that_goes_through_micro_batches_is_not_late(machine: Machine) -> None:
    assert not machine.steps(3, seconds=1)
    machine.enter("step")
    for number in range(100):
        for crumbs in machine.crumbs.values():
            crumbs.at_micro_batch(number)
        assert not machine.wait(50)


@pytest.mark.parametrize("phase", ["init", "join", "load", "warm_up", "step", "save", "evaluate"])
def test_where_nothing_was_measured_it_takes_half_an_hour(machine: Machine, phase: Phase) -> None:
    machine.enter(phase)
    assert not machine.wait(1800)
    assert {late.rank for late in machine.wait(2 * BEAT)} == {0, 1}


def test_one_that_does_not_begin_is_late_by_what_the_others_took(machine: Machine) -> None:
    assert not machine.wait(8)
    machine.enter("join", 1)
    (late,) = machine.wait(1000)
    assert (late.rank, late.phase, late.limit) == (0, "init", PATIENCE + 80)


def test_a_later_step_may_compile_as_long_as_the_first(machine: Machine) -> None:
    machine.enter("warm_up")
    assert not machine.wait(600)
    assert not machine.steps(3, seconds=1)
    machine.enter("step")
    assert not machine.wait(1200)
    assert machine.wait(1000)


def test_one_save_that_took_long_does_not_let_all_later_ones_hang(machine: Machine) -> None:
    machine.enter("save")
    assert not machine.wait(1200)
    machine.enter("data")
    machine.enter("save")
    (late, _) = machine.wait(10_000)
    assert late.limit == 2400


def test_the_time_in_which_the_agent_did_not_look_is_nobodys(machine: Machine) -> None:
    """It was stopped, or the machine was."""
    assert not machine.steps(3, seconds=1)
    machine.enter("step")
    for _ in range(20):
        machine.now += 3600
        assert not machine.watch.late(machine.crumbs, machine.now)
    assert machine.wait(60)


def test_the_time_in_which_a_debugger_holds_one_is_nobodys(machine: Machine) -> None:
    assert not machine.steps(3, seconds=1)
    machine.enter("step")
    assert not machine.wait(3600, held=True)
    assert machine.wait(100)


def test_a_later_life_knows_what_steps_take_but_not_what_loading_does(machine: Machine) -> None:
    machine.enter("load")
    assert not machine.wait(2)
    assert not machine.steps(3, seconds=2)
    machine.begin()
    machine.enter("load")
    assert not machine.wait(1700), "the first life had no checkpoint to read"
    machine.enter("step")
    (late, _) = machine.wait(1000)
    assert late.limit == PATIENCE + 20
    machine.begin(world=1)
    machine.enter("step")
    assert not machine.wait(1700), "on fewer machines steps are longer"


def test_after_a_report_it_counts_anew(machine: Machine) -> None:
    assert not machine.steps(3, seconds=1)
    machine.enter("step")
    assert machine.wait(100) and machine.watch.quiet(0) > 60
    machine.watch.forgive()
    assert not machine.wait(60) and machine.watch.quiet(0) == 60


def test_what_linux_says_of_a_process() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            assert state_of_process(os.getpid()) == "R"
            process.send_signal(signal.SIGSTOP)
            until(lambda: state_of_process(process.pid) == "T")
        finally:
            process.kill()
    assert state_of_process(process.pid) == ""
