"""What the root and its agents do when two things happen at once: found by hostile reading, each of them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any, cast

import pytest
from launching import Launch as Launching
from test_held import STATES, resumed
from test_orders import THREE, Paper, agent_in, hello, sent, stopped, three_at_work

from zili.parallel.control.links import Link
from zili.supervision.file_thread import FileThread
from zili.supervision.folder import SupervisionFolder
from zili.supervision.held import StateMark
from zili.supervision.members import Membership, Waiting
from zili.supervision.root import Root
from zili.supervision.state import Launch, State


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return three_at_work(tmp_path)


def ended(rank: int, machine: str) -> dict[str, Any]:
    """As a process that raised after a step."""
    at = {"phase": "step", "step": 54, "begun_after": 0, "seconds": {}, "stood": 0.0, "saves": 0, "stopping": 0.0}
    error = "Traceback (most recent call last):\nValueError: the callback does not like this step"
    return {"rank": rank, "machine": machine, "code": 1, "stopped": False, "error": error, "log": "", **at}


def fail(root: Root) -> None:
    """b's process raises, all stop, and the root decides to go on."""
    root._hear(root._members["b"], {"say": "ended", "generation": root._state.generation, "ending": ended(1, "b")})
    generation = root._state.generation
    for name in "abc":
        endings = [ended(1, "b")] if name == "b" else []
        root._hear(root._members[name], {"say": "stopped", "generation": generation, "endings": endings, "held": []})
    assert len(root._state.failures) == 1 and root._state.life == 2 and root._phase is Waiting.PREPARING


def test_a_failure_is_judged_once_though_a_machine_leaves_before_the_next_life_is_prepared(
    root: Root, tmp_path: Path
) -> None:
    """The fence is being written, or a nursery imports: the agent still has the endings of the life before."""
    fail(root)
    agent, paper = agent_in(tmp_path / "agent"), Paper()
    agent._link, agent._generation, agent._endings = cast(Any, paper), 1_000_001, {1: ended(1, "b")}
    root._hear(root._members["a"], {"say": "leave"})
    assert root._phase is Waiting.STOPPING
    asyncio.run(agent._stop(root._state.generation, gentle=True))
    for name in "ac":
        root._hear(root._members[name], {"say": "stopped", "generation": 1_000_002, "endings": [], "held": []})
    root._hear(root._members["b"], paper.sent[-1])
    assert len(root._state.failures) == 1 and root._phase is not Waiting.OVER, (root._code, root._phase)


def test_a_failure_is_judged_once_though_the_next_root_finds_an_older_state(root: Root, tmp_path: Path) -> None:
    """The root was killed before its disk had what its agents have: as when the machine that it is on is left out."""
    before = root._state.as_table()
    fail(root)
    newer = {**root._state.as_table(), "generation": 1_000_001, "life": 1, "running": False, "version": 99}
    folder = SupervisionFolder(tmp_path / "elsewhere")
    folder.write_state(before)
    other = Root(folder, 2, THREE)
    other._tasks.begin = asyncio.run  # type: ignore[method-assign]
    for name in "bac":
        endings = [ended(1, "b")] if name == "b" else []
        said = hello(name, state=newer, generation=1_000_001, endings=endings)
        other._welcome(said, cast(Link, Paper()))
    stopped(other, "abc", 1_000_001)
    assert len(other._state.failures) <= 1 and other._code == 0, other._state.failures


def test_a_root_that_took_over_while_all_stopped_gently_goes_on(root: Root, tmp_path: Path) -> None:
    """Workers were saving when the root was killed: that they were told to stop nobody remembers."""
    root._stop(gentle=True)  # another machine is here
    state = root._state.as_table()
    other = Root(SupervisionFolder(tmp_path / "elsewhere"), 2, THREE)
    other._tasks.begin = asyncio.run  # type: ignore[method-assign]
    for name in "abc":
        other._welcome(hello(name, state=state, generation=1_000_001), cast(Link, Paper()))
    stopped(other, "abc", 1_000_001)
    other._since -= 1000
    other._look()
    assert other._phase is not Waiting.RUNNING, "no machine has a process, and it waits for ever"


def test_a_spare_that_leaves_takes_nobody_along_that_saves(root: Root) -> None:
    """SIGTERM to several machines in one second."""
    root._welcome(hello("spare"), cast(Link, Paper()))
    root._hear(root._members["a"], {"say": "leave"})
    assert root._phase is Waiting.STOPPING
    root._hear(root._members["spare"], {"say": "leave"})
    assert "a" in root._members, "its processes save"


def test_a_machine_that_comes_while_a_life_is_prepared_is_used(tmp_path: Path) -> None:
    folder = SupervisionFolder(tmp_path)
    root = Root(folder, 1, Launch(["train"], 1, 3, {"2": [], "3": []}, wait=60))
    root._tasks.begin = asyncio.run  # type: ignore[method-assign]
    for name in "ab":
        root._since -= 61 * (name == "b")
        root._welcome(hello(name), cast(Link, Paper()))
    assert root._phase is Waiting.PREPARING
    root._welcome(hello("c"), cast(Link, Paper()))
    for name in "ab":
        root._hear(root._members[name], {"say": "prepared", "generation": 1_000_001, "address": "nowhere"})
    root._look()
    assert sent(root, "a")[-1] == "stop" or "c" in root._state.machines, "it would grow at the next step"


