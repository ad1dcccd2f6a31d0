"""A run that watches its steps: what is left out, what it goes back for, and that a repetition has the same bits."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from poisoned import NAN, Poison
from rich.console import Console
from tiny_run import At, Recipe, Recorder, assert_same_bits, die, final_tensors, interrupt, run_apart, train
from torch import nn

from zili.config import RunConfig
from zili.config.watch import WatchConfig
from zili.errors import CheckpointError, ConfigError, TrainingError
from zili.training.callbacks import Callback, MetricsLog, ProgressDisplay
from zili.training.callbacks.named import watches
from zili.training.callbacks.tensorboard import TensorBoardLog
from zili.training.checkpoints import list_checkpoints, read_state
from zili.training.left_out import (
    LeftOut,
    consumed,
    leave_out,
    order_roll_back,
    position_of,
    read_decisions,
    together,
    windows,
)
from zili.training.spikes import is_sound, limit, update_unless

SPIKES = ("watch.fewest=3", "watch.window=8", "training.steps=12", "model.hidden_dropout=0.1")
BAD = 7
FACTOR = {"spike": 60.0, "non_finite": NAN}


def left_out(config: RunConfig) -> list[tuple[str, int, int]]:
    return [(one.action, one.first, one.last) for one in read_decisions(config.folder / "decisions.json")]


def cleanly(trainer_weights: dict[str, torch.Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in trainer_weights.values() if tensor.is_floating_point())


class Losses(Recorder):
    """And what the run saw of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, dict[str, Any]]] = []

    def on_event(self, kind: str, values: dict[str, Any]) -> None:
        self.events.append((kind, values))


EXPERTS = (
    "model.mixture={experts = 4, top_k = 2, ffn_hidden_size = 16, scoring = 'sigmoid', bias = true, "
    "bias_update_rate = 0.01}"
)


@pytest.mark.parametrize(
    ("kind", "other"), [("spike", EXPERTS), ("spike", "optimizer.name=muon"), ("non_finite", "optimizer.name=adamw")]
)
def test_a_skipped_batch_counts_as_read_and_moves_nothing(recipe: Recipe, kind: str, other: str) -> None:
    config = recipe(*SPIKES, f"watch.{kind}=skip", other)
    before, after = {}, {}

    def weights(into: dict[str, torch.Tensor]) -> None:
        into.update({name: tensor.clone() for name, tensor in trainer[0].saved_tensors().items()})

    trainer: list[Any] = []

    class Hold(Callback):
        def on_start(self, own: Any) -> None:
            trainer.append(own)

    poison, seen = Poison(BAD, factor=FACTOR[kind]), Losses()
    steps = [At(BAD, lambda: weights(before)), At(BAD + 1, lambda: weights(after))]
    train(config, Hold(), poison, seen, *steps, MetricsLog(config.folder))
    assert poison.met == [BAD] and left_out(config) == [("skip", BAD, BAD)]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"rng.cpu"}, "no weight, no router's bias, no moment, no count of steps"
    state = read_state(list_checkpoints(config.folder / "checkpoints")[-1])
    assert (state.step, state.samples) == (12, 12 * 4)
    assert [(one["first"], one["step"]) for one in state.decisions] == [(BAD, BAD)]
    assert cleanly(final_tensors(config)) and [kind for kind, _ in seen.events] == ["decision"]
    lines = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(one["action"], one["first"], one["step"]) for one in lines if one["kind"] == "decision"] == [
        ("skip", BAD, BAD)
    ]
    assert any(text.startswith(f"step {BAD + 1}: loss ") for text in seen.notes)


