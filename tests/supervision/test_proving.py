"""What a machine concludes from the try-outs of its processes, and when it makes them."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
from forks import zili

from zili.errors import ChipError, ConfigError
from zili.parallel.control.links import Link
from zili.supervision import proving, tryout
from zili.supervision.agent import Agent, ThisMachine
from zili.supervision.folder import SupervisionFolder
from zili.supervision.processes import ERROR_FILE, LocalProcesses
from zili.supervision.proving import Proving
from zili.supervision.state import Launch


class Planned:
    """Processes that end with planned codes, and say planned things; None: that hang."""

    def __init__(self, *codes: int | None, said: str = "", log: str = "") -> None:
        self.codes, self.said, self.log = list(codes), said, log
        self.over = False
        self.alive: dict[int, int] = {}
        self.killed: list[int | None] = []
        self.ready = asyncio.get_running_loop().create_future()
        self.ready.set_result(0.0)

    def begin_apart(self, key: int, words: list[str], environment: dict[str, str], log: Path) -> asyncio.Future[int]:
        assert words[:2] == ["launch", "try-out"] and key < 0
        if self.said:
            Path(environment[ERROR_FILE]).write_text(json.dumps({"message": {"message": self.said}}), encoding="utf-8")
        log.write_text(self.log, encoding="utf-8")
        ended = asyncio.get_running_loop().create_future()
        if (code := self.codes.pop(0)) is not None:
            ended.set_result(code)
        return ended

    def signal(self, number: signal.Signals, rank: int | None = None, *, alone: bool = False) -> None:
        if number == signal.SIGKILL:
            self.killed.append(rank)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proving, "_AGAIN", 0)


def in_a_loop(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 60))


def never() -> LocalProcesses:
    raise AssertionError("no other processes are needed")


def proof(folder: Path, count: int = 1, *, cold: bool = False) -> tuple[Proving, list[str]]:
    said: list[str] = []
    return Proving("acme", "host-a", count, folder, said.append, cold=cold), said


def local(processes: Planned) -> LocalProcesses:
    return cast(LocalProcesses, processes)


def test_a_link_that_fails_is_no_matter_of_forks(tmp_path: Path) -> None:
    async def work() -> None:
        made, _ = proof(tmp_path)
        with pytest.raises(ConfigError, match=r"take part: --host host-a: this machine cannot be reached$"):
            await made.prove(local(Planned(3, said="zili: --host host-a: this machine\ncannot be reached")), never)
        assert not made.cold

    in_a_loop(work)


def test_a_machine_told_to_begin_cold_tries_no_fork(tmp_path: Path) -> None:
    async def work() -> None:
        made, said = proof(tmp_path, 2, cold=True)
        await made.prove(local(Planned(0, 0)), never)
        with pytest.raises(ChipError, match=r"process 1: ended with code 1: OSError: no driver$"):
            await made.prove(local(Planned(0, 1, 0, 1, log="Traceback\n  line\nOSError: no driver\n")), never)
        assert not said and list(tmp_path.iterdir()) == []

    in_a_loop(work)


def test_a_device_that_somebody_just_left_is_asked_once_more(tmp_path: Path) -> None:
    async def work() -> None:
        made, said = proof(tmp_path)
        await made.prove(local(Planned(6, 0)), never)
        assert not made.cold and not said

    in_a_loop(work)


def test_what_nothing_ends_holds_the_machine_up_no_longer_than_said(tmp_path: Path) -> None:
    async def work() -> None:
        made, said = proof(tmp_path)
        hung, hung_too = Planned(None), Planned(None)
        with (
            mock.patch.multiple(proving, FORKED=0.05, COLD=0.05, _DYING=0.05),
            pytest.raises(ChipError, match="in 0 s"),
        ):
            await made.prove(local(hung), lambda: local(hung_too))
        assert hung.killed == hung_too.killed == [-1] and not said

    in_a_loop(work)


def test_who_stood_by_is_tried_again_and_who_worked_is_not(tmp_path: Path) -> None:
    async def work() -> None:
        made, _ = proof(tmp_path)
        processes = Planned(0, 0, 0)
        await made.prove(local(processes), never)
        await made.prove_again(local(processes), never)
        assert len(processes.codes) == 2, "a moment ago it was right"
        made._used = cast(float, made._used) - 301
        await asyncio.gather(*(made.prove_again(local(processes), never) for _ in range(2)))
        assert len(processes.codes) == 1, "one of both"
        made._used -= 301
        made._look = mock.AsyncMock(side_effect=ConfigError("the disk is full"))
        with pytest.raises(ConfigError, match="disk is full"):
            await made.prove_again(local(processes), never)
        made.used()
        await made.prove_again(local(processes), never)
        assert len(processes.codes) == 1

    in_a_loop(work)


def test_a_spare_whose_chip_has_gone_takes_no_place(tmp_path: Path) -> None:
    async def work() -> None:
        machine = ThisMachine("a", "127.0.0.1", "cpu", False, {})
        agent, told = (
            Agent(SupervisionFolder(tmp_path / "run"), tmp_path, Launch(["train"], 1, 2, {"2": []}), machine, print),
            mock.Mock(),
        )
        processes = Planned(0, 6, 6, 6, said="zili: cpu does not work")
        agent._link, agent._processes = cast(Link, told), local(processes)
        with (
            mock.patch.multiple(agent, _new_processes=lambda: local(processes)),
            mock.patch.object(Planned, "close", lambda _: None, create=True),
        ):
            await agent._proving.prove(agent._processes, agent._renewed)
            agent._proving._used = cast(float, agent._proving._used) - 301
            with pytest.raises(ChipError, match="cannot take part: cpu does not work"):
                await agent._prepare(1, 1, 0, 2, (0, 1))
        assert agent._node is None and not told.send.called

    in_a_loop(work)


def test_the_try_out_says_nothing_or_one_line() -> None:
    sound = zili("launch", "try-out", "cpu")
    assert (sound.returncode, sound.stdout, sound.stderr) == (0, "", "")
    foreign = zili("launch", "try-out", "cpu", "--host", "192.0.2.7")
    assert foreign.returncode == 3 and foreign.stdout == ""
    assert (
        "--host 192.0.2.7: this machine cannot be reached there" in foreign.stderr and foreign.stderr.count("\n") == 1
    )
    unknown = zili("launch", "try-out", "acne")
    assert unknown.returncode == 6 and unknown.stderr.count("\n") == 1


def test_a_link_that_is_slow_silent_or_wrong() -> None:
    tryout._try_link("127.0.0.1")
    with (
        mock.patch.object(tryout, "time", mock.Mock(monotonic=mock.Mock(side_effect=[0.0, 11.0]))),
        pytest.raises(ConfigError, match="1 MiB took 11 s"),
    ):
        tryout._try_link("127.0.0.1")
    with (
        mock.patch.object(tryout.socket, "create_connection", mock.Mock(side_effect=TimeoutError())),
        pytest.raises(ConfigError, match="cannot be reached there"),
    ):
        tryout._try_link("127.0.0.1")

    def changed(address: tuple[str, int], seconds: float) -> socket.socket:
        link = socket.socket()
        link.connect(address)
        double = mock.MagicMock(wraps=link)
        double.sendall = lambda piece: link.sendall(bytes(len(piece)))
        double.__enter__.return_value = double
        double.__exit__.side_effect = lambda *_: link.close()
        return cast(socket.socket, double)

    with (
        mock.patch.object(tryout.socket, "create_connection", changed),
        pytest.raises(ConfigError, match="bytes change"),
    ):
        tryout._try_link("127.0.0.1")
