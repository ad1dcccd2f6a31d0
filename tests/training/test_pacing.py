"""Runs that end on time on a machine whose speed changes, told by a clock that the tests turn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import At, Recipe, assert_same_bits, final_tensors, interrupt, open_trainer, train

from zili.config import RunConfig
from zili.data.store import TokenStore
from zili.data.tokenizer import Tokenizer
from zili.evaluation.during_training import seconds_of
from zili.training.callbacks import Callback
from zili.training.pacing import Pacer
from zili.training.trainer import Trainer

WSD = ("schedule.kind=wsd", "schedule.warmup_steps=3", "schedule.decay_fraction=0.4", "checkpoint.every=20")
MIXTURE = "model.mixture={experts=4, top_k=2, ffn_hidden_size=16, bias=true, bias_update_rate=0.01}"


class Clock(Callback):
    """Goes on by what each step takes: `seconds` of it, of the first steps `first`, from step `then` on `later`."""

    def __init__(self, seconds: float, later: float, then: int, first: float = 10.0) -> None:
        self.now = 1000.0
        self._seconds, self._later, self._then, self._first = seconds, later, then, first

    def after_step(self, trainer: Trainer) -> None:
        early = self._first if trainer.step <= 2 else self._seconds
        self.now += self._later if trainer.step > self._then else early


def paced(
    config: RunConfig,
    clock: Clock,
    minutes: float,
    *more: Callback,
    expected: Callable[[Trainer], float] | None = None,
) -> tuple[Trainer, list[RunConfig]]:
    """`config` trained until so long after now; and what was to be kept of it."""
    kept: list[RunConfig] = []
    pacer = Pacer(clock.now + 60 * minutes, kept.append, clock=lambda: clock.now)
    if expected is not None:
        pacer.expect(expected)
    trainer = open_trainer(config, [*more, clock, pacer])
    trainer.resume()
    trainer.fit()
    return trainer, kept


@pytest.mark.parametrize(
    ("seconds", "later", "then", "guess"), [(2, 2, 0, 5000), (2, 2, 0, 10), (2, 6, 15, 5000), (6, 2, 5, 10)]
)
def test_a_run_ends_on_time_at_whatever_speed(
    recipe: Recipe, seconds: float, later: float, then: int, guess: int
) -> None:
    clock = Clock(seconds, later, then)
    began = clock.now
    trainer, kept = paced(recipe(*WSD, f"training.steps={guess}"), clock, 2.0)
    assert 0.8 * 120 <= clock.now - began <= 1.2 * 120
    assert trainer.step == trainer.config.training.steps == kept[-1].training.steps
    start = kept[-1].schedule.decay_start
    assert start is not None and (trainer.step - start) / trainer.step == pytest.approx(0.4, abs=0.1)


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
def test_a_run_with_these_numbers_in_its_recipe_has_the_same_bits(recipe: Recipe, tiny_data: Path, kind: str) -> None:
    """Learning what an evaluation takes moves neither generators nor the load of experts that their biases follow."""
    held_out = tiny_data / "held_out"
    expected = seconds_of(TokenStore.open(held_out), Tokenizer.from_folder(tiny_data / "tokenizer"))
    asked: list[float] = []
    config = recipe(*WSD, MIXTURE, f"schedule.kind={kind}", "training.steps=100", "model.hidden_dropout=0.1")
    _, kept = paced(config, Clock(1, 2, 15), 0.8, expected=lambda trainer: asked.append(expected(trainer)) or 0.1)
    assert len(asked) == 1 and asked[0] > 0
    found = kept[-1]
    assert 10 < found.training.steps < 60
    told = found.model_copy(update={"folder": config.folder.with_name("told")})
    train(told)
    assert_same_bits(final_tensors(config), final_tensors(told))


def test_one_that_was_stopped_goes_on_with_the_numbers_it_had_and_has_the_same_bits(recipe: Recipe) -> None:
    config = recipe(*WSD, "training.steps=400")
    stopped, kept = paced(config, Clock(1, 1, 0), 1.0, At(12, interrupt))
    assert stopped.interrupted and stopped.step == 12
    found = kept[-1]
    assert found.schedule.decay_start is None, "the rate was constant still"
    assert found.training.steps == 60
    train(found)
    told = found.model_copy(update={"folder": config.folder.with_name("told")})
    train(told)
    assert_same_bits(final_tensors(found), final_tensors(told))


def test_each_checkpoint_has_numbers_to_go_on_with(recipe: Recipe) -> None:
    """Whichever is the newest when a run is killed, its steps were taken at the rates that its numbers give."""
    config = recipe(*WSD, "training.steps=400", "checkpoint.keep=20", "checkpoint.every=4")
    _, kept = paced(config, Clock(1, 2, 15), 1.0)
    from zili.training import checkpoints
    from zili.training.schedules import decay_start

    states = [checkpoints.read_state(path) for path in checkpoints.list_checkpoints(config.folder / "checkpoints")]
    assert len(states) > 5
    for state in states[:-1]:
        own = RunConfig.model_validate(state.config)
        assert own.training.steps > state.step
        if own.schedule.decay_start is None:
            assert decay_start(own.training.steps, own.schedule) > state.step
    assert states[-1].config["training"]["steps"] == states[-1].step == kept[-1].training.steps
    assert states[-1].config["schedule"]["decay_start"] == kept[-1].schedule.decay_start


def test_evaluations_are_paid_for(recipe: Recipe) -> None:
    class Evaluated(Callback):
        def after_step(self, trainer: Trainer) -> None:
            if trainer.step % 10 == 0:
                clock.now += 8
                pacer.on_evaluation(trainer.step, {"seconds": 8.0})

    config = recipe(*WSD, "training.steps=400", "evaluation.every=10", "evaluation.max_bytes=2000", "data.held_out=x")
    clock = Clock(1, 1, 0)
    began = clock.now
    pacer = Pacer(began + 120, lambda config: None, clock=lambda: clock.now)
    open_trainer(config, [clock, Evaluated(), pacer]).fit()
    # The last evaluation comes after the last step: its 8 seconds are kept for it.
    assert 0.8 * 120 <= clock.now - began + 8 <= 1.2 * 120


def test_the_first_evaluation_is_paid_for_as_it_is_expected(recipe: Recipe) -> None:
    """None comes before the last step: its 40 seconds of 120 are known from before the first."""
    config = recipe(*WSD, "training.steps=400", "evaluation.max_bytes=2000", "data.held_out=x")
    clock = Clock(1, 1, 0, first=1)
    began = clock.now
    trainer, _ = paced(config, clock, 2.0, expected=lambda trainer: 40.0)
    assert clock.now - began == pytest.approx(80, abs=2) and trainer.step == pytest.approx(80, abs=2)
