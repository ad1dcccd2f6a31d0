"""A request to end is often heard twice, and is one; who insists is obeyed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from tiny_run import At, Recipe, Recorder, interrupt, start, train
from torch.distributed.launcher.api import LaunchConfig

from zili.config import RunConfig
from zili.errors import ConfigError
from zili.training.checkpoints import list_checkpoints, verify
from zili.training.interruption import grace_seconds
from zili.training.tiers.run_folder import RunFolder
from zili.training.trainer import Trainer


def heard(*numbers: int) -> Callable[[], None]:
    def hear() -> None:
        for number in numbers:
            interrupt(number)

    return hear


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGTERM, signal.SIGTERM, signal.SIGTERM),
        (signal.SIGHUP, signal.SIGHUP),
        (signal.SIGTERM, signal.SIGHUP),  # systemd's SendSIGHUP
        (signal.SIGTERM, signal.SIGINT),
        (signal.SIGINT, signal.SIGTERM),
    ],
)
def test_a_request_that_is_heard_twice_is_one(recipe: Recipe, numbers: tuple[int, ...]) -> None:
    trainer = train(recipe(), At(3, heard(*numbers)))
    assert (trainer.step, trainer.interrupted) == (3, True)
    assert list_checkpoints(trainer.checkpoint_folder)[-1].name == "step-00000003"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


class StopAt(Recorder):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            trainer.stop("the figures got worse")


@pytest.mark.parametrize(("step", "ends"), [(0, 6), (3, 3), (6, 6)])
def test_a_callback_ends_a_run_with_a_checkpoint(recipe: Recipe, step: int, ends: int) -> None:
    config, callback = recipe("checkpoint.every=0"), StopAt(step)
    trainer = train(config, callback)
    assert (trainer.step, trainer.interrupted) == (ends, False)
    (saved,) = list_checkpoints(trainer.checkpoint_folder)
    assert saved.name == f"step-0000000{ends}"
    assert ([f"stopping after step {step}: the figures got worse"] if step else []) == callback.notes
    assert train(config).step == 6, "the same call goes on"


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_sigterm_heard_again_while_saving_leaves_the_checkpoint_whole(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, asynchronous: str
) -> None:
    write = RunFolder.take

    def slow(*arguments: Any) -> int:
        os.kill(os.getpid(), signal.SIGTERM)  # the main thread hears it, whichever thread writes
        time.sleep(0.2)
        return write(*arguments)

    monkeypatch.setattr(RunFolder, "take", slow)
    config = recipe("checkpoint.every=0", f"checkpoint.asynchronous={asynchronous}")
    trainer = train(config, At(3, heard(signal.SIGTERM)))
    (saved,) = list_checkpoints(trainer.checkpoint_folder)
    verify(saved)
    assert saved.name == "step-00000003" and trainer.interrupted


def insist(config: RunConfig) -> None:
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "0.1"

    def later() -> None:
        interrupt(signal.SIGTERM)
        time.sleep(0.2)
        interrupt(signal.SIGTERM)

    train(config, At(3, later))


def test_a_sigterm_after_the_grace_ends_at_once(recipe: Recipe) -> None:
    config = recipe("checkpoint.every=0")
    process = start(insist, config)
    process.join(120)
    assert process.exitcode == -signal.SIGTERM
    assert not list_checkpoints(config.folder / "checkpoints")


def test_the_grace_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    assert grace_seconds() == LaunchConfig(1, 1, 1).shutdown_timeout
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    assert grace_seconds() == LaunchConfig(1, 1, 1).shutdown_timeout == 600
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "long")
    with pytest.raises(ConfigError, match="TORCH_ELASTIC_SHUTDOWN_TIMEOUT is 'long'"):
        grace_seconds()
