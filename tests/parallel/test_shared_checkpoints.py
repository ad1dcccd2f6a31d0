"""What processes share of a checkpoint: they write it, hash it and read it together, each near its own part."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from many import on_processes, open_trainer, train, world_here
from tiny_models import Runs
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, Shard

from zili import checksums
from zili.config import RunConfig
from zili.errors import CheckpointError, ZiliError
from zili.parallel.world import World
from zili.training import checkpoints, restoring
from zili.training.checkpoints import RunState, SoundCheckpoint
from zili.training.fence import generation_fence
from zili.training.index import TensorIndex, read_index
from zili.training.saving import Saver

WORLD = 3
STATE = RunState(1, 1, {"model": {}}, "")


def raised_by(work: Callable[[], object]) -> tuple[str, str, bool] | None:
    try:
        work()
    except ZiliError as error:
        return type(error).__name__, str(error), error.agreed
    return None


def tensors_of(world: World, fill: Callable[[Tensor], Tensor] = lambda whole: whole) -> dict[str, Tensor]:
    """A matrix of ten rows over the processes, 4, 4 and 2, a vector that all have, and a generator's state of each."""
    whole = fill(torch.arange(40.0).reshape(10, 4))
    local = whole.chunk(WORLD)[world.rank].clone()
    cut = DTensor.from_local(
        local, world.mesh("weights"), [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )
    own = torch.full((3,), world.rank, dtype=torch.uint8)
    key = checkpoints.generator_key("cpu", world.rank)
    return {"model.cut": cut, "model.all": fill(torch.arange(5.0)), key: own}


def saver_of(folder: Path, world: World, **options: Any) -> Saver:
    return Saver(folder, world, keep=2, asynchronous=False, patience=9, **options)


def save(saver: Saver, tensors: dict[str, Tensor], step: int = 1) -> None:
    saver.save(RunState(step, step, {"model": {}}, ""), tensors)
    saver.wait()


@contextmanager
def names_given_to(owner: Any, function: str) -> Iterator[list[str]]:
    """The names of the files that a function is called with."""
    names: list[str] = []
    real = getattr(owner, function)

    def watched(file: Any = None, *rest: Any, **named: Any) -> Any:
        names.append(Path(file or named["filename"]).name)
        return real(*(() if file is None else (file,)), *rest, **named)

    with mock.patch.object(owner, function, watched):
        yield names


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: (path / "shard-00002.safetensors").unlink(),
    "truncated": lambda path: os.truncate(path / "shard-00002.safetensors", 100),
    "renamed": lambda path: (path / "shard-00002.safetensors").rename(path / "shard-00004.safetensors"),
    "swapped": lambda path: swap(path / "shard-00002.safetensors", path / "shard-00003.safetensors"),
    "older": lambda path: (path / "index.json").write_text("{}"),
}


