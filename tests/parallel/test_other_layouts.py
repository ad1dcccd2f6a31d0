"""A run begun in one layout goes on in another: checkpoints belong to the model, not to the processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from many import Curve, curve_of, on_processes, open_trainer, train
from tiny_models import BOUND, Kind, Layout, Row, Runs, slow
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from zili.config import RunConfig
from zili.training.callbacks import Callback
from zili.training.checkpoints import list_checkpoints, verify
from zili.training.restoring import one_process
from zili.training.tiers import run_folder

HALF = 4
WHOLE = f"training.steps={2 * HALF}"
MUON = "optimizer.name=muon"

PAIRS = [
    ("", "shards=2", "dense", ()),
    ("shards=2 expert=2", "pipeline=2", "mixture", ()),
    slow("shards=4", "tensor=2 pipeline=2", "dense", ()),
    slow("shards=2 tensor=2 pipeline=2", "", "dense", ()),
    slow("pipeline=2 schedule=zbv", "shards=2 context=2", "dense", ()),
    slow("replicas=2 shards=2", "shards=2", "dense", ()),
    slow("shards=2", "replicas=2 shards=4", "dense", ()),
    slow("context=2 tensor=2", "pipeline=4", "dense", ()),
    slow("pipeline=2 stage_layers=[1,3]", "pipeline=2 schedule=interleaved", "dense", ()),
    slow("pipeline=2", "shards=4", "dense", ("model.tied_embeddings=true",)),
    slow("shards=2", "tensor=4", "dense", (MUON,)),
    slow("tensor=2 pipeline=2", "shards=4", "dense", (MUON,)),
    slow("tensor=2 expert=2", "shards=4 expert=4", "mixture", (MUON,)),
    slow("shards=4 expert=4", "shards=2 expert=2", "mixture", ()),
    slow("shards=2 pipeline=2 expert=2", "tensor=2 expert=2", "mixture", ()),
    slow("", "context=2 tensor=2 expert=4", "mixture", ()),
    slow("pipeline=2 schedule=interleaved", "shards=2 tensor=2 expert=4", "mixture", ()),
    slow("tensor=4 expert=4", "", "mixture", ()),
]


@pytest.mark.parametrize(("begun", "resumed", "kind", "settings"), PAIRS)
def test_a_run_goes_on_in_another_layout(
    begun: str, resumed: str, kind: Kind, settings: tuple[str, ...], runs: Runs, request: pytest.FixtureRequest
) -> None:
    folder, settings = f"folder={runs.recipe(kind).folder}", (WHOLE, *settings)
    before, after = Layout(begun), Layout(resumed)
    first = runs.on(before, kind, *settings, folder, steps=HALF)
    second = runs.on(after, kind, *settings, folder)
    assert (len(first.losses), len(second.losses)) == (HALF, HALF)
    joined = Curve(first.losses + second.losses, first.norms + second.norms)
    name, worlds = f"{before} → {after}", f"{before.world} → {after.world}"
    what = ", ".join((kind, *settings[1:]))
    Row.of(name, worlds, what, runs.alone(kind, *settings), joined, BOUND).check(request)


DROPOUT = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1")
TWICE = [
    (Layout("shards=2"), "dense", (MUON,)),
    slow(Layout("shards=2 tensor=2"), "dense", (MUON,)),
    slow(Layout("context=2 tensor=2"), "dense", ()),
    slow(Layout("tensor=2 pipeline=2 schedule=interleaved"), "dense", ()),
    slow(Layout("replicas=2 shards=2"), "dense", ()),
    slow(Layout("shards=2 tensor=2 expert=4"), "mixture", ()),
    slow(Layout("shards=2 pipeline=2 expert=2"), "mixture", (MUON,)),
    slow(Layout("shards=2 tensor=2 expert=4"), "mixture", ("chip.precision=bf16",)),
]


@pytest.mark.parametrize(("layout", "kind", "settings"), TWICE)
def test_a_run_that_goes_on_in_its_layout_ends_in_the_same_bytes(
    layout: Layout, kind: Kind, settings: tuple[str, ...], runs: Runs
) -> None:
    # Dropout draws in every step, so a generator of any process that is not restored shows in the weights.
    short = (*settings, *DROPOUT, "training.steps=6", "training.global_batch=8", *layout.overrides)
    whole, stopped = (runs.recipe(kind, *short) for _ in range(2))
    curve = curve_of(whole, layout.world)
    first = curve_of(stopped, layout.world, stop=3)
    second = curve_of(stopped, layout.world)
    assert first.losses + second.losses == curve.losses and len(first.losses) == 3
    assert_same_bits(final_tensors(stopped), final_tensors(whole))


def final_tensors(config: RunConfig) -> dict[str, Tensor]:
    """Everything in the newest checkpoint, whole. Torch puts what several processes have into the file of any one."""
    newest = str(list_checkpoints(config.folder / "checkpoints")[-1])
    entries = HuggingFaceStorageReader(newest).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    with one_process():
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(newest), no_dist=True)
    return tensors


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert {name.partition(".")[0] for name in one} == {"model", "optimizer", "rng"}
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def die_while_saving(config: RunConfig, function: str, rank: int) -> None:
    """Train, and be killed on process `rank` where the second checkpoint calls `function` of `run_folder`.

    The first checkpoint is there already.
    """
    real, folder = getattr(run_folder, function), config.folder / "checkpoints"

    def die(*arguments: object) -> object:
        if list_checkpoints(folder) and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    with mock.patch.object(run_folder, function, side_effect=die):
        train(config)


@pytest.mark.parametrize(
    ("function", "rank"),
    [
        ("_write_tensors", 1),
        slow("_write_tensors", 0),
        slow("_written", 1),
        slow("_written", 0),
        slow("sync", 1),
        slow("sync", 0),
    ],
)
def test_a_process_killed_while_it_writes_a_checkpoint_leaves_no_half_one(function: str, rank: int, runs: Runs) -> None:
    layout = Layout("shards=2")
    settings = ("checkpoint.every=2", "training.steps=6", "training.global_batch=4", *layout.overrides)
    config, whole = runs.recipe("dense", *settings), runs.recipe("dense", *settings)
    with pytest.raises(AssertionError):
        on_processes(layout.world, die_while_saving, config, function, rank)
    folder = config.folder / "checkpoints"
    assert names(folder) == ["step-00000002"]
    verify(folder / "step-00000002")
    # Where the first process lives it clears away what it began; where it dies at `sync`, the rename is just done.
    assert hidden(folder) or rank != 0 or function == "sync"
    assert len(curve_of(config, layout.world).losses) == 4
    assert names(folder) == ["step-00000004", "step-00000006"]
    assert not hidden(folder), "what was left is swept away"
    curve_of(whole, layout.world)
    assert_same_bits(final_tensors(config), final_tensors(whole))


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


class Notes(Callback):
    """What the first process tells its user; the command gives the others no callbacks."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_note(self, text: str) -> None:
        self.texts.append(text)


def noted_by_the_first(config: RunConfig) -> list[str]:
    notes = Notes()
    open_trainer(config, [notes] if os.environ["RANK"] == "0" else []).resume()
    return notes.texts


def test_generators_that_start_anew_elsewhere_are_told_of(runs: Runs) -> None:
    config = runs.recipe("dense", "model.hidden_dropout=0.1", "training.steps=2")
    train(config)
    (alone,) = on_processes(1, noted_by_the_first, config)
    assert not any("dropout" in text for text in alone), alone
    first, second = on_processes(2, noted_by_the_first, config)
    (told,) = (text for text in first if "dropout" in text)
    assert "by fewer processes: dropout draws other numbers in 1 of 2 processes" in told
    assert second == []
