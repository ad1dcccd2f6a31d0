"""Tiers of two processes on two machines, each with a disk of its own: they save, lose, and go on together."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from many import on_processes, open_trainer
from tiny_models import Layout, Runs, slow
from torch import Tensor
from torch.distributed.tensor import DTensor

from zili.config import RunConfig
from zili.runs.running import begin
from zili.training.callbacks import Callback
from zili.training.checkpoints import list_checkpoints, verify
from zili.training.trainer import Trainer

LAYOUTS = ["shards=2", slow("replicas=2"), slow("pipeline=2")]


class FailsAt(Callback):
    """Ends a run on all processes by an error after a step, without a last checkpoint; keeps what was noted."""

    everywhere = True

    def __init__(self, step: int | None = None) -> None:
        self.step = step
        self.notes: list[str] = []

    def after_step(self, trainer: Trainer) -> None:
        for thread in threading.enumerate():
            if thread.name in ("zili-tier", "zili-checkpoint"):
                thread.join(60)
        if trainer.step == self.step:
            raise RuntimeError("as if killed")

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def on_a_machine(folder: Path) -> int:
    """Be the only process of a machine whose disk is `folder/RANK`; returns the rank."""
    rank = int(os.environ["RANK"])
    os.environ.update(SCRATCH=str(folder / str(rank)), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    return rank


def train(config: RunConfig, fails: int | None = None) -> tuple[Trainer, list[str]]:
    callback = FailsAt(fails)
    trainer = open_trainer(config, [callback])
    begin(trainer)
    if fails is None:
        trainer.fit()
    else:
        with pytest.raises(RuntimeError, match="as if killed"):
            trainer.fit()
    return trainer, callback.notes


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: part_of(tensor) for name, tensor in trainer._held_tensors().items()}


def part_of(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).clone()


def through_losses(alone: RunConfig, config: RunConfig, machines: Path) -> dict[str, Any]:
    """Killed after step 5 of 6, with the local disks at 5, the folder at 4 and the store at 3: gone on from each."""
    on_a_machine(machines)
    found: dict[str, Any] = {"notes": {}, "different": {}}
    whole = state_of(train(alone)[0])
    _, before = train(config, fails=6)
    found["before"] = before
    for name in ("disks", "folder", "store"):
        copies = (config.folder, machines, machines.parent / "bucket")
        trainer = open_trainer(config)
        if trainer.world.is_first:
            for path in copies:
                back(path, keep=name == "disks")
            if name != "disks":
                shutil.rmtree(machines / "1")  # the machine was replaced
            if name == "store":
                shutil.rmtree(config.folder)
        trainer.world.count(False)
        again, found["notes"][name] = train(config)
        there = state_of(again)
        found["different"][name] = [key for key in whole if not torch.equal(there[key], whole[key])]
        assert there.keys() == whole.keys()
    return found


def back(path: Path, *, keep: bool) -> None:
    """Keep what a folder has, or have it as it was kept."""
    kept = path.with_name(f"{path.name}-kept")
    if keep:
        shutil.copytree(path, kept)
    else:
        shutil.rmtree(path)
        shutil.copytree(kept, path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_processes_go_on_from_their_disks_from_the_folder_or_from_the_store_with_the_same_bits(
    runs: Runs, tmp_path: Path, layout: str
) -> None:
    settings = (
        *("training.steps=6", "training.global_batch=4", "model.layers=2", "model.hidden_dropout=0.1"),
        *("checkpoint.every=2", *Layout(layout).overrides),
        *(("model.tied_embeddings=true", "training.micro_batch=1") if "pipeline" in layout else ()),
    )
    alone, config = runs.recipe("dense", *settings), runs.recipe("dense", *settings)
    places = [{"place": "$SCRATCH/mine", "every": 1}, {"place": f"file://{tmp_path}/bucket", "every": 3}]
    config = config.changed(checkpoint={"tiers": places})
    found = on_processes(2, through_losses, alone, config, tmp_path / "machines")
    for rank, one in enumerate(found):
        assert one["different"] == {"disks": [], "folder": [], "store": []}, rank
    first = found[0]
    assert first["before"] == []
    of_disks, of_folder, of_store = (first["notes"][name] for name in ("disks", "folder", "store"))
    assert "step-00000005 at step 5" in of_disks[-1] and f"{tmp_path}/machines/0/mine" in of_disks[-1]
    assert "passing over step 5 in the local disk $SCRATCH/mine" in of_folder[0] and "process 1 on " in of_folder[0]
    assert f"{config.folder}/checkpoints/step-00000004" in of_folder[-1]
    assert any("step 3 was brought from the store" in note for note in of_store)
    assert f"{config.folder}/checkpoints/step-00000003" in of_store[-1]
    for folder in (tmp_path / "bucket", config.folder / "checkpoints"):
        for path in list_checkpoints(folder):
            verify(path)
    for rank in (0, 1):
        own = {path.name for path in (tmp_path / f"machines/{rank}/mine").glob("step-*/shard-*")}
        assert own == {f"shard-0000{rank + 1}.safetensors", f"shard-0000{rank + 1}.json"}, "a disk is its machine's"


def one_fails(config: RunConfig, machines: Path) -> tuple[int, list[str]]:
    """The second process's disk is no folder."""
    rank = on_a_machine(machines)
    if rank:
        machines.mkdir(exist_ok=True)
        (machines / "1").write_text("no folder")
    trainer, notes = train(config)
    return trainer.step, notes


def test_a_disk_that_fails_on_one_machine_is_told_by_the_first_and_nothing_of_that_save_counts(
    runs: Runs, tmp_path: Path
) -> None:
    settings = ("training.steps=2", "training.global_batch=4", "checkpoint.every=1", "parallel.shards=2")
    config = runs.recipe("dense", *settings)
    config = config.changed(checkpoint={"tiers": [{"place": "$SCRATCH/mine", "every": 1}]})
    (step, notes), _ = on_processes(2, one_fails, config, tmp_path / "machines")
    assert step == 2 and len(notes) == 2
    for note, number in zip(notes, (1, 2), strict=True):
        assert f"the local disk $SCRATCH/mine has not taken step {number}" in note and "Not a directory" in note
        assert f"machines/1/mine/step-0000000{number}" in note and "in the run's folder" in note
    assert list((tmp_path / "machines/0/mine").glob("step-*/*.json")) == [], "no part has its mark"
