"""What a checkpoint holds, how damage shows, and what is kept."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny_run import At, Recipe, Recorder, final_tensors, hidden, interrupt, open_trainer, train

from zili.config import RunConfig
from zili.errors import CheckpointError
from zili.training import checkpoints, restoring
from zili.training.callbacks import Callback
from zili.training.saving import Saver
from zili.training.tiers import run_folder
from zili.training.trainer import Trainer


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints.list_checkpoints(folder)]


@pytest.fixture
def trained(recipe: Recipe) -> Trainer:
    """A finished run of 6 steps with checkpoints of the steps 4 and 6."""
    return train(recipe())


def newest(config: RunConfig) -> Path:
    return checkpoints.list_checkpoints(config.folder / "checkpoints")[-1]


def test_only_the_newest_are_kept(recipe: Recipe) -> None:
    trainer = train(recipe("checkpoint.every=1", "checkpoint.keep=3"))
    assert names(trainer.checkpoint_folder) == ["step-00000004", "step-00000005", "step-00000006"]
    assert hidden(trainer.checkpoint_folder) == []


def test_without_regular_checkpoints_one_is_written_at_the_end(recipe: Recipe) -> None:
    assert names(train(recipe("checkpoint.every=0")).checkpoint_folder) == ["step-00000006"]


def test_sha256sum_agrees(trained: Trainer) -> None:
    for path in checkpoints.list_checkpoints(trained.checkpoint_folder):
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=path, check=True, capture_output=True)
        listed = {line.split("  ")[1] for line in (path / "SHA256SUMS").read_text().splitlines()}
        assert listed == {entry.name for entry in path.iterdir()} - {"SHA256SUMS"}


def test_nothing_in_a_checkpoint_is_pickled(trained: Trainer) -> None:
    texts = ("run.json", "index.json", "SHA256SUMS")
    files = [path for path in newest(trained.config).iterdir() if path.name not in texts]
    assert files and all(path.suffix == ".safetensors" for path in files)
    for path in files:
        raw = path.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])  # the format's own definition
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        assert {entry["dtype"] for entry in tensors.values()} <= {"F32", "U8"}
        assert len(raw) == 8 + int.from_bytes(raw[:8], "little") + max(e["data_offsets"][1] for e in tensors.values())


def test_run_json_says_where_the_run_stands(trained: Trainer) -> None:
    states = [
        json.loads((path / "run.json").read_text()) for path in checkpoints.list_checkpoints(trained.checkpoint_folder)
    ]
    assert [(state["step"], state["samples"]) for state in states] == [(4, 16), (6, 24)]
    assert states[1]["data_fingerprint"] == trained.loader.fingerprint()
    assert RunConfig.model_validate(states[1]["config"]) == trained.config
    assert states[1]["versions"]["torch"] == torch.__version__
    assert states[1]["operations"].keys() >= {"linear", "attention"}


def test_load_model_gives_the_trainers_weights_in_eval_mode(trained: Trainer) -> None:
    for place in (trained.config.folder, trained.checkpoint_folder, newest(trained.config)):
        model = restoring.load_model(place)
        assert not model.training
        for (name, mine), (other, theirs) in zip(
            model.named_parameters(), trained.model.named_parameters(), strict=True
        ):
            assert name == other and torch.equal(mine, theirs)


def test_a_tied_head_is_saved_once_and_loaded_tied(recipe: Recipe) -> None:
    trainer = train(recipe("model.tied_embeddings=true"))
    assert not any("head" in name for name in final_tensors(trainer.config))
    assert restoring.load_model(trainer.config.folder).head is None


def flip_a_byte(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)


def truncate(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 7)


def cut_the_sums(path: Path) -> None:
    os.truncate(path / "SHA256SUMS", 0)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped byte": (flip_a_byte, ".safetensors"),
    "a truncated shard": (truncate, ".safetensors"),
    "no shard": (lambda path: next(path.glob("*.safetensors")).unlink(), ".safetensors"),
    "no run.json": (lambda path: (path / "run.json").unlink(), "run.json"),
    "another run.json": (lambda path: (path / "run.json").write_text("{}"), "run.json"),
    "no sums": (lambda path: (path / "SHA256SUMS").unlink(), "SHA256SUMS"),
    "empty sums": (cut_the_sums, "SHA256SUMS"),
    "no index.json": (lambda path: (path / "index.json").unlink(), "index.json"),
    "another index.json": (lambda path: (path / "index.json").write_text("{}"), "index.json"),
    "an empty folder": (lambda path: [file.unlink() for file in path.iterdir()] and None, "SHA256SUMS"),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
    trained: Trainer,
    damage: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # By itself: whether it reaches the root's handlers depends on what ran before, as the command line keeps it from.
    monkeypatch.setattr(logging.getLogger("zili.training.checkpoints"), "handlers", [caplog.handler])
    inflict, file = DAMAGE[damage]
    path = newest(trained.config)
    inflict(path)
    restoring.load_model(trained.config.folder)
    assert str(path) in caplog.text and capsys.readouterr().out == "", "standard output is for the answer"
    recorder = Recorder()
    again = open_trainer(trained.config, [recorder])
    assert again.resume() and again.step == 4
    assert str(path) in recorder.notes[0] and file in recorder.notes[0] and "damaged" in recorder.notes[0]
    assert "step-00000004" in recorder.notes[1]
    assert path.with_name(f"damaged-{path.name}").is_dir() and not path.exists(), "it no longer counts as kept"


def test_with_all_checkpoints_damaged_the_run_stops(trained: Trainer) -> None:
    for path in checkpoints.list_checkpoints(trained.checkpoint_folder):
        flip_a_byte(path)
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are damaged.*new folder") as caught:
        open_trainer(trained.config).resume()
    assert str(trained.checkpoint_folder) in str(caught.value)


def test_damaged_checkpoints_never_push_out_sound_ones(recipe: Recipe) -> None:
    train(recipe("checkpoint.every=3", "checkpoint.keep=3", "training.steps=9"))
    for path in checkpoints.list_checkpoints(recipe().folder / "checkpoints")[1:]:
        flip_a_byte(path)
    # Interrupted before it reaches the damaged ones: 3 and 4 are sound, 6 and 9 are not.
    stopped = train(recipe("checkpoint.every=0", "training.steps=9"), At(4, interrupt))
    assert stopped.interrupted and stopped.step == 4
    again = open_trainer(recipe("training.steps=9"))
    assert again.resume() and again.step == 4


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.layers=3"], ["another shape", "model.layers 2 there, 3 here"]),
        (
            ["model.ffn_hidden_size=64", "model.head_dim=8"],
            ["model.ffn_hidden_size 48 there, 64 here", "model.head_dim"],
        ),
        (["model.rotary.base=5e5"], ["model.rotary"]),
        (["optimizer.name=muon"], ["another optimizer", "Muon"]),
        (["seed=1"], ["seed 0 there, 1 here"]),
        (["training.global_batch=8"], ["training.global_batch 4 there, 8 here"]),
        (["training.sequence_length=16"], ["training.sequence_length 32 there, 16 here"]),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_the_difference(
    trained: Trainer, recipe: Recipe, overrides: list[str], parts: list[str]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_trainer(recipe(*overrides)).resume()
    assert all(part in str(caught.value) for part in ["step-00000006", *parts]), caught.value
    assert caught.value.exit_code == 5


def test_a_muon_run_is_not_taken_for_an_adamw_one(recipe: Recipe) -> None:
    train(recipe("optimizer.name=muon"))
    with pytest.raises(CheckpointError, match=r"another optimizer.*AdamW"):
        open_trainer(recipe()).resume()


def test_other_data_are_refused_and_the_same_data_elsewhere_are_not(
    trained: Trainer, recipe: Recipe, tiny_data: Path, tmp_path: Path
) -> None:
    other = f'data.sources=[{{store="{tiny_data / "other"}"}}]'
    with pytest.raises(CheckpointError, match=r"other data.*data\.sources.*train.*other"):
        open_trainer(recipe(other)).resume()
    moved = tmp_path / "moved"
    shutil.copytree(tiny_data, moved)
    assert open_trainer(recipe(f'data.sources=[{{store="{moved / "train"}"}}]')).resume()


def test_a_format_of_the_future_is_refused(trained: Trainer) -> None:
    path = newest(trained.config)
    state = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99; this version reads 1"):
        checkpoints.read_state(path)


def save_again(trainer: Trainer, step: int) -> Path:
    state = dataclasses.replace(checkpoints.read_state(newest(trainer.config)), step=step)
    saver = Saver(trainer.checkpoint_folder, trainer.world, keep=2, asynchronous=True)
    path = saver.save(state, checkpoints.model_tensors(list(trainer.model.named_parameters())))
    saver.wait()
    return path


def test_a_disk_that_refuses_leaves_the_old_checkpoints_and_nothing_else(trained: Trainer) -> None:
    before = names(trained.checkpoint_folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a shard takes more
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*step-00000008.*free some space") as caught:
            save_again(trained, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "Traceback" not in str(caught.value)
    assert names(trained.checkpoint_folder) == before and hidden(trained.checkpoint_folder) == []


@pytest.mark.parametrize("function", ["fsync", "rename"])
def test_a_failure_at_the_end_of_writing_shows_no_half_checkpoint(
    trained: Trainer, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names(trained.checkpoint_folder)

    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if function == "fsync" else (Path, "rename")), refuse)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_again(trained, 8)
    assert names(trained.checkpoint_folder) == before and hidden(trained.checkpoint_folder) == []


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_checkpoint_from_another_kind_of_device_says_what_differs(recipe: Recipe, dropout: float) -> None:
    config = recipe(f"model.attention_dropout={dropout}")
    trainer = open_trainer(config)
    trainer.train_step(trainer.loader.batch(0))
    state = trainer.device.rng_state()
    trainer.device.rng_state = lambda: {**state, "elsewhere": torch.zeros(16, dtype=torch.uint8)}  # type: ignore[method-assign]
    trainer.save()
    trainer.saver.wait()
    recorder = Recorder()
    assert open_trainer(config, [recorder]).resume()
    told = [note for note in recorder.notes if "another kind of device: dropout draws other numbers" in note]
    assert len(told) == bool(dropout), "without dropout nothing is drawn"


def test_a_damaged_checkpoint_never_pushes_out_the_sound_one_before_it(recipe: Recipe) -> None:
    """With other step numbers after the pass-over than before it: 2, 4 (damaged), then 5."""
    first = train(recipe("training.steps=4", "schedule.kind=constant"))
    flip_a_byte(newest(first.config))
    train(recipe("training.steps=5", "schedule.kind=constant", "checkpoint.every=0"))
    kept = [path.name for path in checkpoints.list_checkpoints(first.checkpoint_folder)]
    assert kept == ["step-00000002", "step-00000005"]


class Heard(Callback):
    """What was noted, and at which step."""

    def __init__(self) -> None:
        self.notes: list[tuple[int, str]] = []
        self.step = 0

    def after_step(self, trainer: Trainer) -> None:
        self.step = trainer.step
        if trainer.step % 2:
            # Wait for the thread as a long step would, without asking how it went.
            while any(thread.name == "zili-checkpoint" for thread in threading.enumerate()):
                time.sleep(0.01)

    def on_note(self, text: str) -> None:
        self.notes.append((self.step, text))


def refusing(*steps: int) -> Any:
    """A disk that is full when checkpoints of `steps` are written."""
    real = run_folder._write_tensors

    def write(file: Path, *rest: Any) -> None:
        if int(file.parent.name[-8:]) in steps:
            raise OSError(28, "No space left on device")
        real(file, *rest)

    return mock.patch.object(run_folder, "_write_tensors", write)


@pytest.mark.parametrize("mode", ["asynchronous=true", "asynchronous=false"])
def test_a_save_that_fails_is_noted_at_the_next_step_and_tried_again(recipe: Recipe, mode: str) -> None:
    heard = Heard()
    with refusing(4, 8, 10):
        trainer = train(recipe("training.steps=12", f"checkpoint.{mode}"), heard)
    assert names(trainer.checkpoint_folder) == ["step-00000006", "step-00000012"]
    assert hidden(trainer.checkpoint_folder) == []
    assert len(heard.notes) == 3
    for (at, text), step, count in zip(heard.notes, (4, 8, 10), (1, 1, 2), strict=True):
        assert at in (step, step + 1)
        assert f"step-{step:08d}: " in text and "No space left on device" in text and f"({count} of" in text


@pytest.mark.parametrize(("patience", "step"), [(1, 4), (3, 8)])
def test_a_run_without_a_checkpoint_for_so_many_intervals_ends(recipe: Recipe, patience: int, step: int) -> None:
    trainer = open_trainer(recipe("training.steps=40", f"checkpoint.patience={patience}"), [Heard()])
    with refusing(*range(4, 40)), pytest.raises(CheckpointError, match="No space left on device") as caught:
        trainer.fit()
    assert f"{patience} saves in a row failed (checkpoint.patience)" in str(caught.value)
    assert trainer.step in (step, step + 1) and names(trainer.checkpoint_folder) == ["step-00000002"]


def test_a_last_save_that_fails_is_an_error(recipe: Recipe) -> None:
    with refusing(6), pytest.raises(CheckpointError, match=r"cannot write .*step-00000006"):
        train(recipe())


def test_what_cannot_be_deleted_is_a_note(recipe: Recipe) -> None:
    """As a file that somebody reads over NFS, or one that is write-protected."""
    recorder, real = Recorder(), shutil.rmtree

    def refuse(path: Path, *rest: Any, **options: Any) -> None:
        if "step-00000002" in str(path) and not options:
            raise OSError(39, "Directory not empty")
        real(path, *rest, **options)

    with mock.patch.object(shutil, "rmtree", refuse):
        trainer = train(recipe(), recorder)
    assert names(trainer.checkpoint_folder) == ["step-00000004", "step-00000006"]
    (note,) = recorder.notes
    assert "step-00000002" in note and "cannot be deleted" in note and "Directory not empty" in note
