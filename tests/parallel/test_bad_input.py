"""`zili train` on two processes: what is wrong is said once, with its exit code, and nobody is left waiting."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from forks import Zili
from many import files_of, free_port, place

from zili.config import RunConfig, dump_recipe
from zili.training.checkpoints import list_checkpoints

_SECONDS = 120


class Outcome(NamedTuple):
    """What a user sees of all processes together."""

    codes: list[int]
    out: str
    err: str


class Runner:
    """Trains a tiny recipe with the command, on processes that the test starts as torchrun would."""

    def __init__(self, recipe: Callable[..., RunConfig], folder: Path) -> None:
        plain = (f"chip.operations.{name}=reference" for name in ("linear", "attention"))
        self.file = folder / "tiny.toml"
        self.file.write_text(dump_recipe(recipe(*plain, "training.steps=4")), encoding="utf-8")
        self.folder = folder / "run"

    @property
    def checkpoints(self) -> list[Path]:
        return list_checkpoints(self.folder / "checkpoints")

    def __call__(self, *overrides: str, count: int = 2) -> Outcome:
        started = [self._start(rank, count, port, overrides) for port in [free_port()] for rank in range(count)]
        try:
            ended = [process.end() for process in started]
        finally:
            for process in started:
                process.kill()
        out, err = "".join(one.stdout for one in ended), "".join(one.stderr for one in ended)
        assert "Traceback" not in out + err, err
        return Outcome([one.returncode for one in ended], " ".join(out.split()), err)

    def _start(self, rank: int, count: int, port: int, overrides: tuple[str, ...]) -> Zili:
        environment = {**place(rank, count, port), "COLUMNS": "300"}
        return Zili("train", self.file, *words(overrides), environment=environment)


def words(overrides: tuple[str, ...]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


@pytest.fixture
def zili(recipe: Callable[..., RunConfig], tmp_path: Path) -> Runner:
    return Runner(recipe, tmp_path)


def one_error(outcome: Outcome, code: int, *parts: str) -> None:
    """Every process ends with `code`, and one message holds all of `parts`."""
    assert outcome.codes == [code] * len(outcome.codes), outcome
    assert outcome.err.count("zili: ") == 1, outcome.err
    assert [part for part in parts if part not in outcome.err] == [], outcome.err
    assert all(outcome.err.count(part) == 1 for part in parts), outcome.err


def test_a_world_of_another_size(zili: Runner) -> None:
    one_error(zili("parallel.shards=4"), 7, "[parallel] asks for 4 processes", "start 4")
    assert not zili.folder.exists()


@pytest.mark.slow
def test_a_layout_that_does_not_fit_the_model(zili: Runner) -> None:
    one_error(zili("parallel.tensor=2"), 7, "parallel.tensor 2 does not divide model.kv_heads 1")
    assert not zili.folder.exists()


@pytest.mark.slow
def test_a_store_that_is_not_there(zili: Runner) -> None:
    one_error(zili('data.sources=[{store="nowhere"}]'), 4, "nowhere.json", "Build the store again")
    assert not zili.folder.exists()


@pytest.mark.slow
def test_a_schedule_that_refuses_the_micro_batches(zili: Runner) -> None:
    wrong = ("parallel.pipeline=2", "parallel.schedule=interleaved", "model.layers=4", "training.global_batch=5")
    outcome = zili(*wrong, "training.micro_batch=1")
    one_error(outcome, 7, "parallel.schedule interleaved")
    assert not zili.checkpoints


@pytest.mark.slow
def test_checkpoints_that_are_damaged_or_of_another_run(zili: Runner) -> None:
    first = zili()
    assert first.codes == [0, 0] and first.err == "", first
    assert first.out.count("Done: 4 steps") == 1
    before = files_of(zili.folder)
    other = ("model.layers=3", "model.layers 2 there, 3 here"), ("seed=7", "seed 0 there, 7 here")
    for override, part in other:
        one_error(zili(override), 5, "step-00000004", part)
    assert files_of(zili.folder) == before

    older, newest = zili.checkpoints
    (missing,) = newest.glob("shard-00002.*")
    missing.unlink()
    again = zili()
    assert again.codes == [0, 0], again
    assert again.out.count("passing over a damaged checkpoint") == 1
    assert again.out.count(f"{missing} cannot be read") == 1
    assert again.out.count(f"resumed from {older} at step 2") == 1
    assert [path.name for path in zili.checkpoints] == ["step-00000002", "step-00000004"]

    for path in zili.checkpoints:
        next(path.glob("shard-00001.*")).write_bytes(b"nothing")
    one_error(zili(), 5, "all 2 checkpoints", str(zili.folder), "new folder")


@pytest.mark.slow
def test_what_all_processes_meet_after_they_joined_is_said_once(zili: Runner) -> None:
    one_error(zili("optimizer.learning_rate=1e30", "optimizer.clip=0"), 8, "Lower optimizer.learning_rate")
    one_error(zili("data.held_out=nowhere"), 4, "nowhere.json")


@pytest.mark.slow
def test_torchrun_says_it_once_too(zili: Runner) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "-m", "zili", "train", str(zili.file)]

    def run(*overrides: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*torchrun, *command, *words(overrides)], capture_output=True, text=True, check=False, timeout=_SECONDS
        )

    wrong = run("parallel.shards=4")
    assert wrong.returncode != 0
    ours, torchruns = wrong.stderr.split("Traceback (most recent call last)")
    cause = torchruns.partition("Root Cause")[2]
    assert wrong.stderr.count("asks for 4 processes") == 2 and "asks for 4 processes" in ours
    assert "exitcode  : 7" in cause and "traceback : zili: [parallel] asks for 4 processes" in cause
    assert "start 4: torchrun --nproc-per-node 4 -m zili train" in cause
    assert not zili.folder.exists()
    right = run()
    assert right.returncode == 0 and right.stdout.count("Done: 4 steps") == 1, right
    assert f"torchrun --nproc-per-node 2 -m zili train {zili.folder / 'recipe.toml'}" in right.stdout
    for path in zili.checkpoints:
        shutil.rmtree(path)
        path.mkdir()
    damaged = run()
    assert damaged.returncode != 0 and damaged.stderr.count("all 2 checkpoints") == 2, damaged.stderr
    assert "all 2 checkpoints" in damaged.stderr.partition("Root Cause")[2]
