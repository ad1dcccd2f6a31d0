"""Wrong sums are found, and the process that made them is named: in every layout, in real processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from many import on_processes, open_trainer
from tiny_models import Kind, Layout, Runs, slow
from torch import Tensor

from zili.config import RunConfig
from zili.errors import CorruptionError, PeerError
from zili.parallel.model import plain
from zili.parallel.witness import bits_of
from zili.supervision.rules import Ending
from zili.supervision.verdicts import cause_of, failure_of, judge
from zili.training.callbacks import Callback
from zili.training.callbacks.corruption import CorruptionWatch, verdict

SETTINGS = ("training.steps=4", "training.global_batch=8", "training.micro_batch=1", "model.hidden_dropout=0.1")


def flip(tensor: Tensor) -> None:
    """One bit of the first number, a low one."""
    with torch.no_grad():
        plain(tensor).detach().view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 3)


class FlipInPass(Callback):
    """On one process, one bit of what the last block gives in one of all forward passes."""

    everywhere = True

    def __init__(self, rank: int, number: int) -> None:
        self.rank, self.number, self.passes = rank, number, 0

    def on_start(self, trainer: Any) -> None:
        if trainer.world.rank == self.rank:
            block = list(trainer.parallel.parts[-1].layers.children())[-1]
            block.register_forward_hook(self._flip)

    def _flip(self, module: Any, given: Any, out: Tensor) -> None:
        self.passes += 1
        if self.passes == self.number:
            flip(out)


class FlipGradient(Callback):
    """On one process, one bit of a gradient that it has when its backward pass is over."""

    everywhere = True

    def __init__(self, rank: int, number: int) -> None:
        self.rank, self.number, self.passes = rank, number, 0

    def on_start(self, trainer: Any) -> None:
        if trainer.world.rank == self.rank:
            accumulate = trainer.parallel.accumulate

            def flipped(batch: Any) -> Any:
                own = accumulate(batch)
                self.passes += 1
                if self.passes == self.number:
                    flip(next(p.grad for p in trainer.parallel.parameters() if p.grad is not None))
                return own

            trainer.parallel.accumulate = flipped


class FlipWeight(Callback):
    """On one process, one bit of a weight after a step."""

    everywhere = True

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def after_step(self, trainer: Any) -> None:
        if trainer.world.rank == self.rank and trainer.step == self.step:
            flip(next(iter(trainer.parallel.parameters())))


class Events(Callback):
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def on_event(self, kind: str, values: dict[str, Any]) -> None:
        self.events.append(values)

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def train(config: RunConfig, fault: Callback | None) -> tuple[str, str, int, list[dict[str, Any]]]:
    """The error that ends the run here, its text, the steps done, and what was told."""
    seen = Events()
    trainer = open_trainer(config, [*([fault] if fault else []), CorruptionWatch(config.watch.corruption), seen])
    try:
        trainer.fit()
    except (CorruptionError, PeerError) as error:
        assert error.agreed
        return type(error).__name__, str(error), trainer.step, seen.events
    return "", "", trainer.step, seen.events


@pytest.mark.parametrize(
    ("layout", "kind", "blamed", "number"),
    [
        slow(Layout("shards=2"), "dense", 1, 2),
        (Layout("tensor=2"), "mixture", 0, 2),
        (Layout("pipeline=2"), "dense", 0, 8 + 3),
        slow(Layout("pipeline=2"), "dense", 1, 8 + 3),
        slow(Layout("shards=2 expert=2"), "mixture", 1, 2),
        slow(Layout("context=2"), "dense", 1, 2),
        slow(Layout("replicas=2 tensor=2"), "dense", 3, 2),
        slow(Layout(""), "dense", 0, 2),
    ],
)
def test_who_computes_other_bits_the_second_time_is_named(
    layout: Layout, kind: Kind, blamed: int, number: int, runs: Runs
) -> None:
    config = runs.recipe(kind, *SETTINGS, "watch.corruption=100", *layout.overrides)
    found = on_processes(layout.world, train, config, FlipInPass(blamed, number))
    assert [error for error, *_ in found] == [
        "CorruptionError" if rank == blamed else "PeerError" for rank in range(layout.world)
    ]
    text = found[0][1]
    assert text.startswith(f"after step 0: process {blamed} on ") and "the second time" in text
    assert all(one[1:] == (text, 0, found[0][3]) for one in found)
    assert found[0][3][0]["processes"] == [blamed]


def test_a_wrong_gradient_is_its_processs_own(runs: Runs) -> None:
    layout = Layout("replicas=2")
    config = runs.recipe("dense", *SETTINGS, "watch.corruption=100", *layout.overrides)
    found = on_processes(2, train, config, FlipGradient(1, 2))
    assert [error for error, *_ in found] == ["PeerError", "CorruptionError"]


@pytest.mark.parametrize(
    ("layout", "blamed"),
    [(Layout("replicas=3"), 1), slow(Layout("replicas=3 tensor=2"), 4), slow(Layout("shards=3"), 2)],
)
def test_a_replica_with_other_weights_is_named(layout: Layout, blamed: int, runs: Runs) -> None:
    settings = (*SETTINGS, "training.global_batch=6", "watch.corruption=2", *layout.overrides)
    if "shards" in layout.text:  # weights that are whole everywhere
        settings = (*settings, "chip.capabilities.fsdp2=false")
    found = on_processes(layout.world, train, runs.recipe("dense", *settings), FlipWeight(blamed, 2))
    assert [error for error, *_ in found] == [
        "CorruptionError" if rank == blamed else "PeerError" for rank in range(layout.world)
    ]
    assert f"process {blamed} on " in found[0][1] and "has other weights than the 2 that hold" in found[0][1]


def test_of_two_replicas_neither_is_taken_for_the_wrong_one(runs: Runs) -> None:
    config = runs.recipe("dense", *SETTINGS, "parallel.replicas=2", "watch.corruption=100", "checkpoint.every=3")
    found = on_processes(2, train, config, FlipWeight(1, 2))
    assert [error for error, *_ in found] == ["CorruptionError"] * 2
    assert "which of them is wrong cannot be told" in found[0][1] and found[0][2] == 3
    assert not list((config.folder / "checkpoints").glob("step-*")), "no checkpoint of such weights"


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        (Layout("shards=2"), "dense"),
        slow(Layout("replicas=2"), "mixture"),
        slow(Layout("tensor=2 pipeline=2"), "dense"),
        slow(Layout("shards=2 expert=2"), "mixture"),
        slow(Layout("pipeline=2 schedule=zero_bubble"), "dense"),
        slow(Layout("context=2"), "dense"),
    ],
)
def test_looking_changes_no_bit(layout: Layout, kind: Kind, runs: Runs) -> None:
    looked = runs.recipe(kind, *SETTINGS, "watch.corruption=1", *layout.overrides)
    plainly = runs.recipe(kind, *SETTINGS, *layout.overrides)
    weights = [on_processes(layout.world, _weights_after, config) for config in (looked, plainly)]
    assert weights[0] == weights[1]


def _weights_after(config: RunConfig) -> list[int]:
    trainer = open_trainer(config, [CorruptionWatch(1)] if config.watch.corruption else [])
    trainer.fit()
    return [int(bits_of(plain(tensor))) for tensor in trainer.saved_tensors().values()]


def test_a_bit_always_shows() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8):
        tensor = torch.arange(6).to(dtype).reshape(2, 3)
        before = int(bits_of(tensor))
        tensor.view(torch.uint8)[0, 0] ^= 1
        assert int(bits_of(tensor)) != before
    assert int(bits_of(torch.tensor(float("nan")))) == int(bits_of(torch.tensor(float("nan"))))


def said(*weights: int, fault: int | None = None) -> list[dict[str, Any]]:
    return [
        {"place": f"process {rank} on m", "fault": rank == fault, "weights": [("all", one)]}
        for rank, one in enumerate(weights)
    ]


def test_the_verdict() -> None:
    assert verdict(said(1, 1, 1)) == ([], "")
    assert verdict(said(1, 2, 1))[0] == [1]
    assert verdict(said(1, 2, 1, fault=2))[0] == [2], "who computes wrongly is the cause"
    assert verdict(said(1, 2))[0] == [0, 1]
    assert verdict(said(1, 2, 3, 2))[0] == [0, 2]


def test_the_supervisor_replaces_the_machine_of_who_is_to_blame() -> None:
    endings = [Ending(0, "a", code=PeerError.exit_code, step=7), Ending(1, "b", code=CorruptionError.exit_code, step=7)]
    failure = failure_of(cause_of(endings))
    assert (failure.rule, failure.machine) == ("corrupted", "b")
    found = judge(failure, [])
    assert (found.action, found.machine) == ("replace", "b")
    told = '{"message": {"message": "hold the same weights with unlike bits; which of them is wrong cannot be told"}}'
    failure = failure_of(cause_of([Ending(0, "a", code=CorruptionError.exit_code, error=told, step=7)]))
    assert (failure.rule, judge(failure, []).action) == ("replicas-unlike", "restart")
