"""What the root and its agents say to one another when things happen at once or late."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from zili.cli.launch import identity_of, show
from zili.config import RunConfig
from zili.errors import ConfigError
from zili.parallel.control.links import Link
from zili.supervision.agent import Agent, ThisMachine
from zili.supervision.folder import SupervisionFolder
from zili.supervision.members import Refused, table_in
from zili.supervision.nursery import Nursery
from zili.supervision.root import PATIENCE, Root
from zili.supervision.state import Launch, State

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
    table = {"machine": name, "identity": {}, "ago": 0.0, "generation": 0, "endings": [], "state": State().as_table()}
    return {**table, **other}


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """One with machines a, b and c at work."""
    folder = SupervisionFolder(tmp_path)
    folder.become_root(1, {})
    root = Root(folder, 1, THREE)
    for name in "abc":
        root._welcome(hello(name), cast(Link, Paper()))
    for member in tuple(root._members.values()):
        root._hear(member, {"say": "prepared", "generation": 1_000_001, "address": "nowhere"})
    return root


def sent(root: Root, name: str) -> list[str]:
    return [order["do"] for order in cast(Paper, root._members[name].link).sent]


def test_machines_that_fall_silent_in_one_moment_do_not_end_the_root(root: Root) -> None:
    for name in "ab":
        root._members[name].heard -= PATIENCE + 1
    root._look()
    assert list(root._members) == ["c"] and sent(root, "c")[-1] == "stop"


def test_a_root_that_slept_does_without_no_machine(root: Root) -> None:
    slept = 2 * PATIENCE
    root._listened -= slept
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
        root._hear(root._members[name], {"say": "stopped", "generation": 1_000_001, "endings": []})
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
        root._hear(root._members[name], {"say": "stopped", "generation": 1_000_001, "endings": []})
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
    return Agent(folder, SupervisionFolder(folder), THREE, machine, print)


def test_an_agent_that_cannot_do_what_it_is_told_ends(tmp_path: Path) -> None:
    async def failing() -> None:
        raise OSError("no such address")

    async def serve() -> None:
        agent = agent_in(tmp_path)
        agent._follow(failing())
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
    others = (identity_of(config, "cpu", 4, "1:2"), identity_of(config, "cpu", 2, "1:1"))
    assert all(other != alike[0] for other in others)
