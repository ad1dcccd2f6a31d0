"""`zili launch`: what breaks is begun anew, and the run ends with the weights of one that nothing disturbed."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from launching import Launch, at_work, weights
from many import on_processes, train

from zili.supervision.account import account_of
from zili.supervision.folder import SupervisionFolder, ask_root
from zili.training.checkpoints import list_checkpoints, read_state


def test_a_run_that_is_broken_again_and_again_ends_as_if_it_was_not(launch: Launch) -> None:
    """Two machines of two processes. A worker is killed, one raises, the root is killed, a worker is stopped, a machine
    vanishes and comes back; and a run of the same length that nothing happens to."""
    words = ("--machines", "2", "--wait", "30", "--patience", "2")
    run = launch("training.steps=120", "checkpoint.every=5", words=words)
    run.begin("a", "b")
    run.await_life(1, run.steps() + 6)
    os.kill(run.workers("a")[1], signal.SIGKILL)
    run.await_life(2, run.steps() + 6)
    run.fault(3, "raise")
    run.await_life(3, run.steps() + 6)
    root = run.root()
    os.kill(root, signal.SIGKILL)
    run.until((run.run / "supervision/root-000002.json").exists)
    run.await_life(3, run.steps() + 6)
    assert run.life() == 3, "workers go on without a root"
    os.kill(run.workers("b")[0], signal.SIGSTOP)
    run.await_life(4, run.steps() + 6)
    run.vanish("b")
    run.begin("b")
    run.await_life(5, run.steps() + 6)
    assert run.codes() == {0}, run.everything()
    calm = run.config.changed(folder=run.run.parent / "calm")
    on_processes(4, train, calm)
    assert weights(run.run) == weights(calm.folder)
    said = "\n".join(run.said())
    for what in (r"process [13] on a, .* killed", "rule own-exception|rule raised", "is stopped", "machine b is gone"):
        assert re.search(what, said), (what, said)
    told = account_of(run.run)
    assert [life.number for life in told.lives] == [1, 2, 3, 4, 5] and told.code == 0
    assert [life.failed for life in told.lives] == [True, True, True, True, False]
    assert told.lives[1].resumed and told.seconds["reload"] > 0
    # Beside other work a message may be late, and so an order; 1 % is for a machine of one's own.
    assert told.unknown < 0.1, told
    assert "% trained" in said


@pytest.mark.slow
def test_lives_go_on_from_the_machines_disks_and_from_a_store(launch: Launch, tmp_path: Path) -> None:
    """With a folder that gets a checkpoint at the end alone; then without that folder and the disks."""
    tiers = [
        f'{{place = "{tmp_path}/disk/mine", every = 1}}',
        f'{{place = "file://{tmp_path}/bucket/mine", every = 5}}',
    ]
    words = ("--machines", "2", "--wait", "30", "--patience", "2")
    run = launch(
        "training.steps=90",
        "checkpoint.every=0",
        "checkpoint.memory=0",
        f"checkpoint.tiers=[{', '.join(tiers)}]",
        words=words,
    )
    run.begin("a", "b")
    run.await_life(1, run.steps() + 8)
    os.kill(run.workers("a")[1], signal.SIGKILL)
    run.await_life(2, run.steps() + 8)
    for machine in ("a", "b"):
        run.vanish(machine)
    assert f"resumed from {tmp_path}/disk/mine/step-" in (run.run / "metrics.jsonl").read_text()
    run.until(lambda: not run.left())  # the root waits a while for a machine, and writes
    shutil.rmtree(run.run)
    shutil.rmtree(tmp_path / "disk")
    run.begin("a", "b")
    assert run.codes() == {0}, run.everything()
    calm = run.config.changed(folder=run.run.parent / "calm", checkpoint={"tiers": ()})
    on_processes(4, train, calm)
    assert weights(run.run) == weights(calm.folder)
    notes = (run.run / "metrics.jsonl").read_text()
    assert "was brought from the store file:" in notes
    life, *_ = account_of(run.run).lives
    assert life.resumed % 5 == 0 and life.resumed > 5


@pytest.mark.slow
def test_a_batch_that_cannot_be_trained_on_is_left_out_where_the_recipe_says_so(launch: Launch) -> None:
    """And a run that knows it from its first step has the same bits."""
    run = launch("training.steps=20", "checkpoint.every=5", "watch.failure=roll_back")
    (run.run.parent / "bad-batch").write_text("13")
    run.begin("a")
    assert run.codes() == {0}, run.everything()
    said = "\n".join(run.said())
    assert re.search(r"process 1 on a, after step 13.* Zili: go back to the checkpoint before and skip", said), said
    assert re.search(r"step 14: life 1: process 1 .*; batch 13 left out, from a checkpoint before", said), said
    state = read_state(list_checkpoints(run.run / "checkpoints")[-1])
    assert (state.step, state.samples) == (20, 21 * run.config.training.global_batch)
    again = run.config.changed(folder=run.run.parent / "again", watch={"decisions": run.run})
    on_processes(2, train, again)
    assert weights(run.run) == weights(again.folder)


@pytest.mark.slow
def test_a_run_that_goes_back_by_itself_forgets_what_memory_has_of_the_way_it_left(launch: Launch) -> None:
    run = launch("training.steps=60", "checkpoint.every=5", "watch.non_finite=roll_back", "checkpoint.memory_share=1")
    (run.run.parent / "nan-batch").write_text("13")
    run.begin("a")
    run.await_life(1, 30)
    os.kill(run.workers("a")[1], signal.SIGKILL)
    assert run.codes() == {0}, run.everything()
    told = (run.run / "metrics.jsonl").read_text(encoding="utf-8")
    (gone_back,) = re.findall(r"resumed from \S*step-(\d+) at step", told)
    assert int(gone_back) == 10 and "batch 13 left out" in told and run.life() == 2
    assert re.findall(r"resumed from memory at step (\d+)", told)
    again = run.config.changed(folder=run.run.parent / "again", watch={"decisions": run.run})
    on_processes(2, train, again)
    assert weights(run.run) == weights(again.folder)


@pytest.mark.slow
def test_a_machine_that_vanishes_is_done_without_until_it_is_back(launch: Launch) -> None:
    run = launch("training.steps=100000", words=("--machines", "1:2", "--wait", "1"))
    run.begin("a", "b")
    run.await_life(1, 12)
    run.vanish("b")
    run.await_life(2, 32)
    assert any("2 processes on 1 machine" in line for line in run.said()), run.said()
    run.begin("b")
    run.until(lambda: any("going on with 2" in line for line in run.said()))
    run.await_life(3, run.steps() + 10)
    evicted = run.agents.pop("b")
    evicted.send_signal(signal.SIGTERM)
    assert evicted.wait(60) == 130, run.everything()
    run.await_life(4, run.steps() + 10)
    run.agents["a"].send_signal(signal.SIGTERM)
    assert run.codes() == {130}, run.everything()
    assert any(re.search(r"interrupted; step \d+ is saved", line) for line in run.said())
    assert weights(run.run)


@pytest.mark.slow
def test_a_machine_that_is_stopped_does_not_keep_the_run_from_the_others(launch: Launch) -> None:
    """All of the machine with the first process is stopped, as by a hypervisor; it wakes when others have gone on."""
    run = launch("training.steps=100000", words=("--machines", "1:2", "--wait", "1"))
    run.begin("a")
    run.until((run.run / "supervision/root-000001.json").exists)
    run.begin("b")
    run.until(lambda: any("on 2 machines" in line for line in run.said()))
    run.await_life(run.life(), run.steps() + 3)
    life = run.life()
    asleep = (run.agents["a"].pid, run.nursery("a"), *run.workers("a"))
    for pid in asleep:
        os.kill(pid, signal.SIGSTOP)
    run.await_life(life + 1, run.steps() + 3)
    for pid in asleep:
        os.kill(pid, signal.SIGCONT)
    run.await_life(life + 2, run.steps() + 3)
    run.agents["b"].send_signal(signal.SIGINT)
    assert run.codes() == {130}, run.everything()


def test_a_second_supervisor_is_refused_and_one_that_is_killed_leaves_no_process(launch: Launch) -> None:
    run = at_work(launch)
    first = run.agents["a"]
    run.begin("a")
    assert run.agents["a"].wait(60) == 3
    assert "has a supervisor of" in run.log("a").read_text()
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    run.until(lambda: not run.left(), 30)


@pytest.mark.slow
def test_a_nursery_that_is_killed_and_a_job_that_is_asked_to_end(launch: Launch) -> None:
    """Schedulers send SIGTERM to all processes of a job: the root lives on to end the run."""
    run = at_work(launch)
    workers = run.workers("a")
    os.kill(run.nursery("a"), signal.SIGKILL)
    run.await_life(2, run.steps() + 3)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers), "they would keep their devices"
    for pid in (run.root(), *run.workers("a"), run.agents["a"].pid):
        os.kill(pid, signal.SIGTERM)
    assert run.codes() == {130}, run.everything()
    assert weights(run.run)


@pytest.mark.slow
def test_a_machine_is_drained_that_has_the_root(launch: Launch) -> None:
    run = launch("training.steps=100000", words=("--machines", "1:2", "--wait", "1"))
    run.begin("a")
    run.until((run.run / "supervision/root-000001.json").exists)
    run.begin("b")
    run.until(lambda: any("on 2 machines" in line for line in run.said()) and run.steps() > 3)
    folder = SupervisionFolder(run.run)
    assert "is left after the next step" in ask_root(folder, {"drain": "a"})
    assert run.agents.pop("a").wait(60) == 0, run.everything()
    run.until((run.run / "supervision/root-000002.json").exists)
    run.await_life(run.life(), run.steps() + 10)
    run.agents["b"].send_signal(signal.SIGINT)
    assert run.codes() == {130}, run.everything()
