"""What the root and its agents say to one another when things happen at once or late."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from zili.cli.launch import identity_of, show
from zili.config import RunConfig
from zili.errors import ConfigError, NoProgressError, TrainingError
from zili.parallel.control.links import Link, _host_and_port, address_of, connect, listening_at
from zili.supervision.agent import Agent, ThisMachine
from zili.supervision.decisions import leave_out_batch
from zili.supervision.endings import Endings
from zili.supervision.file_thread import FileThread
from zili.supervision.folder import Signs, SupervisionFolder
from zili.supervision.members import PATIENCE, Refused, table_in
from zili.supervision.nursery import Nursery
from zili.supervision.root import Root
from zili.supervision.state import Launch, State, state_of
from zili.training.left_out import read_decisions

THREE = Launch(["train"], 1, 3, {"2": [], "3": []}, spares=5)


class Paper:
    """A link that keeps what was sent."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, message: bytes) -> None:
        self.sent.append(json.loads(message))

    async def receive(self) -> bytes:
        await asyncio.sleep(0)
        return b'{"do": "beat"}'

    def close(self) -> None:
        pass


def hello(name: str, **other: Any) -> dict[str, Any]:
    table = {
        "machine": name,
        "identity": {},
        "ago": 0.0,
        "generation": 0,
        "endings": [],
        "state": State().as_table(),
        "held": [],
        "stopping": False,
    }
    return {**table, **other}


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return three_at_work(tmp_path)


def three_at_work(run: Path) -> Root:
    """A root with machines a, b and c at work."""
    folder = SupervisionFolder(run)
    folder.become_root(1, {})
    root = Root(folder, 1, THREE)
    root._tasks.begin = asyncio.run  # type: ignore[method-assign] - at once, as there is no loop here
    for name in "abc":
        root._welcome(hello(name), cast(Link, Paper()))
    for member in tuple(root._members.values()):
        root._hear(member, {"say": "prepared", "generation": 1_000_001, "address": "nowhere"})
    return root


def sent(root: Root, name: str) -> list[str]:
    return [order["do"] for order in cast(Paper, root._members[name].link).sent]


def test_machines_that_fall_silent_in_one_moment_do_not_end_the_root(root: Root) -> None:
    for name in "abc":
        root._members[name].heard -= PATIENCE + 1
    root._look()
    assert not root._members


def test_a_root_that_slept_does_without_no_machine(root: Root) -> None:
    slept = 2 * PATIENCE
    root._members._listened -= slept
    for member in root._members.values():
        member.heard -= slept
    root._look()
    assert list(root._members) == ["a", "b", "c"]
    for member in root._members.values():
        member.heard -= PATIENCE
    root._look()
    assert not root._members


def test_a_machine_that_is_back_while_the_others_stop_holds_nobody_up(root: Root) -> None:
    root._lose(root._members["b"], "is gone")
    root._welcome(hello("b"), cast(Link, Paper()))
    for name in "ac":
        root._hear(root._members[name], {"say": "stopped", "generation": 1_000_001, "endings": [], "held": []})
    assert sent(root, "b")[-1] == "prepare"


def test_who_is_there_hears_nothing_of_those_that_come_to_stand_by(root: Root) -> None:
    """Else ten thousand machines that come to a new root would be sent a hundred million messages."""
    before = sent(root, "a")
    for number in range(5):
        root._welcome(hello(f"spare-{number}"), cast(Link, Paper()))
    assert sent(root, "a") == before
    assert "state" in sent(root, "spare-0")


def test_processes_that_nothing_ends_hold_nobody_up(root: Root) -> None:
    """One waits for a dead disk, and hears no signal."""
    root._stop()
    for name in "ac":
        root._hear(root._members[name], {"say": "stopped", "generation": 1_000_001, "endings": [], "held": []})
    root._look()
    assert root._state.life == 1, "b has its time"
    link = cast(Paper, root._members["b"].link)
    root._killed = time.monotonic() - 31
    root._look()
    assert link.sent[-1]["do"] == "end" and "SIGKILL did not end" in link.sent[-1]["text"]
    assert list(root._state.left_out) == ["b"]
    root._since -= 61  # of waiting for another machine
    root._look()
    assert root._state.life == 2 and root._state.machines == ["a", "c"]