@pytest.mark.parametrize(("kind", "margin"), [("non_finite", 0), ("spike", 2)])
def test_a_run_goes_back_and_leaves_out_a_window(recipe: Recipe, kind: str, margin: int) -> None:
    config = recipe(*SPIKES, f"watch.{kind}=roll_back", f"watch.margin={margin}")
    poison, seen = Poison(BAD, factor=FACTOR[kind]), Losses()
    shown = [ProgressDisplay(Console(file=StringIO())), *([TensorBoardLog()] if margin else [])]
    train(config, poison, seen, MetricsLog(config.folder), *shown)
    # Checkpoints of steps 2, 4 and 6; two are kept, so 4 is there to go back to where 5 is to be left out.
    assert poison.met == [BAD] and left_out(config) == [("roll_back", BAD - margin, BAD + margin)]
    state = read_state(list_checkpoints(config.folder / "checkpoints")[-1])
    assert (state.step, state.samples) == (12, (12 + 2 * margin + 1) * 4)
    resumed = [text for text in seen.notes if text.startswith("resumed")]
    assert [text.rpartition(" ")[2] for text in resumed] == [str(6 if margin < 2 else 4)]
    lines = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [one["step"] for one in lines if one["kind"] == "train"]
    assert steps == list(range(1, 13)), "each step once, as it happened last"

    # A run that knows the decision from its first step has the same bits, and meets no bad batch.
    again = recipe(*SPIKES, f"folder={config.folder}-again", f"watch.decisions={config.folder}")
    other = Poison(BAD, factor=FACTOR[kind])
    train(again, other)
    assert other.met == []
    assert_same_bits(final_tensors(config), final_tensors(again))


@pytest.mark.parametrize(("kind", "answer"), [("spike", "roll_back"), ("non_finite", "skip")])
def test_a_run_that_is_stopped_around_it_decides_alike(recipe: Recipe, kind: str, answer: str) -> None:
    settings = (*SPIKES, f"watch.{kind}={answer}")
    whole = recipe(*settings, f"folder={recipe().folder}-whole")
    train(whole, Poison(BAD, factor=FACTOR[kind]))
    config = recipe(*settings)
    for stop in (5, 7, 8, 9):
        train(config, Poison(BAD, factor=FACTOR[kind]), At(stop, interrupt))
    assert train(config, Poison(BAD, factor=FACTOR[kind])).done
    assert left_out(config) == left_out(whole) != []
    assert_same_bits(final_tensors(config), final_tensors(whole))


def test_a_repetition_of_skips_has_the_same_bits_without_the_rule(recipe: Recipe) -> None:
    config = recipe(*SPIKES, "watch.spike=skip")
    train(config, Poison(BAD, 9, factor=60.0))
    assert left_out(config) == [("skip", BAD, BAD), ("skip", 9, 9)]
    again = recipe(*SPIKES, f"folder={config.folder}-again", f"watch.decisions={config.folder}/decisions.json")
    train(again, Poison(BAD, 9, factor=60.0))
    assert_same_bits(final_tensors(config), final_tensors(again))
    other = recipe(*SPIKES, f"folder={config.folder}-other")
    train(other, Poison(BAD, 9, factor=60.0))
    assert any(not torch.equal(final_tensors(other)[name], one) for name, one in final_tensors(config).items())


@pytest.mark.slow
def test_who_is_killed_after_going_back_does_not_go_back_again(recipe: Recipe) -> None:
    """The decision is on the disk before the first step that follows it, and no checkpoint has it yet."""
    config = recipe(*SPIKES, "watch.spike=roll_back", "checkpoint.asynchronous=false")
    assert run_apart(_die_first_time, config) < 0
    assert left_out(config) == [("roll_back", BAD, BAD)]
    poison, seen = Poison(BAD, factor=60.0), Losses()
    train(config, poison, seen)
    assert poison.met == [] and not seen.events
    assert "1 decision on batches to leave out, taken again" in seen.notes


class _DieOnceBack(Callback):
    def on_roll_back(self, trainer: Any) -> None:
        die()


def _die_first_time(config: RunConfig) -> None:
    train(config, Poison(BAD, factor=60.0), _DieOnceBack())


