"""Batches that are left out are so on all processes, and in every layout the same ones."""

from __future__ import annotations

from typing import Any

import pytest
from many import largest_difference, on_processes, open_trainer
from poisoned import NAN, Poison
from tiny_models import BOUND, Kind, Layout, Runs, slow

from zili.config import RunConfig
from zili.training.callbacks import Callback, StepRecord
from zili.training.checkpoints import list_checkpoints, read_state

STEPS, BAD = 8, 5
SETTINGS = (f"training.steps={STEPS}", "watch.fewest=2", "training.global_batch=8", "training.micro_batch=1")


class Curve(Callback):
    """Loss and norm of each step, as it happened last."""

    everywhere = True

    def __init__(self) -> None:
        self.steps: dict[int, tuple[float, float]] = {}
        self.decisions: list[tuple[str, int, int]] = []

    def on_step(self, trainer: Any, record: StepRecord) -> None:
        self.steps[record.step] = record.loss, record.gradient_norm

    def on_event(self, kind: str, values: dict[str, Any]) -> None:
        self.decisions.append((values["action"], values["first"], values["last"]))


def train(config: RunConfig, factor: float) -> Curve:
    curve = Curve()
    trainer = open_trainer(config, [curve, Poison(BAD, factor=factor)])
    trainer.resume()
    trainer.fit()
    return curve


@pytest.mark.parametrize(
    ("layout", "kind", "watch", "factor"),
    [
        slow(Layout("tensor=2"), "dense", "spike=skip", 60.0),
        (Layout("pipeline=2"), "dense", "non_finite=roll_back", NAN),
        slow(Layout("replicas=2"), "mixture", "spike=skip", 60.0),
        slow(Layout("tensor=2"), "dense", "non_finite=roll_back", NAN),
        slow(Layout("pipeline=2"), "mixture", "non_finite=skip", NAN),
        slow(Layout("shards=2"), "dense", "spike=skip", 60.0),
        slow(Layout("replicas=2 tensor=2"), "mixture", "spike=roll_back", 60.0),
    ],
)
def test_all_processes_leave_out_what_one_does(
    layout: Layout, kind: Kind, watch: str, factor: float, runs: Runs
) -> None:
    settings = (*SETTINGS, f"watch.{watch}", "checkpoint.every=3", "optimizer.name=muon")
    alone = runs.recipe(kind, *settings)
    (one,) = on_processes(1, train, alone, factor)
    config = runs.recipe(kind, *settings, *layout.overrides)
    curves = on_processes(layout.world, train, config, factor)
    answer = watch.partition("=")[2]
    expected = [(answer, BAD, BAD)]
    assert [curve.decisions for curve in curves] == [expected] * layout.world and one.decisions == expected
    assert all(repr(curve.steps) == repr(curves[0].steps) for curve in curves)
    sound = [step for step in one.steps if not (answer == "skip" and step == BAD + 1)]
    assert sorted(sound) == sorted({*range(1, STEPS + 1)} - ({BAD + 1} if answer == "skip" else set()))
    for figure in (0, 1):
        found = [[run.steps[step][figure] for step in sound] for run in (one, curves[0])]
        assert largest_difference(*found) <= 10 * BOUND
    states = [read_state(list_checkpoints(run.folder / "checkpoints")[-1]) for run in (alone, config)]
    consumed = STEPS if answer == "skip" else STEPS + 1
    assert [state.samples for state in states] == [8 * consumed] * 2
    assert states[0].decisions[0]["first"] == states[1].decisions[0]["first"] == BAD