@pytest.mark.parametrize("raw", [b"", b"\xff", b"[1]", b"3", b"[" * 100_000, b'{"a"'])
def test_what_is_no_table_is_refused(raw: bytes) -> None:
    with pytest.raises(Refused):
        table_in(raw)
    assert table_in(None) is None and table_in(b'{"say": "beat"}') == {"say": "beat"}


def agent_in(folder: Path) -> Agent:
    machine = ThisMachine("a", "127.0.0.1", "cpu", False, {})
    return Agent(SupervisionFolder(folder), folder, THREE, machine, print)


def test_an_agent_that_cannot_do_what_it_is_told_ends(tmp_path: Path) -> None:
    async def failing() -> None:
        raise OSError("no such address")

    async def serve() -> None:
        agent = agent_in(tmp_path)
        agent._tasks.begin(failing())
        await agent._serve(cast(Link, Paper()))

    with pytest.raises(OSError, match="no such address"):
        asyncio.run(asyncio.wait_for(serve(), 20))


def test_of_two_lives_that_are_prepared_at_once_the_newer_one_counts(tmp_path: Path) -> None:
    class Slow:
        """A node whose first end takes longer than the next one."""

        seconds = 0.2

        async def close(self, patience: float) -> None:
            seconds, self.seconds = self.seconds, 0.0
            await asyncio.sleep(seconds)

    class Nobody:
        """A machine without processes."""

        def __init__(self) -> None:
            self.alive: dict[int, int] = {}
            self.over = False
            self.ready = asyncio.get_running_loop().create_future()
            self.ready.set_result(0.0)

    async def prepare() -> list[dict[str, Any]]:
        agent, paper = agent_in(tmp_path), Paper()
        agent._link, agent._node, agent._processes = cast(Any, paper), cast(Any, Slow()), cast(Any, Nobody())
        await asyncio.gather(*(agent._prepare(number, number, 0, 1, (0, 1)) for number in (1, 2)))
        assert agent._node is not None
        await agent._node.close(0)
        return paper.sent

    assert [said["generation"] for said in asyncio.run(prepare())] == [2]


def test_a_request_to_end_reaches_the_next_root(tmp_path: Path) -> None:
    agent, paper = agent_in(tmp_path), Paper()
    agent._interrupt()  # there is no root at the moment
    agent._greet(cast(Link, paper))
    assert [said.get("say") for said in paper.sent] == [None, "interrupt"]


def test_a_signal_reaches_a_process_that_has_no_group_of_its_own_yet() -> None:
    nursery = Nursery.__new__(Nursery)  # another one would take this process's signals
    with subprocess.Popen(["sleep", "60"]) as child:
        nursery._ranks = {child.pid: 0}
        nursery._obey({"do": "signal", "rank": None, "signal": 9, "alone": False})
        try:
            assert child.wait(20) == -9
        finally:
            child.kill()