def test_a_machine_that_asks_to_leave_twice_may_come_again(root: Root) -> None:
    """By `zili launch drain`, and by SIGTERM before its supervisor has ended."""
    member = root._members["b"]
    root._drain("b")
    stopped(root, "abc", 1_000_001)
    assert "b" not in root._members
    root._hear(member, {"say": "leave"})  # its link is read to the end
    assert root._state.leaving == {}


def test_a_machine_that_replaces_one_that_is_leaving_is_taken() -> None:
    members = Membership(Launch(["train"], 1, 2, {"2": []}))
    for name in "ab":
        members[name] = cast(Any, None)
    state = State(machines=["a", "b"], leaving={"a": 130})
    assert members.refusal("c", {}, state) == ""


def test_a_fence_is_never_lowered(tmp_path: Path) -> None:
    """By a root that a stalled file server held up, when another one has begun a life."""
    folder = SupervisionFolder(tmp_path)
    assert folder.begin(2_000_001) and not folder.begin(1_000_007)
    assert (folder.path / "generation").read_text() == "2000001"


def test_work_that_fails_does_not_end_the_thread() -> None:
    async def work() -> int:
        files = FileThread()
        files.put(lambda: json.loads("no JSON"))
        return await asyncio.wait_for(files.do(lambda: 3), 2)

    assert asyncio.run(work()) == 3


def test_a_machine_that_is_asked_twice_leaves_though_its_folder_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No root answers, since its machine is gone; docs: "ends the machine at once"."""
    monkeypatch.setattr(SupervisionFolder, "root", lambda self: time.sleep(5) or (0, {}))

    async def reach() -> None:
        agent = agent_in(tmp_path)
        agent._leave()
        assert agent._leaving is not None
        agent._leaving -= 31
        asyncio.get_running_loop().call_later(0.1, agent._leave)
        await agent._reach_root()

    begun = time.monotonic()
    with pytest.raises(SystemExit):
        asyncio.run(reach())
    assert time.monotonic() - begun < 4


def test_an_answer_of_an_earlier_life_is_none(tmp_path: Path) -> None:
    async def ask() -> None:
        agent = agent_in(tmp_path)
        agent._link = cast(Any, Paper())
        agent._generation = 1
        first = asyncio.ensure_future(agent._ask_where("k"))
        await asyncio.sleep(0)
        first.cancel()  # its process was killed, the answer is on its way
        agent._generation = 2
        second = asyncio.ensure_future(agent._ask_where("k"))
        await asyncio.sleep(0)
        agent._learn_where({"kind": "k", "generation": 1, "marks": [[[[1, 0], 7], ["gone:1"]]]})
        agent._learn_where({"kind": "k", "generation": 2, "marks": [[[[1, 0], 9], ["here:1"]]]})
        assert await asyncio.wait_for(second, 1) == {StateMark((1, 0), 9): ["here:1"]}

    asyncio.run(ask())


def test_a_run_that_may_not_wait_waits_for_the_machines_that_it_needs(tmp_path: Path) -> None:
    """--wait 0: "seconds to wait for a missing machine before going on with fewer"."""
    root = Root(SupervisionFolder(tmp_path), 1, Launch(["train"], 1, 2, {"2": []}, wait=0))
    root._tasks.begin = asyncio.run  # type: ignore[method-assign]
    root._since -= 1
    root._welcome(hello("a"), cast(Link, Paper()))
    assert root._phase is Waiting.GATHERING


def test_a_root_that_cannot_hand_over_ends(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most machines fell silent, and the folder refuses: nobody watches the run any more."""

    def refuse(*words: Any) -> None:
        raise OSError("stale")

    def begin(work: Any) -> None:
        try:
            asyncio.run(work)
        except OSError as error:
            root._failed(error)

    root._tasks.begin = begin  # type: ignore[method-assign,assignment]
    monkeypatch.setattr(SupervisionFolder, "hand_over", refuse)
    for name in "ab":
        root._members[name].heard -= 100
    root._look()
    assert root._over.is_set()


@pytest.mark.slow
def test_a_second_failure_before_the_next_copy_loses_nothing(launch: Launching) -> None:
    """One machine, two processes of which each has half of the state. Test 01 for a whole run."""
    run = launch(*STATES, "training.steps=60")
    run.begin("a")
    run.await_life(1, 12)
    os.kill(run.workers("a")[1], 9)
    time.sleep(0.1)
    run.fault(1, "raise")  # after the first step of life 2, before it is kept
    assert run.codes() == {0}, run.everything()
    first, *others = resumed(run)
    told = [line[:160] for line in run.said()]
    assert others and others[0] >= first, "\n".join([f"{first} {others}", *told])


@pytest.mark.slow
def test_a_root_that_is_killed_while_a_machine_leaves_stops_nobody(launch: Launching) -> None:
    """Test 13 for a whole run: saving takes longer than another root needs to come."""
    run = launch(*STATES, "training.steps=2000", words=("--machines", "1:2", "--wait", "1"))
    run.begin("a", "b")
    run.until(lambda: any("on 2 machines" in line for line in run.said()) and run.steps() > 5)
    workers = [*run.workers("a"), *run.workers("b")]
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)  # they are slow to save
    run.agents["a"].terminate()
    run.until(lambda: any("is to be left" in line for line in run.said()))
    time.sleep(0.5)
    os.kill(run.root(), 9)
    time.sleep(6)
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    run.until(lambda: run.agents["a"].poll() is not None, 30)
    run.await_life(2, 0)
