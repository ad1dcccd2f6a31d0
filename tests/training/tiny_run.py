"""Tiny runs of the real trainer, also in processes that are killed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import forks
import torch
from safetensors.torch import load_file
from torch import Tensor

from zili import chips
from zili.chips.device import Device
from zili.config import RunConfig
from zili.data.packing import open_loader
from zili.data.store import TokenStore
from zili.training import checkpoints
from zili.training.callbacks import Callback, StepRecord
from zili.training.saving import Saved
from zili.training.tiers import run_folder
from zili.training.trainer import Trainer

PEAK = 1e11
Recipe = Callable[..., RunConfig]
"""The fixture `recipe`: overrides to a configuration."""


class Recorder(Callback):
    """Keeps what a run reports."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.notes: list[str] = []

    @property
    def losses(self) -> list[float]:
        return [record.loss for record in self.records]

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        self.records.append(record)

    def on_note(self, text: str) -> None:
        self.notes.append(text)


class Saves(Callback):
    """What was saved where, and what was noted, where each step takes as long as the saves at hand."""

    def __init__(self) -> None:
        self.saved: list[str] = []
        self.notes: list[tuple[int, str]] = []
        self.step = 0

    def after_step(self, trainer: Trainer) -> None:
        self.step = trainer.step
        for thread in threading.enumerate():
            if thread.name in ("zili-tier", "zili-checkpoint"):
                thread.join(20)

    def on_saved(self, saved: Saved) -> None:
        self.saved.append(saved.where)

    def on_note(self, text: str) -> None:
        self.notes.append((self.step, text))


class At(Callback):
    """Does something after one step."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step = step
        self.action = action

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            self.action()


def interrupt(number: int = signal.SIGINT) -> None:
    """Ctrl-C, as the terminal sends it."""
    os.kill(os.getpid(), number)


def open_trainer(config: RunConfig, callbacks: Sequence[Callback] = ()) -> Trainer:
    """A trainer of `config` on the CPU, without the time that measuring the matmul peak takes."""
    stores = [(TokenStore.open(source.store), source.weight) for source in config.data.sources]
    training = config.training
    loader = open_loader(
        stores, sequence_length=training.sequence_length, global_batch=training.global_batch, seed=config.seed
    )
    device = Device(chips.activate(chips.find_backend("cpu")))
    trainer = Trainer(config, loader, device, callbacks)
    trainer.matmul_peak = PEAK  # 0.3 s to measure
    return trainer


def train(config: RunConfig, *callbacks: Callback) -> Trainer:
    """Run `config` to its end, from its newest checkpoint."""
    trainer = open_trainer(config, callbacks)
    trainer.resume()
    trainer.fit()
    return trainer


def final_tensors(config: RunConfig) -> dict[str, Tensor]:
    """Everything in the newest checkpoint: weights, optimizer state, generator states."""
    newest = checkpoints.list_checkpoints(config.folder / "checkpoints")[-1]
    return {name: tensor for file in newest.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal names, dtypes and bytes."""
    assert one.keys() == other.keys()
    different = [
        name for name in one if not torch.equal(one[name], other[name]) or one[name].dtype != other[name].dtype
    ]
    assert different == []


# What follows runs in a process of its own, forked from one that has imported torch but not used it.


def die() -> None:
    """As the kernel ends a process that has no memory left."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_step(config: RunConfig, step: int) -> None:
    """Train, and be killed after `step`, before a checkpoint of it is written."""
    train(config, At(step, die))


class _DieWhileSaving(Callback):
    def __init__(self, step: int, function: str) -> None:
        self.step = step
        self.function = function

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            trainer.saver.wait()  # or the save before, still at work in its thread, would be the one that dies
            mock.patch.object(run_folder, self.function, side_effect=lambda *_: die()).start()


def die_while_saving(config: RunConfig, step: int, function: str) -> None:
    """Train, and be killed where the checkpoint of `step` calls `function` of `zili.training.tiers.run_folder`."""
    train(config, _DieWhileSaving(step, function))


def start(target: Callable[..., object], *arguments: object) -> BaseProcess:
    """Run `target` in a process of its own."""
    process = forks.context().Process(target=target, args=arguments)
    process.start()
    return process


def run_apart(target: Callable[..., object], *arguments: object) -> int:
    """Run `target` in a process of its own to its end; returns its exit code, negative for a signal."""
    process = start(target, *arguments)
    process.join(300)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"{target.__name__} did not end in 300 seconds")
    return process.exitcode


def hidden(folder: Path) -> list[str]:
    """Names in `folder` that begin with a dot."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]