def test_checkpoints_that_have_read_what_is_left_out_are_passed_over(recipe: Recipe) -> None:
    """As after a supervisor's order: the batch of a step that is done already is left out."""
    config = recipe(*SPIKES)
    assert train(config, At(8, interrupt)).step == 8
    order_roll_back(config.folder, 6, "process 1 raised", config.watch, [6, 8])
    seen = Losses()
    assert train(config, seen).done
    assert any(text.endswith("at step 6") for text in seen.notes)
    state = read_state(list_checkpoints(config.folder / "checkpoints")[-1])
    assert (state.step, state.samples) == (12, 13 * 4)
    assert [path.name for path in (config.folder / "checkpoints").glob("rolled-back-*")] == [
        "rolled-back-step-00000008"
    ]
    assert not list((config.folder / "checkpoints").glob("damaged-*"))


# ------------------------------------------------------------------ what ends a run


def test_a_rule_that_would_skip_every_batch_ends_the_run(recipe: Recipe) -> None:
    config = recipe(*SPIKES, "watch.non_finite=skip", "watch.most=2")
    with pytest.raises(TrainingError, match=r"left out 2 times among the last 1,000 \(watch.most = 2\)") as met:
        train(config, Poison(*range(3, 12), factor=NAN))
    assert met.value.agreed and "\n" not in str(met.value)
    assert left_out(config) == [("skip", 3, 3), ("skip", 4, 4)]


def test_going_back_too_often_ends_the_run(recipe: Recipe) -> None:
    config = recipe(*SPIKES, "watch.non_finite=roll_back", "watch.most=2")
    with pytest.raises(TrainingError, match="left out 2 times"):
        train(config, Poison(*range(6, 12), factor=NAN))


def test_left_out_long_ago_counts_no_more(recipe: Recipe) -> None:
    config = recipe(*SPIKES, "watch.non_finite=skip", "watch.most=1", "watch.within=3")
    train(config, Poison(3, 7, factor=NAN))
    assert left_out(config) == [("skip", 3, 3), ("skip", 7, 7)]


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(recipe: Recipe) -> None:
    config = recipe(*SPIKES, "watch.non_finite=roll_back", "checkpoint.every=10")
    with pytest.raises(TrainingError, match=r"step 4: loss nan, .* there is no checkpoint before it to go back to"):
        train(config, Poison(3, factor=NAN))


@pytest.mark.parametrize("kind", FACTOR)
def test_a_run_may_stop_at_once(recipe: Recipe, kind: str) -> None:
    other = {"spike": "non_finite=skip", "non_finite": "spike=skip"}[kind]
    config = recipe(*SPIKES, f"watch.{kind}=stop", f"watch.{other}", "logging.every=100", "checkpoint.every=100")
    with pytest.raises(TrainingError, match=f"step {BAD + 1}: .* its batch is number {BAD}"):
        train(config, Poison(BAD, factor=FACTOR[kind]))


def test_without_a_rule_nothing_is_judged(recipe: Recipe) -> None:
    config = recipe(*SPIKES)
    train(config, Poison(BAD, factor=60.0))
    assert not (config.folder / "decisions.json").exists()
    assert read_state(list_checkpoints(config.folder / "checkpoints")[-1]).history == []


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("watch.threshold=many",), "watch.threshold: must be a number"),
        (("watch.threshold=nan",), "watch.threshold"),
        (("watch.threshold=-1",), "watch.threshold"),
        (("watch.window=8",), "fewest (32) good steps are never among window (8) of them"),
        (("watch.spike=skip",), "watch.fewest (32) good steps come before the first spike, and training.steps is 6"),
        (("watch.non_finite=roll_back", "checkpoint.every=0"), "none is written before the end; set checkpoint.every"),
        (("watch.spike=ignored",), "watch.spike"),
        (("watch.most=0",), "watch.most"),
        (("watch.spikes=skip",), "unknown key watch.spikes; did you mean watch.spike?"),
    ],
)
def test_a_recipe_that_cannot_be_watched_is_refused(recipe: Recipe, settings: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError) as met:
        recipe(*settings)
    assert says in str(met.value)


