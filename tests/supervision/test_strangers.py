"""Machines and connections that are none of the run: one clear line each, or nothing at all."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from launching import Launch, Launched, at_work
from namespaces import Switch, why_not
from test_orders import hello

import zili
from zili.errors import ConfigError
from zili.parallel.control.links import connect
from zili.supervision import agent as agents
from zili.supervision.agent import Agent, ThisMachine
from zili.supervision.folder import SupervisionFolder
from zili.supervision.root import Root
from zili.supervision.state import Launch as Job

JOB = Job(["train"], 1, 1, {"1": []})
GARBAGE = {
    "bytes": bytes(range(256)) * 8,
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "huge": b"\xff\xff\xff\xff" + b"x" * 64,
    "empty": b"\0\0\0\0" * 8,
    "silence": b"",
}
OTHER_VERSION = """
import zili
zili.__version__ = "0.0.other"
from zili.cli import main
main()
"""
TAKE_ALL = """
import socket, sys
with open("/proc/sys/net/ipv4/ip_local_port_range", "w") as few:
    few.write("40000 40001")
taken = [socket.create_server(("", port)) for port in (40000, 40001)]
print("taken", flush=True)
sys.stdin.read()
"""


async def served(folder: SupervisionFolder, listening: socket.socket, stranger: socket.socket) -> str:
    """What a machine hears from a root to which a stranger spoke before; only who said nothing still has its link."""
    folder.become_root(1, {})
    root = Root(folder, 1, JOB)
    serving = asyncio.create_task(root.serve(listening))
    with suppress(OSError):
        while await asyncio.to_thread(stranger.recv, 4096):
            pass
    link = await connect("{}:{}".format(*listening.getsockname()), folder.secret)
    link.send(json.dumps(hello("a")).encode())
    while (order := json.loads(await link.receive() or b"{}")["do"]) in ("state", "beat"):
        pass
    assert list(root._members) == ["a"]
    root._end(0, "")
    assert await serving == 0
    link.close()
    return str(order)


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_stranger_at_the_roots_port_has_no_effect(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname(), 20) as stranger,
    ):
        stranger.sendall(GARBAGE[kind])
        stranger.settimeout(20 if GARBAGE[kind] else 0.2)
        serving = served(SupervisionFolder(tmp_path), listening, stranger)
        assert asyncio.run(asyncio.wait_for(serving, 60)) == "prepare"
    assert capfd.readouterr() == ("", "") and not caplog.records


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_stranger_at_an_earlier_roots_port_is_no_root(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port is anybody's once its process has ended."""

    class Begun(Exception):
        """The machine begins a root itself."""

    async def begin(term: int) -> None:
        raise Begun(term)

    async def reach() -> None:
        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(GARBAGE[kind])

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            folder = SupervisionFolder(tmp_path)
            folder.become_root(1, {"address": f"127.0.0.1:{port}"})
            agent = Agent(folder, tmp_path, JOB, ThisMachine("a", "127.0.0.1", "cpu", False, {}), print)
            monkeypatch.setattr(agent, "_begin_root", begin)
            await agent._reach_root()

    monkeypatch.setattr(agents, "_TRIES", 0.1)
    monkeypatch.setattr(agents, "_REACH", 0.2)
    with pytest.raises(Begun, match="2"):
        asyncio.run(asyncio.wait_for(reach(), 20))


@pytest.mark.slow
@pytest.mark.parametrize(("machines", "wait"), [("1:2", "1"), ("2", "60")])
def test_a_machine_with_another_version_of_zili_is_refused(launch: Launch, machines: str, wait: str) -> None:
    """The others go on without it, or wait for one that is as they are."""
    run: Launched = launch("training.steps=100000", words=("--machines", machines, "--wait", wait))
    run.begin("a")
    run.until(lambda: '"joined"' in run.events())
    run.begin("b", zili=("-c", OTHER_VERSION))
    assert run.agents.pop("b").wait(120) == ConfigError.exit_code, run.everything()
    line = f"b has Zili 0.0.other, the others have {zili.__version__}: make them equal"
    assert run.log("b").read_text() == f"zili launch: {line}\n"
    if machines == "1:2":
        run.await_life(1, run.steps() + 5)
    assert run.life() == int(machines == "1:2")
    run.agents["a"].send_signal(signal.SIGINT)
    assert run.codes() == {130}, run.everything()


@pytest.mark.slow
def test_strangers_at_every_port_of_a_run(launch: Launch) -> None:
    """At the root's and at the node's, to the end of the run and beyond."""
    run = at_work(launch)
    ports = ports_of(run.root()) | ports_of(run.agents["a"].pid)
    assert len(ports) == 2
    with ExitStack() as strangers:
        for port in ports:
            for said in GARBAGE.values():
                link = strangers.enter_context(socket.create_connection(("127.0.0.1", port), 20))
                link.sendall(said)
        run.await_life(1, run.steps() + 10)
        run.agents["a"].send_signal(signal.SIGINT)
        assert run.codes() == {130}, run.everything()
    assert run.life() == 1 and "Traceback" not in run.log("a").read_text(), run.everything()


@pytest.mark.slow
def test_a_host_without_a_free_port_is_one_line(launch: Launch) -> None:
    if why := why_not():
        pytest.skip(why)
    run: Launched = launch("training.steps=100000")
    with Switch("a") as switch:
        taken = subprocess.Popen(
            [*switch.inside("a"), sys.executable, "-c", TAKE_ALL], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert taken.stdout is not None and taken.stdout.readline() == b"taken\n"
            run.begin("a", words=("--host", switch.host("a")), inside=switch.inside("a"))
            assert run.codes() == {ConfigError.exit_code}, run.everything()
        finally:
            taken.kill()
            taken.wait()
    said = run.log("a").read_text().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith(f"zili: --host {switch.host('a')}: this machine cannot listen there (Address already in")


def ports_of(pid: int) -> set[int]:
    """Where a process listens."""
    own = set()
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            own.add(str(handle.readlink()))
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}
