"""How a command ends among others: who speaks, with which code, and what torchrun finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from zili.errors import CheckpointError

LOST = "[/src/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:9"


@pytest.fixture
def error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As torchrun gives one to each process."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr("zili.cli.ending._SECONDS_BEHIND", 0.0)
    return tmp_path / "error.json"


@pytest.fixture
def among_two(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`among_two(rank)`: this process is one of two that have joined."""

    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    def place(rank: int) -> None:
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr("zili.parallel.world._others", True)
        monkeypatch.setattr("zili.cli.ending.os._exit", leave)

    return place


def root_cause(error_file: Path, code: int) -> str:
    """What torchrun prints of a process that left this file."""
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file=str(error_file))
    return ChildFailedError("zili", {0: failure}).format_msg().partition("Root Cause")[2]


def test_torchrun_names_our_message_and_code(zili, error_file: Path, tmp_path: Path) -> None:
    outcome = zili("train", tmp_path / "nothere.toml")
    assert outcome.code == 3 and outcome.err.count("nothere.toml") >= 1
    cause = root_cause(error_file, outcome.code)
    assert "exitcode  : 3" in cause and f"traceback : {outcome.err.strip()}" in cause
    assert "Traceback" not in cause


def test_torchrun_names_a_defect_with_its_traceback(
    zili, error_file: Path, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise KeyError("a defect")

    monkeypatch.setattr("zili.api.open_run", fail)
    outcome = zili("train", recipe_file)
    assert outcome.code == 1 and "KeyError: 'a defect'" in outcome.err
    assert "Traceback (most recent call last)" in (cause := root_cause(error_file, 1)) and "KeyError" in cause


@pytest.mark.parametrize("loss", [RuntimeError(LOST), dist.DistNetworkError("the connection is gone")])
def test_a_process_that_lost_another_says_so_once_and_is_no_defect(
    zili,
    error_file: Path,
    recipe_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    among_two: Callable[[int], None],
    loss: Exception,
) -> None:
    def fail(*_: object) -> NoReturn:
        raise loss

    monkeypatch.setattr("zili.api.open_run", fail)
    said = []
    for rank in range(2):
        among_two(rank)
        outcome = zili("train", recipe_file)
        assert outcome.code == 11 and "another process of the run is gone" in root_cause(error_file, 11)
        said.append(outcome.err)
    assert said[0].startswith("zili: another process of the run is gone") and said[0].count("\n") == 1
    assert "third_party" not in said[0] and said[1] == ""


@pytest.mark.parametrize("words", [("train",), ("trian",), ("train", "x.toml", "--steps", "5")])
def test_the_first_process_of_a_machine_says_what_cannot_be_parsed(
    zili, error_file: Path, among_two: Callable[[int], None], words: tuple[str, ...]
) -> None:
    said = []
    for rank in range(2):
        among_two(rank)
        outcome = zili(*words)
        assert outcome.code == 2
        said.append(outcome.err)
    assert "Usage: " in said[0] and said[1] == ""
    assert "zili: " in root_cause(error_file, 2)


def test_what_all_agreed_on_is_said_by_the_first_alone(
    zili, recipe_file: Path, monkeypatch: pytest.MonkeyPatch, among_two: Callable[[int], None]
) -> None:
    def fail(*_: object) -> NoReturn:
        error = CheckpointError("all are damaged")
        error.agreed = True
        raise error

    monkeypatch.setattr("zili.api.open_run", fail)
    said = []
    for rank in range(2):
        among_two(rank)
        outcome = zili("train", recipe_file)
        assert outcome.code == 5
        said.append(outcome.err)
    assert said == ["zili: all are damaged\n", ""]


def test_the_line_to_go_on_with_starts_as_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from zili.cli.options import starter

    def line(size: int, here: int, world: int | None = None) -> str:
        from zili.parallel.layout import torchrun

        monkeypatch.setenv("WORLD_SIZE", str(size))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
        monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
        return starter() if world is None else torchrun(world)

    several = "--rdzv-backend c10d --rdzv-endpoint HOST:29500"
    assert line(1, 1) == "zili"
    assert line(4, 4) == "torchrun --nproc-per-node 4 -m zili"
    assert line(16, 16) == "torchrun --nproc-per-node 16 -m zili"
    assert line(16, 8) == f"torchrun --nnodes 2 {several} --nproc-per-node 8 -m zili"
    assert line(1, 1, 4) == "torchrun --nproc-per-node 4 -m zili"
    assert line(1, 1, 512) == line(2, 2, 512) == f"torchrun --nnodes 64 {several} --nproc-per-node 8 -m zili"
    assert line(32, 16, 512) == f"torchrun --nnodes 32 {several} --nproc-per-node 16 -m zili"
    assert line(2, 2, 12) == f"torchrun --nnodes 3 {several} --nproc-per-node 4 -m zili"
