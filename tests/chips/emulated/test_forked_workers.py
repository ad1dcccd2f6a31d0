"""Machines try their emulated chips before they join a run: by forks, and cold where those cannot use them."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
from emulated import FAULTS
from forks import zili
from many import on_processes
from plugins import ASCEND, CAMBRICON, UNHEARD_OF, Environment, Vendor

from zili.config import RunConfig, dump_recipe
from zili.errors import ZiliError
from zili.supervision import nursery, processes, proving
from zili.supervision.processes import LocalProcesses
from zili.supervision.proving import Proving
from zili.training.checkpoints import list_checkpoints

_COLD = "BEGUN_COLD"
_IN_A_FORK = f"""
import os, signal, sys, time
from pathlib import Path
fork = {_COLD!r} not in os.environ and b"worker" not in Path("/proc/self/cmdline").read_bytes().split(b"\\0")
"""
RAISES = "if fork: raise RuntimeError('no context after a fork')"
WRONG = json.dumps([{"operation": "aten::mm", "kind": "scale", "amount": 0.01, "rank": 1}])


class Proof(NamedTuple):
    """What came of it."""

    cold: bool
    said: list[str]
    error: str
    left: list[str]
    """Files of it that are still there."""


class _Nursery:
    """A nursery that is a fork of this process, which has everything imported, in place of a Python of its own; a cold
    worker is its fork too, and says so to the plugin."""

    def __init__(self, words: list[str], *, pass_fds: list[int], start_new_session: bool) -> None:
        self.pid = os.fork()
        if self.pid:
            return
        try:
            (kept,) = pass_fds  # with the other end in hand it would never hear that the agent is gone
            os.closerange(3, kept)
            os.closerange(kept + 1, 4096)
            sys.argv = words[2:]
            with mock.patch.object(os, "execv", _begin_cold):
                nursery.main()
        finally:
            os._exit(1)

    def wait(self, seconds: float) -> None:
        os.waitpid(self.pid, 0)


def _begin_cold(_: str, words: list[str]) -> None:
    os.environ[_COLD] = "1"
    nursery.answer_with_stacks()
    nursery._run(words[4:])


def prove(chip: str, count: int, seconds: float) -> Proof:
    """In a process that has `chip`: try it as an agent does, with `seconds` for it."""

    async def proved(folder: Path) -> Proof:
        def begun() -> LocalProcesses:
            made.append(LocalProcesses(chip, cold=proof.cold, ended=lambda *_: None))
            return made[-1]

        made: list[LocalProcesses] = []
        said: list[str] = []
        proof, error = Proving(chip, "127.0.0.1", count, folder, said.append, cold=False), ""
        try:
            await proof.prove(begun(), begun)
        except ZiliError as raised:
            error = f"{raised.exit_code}: {raised}"
        finally:
            for one in made:
                one.close()
        return Proof(proof.cold, said, error, [file.name for file in folder.iterdir()])

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(processes, "subprocess", mock.Mock(Popen=_Nursery, TimeoutExpired=subprocess.TimeoutExpired)),
        mock.patch.multiple(proving, FORKED=seconds, COLD=seconds, _AGAIN=0),
    ):
        return asyncio.run(proved(Path(folder)))


def proof(vendor: Vendor, with_plugins: Environment, plugin: str = "", seconds: float = 60, **more: str) -> Proof:
    """That of two processes, whose plugin begins with `plugin`."""
    variables = with_plugins(vendor, **more)
    _begin_with(plugin, vendor, variables)
    (found,) = on_processes(1, prove, vendor.backend, 2, seconds, environment=variables)
    return found


def _begin_with(text: str, vendor: Vendor, variables: dict[str, str]) -> None:
    file = Path(variables["PYTHONPATH"].split(os.pathsep)[0], f"{vendor.plugin}.py")
    file.write_text(f"{_IN_A_FORK}{text}\n{file.read_text(encoding='utf-8')}", encoding="utf-8")


@pytest.mark.parametrize("vendor", [ASCEND, CAMBRICON, UNHEARD_OF], ids=str)
def test_a_sound_chip_is_proven_by_forks(vendor: Vendor, with_plugins: Environment) -> None:
    assert proof(vendor, with_plugins) == Proof(False, [], "", [])


def test_a_chip_that_computes_wrongly_is_refused(with_plugins: Environment) -> None:
    found = proof(UNHEARD_OF, with_plugins, **{FAULTS: WRONG})
    assert found.error.startswith("6: this machine cannot take part: process 1: xyz:1 multiplies wrongly: ")
    assert found.said == found.left == [] and "\n" not in found.error


@pytest.mark.parametrize(
    ("plugin", "seconds", "why"),
    [
        pytest.param(RAISES, 60, "no context after a fork", id="raises", marks=pytest.mark.slow),
        pytest.param("if fork: os.kill(os.getpid(), signal.SIGSEGV)", 60, "ended by SIGSEGV", id="dies"),
        pytest.param("if fork: time.sleep(1000)", 3, "did not end in 3 s, at ", id="hangs"),
    ],
)
def test_where_forks_cannot_use_a_chip_workers_begin_cold(
    plugin: str, seconds: float, why: str, with_plugins: Environment
) -> None:
    found = proof(UNHEARD_OF, with_plugins, plugin, seconds)
    assert (found.cold, found.error, found.left) == (True, "", [])
    (line,) = found.said
    assert line.startswith("forked processes cannot use unheard here (process 0: ") and why in line
    assert "; 2 of 2 processes)" in line and "each worker begins as a Python of its own, restarts take longer" in line
    assert "at " not in why or "torch_xyz.py:5 in <module>" in line, "where it hangs"


@pytest.mark.slow
def test_a_chip_that_hangs_in_any_process_is_refused_in_time(with_plugins: Environment) -> None:
    found = proof(UNHEARD_OF, with_plugins, "time.sleep(1000)", 2)
    assert found.error.startswith("6: ") and "did not end in 2 s, at " in found.error and found.said == []


Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def launch(recipe: Callable[..., RunConfig], with_plugins: Environment, tmp_path: Path) -> Launch:
    """`zili launch` of two processes on a chip whose plugin begins with a text."""

    def run(plugin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "tiny.toml"
        config = recipe("training.steps=4", "chip.name=unheard", "chip.precision=fp32", f"folder={tmp_path / 'run'}")
        file.write_text(dump_recipe(config), encoding="utf-8")
        variables = with_plugins(UNHEARD_OF, **more)
        _begin_with(plugin, UNHEARD_OF, variables)
        return zili("launch", file, "--processes", "2", "--machine", "a", environment=variables)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("plugin", ["", RAISES], ids=["sound", "cold"])
def test_a_run_on_such_a_chip(plugin: str, launch: Launch, tmp_path: Path) -> None:
    done = launch(plugin)
    assert done.returncode == 0, done.stderr
    assert "life 1: 2 processes on 1 machine" in done.stderr and list_checkpoints(tmp_path / "run/checkpoints")
    assert done.stderr.count("forked processes cannot use unheard here") == bool(plugin), done.stderr


@pytest.mark.slow
def test_a_machine_whose_chip_computes_wrongly_does_not_join(launch: Launch, tmp_path: Path) -> None:
    done = launch(**{FAULTS: WRONG})
    assert done.returncode == 6, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("zili: this machine cannot take part: process 1: xyz:1 multiplies wrongly")
    assert not list((tmp_path / "run/supervision").glob("root-*")), "it greeted no root"
