"""`zili drill`: a seed's schedule, faults that fire in the phase that they are meant for, what is refused."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zili.errors import CheckpointError, ConfigError
from zili.parallel.control.crumbs import Crumbs
from zili.parallel.control.orders import DrillError
from zili.supervision.damage import damage
from zili.supervision.drill import NOT_SURVIVED, Drill, Followed, Watched, drilled, exit_code, sum_up
from zili.supervision.faults import KINDS, Fault, kinds_named, phases_named, schedule
from zili.supervision.file_thread import FileThread
from zili.supervision.firing import REPORTS, Firing
from zili.supervision.folder import SupervisionFolder
from zili.supervision.places import Places
from zili.supervision.watch import state_of_process

USUAL = kinds_named(None)
ALL = phases_named(None, USUAL)


def plan(seed: int, count: int = 40, kinds: list[str] = USUAL, machines: tuple[str, ...] = ("a", "b")) -> list[Fault]:
    return schedule(seed, count, kinds, phases_named(None, kinds), machines, 2)


def test_a_seed_makes_one_schedule() -> None:
    assert plan(7) == plan(7, machines=("b", "a")) and plan(7) != plan(8)
    assert [fault.number for fault in plan(7)] == list(range(1, 41))
    for fault in plan(7):
        assert fault.phase in KINDS[fault.kind].phases and fault.machine in "ab" and fault.process in (0, 1)
    counts = Counter(fault.kind for fault in plan(7, count=5 * len(USUAL)))
    assert set(counts.values()) == {5} and set(counts) == set(USUAL)


def test_what_ends_the_run_comes_last_and_once() -> None:
    assert [fault.kind for fault in plan(1, 6, ["kill", "nan"])] == ["kill"] * 5 + ["nan"]
    assert [fault.kind for fault in plan(1, 3, ["nan"])] == ["nan"]
    assert "agent" not in USUAL and "nan" not in USUAL, "they need a hand, or end the run: only where they are named"


def test_wrong_words_are_refused_in_a_line() -> None:
    with pytest.raises(ConfigError, match="there is no fault 'kil'; there are kill, hang"):
        kinds_named("kil,hang")
    with pytest.raises(ConfigError, match="name some of"):
        kinds_named(" , ")
    with pytest.raises(ConfigError, match="no fault is made in 'saving', but in init"):
        phases_named("saving", USUAL)
    with pytest.raises(ConfigError, match="hang is made in data, step, and in no other"):
        phases_named("save", ["kill", "hang"])
    for seed in (-1, 2**63):
        with pytest.raises(ConfigError, match="give a whole number"):
            plan(seed)


# -------------------------------------------------------------------- which runs


def a_run(folder: Path, processes: int = 4) -> Path:
    """The folder of a run that has two machines."""
    run = folder / "run"
    found = SupervisionFolder(run)
    assert found.become_root(1, {"address": "127.0.0.1:1", "machine": "a"})
    found.write_state({"machines": ["a", "b"], "life": 1})
    events = [{"event": "root"}, {"event": "preparing", "processes": processes}, {"event": "started"}]
    (found.path / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events), encoding="utf-8")
    return run


def test_a_run_that_can_be_drilled_and_runs_that_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path)
    assert drilled(run)[1:] == (["a", "b"], 2)
    with pytest.raises(ConfigError, match="is no run that `zili launch` has begun"):
        drilled(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    SupervisionFolder(run).lay_down(1, 0, "")
    with pytest.raises(ConfigError, match="is over, or was never begun"):
        drilled(run)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(ConfigError, match="the run of another user"):
        drilled(run)


def test_a_run_that_nobody_supervises_takes_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zili.supervision.drill._REACH", 0.1)
    monkeypatch.setattr(Drill, "_steady", lambda self, every: True)
    run = a_run(tmp_path)
    found = list(Drill(SupervisionFolder(run), 1).run(plan(1, 2), every=0))
    assert [one.fired for one in found] == [False, False]
    assert "nobody supervises" in found[0].why and exit_code(found) == NOT_SURVIVED
    lines = [json.loads(line) for line in (run / "supervision/drill.jsonl").read_text().splitlines()]
    assert [line["fault"]["number"] for line in lines] == [1, 2] and not any(line["counts"] for line in lines)


def test_what_counts_and_what_went_well() -> None:
    kill, nan = Fault(1, "kill", "a", 0, "save", 0), Fault(2, "nan", "a", 0, "step", 0)
    survived = Followed(kill, fired=True, phase="save", seconds=1.0)
    elsewhere = Followed(kill, fired=True, phase="step", seconds=1.0)
    assert survived.counts and not elsewhere.counts
    assert exit_code([survived, elsewhere, Followed(kill)]) == 0 and exit_code([elsewhere]) == NOT_SURVIVED
    assert not Followed(kill, fired=True, phase="save").went_well, "no step followed"
    assert not Followed(kill, fired=True, phase="save", code=12).went_well, "it stopped by a kill"
    assert Followed(nan, fired=True, phase="step", code=8).went_well
    assert not Followed(nan, fired=True, phase="step", code=1).went_well
    assert "1 fault of 2 fired" in sum_up([survived, elsewhere]) and "went on" in sum_up([survived])


def test_the_folder_tells_what_is_new(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    watched = Watched(run)
    assert watched.events() == [] and watched.newest_step() == (0, 0.0)
    with (run / "supervision/events.jsonl").open("a", encoding="utf-8") as events:
        events.write('{"event": "verdict"}\n{"event": "sta')
        events.flush()
        assert [event["event"] for event in watched.events()] == ["verdict"], "half a line is not read"
        events.write('rted"}\nno json\n')
    assert [event["event"] for event in watched.events()] == ["started"]
    lines = [{"kind": "train", "step": 3, "time": 1.5}, {"kind": "note", "time": 2, "text": "resumed from memory"}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    assert watched.newest_step() == (3, 1.5)
    assert (watched.went_on(1.9), watched.went_on(2.0)) == ("resumed from memory", "")


# -------------------------------------------------------------------- orders


def test_a_process_meets_an_order_in_the_phase_that_it_names(tmp_path: Path) -> None:
    worker, agent = Crumbs(tmp_path / "crumbs"), Crumbs(tmp_path / "crumbs")
    worker.enter("step")
    agent.order("raise", "save")
    worker.at_micro_batch(2)
    worker.enter("data")
    assert agent.ordered == "raise" and agent.obeyed_in is None
    with pytest.raises(DrillError), worker.within("save"):
        pass
    assert agent.ordered is None and agent.obeyed_in == "save"
    agent.order("exit", "step")
    agent.withdraw()
    worker.enter("step")
    agent.order("exit", "data")
    with pytest.raises(SystemExit) as ended:
        worker.enter("data")
    assert ended.value.code == 0


def test_a_gradient_is_spoiled_by_who_asks_for_it(tmp_path: Path) -> None:
    worker, agent = Crumbs(tmp_path / "crumbs"), Crumbs(tmp_path / "crumbs")
    agent.order("nan", "step")
    worker.enter("data")
    assert not worker.takes("nan")
    worker.enter("step")
    assert worker.takes("nan") and not worker.takes("nan") and agent.obeyed_in == "step"


# -------------------------------------------------------------------- files


def test_damage_to_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        damage(tmp_path, "flip", 3)
    for step, whole in ((5, True), (10, True), (15, False)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "shard.safetensors").write_bytes(bytes(100))
        if whole:
            (folder / "SHA256SUMS").write_text("sums", encoding="utf-8")
    newest = tmp_path / "checkpoints/step-00000010"
    assert damage(tmp_path, "flip", 13) == "checkpoints/step-00000010/shard.safetensors"
    content = (newest / "shard.safetensors").read_bytes()
    assert content[13] == 1 << 5 and sum(content) == 1 << 5
    damage(tmp_path, "truncate", 1)
    assert (newest / "shard.safetensors").stat().st_size == 50
    assert damage(tmp_path, "remove", 1) == "checkpoints/step-00000010/shard.safetensors"
    assert sorted(path.name for path in newest.iterdir()) == ["SHA256SUMS"]
    assert len(list((tmp_path / "checkpoints/step-00000005").iterdir())) == 2


# -------------------------------------------------------------------- firing

CYCLE = """
import sys, time
from pathlib import Path
from zili.parallel.control.crumbs import Crumbs
crumbs = Crumbs(Path(sys.argv[1]))
while True:
    for phase in ("data", "step", "save"):
        crumbs.enter(phase)
        time.sleep(0.02)
    crumbs.done(crumbs.step + 1)