def test_a_folder_that_vanishes_is_named(tmp_path: Path) -> None:
    folder = SupervisionFolder(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(ConfigError, match="cannot be read any more"):
        folder.root()


def test_a_machine_that_is_asked_to_end_leaves_the_others_at_work(root: Root) -> None:
    """By SIGTERM, as when one node is evicted. When the last one is asked too, the run ends."""
    root._hear(root._members["b"], {"say": "leave"})
    stop = cast(Paper, root._members["a"].link).sent[-2]
    assert (stop["do"], stop["gentle"]) == ("stop", True), "they save first"
    link = cast(Paper, root._members["b"].link)
    stopped(root, "abc", 1_000_001)
    assert (link.sent[-1]["do"], link.sent[-1]["code"]) == ("end", 130) and "b" not in root._members
    root._since -= 61  # of waiting for another machine
    root._look()
    assert root._state.machines == ["a", "c"] and not root._state.leaving
    for name in "ac":
        root._hear(root._members[name], {"say": "leave"})
    stopped(root, "ac", 1_000_002)
    assert root._code == 130 and root._over.is_set()


def stopped(root: Root, names: str, generation: int) -> None:
    for name in names:
        root._hear(root._members[name], {"say": "stopped", "generation": generation, "endings": [], "held": []})


def test_a_drain_is_known_to_the_next_root(root: Root, tmp_path: Path) -> None:
    assert "is left after the next step" in root._drain("b")
    state = root._state.as_table()
    other = Root(SupervisionFolder(tmp_path / "elsewhere"), 2, THREE)
    other._tasks.begin = asyncio.run  # type: ignore[method-assign]
    papers = {name: Paper() for name in "abc"}
    for name, paper in papers.items():
        other._welcome(hello(name, state=state, generation=1_000_001), cast(Link, paper))
    assert other._state.leaving == {"b": 0}
    other._stop(gentle=True)
    stopped(other, "abc", 1_000_001)
    assert papers["b"].sent[-1]["code"] == 0 and sorted(other._members) == ["a", "c"]


def test_a_machine_of_another_version_is_refused_whatever_it_says(root: Root) -> None:
    paper = Paper()
    with pytest.raises(Refused):
        root._welcome({"machine": "d", "identity": {"Zili": "9"}}, cast(Link, paper))
    with pytest.raises(Refused):
        root._welcome({"hello": 1}, cast(Link, paper))
    assert [(order["do"], order["code"]) for order in paper.sent] == [("end", 3)] * 2
    assert paper.sent[0]["text"] == "d has Zili 9, the others have None: make them equal"


@pytest.mark.parametrize("table", [[], None, {"life": "x"}, {"machines": 3}, {"failures": [1]}, {"left_out": {"a": 1}}])
def test_a_state_that_is_none_is_an_empty_one(table: Any) -> None:
    assert state_of(table) == State()
    assert state_of({"life": 3, "of_a_later_version": 1}) == State(life=3)


def test_failures_are_not_kept_without_end() -> None:
    state = State()
    for number in range(1_500):
        state.remember({"step": number})
    assert len(state.failures) == 1_000 and state.failures[-1] == {"step": 1_499}


def test_a_folder_that_does_not_answer_costs_no_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file server stalls for as long as a machine may say nothing: all agents would leave the root."""
    answer = threading.Event()
    monkeypatch.setattr(SupervisionFolder, "look", lambda self: (answer.wait(20), (0, None))[1])

    async def stalled() -> tuple[list[float], int]:
        folder = SupervisionFolder(tmp_path)
        root = Root(folder, 1, THREE)
        with listening_at("127.0.0.1") as listening:
            address = address_of("127.0.0.1", listening.getsockname()[1])
            serving = asyncio.ensure_future(root.serve(listening))
            link, idle = [await connect(address, folder.secret) for _ in range(2)]
            link.send(json.dumps(hello("a")).encode())
            heard = []
            while len(heard) < 5:
                raw = await asyncio.wait_for(link.receive(), PATIENCE)
                assert raw is not None, "the root is gone"
                if json.loads(raw)["do"] == "beat":
                    heard.append(time.monotonic())
            link.send(json.dumps({"say": "interrupt", "hard": True}).encode())
            answer.set()
            code = await asyncio.wait_for(serving, 10)  # a connection on which nobody speaks holds nobody up
            link.close()
            idle.close()
            return heard, code

    heard, code = asyncio.run(stalled())
    assert code == 130 and heard[-1] - heard[0] < PATIENCE


def test_a_root_that_hears_no_more_of_most_hands_over(root: Root, tmp_path: Path) -> None:
    """The machine with the root is cut off. It cannot go on alone, and the two others could."""
    for name in "bc":
        root._members[name].heard -= PATIENCE + 1
    root._look()
    assert root._over.is_set() and sent(root, "a")[-1] != "stop", "the others may go on with this life"
    assert root._folder.root() == (1, {"cut_off": ["a"]})
    agent = agent_in(tmp_path)
    assert agent._patience_with({"cut_off": ["a"]}) > agent._patience_with({"cut_off": ["b"]}) == 0


def test_a_root_that_lives_is_left_to_those_that_reach_it() -> None:
    signs = Signs()
    found = [signs.come(sign, 7) for sign in ("", "a", "a", "b")]
    assert found == [False, True, False, True] and not signs.first and signs.generation == 7


def test_a_folder_that_refuses_for_a_while_is_asked_again() -> None:
    answers: list[Any] = [OSError(errno.ESTALE, "stale"), ConfigError("cannot be read any more"), 3]

    def work() -> Any:
        said = answers.pop(0)
        if isinstance(said, Exception):
            raise said
        return said

    async def ask() -> Any:
        return await FileThread().patiently(work)

    assert asyncio.run(ask()) == 3
    answers = [OSError(errno.EIO, "broken")] * 9

    async def ask_in_haste() -> Any:
        return await FileThread().patiently(work, patience=0.1)

    with pytest.raises(OSError, match="broken"):
        asyncio.run(ask_in_haste())


def test_roots_that_end_by_errors_again_and_again_end_the_machine(tmp_path: Path) -> None:
    class Crashed:
        def poll(self) -> int:
            return 1

    async def again() -> None:
        agent, waits = agent_in(tmp_path), []
        for _ in range(5):
            agent._root = cast(Any, Crashed())
            waits.append(agent._patience_with({}))

    with pytest.raises(NoProgressError, match="ended 5 times in a row by an error"):
        asyncio.run(again())


def test_a_machine_that_is_asked_twice_to_leave_leaves_at_once(tmp_path: Path) -> None:
    agent = agent_in(tmp_path)
    agent._leave()
    agent._leave()  # the launcher passes on what the job manager has sent
    assert agent._broken is None
    assert agent._leaving is not None
    agent._leaving -= 31
    agent._leave()
    assert isinstance(agent._broken, SystemExit) and agent._broken.code == 130


def test_a_secret_that_is_damaged_is_named(tmp_path: Path) -> None:
    folder = SupervisionFolder(tmp_path)
    (folder.path / "secret").write_text("no hex")
    with pytest.raises(ConfigError, match="secret is damaged"):
        SupervisionFolder(tmp_path)


def test_a_machine_has_one_supervisor_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = SupervisionFolder(tmp_path / "run")
    with folder.machine("a") as own:
        (own / "left").touch()
        with pytest.raises(ConfigError, match="machine a has a supervisor"), folder.machine("a"):
            pass
        with folder.machine("b"):
            assert own.stat().st_mode & 0o077 == 0 and own.parent.stat().st_mode & 0o077 == 0
    assert not own.exists()
    own.mkdir()
    (own / "left").touch()  # by one that was killed
    with folder.machine("a") as again:
        assert again == own and not list(own.iterdir())


def test_a_folder_that_somebody_else_made_for_us_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"zili-{os.getuid()}").symlink_to(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="TMPDIR"), SupervisionFolder(tmp_path / "run").machine("a"):
        pass


def test_machines_find_one_another_by_ipv6() -> None:
    try:
        listening = listening_at("::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    with listening:
        address = address_of("::1", listening.getsockname()[1])
        assert address.startswith("[::1]:")
        listening.settimeout(5)
        with socket.create_connection(_host_and_port(address), 5):
            listening.accept()[0].close()


def test_a_pipe_that_nobody_reads_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", encoding="utf-8") as nobody:
        os.close(reading)
        monkeypatch.setattr("sys.stderr", nobody)
        show("life 1")
        show("life 2")


def test_machines_that_were_told_other_counts_are_not_of_one_run(recipe: Callable[..., RunConfig]) -> None:
    config = recipe()
    alike = [identity_of(config, "cpu", 2, "1:2") for _ in range(2)]
    assert alike[0] == alike[1]
    others = [identity_of(config, "cpu", 4, "1:2"), identity_of(config, "cpu", 2, "1:1")]
    manifest = Path(f"{config.data.sources[0].store}.json")
    said = manifest.read_text(encoding="utf-8")
    manifest.write_text(said.replace('"sha256": "', '"sha256": "0', 1), encoding="utf-8")
    others.append(identity_of(config, "cpu", 2, "1:2"))
    manifest.write_text(said, encoding="utf-8")
    assert all(other != alike[0] for other in others)


# ------------------------------------------------------------------ batches that end a life


BAD_BATCH = {"rank": 1, "code": 1, "signal": None, "error": "IndexError: index out of range in self", "step": 7}


def life_that_met_it(folder: Path, **watch: Any) -> Root:
    """The process of b cannot train on the batch after step 7."""
    found = SupervisionFolder(folder)
    found.become_root(1, {})
    root = Root(found, 1, replace(THREE, watch=watch))
    waiting: list[Any] = []

    def one_after_another(work: Any) -> None:
        waiting.append(work)
        if len(waiting) > 1:
            return  # ordered by what is being done
        while waiting:
            asyncio.run(waiting[0])
            del waiting[0]

    root._tasks.begin = one_after_another  # type: ignore[method-assign]
    for name in "abc":
        root._welcome(hello(name), cast(Link, Paper()))
    meet_it(root, 1)
    return root


def meet_it(root: Root, life: int) -> None:
    generation = 1_000_000 + life
    for member in tuple(root._members.values()):
        root._hear(member, {"say": "prepared", "generation": generation, "address": "nowhere"})
    ending = {**BAD_BATCH, "machine": "b", "log": "", "phase": "step", "stopped": False}
    root._hear(root._members["b"], {"say": "ended", "generation": generation, "ending": ending})
    for name in "abc":
        root._hear(root._members[name], {"say": "stopped", "generation": generation, "endings": [], "held": []})


def test_the_next_life_leaves_out_the_batch_where_the_recipe_allows_it(tmp_path: Path) -> None:
    for step in (4, 6):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    root = life_that_met_it(tmp_path, failure="roll_back", margin=2, most=2)
    assert root._state.life == 2 and root._state.bad_batch is None and sent(root, "a")[-1] == "prepare"
    (decision,) = read_decisions(tmp_path / "decisions.json")
    assert (decision.action, decision.first, decision.last, decision.step) == ("roll_back", 5, 9, 7)
    meet_it(root, 2)
    assert [(one.first, one.last) for one in read_decisions(tmp_path / "decisions.json")] == [(5, 9), (10, 14)]
    meet_it(root, 3)
    assert root._code == TrainingError.exit_code and "watch.most = 2" in root._folder.root()[1]["over"]["text"]


def test_a_recipe_that_says_nothing_leaves_out_nothing(tmp_path: Path) -> None:
    root = life_that_met_it(tmp_path)
    assert root._state.life == 1 and root._code and not (tmp_path / "decisions.json").exists()


def test_a_root_that_comes_after_orders_the_same_once(tmp_path: Path) -> None:
    bad = {"step": 7, "why": "life 1: process 1 on b"}
    assert leave_out_batch(tmp_path, bad, {"failure": "roll_back"}) == leave_out_batch(tmp_path, bad, {})
    assert len(read_decisions(tmp_path / "decisions.json")) == 1


def ending(rank: int, machine: str, **other: Any) -> dict[str, Any]:
    at = {"phase": "step", "step": 54, "begun_after": 0, "seconds": {}, "stood": 0.0, "saves": 0, "stopping": 0.0}
    return {"rank": rank, "machine": machine, "code": 0, "stopped": False, "error": "", "log": "", **at, **other}


def test_a_process_that_ends_too_early_without_an_error_is_the_cause(root: Root) -> None:
    """Its peers say that they lost it, or say nothing and wait: with nobody's error."""
    lost = {"code": 1, "log": "RuntimeError: [../gloo/transport/tcp/pair.cc:525] Connection closed by peer"}
    for others in ([], [ending(0, "a", **lost), ending(2, "c", **lost)]):
        ends = Endings("abc", 1)
        assert not any(ends.hear(one) for one in (ending(1, "b", phase="warm_up"), *others))
        assert ends.doubt is not None and not ends.all_done
        failure = ends.failure(None)
        assert failure is not None and (failure.rule, failure.machine) == ("ended-early", "b")
    calm = Endings("abc", 1)
    for rank, machine in enumerate("abc"):
        calm.hear(ending(rank, machine, phase="end"))
    assert calm.all_done and calm.doubt is None and calm.failure(None) is None


def test_a_failure_before_a_lifes_first_step_is_after_the_runs_last_one(root: Root) -> None:
    """Though it went on from memory, and the disk has only what is older."""
    root._hear(root._members["a"], {"say": "beat", "at": {"step": 28}})
    root._hear(
        root._members["b"], {"say": "ended", "generation": 1_000_001, "ending": ending(1, "b", code=-9, step=None)}
    )
    stopped(root, "abc", 1_000_001)
    assert root._state.failures[0]["step"] == 28