def test_decisions_that_are_not_there_or_broken_are_named(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"watch.decisions: there is no "):
        train(recipe(f"watch.decisions={tmp_path}"))
    broken = tmp_path / "decisions.json"
    for text in (
        "[{",
        "[1]",
        '[{"first": 3}]',
        '{"a": 1}',
        '[{"first":-1,"last":2,"action":"skip","step":1,"why":""}]',
    ):
        broken.write_text(text)
        with pytest.raises(CheckpointError, match="which batches are left out"):
            train(recipe(f"watch.decisions={broken}"))


def test_looks_are_taken_where_the_recipe_says_so() -> None:
    assert watches(WatchConfig()) == []
    assert [type(one).__name__ for one in watches(WatchConfig(stragglers=5, corruption=9))] == [
        "StragglerWatch",
        "CorruptionWatch",
    ]


# ------------------------------------------------------------------ the arithmetic


def away(first: int, last: int | None = None, action: Any = "roll_back") -> LeftOut:
    return LeftOut(first, first if last is None else last, action, first, "")


def test_positions_are_those_that_are_not_left_out() -> None:
    decisions = [away(3, 5), away(5, 7), away(8), away(12), away(1, action="skip")]
    assert windows(decisions) == [(3, 8), (12, 12)]
    kept = [p for p in range(40) if not (3 <= p <= 8 or p == 12)]
    assert [position_of(step, windows(decisions)) for step in range(len(kept))] == kept


def test_a_checkpoint_is_fit_that_has_read_nothing_of_what_is_left_out() -> None:
    assert not consumed([away(5)], 5, [])
    assert consumed([away(5)], 6, [])
    assert not consumed([away(5)], 9, [away(5)])
    assert consumed([away(4, 6)], 5, [away(5)])
    assert not consumed([away(6, 9)], 5, [away(5)])
    assert not consumed([away(2, action="skip")], 9, [])


def test_the_same_batches_are_decided_on_once() -> None:
    assert together([away(7), away(2)], [away(7), away(2, action="skip")]) == (away(2), away(2, action="skip"), away(7))


@pytest.mark.parametrize(
    ("step", "margin", "saved", "expected"),
    [
        (9, 0, [4, 8], (9, 9)),
        (9, 1, [4, 8], (8, 10)),
        (9, 3, [4, 8], (6, 12)),
        (9, 3, [8], (8, 12)),
        (1, 3, [], (0, 4)),
    ],
)
def test_a_window_reaches_back_as_far_as_checkpoints_allow(
    step: int, margin: int, saved: list[int], expected: tuple[int, int]
) -> None:
    found = leave_out(step, "", (), WatchConfig(margin=margin), saved)
    assert (found.first, found.last) == expected


def test_the_limit_is_of_the_median_and_its_deviations() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 100.0]
    assert limit(values, 10.0, 0.01) == pytest.approx(3.0 + 10 * 1.4826 * 1.0)
    assert limit([2.0] * 9, 10.0, 0.01) == pytest.approx(2.2), "a hundredth of the median at least"


def test_an_update_is_left_out_by_the_kernel_and_by_us_alike() -> None:
    for fused in (True, False):
        weight = nn.Parameter(torch.ones(4))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
        weight.grad = torch.full((4,), NAN)
        update_unless([optimizer], torch.ones(()))
        assert torch.equal(weight, torch.ones(4))
        weight.grad = torch.ones(4)
        update_unless([optimizer], torch.zeros(()))
        assert float(optimizer.state[weight]["step"]) == 1 and not hasattr(optimizer, "found_inf")
        assert bool((weight < 1).all())


def test_what_saturates_is_no_number() -> None:
    assert is_sound(1.0, 0.0, saturates=False) and not is_sound(1.0, 0.0, saturates=True)