"""


class OneProcess:
    """What firing needs of a machine's processes."""

    def __init__(self, crumbs: Path) -> None:
        self.child = subprocess.Popen([sys.executable, "-c", CYCLE, str(crumbs)])
        self.alive = {0: self.child.pid}

    def signal(self, number: signal.Signals, rank: int, *, alone: bool = False) -> None:
        self.child.send_signal(number)


class Machine:
    """An agent's part of a drill, with one process that goes from phase to phase."""

    def __init__(self, folder: Path) -> None:
        self.folder = SupervisionFolder(folder / "run")
        (self.folder.path / REPORTS).mkdir()
        self.places = Places(folder / "run", folder)
        self.processes: Any = OneProcess(self.places.crumbs(0))
        self.crumbs = Crumbs(self.places.crumbs(0))
        self.root_heard: list[dict[str, Any]] = []
        end = time.monotonic() + 60
        while not self.crumbs.step and time.monotonic() < end:
            time.sleep(0.01)

    def _tell_root(self, **thing: Any) -> None:
        self.root_heard.append(thing)

    def fire(self, kind: str, phase: Any, seconds: float = 30.0) -> dict[str, Any]:
        """The report of a fault."""
        fault = Fault(1, kind, "a", 0, phase, 0)
        order = {**fault.as_table(), "drill": "x", "seconds": seconds}

        async def work() -> None:
            firing = Firing(self.folder, self.places, lambda: self.processes, self._tell_root, FileThread())
            await firing.fire(order)

        asyncio.run(work())
        report: dict[str, Any] = json.loads((self.folder.path / REPORTS / "x-1.json").read_text())
        return report


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    made.processes.child.kill()
    made.processes.child.wait()