def swap(one: Path, other: Path) -> None:
    aside = one.with_suffix(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def together(folder: Path) -> dict[str, Any]:
    """All that three processes do with checkpoints of their own, one after another."""
    world = world_here(WORLD)
    tensors = tensors_of(world)
    save(saver_of(folder, world), tensors)
    path = folder / "step-00000001"
    found: dict[str, Any] = {"damaged": {}}
    for name, inflict in DAMAGE.items():
        copy = folder.parent / name / path.name

        def prepare(copy: Path = copy, inflict: Callable[[Path], object] = inflict) -> None:
            shutil.copytree(path, copy)
            inflict(copy)

        world.from_first(prepare)
        found["damaged"][name] = raised_by(lambda copy=copy: checkpoints.verify(copy, world))  # type: ignore[misc]
    with (
        names_given_to(checksums, "sha256") as found["hashed"],
        names_given_to(safetensors, "safe_open") as found["opened"],
        names_given_to(Path, "iterdir") as found["listed"],
    ):

        def reads(index: TensorIndex) -> set[str]:
            return restoring.files_to_read(index, {"model.cut": tensors["model.cut"]}, [], world.rank)

        index = checkpoints.verify(path, world, reads)
        room = {"model.cut": tensors_of(world, torch.zeros_like)["model.cut"]}
        restoring._read(SoundCheckpoint(path, index), room)
    found["same"] = torch.equal(local_of(room), local_of(tensors))
    found["old form"] = read_old_form(folder.parent / "old", world, tensors)
    found["fenced"] = fenced(folder, world, tensors)
    return found


def local_of(tensors: dict[str, Tensor]) -> Tensor:
    cut = tensors["model.cut"]
    assert isinstance(cut, DTensor)
    return cut.to_local()


def read_old_form(folder: Path, world: World, tensors: dict[str, Tensor]) -> bool:
    """Whether each process reads its part of what torch's writer wrote."""
    dcp.save(
        tensors,
        storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
        process_group=dist.new_group(backend="gloo"),
    )
    room = tensors_of(world, torch.zeros_like)
    restoring._read(SoundCheckpoint(folder, read_index(folder)), room)
    return torch.equal(local_of(room), local_of(tensors)) and torch.equal(room["model.all"], tensors["model.all"])


def fenced(folder: Path, world: World, tensors: dict[str, Tensor]) -> list[Any]:
    """Saves of a life that is no longer the newest from the start, of one that ceases to be while it writes, and of one
    that slept between its last look and the rename: also where the newer life has saved the same step meanwhile."""
    before = what_is_in(folder)
    found: list[Any] = []
    for answers, step in (([False], 2), ([True, False], 2), ([True, True, False], 2), ([True, True, False], 1)):
        said = iter(answers)
        saver = saver_of(folder, world, fence=lambda said=said: next(said))  # type: ignore[misc]
        saver.save(RunState(step, step, {"model": {}}, ""), tensors)
        found.append(raised_by(saver.wait))
    world.sum(torch.zeros(1))
    return [*found, what_is_in(folder) == before]


def what_is_in(folder: Path) -> list[tuple[str, int]]:
    """Names and inodes of everything: of the same bytes another file is another one."""
    return sorted((str(path.relative_to(folder)), path.stat().st_ino) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    found = on_processes(WORLD, together, folder)
    path = folder / "step-00000001"
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=path, check=True, capture_output=True)
    return found


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_shard_that_is_not_what_was_written_is_named_by_all(three: list[dict[str, Any]], damage: str) -> None:
    told = [found["damaged"][damage] for found in three]
    assert told[0] == told[1] == told[2] and told[0] is not None
    kind, text, agreed = told[0]
    named = {"renamed": "shard-00004", "older": "index.json", "swapped": "shard-0000"}.get(damage, "shard-00002")
    assert kind == "CheckpointError" and agreed and named in text, text


def test_each_process_hashes_and_opens_what_it_reads_and_one_lists(three: list[dict[str, Any]]) -> None:
    hashed = [found["hashed"] for found in three]
    assert [[name for name in names if name.startswith("shard")] for names in hashed] == [
        [f"shard-0000{number}.safetensors"] for number in (1, 2, 3)
    ]
    assert {name for names in hashed for name in names} >= {"run.json", "index.json"}
    for number, found in enumerate(three, 1):
        assert set(found["opened"]) == {f"shard-0000{number}.safetensors"} and found["same"]
        assert len(found["listed"]) == (1 if number == 1 else 0), "the others learn it from the first"


def test_what_torchs_own_writer_wrote_is_read(three: list[dict[str, Any]]) -> None:
    assert [found["old form"] for found in three] == [True] * WORLD


def test_a_life_that_is_no_longer_the_newest_writes_nothing(three: list[dict[str, Any]]) -> None:
    for found in three:
        *refused, unchanged = found["fenced"]
        assert len(refused) == 4 and unchanged
        for kind, text, agreed in refused:
            assert kind == "CheckpointError" and agreed and "a newer life of this run" in text


def test_the_newest_life_is_a_number_in_the_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fence = generation_fence(tmp_path)
    monkeypatch.delenv("ZILI_GENERATION", raising=False)
    assert fence(), "nobody counts lives"
    monkeypatch.setenv("ZILI_GENERATION", "3")
    with pytest.raises(CheckpointError, match=r"generation cannot be read, so nothing of the run is changed"):
        fence()
    (tmp_path / "supervision").mkdir()
    for newest, whether in (("3\n", True), ("4\n", False), ("2", True)):
        (tmp_path / "supervision/generation").write_text(newest)
        assert fence() is whether, newest


def test_a_life_that_wakes_late_leaves_what_the_newest_is_writing(runs: Runs) -> None:
    """By the trainer: two lives of one run, of which the older saves while the newer is in the middle of it."""
    config = runs.recipe("dense", "training.steps=2", "checkpoint.every=1")
    folder = config.folder / "checkpoints"
    second = {"ZILI_GENERATION": "2"}
    (config.folder / "supervision").mkdir(parents=True)
    (config.folder / "supervision/generation").write_text("2")
    on_processes(1, train, config, environment=second)
    at_hand = folder / ".step-00000003-life-3"
    at_hand.mkdir()
    (config.folder / "supervision/generation").write_text("3")
    longer = config.model_copy(update={"training": config.training.model_copy(update={"steps": 3})})
    with pytest.raises(AssertionError, match="a newer life of this run"):
        on_processes(1, train, longer, environment=second)
    assert sorted(path.name for path in folder.iterdir()) == [at_hand.name, "step-00000001", "step-00000002"]


def resumed(config: RunConfig) -> dict[str, Tensor]:
    trainer = open_trainer(config)
    assert trainer.resume()
    return {name: whole(tensor) for name, tensor in trainer.saved_tensors().items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def test_a_run_goes_on_from_a_checkpoint_of_the_old_form(runs: Runs) -> None:
    """A checkpoint as torch's writer makes it, without an index; its generators too."""
    config = runs.recipe("dense", "training.steps=2", "optimizer.name=muon", "model.hidden_dropout=0.1")
    (kept,) = on_processes(1, resumed_after_training, config)
    (path,) = checkpoints.list_checkpoints(config.folder / "checkpoints")
    assert not (path / "index.json").exists() and list(path.glob("shard-00001-model-*"))
    for world in (1, 2):
        for found in on_processes(world, resumed, config):
            own = {name for name in found if not name.startswith("rng.cpu.")}
            assert own >= {name for name in kept if not name.startswith("rng")}
            assert [name for name in own if not torch.equal(found[name], kept[name])] == []


def resumed_after_training(config: RunConfig) -> dict[str, Tensor]:
    """Train, and write the checkpoint anew as it was written once."""
    train(config)
    trainer = open_trainer(config)
    assert trainer.resume()
    (path,) = checkpoints.list_checkpoints(config.folder / "checkpoints")
    for file in (*path.glob("shard-*"), path / "index.json"):
        file.unlink()
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    dcp.save(trainer.saved_tensors(), storage_writer=writer, no_dist=True)
    files = [file.name for file in path.iterdir() if file.name != "SHA256SUMS"]
    checksums.write_sums(path, {name: checksums.sha256(path / name) for name in files})
    return {name: whole(tensor) for name, tensor in trainer.saved_tensors().items()}
