"""Resume is exact: the final bytes are those of a run that was never stopped."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from tiny_run import (
    At,
    Recipe,
    Recorder,
    assert_same_bits,
    die_after_step,
    die_while_saving,
    final_tensors,
    hidden,
    interrupt,
    open_trainer,
    run_apart,
    start,
    train,
)
from torch import Tensor
from waiting import until

from zili.config import RunConfig
from zili.training.checkpoints import list_checkpoints, verify

# Dropout draws random numbers in every step, so a generator that is not restored shows in the weights.
DROPOUT = ("model.hidden_dropout=0.2", "model.attention_dropout=0.1")
OPTIMIZERS = ("adamw", "muon")


@pytest.fixture(params=OPTIMIZERS)
def settings(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return (*DROPOUT, f"optimizer.name={request.param}", "schedule.warmup_steps=2")


def uninterrupted(recipe: Recipe, *settings: str) -> dict[str, Tensor]:
    config = recipe(*settings, f"folder={recipe().folder}-whole")
    train(config)
    return final_tensors(config)


def test_a_run_stopped_after_any_step_goes_on_as_if_it_had_not_been(recipe: Recipe, settings: tuple[str, ...]) -> None:
    whole = uninterrupted(recipe, *settings)
    assert any(name.startswith("optimizer.layers.0.") for name in whole) and "rng.cpu" in whole
    for step in range(1, 6):
        config = recipe(*settings, f"folder={recipe().folder}-{step}")
        assert train(config, At(step, interrupt)).step == step
        assert train(config).step == 6
        assert_same_bits(final_tensors(config), whole)


def test_a_run_stopped_after_every_step_goes_on_as_if_it_had_not_been(
    recipe: Recipe, settings: tuple[str, ...]
) -> None:
    for step in range(1, 6):
        assert train(recipe(*settings), At(step, interrupt)).step == step
    train(recipe(*settings))
    assert_same_bits(final_tensors(recipe(*settings)), uninterrupted(recipe, *settings))


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_run_killed_between_checkpoints_ends_in_the_same_bytes(
    recipe: Recipe, settings: tuple[str, ...], step: int
) -> None:
    config = recipe(*settings)
    assert run_apart(die_after_step, config, step) == -signal.SIGKILL
    assert run_apart(train, config) == 0
    assert_same_bits(final_tensors(config), uninterrupted(recipe, *settings))


@pytest.mark.parametrize("function", ["_write_tensors", "_written", "sync", "_drop"])
def test_a_run_killed_while_it_writes_a_checkpoint_ends_in_the_same_bytes(
    recipe: Recipe, settings: tuple[str, ...], function: str
) -> None:
    # keep=2 and a checkpoint a step: at step 4 there is one to drop, too.
    config = recipe(*settings, "checkpoint.every=1")
    folder = config.folder / "checkpoints"
    assert run_apart(die_while_saving, config, 4, function) == -signal.SIGKILL
    for path in list_checkpoints(folder):
        verify(path)  # no half checkpoint has a name
    assert hidden(folder) or function == "_drop"
    train(config)
    assert hidden(folder) == [], "what the killed process left is swept away"
    assert_same_bits(final_tensors(config), uninterrupted(recipe, *settings))


@pytest.mark.parametrize("delay", [0.0, 0.013, 0.05])
def test_a_run_killed_at_any_moment_ends_in_the_same_bytes(recipe: Recipe, delay: float) -> None:
    config = recipe(*DROPOUT, "checkpoint.every=1", "training.steps=30")
    process = start(train, config, At(29, signal.pause))  # it never ends by itself
    until(lambda: list_checkpoints(config.folder / "checkpoints"))
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list_checkpoints(config.folder / "checkpoints")
    train(config)
    assert_same_bits(final_tensors(config), uninterrupted(recipe, *DROPOUT, "training.steps=30"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_at_hand_with_a_checkpoint(recipe: Recipe, number: int) -> None:
    trainer = train(recipe(), At(3, lambda: interrupt(number)))
    assert (trainer.step, trainer.interrupted) == (3, True)
    assert list_checkpoints(trainer.checkpoint_folder)[-1].name == "step-00000003"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_after_the_last_step_is_no_interruption(recipe: Recipe) -> None:
    trainer = train(recipe(), At(6, interrupt))
    assert trainer.done and not trainer.interrupted


def test_a_signal_that_is_ignored_stays_ignored(recipe: Recipe) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = train(recipe(), At(3, interrupt))
    assert (trainer.step, trainer.interrupted) == (6, False)


def test_a_second_ctrl_c_ends_the_run_at_once(recipe: Recipe) -> None:
    def twice() -> None:
        interrupt()
        interrupt()

    trainer = open_trainer(recipe(), [At(3, twice)])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    trainer.saver.wait()  # as the end of a process does
    assert list_checkpoints(trainer.checkpoint_folder)[-1].name == "step-00000002"


def first_losses(config: RunConfig) -> list[float]:
    recorder = Recorder()
    train(config, recorder)
    return recorder.losses


def test_more_steps_can_be_asked_for_later(recipe: Recipe) -> None:
    constant = "schedule.kind=constant"  # the other kinds depend on the number of steps
    train(recipe(constant, "training.steps=3"))
    trainer = open_trainer(recipe(constant))
    assert trainer.resume() and trainer.step == 3 and not trainer.done
    trainer.fit()
    assert_same_bits(final_tensors(recipe()), uninterrupted(recipe, constant))


def test_a_finished_run_trains_nothing_more_and_writes_nothing(recipe: Recipe) -> None:
    train(recipe())
    newest = list_checkpoints(recipe().folder / "checkpoints")[-1]
    written = {path: path.stat().st_mtime_ns for path in newest.iterdir()}
    assert first_losses(recipe()) == []
    assert {path: path.stat().st_mtime_ns for path in newest.iterdir()} == written


def test_a_new_folder_begins_at_the_beginning(recipe: Recipe, tmp_path: Path) -> None:
    trainer = open_trainer(recipe(f"folder={tmp_path / 'nothing here'}"))
    assert not trainer.resume() and trainer.step == 0