def test_faults_fire_in_their_phase_and_no_other(machine: Machine) -> None:
    child = machine.processes.child
    missed = machine.fire("kill", "copy", seconds=0.2)
    assert not missed["fired"] and "no process was in copy" in missed["why"]
    report = machine.fire("root", "step")
    assert report["fired"] and report["phase"] == "step" and machine.root_heard == [{"say": "die"}]
    steps = machine.crumbs.step
    end = time.monotonic() + 30
    while machine.crumbs.step == steps and time.monotonic() < end:
        time.sleep(0.01)
    assert machine.crumbs.step > steps, "a process that was only looked at goes on"
    report = machine.fire("hang", "save")
    assert report["fired"] and report["phase"] == "save" == machine.crumbs.phase
    assert state_of_process(child.pid) == "T"
    child.send_signal(signal.SIGCONT)
    report = machine.fire("kill", "data")
    assert report["phase"] == "data" == machine.crumbs.phase and report["rank"] == 0
    assert child.wait(30) == -signal.SIGKILL


def test_the_next_fault_waits_for_steps_that_are_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that went back to an earlier step has none until it is further than it was: three lives would end it."""
    monkeypatch.setattr("zili.supervision.drill._FOLLOWS", 0.1)
    run = a_run(tmp_path)
    drill = Drill(SupervisionFolder(run), 1)

    def at(step: int) -> bool:
        (run / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": step, "time": 1.0}), encoding="utf-8")
        return drill._steady(0.0)

    assert at(83) and not at(84) and not at(82) and at(85)
    SupervisionFolder(run).lay_down(1, 0, "")
    assert not at(99)
