"""Checkpoints by the clock, milestones, and an end in time: none of it changes a bit of the run."""

from __future__ import annotations

import pytest
from tiny_run import Recipe, Recorder, assert_same_bits, final_tensors, open_trainer, train

from zili.config import RunConfig
from zili.training.callbacks import Callback
from zili.training.checkpoints import list_checkpoints, step_of
from zili.training.run_clock import RunClock
from zili.training.trainer import Trainer

MINUTE = 60.0


class Hand:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now


class Takes(Callback):
    """Each step takes `seconds`."""

    def __init__(self, hand: Hand, seconds: float) -> None:
        self.hand, self.seconds = hand, seconds

    def after_step(self, trainer: Trainer) -> None:
        self.hand.now += self.seconds


def run(config: RunConfig, seconds: float, *callbacks: Callback, spent: float = 0.0) -> Trainer:
    """A run, or its going on, whose steps take `seconds`, in a process that began `spent` seconds before."""
    hand = Hand()
    trainer = open_trainer(config, (*callbacks, Takes(hand, seconds)))
    trainer._clock = RunClock(config, hand.now - spent, hand)
    trainer.resume()
    trainer.fit()
    return trainer


def saved(config: RunConfig) -> list[int]:
    return [step_of(path) for path in list_checkpoints(config.folder / "checkpoints")]


def test_milestones_stay_and_are_written_where_every_does_not_come_by(recipe: Recipe) -> None:
    config = recipe("training.steps=11", "checkpoint.every=2", "checkpoint.keep_every=5")
    train(config)
    assert saved(config) == [5, 10, 11], "the newest two, one of which is a milestone, and the milestone before them"


def test_checkpoints_come_by_the_clock_too(recipe: Recipe) -> None:
    config = recipe("training.steps=9", "checkpoint.every=0", "checkpoint.minutes=3", "checkpoint.keep=9")
    run(config, MINUTE)
    assert saved(config) == [3, 6, 9]


def test_one_by_number_puts_the_next_by_the_clock_off(recipe: Recipe) -> None:
    config = recipe("training.steps=8", "checkpoint.every=4", "checkpoint.minutes=3", "checkpoint.keep=9")
    run(config, MINUTE)
    assert saved(config) == [3, 4, 7, 8]


def test_when_a_run_saves_changes_none_of_its_bits(recipe: Recipe) -> None:
    plain = recipe("model.hidden_dropout=0.1", "checkpoint.every=0")
    often = recipe(
        "model.hidden_dropout=0.1", "checkpoint.minutes=1", "checkpoint.keep_every=2", f"folder={plain.folder}-often"
    )
    train(plain)
    run(often, MINUTE)
    assert_same_bits(final_tensors(plain), final_tensors(often))


def test_a_run_stops_before_its_time_is_over_and_goes_on_to_the_same_bits(recipe: Recipe) -> None:
    whole = recipe("model.hidden_dropout=0.1", "training.steps=8", "checkpoint.every=0")
    limited = recipe(
        "model.hidden_dropout=0.1",
        "training.steps=8",
        "checkpoint.every=0",
        "training.hours=0.1",
        f"folder={whole.folder}-limited",
    )
    train(whole)
    recorder = Recorder()
    first = run(limited, MINUTE, recorder)
    # Six minutes: a sixth step would end on the last second.
    assert (first.step, first.interrupted, saved(limited)) == (5, True, [5])
    assert any("training.hours = 0.1 leaves no time" in note for note in recorder.notes)
    second = run(limited, MINUTE)
    assert second.step == 8 and not second.interrupted
    assert_same_bits(final_tensors(whole), final_tensors(limited))


def test_time_that_went_by_before_the_first_step_counts(recipe: Recipe) -> None:
    config = recipe("training.hours=0.1", "checkpoint.every=0")
    assert run(config, MINUTE, spent=4 * MINUTE).step == 1


@pytest.mark.parametrize(
    ("elapsed", "steps", "saves", "over"),
    [
        (0, [], [], False),
        (3000, [10.0] * 5, [5.0], False),
        (3550, [10.0] * 5, [5.0], True),  # 10 for the step, 10 for two saves, 30 for the end
        (3000, [10.0, 600.0, 10.0], [5.0], True),  # an evaluation, which may come again
        (3000, [600.0] + [10.0] * 20, [5.0], False),  # compiling, long ago
        (3000, [10.0], [300.0], True),
    ],
)
def test_what_the_next_step_and_the_checkpoint_will_take(
    recipe: Recipe, elapsed: float, steps: list[float], saves: list[float], over: bool
) -> None:
    hand = Hand()
    clock = RunClock(recipe("training.hours=1"), hand.now - elapsed + sum(steps), hand)
    for seconds in steps:
        hand.now += seconds
        clock.after_step()
    for seconds in saves:
        clock.save_took(seconds)
    assert clock.time_is_over(lambda: 0) is over


def test_before_anything_was_saved_a_slow_disk_is_expected_but_not_for_ever(recipe: Recipe) -> None:
    hand = Hand()
    clock = RunClock(recipe("training.hours=1"), hand.now, hand)
    assert not clock.time_is_over(lambda: 10**15), "a quarter of the time at most"
    hand.now += 3600 * 0.75
    assert clock.time_is_over(lambda: 10**15) and not clock.time_is_over(lambda: 10**9)


def test_only_the_first_process_tells_the_time(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others learn of it by the sum that all of them take each step."""
    config = recipe("training.hours=0.0000001", "checkpoint.minutes=0.0000001", "training.steps=2")
    trainer = open_trainer(config)
    monkeypatch.setattr(type(trainer.world), "is_first", property(lambda world: False))

    class Quiet:
        requested = False

    assert not trainer._stop(Quiet())  # type: ignore[arg-type]
    assert not any(trainer._requests.own.values()), "nothing is asked for"


def test_without_a_limit_there_is_none(recipe: Recipe) -> None:
    hand = Hand()
    clock = RunClock(recipe(), hand.now - 1e9, hand)
    assert not clock.time_is_over(lambda: 10**15) and not clock.save_is_due()
