"""Processes that are slower than the others are found by what they do while they do not wait, and named."""

from __future__ import annotations

import time
from typing import Any

import pytest
from many import on_processes, open_trainer
from tiny_models import Layout, Runs, slow

from zili.config import RunConfig
from zili.training.callbacks import Callback
from zili.training.callbacks.stragglers import StragglerWatch
from zili.training.callbacks.stragglers import slow as slow_ones

SETTINGS = ("training.steps=8", "training.global_batch=6", "training.micro_batch=1", "watch.stragglers=1")


class Drag(Callback):
    """The clock of one process goes on by a minute in each of its forward passes, up to a step: as if it were slow,
    whatever the machine is at."""

    everywhere = True

    def __init__(self, rank: int, until: int) -> None:
        self.rank, self.until = rank, until
        self.late, self.minutes = False, 0

    def clock(self) -> float:
        return time.perf_counter() + 60 * self.minutes

    def before_step(self, trainer: Any, batch: Any) -> None:
        self.late = trainer.world.rank == self.rank and trainer.step < self.until

    def on_start(self, trainer: Any) -> None:
        trainer.model.register_forward_pre_hook(self._drag)

    def _drag(self, *_: Any) -> None:
        self.minutes += self.late


class Told(Callback):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.events: list[dict[str, Any]] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)

    def on_event(self, kind: str, values: dict[str, Any]) -> None:
        self.events.append({"kind": kind, **values})


def train(config: RunConfig) -> Told:
    told, drag = Told(), Drag(1, 5)
    trainer = open_trainer(config, [drag, StragglerWatch(config.watch.stragglers, drag.clock), told])
    trainer.fit()
    return told


@pytest.mark.parametrize("layout", [Layout("shards=3"), slow(Layout("replicas=3")), slow(Layout("shards=3 tensor=2"))])
def test_a_slow_process_is_named_when_it_persists_and_when_it_is_over(layout: Layout, runs: Runs) -> None:
    """The very first step is left out, so the third look that finds it slow is at step 4."""
    config = runs.recipe("dense", *SETTINGS, *layout.overrides)
    told = on_processes(layout.world, train, config)[0]
    events = [one for one in told.events if one["process"] == 1]
    assert [(one["kind"], one["phase"], one["over"]) for one in events] == [
        ("straggler", "step", False),
        ("straggler", "step", True),
    ]
    assert events[0]["step"] == 4 and events[1]["step"] > 5
    assert events[0]["seconds"] > 60 > events[0]["median"]
    (slow_line,) = [text for text in told.notes if "process 1 " in text and " is slow in " in text]
    assert slow_line.startswith("step 4: process 1 on ") and "forward, backward and update" in slow_line
    assert any(
        "process 1 " in text and text.endswith("is no longer slow in forward, backward and update")
        for text in told.notes
    )


def test_two_processes_are_not_compared(runs: Runs) -> None:
    config = runs.recipe("dense", *SETTINGS, "training.steps=2", "parallel.shards=2")
    told = on_processes(2, train, config)
    assert told[0].notes == ["watch.stragglers: nobody is compared among fewer than 3 processes"]


def test_who_is_slow() -> None:
    assert slow_ones([1.0, 1.0, 1.0, 1.0], "step", 1.0) == []
    assert [one[:2] for one in slow_ones([1.0, 1.01, 1.5, 0.99], "step", 1.0)] == [(2, "step")]
    assert slow_ones([1.0, 1.2, 1.4, 1.6, 1.8], "step", 1.4) == [], "they differ much among themselves"
    assert slow_ones([0.0, 0.0, 0.01], "data", 1.0) == [], "a hundredth of a step is nothing"
    assert [one.rank for one in slow_ones([0.0, 0.4, 0.0], "data", 1.0)] == [1]
    assert slow_ones([0.5, 0.1, 0.5], "step", 0.5) == [], "fast is not slow"
