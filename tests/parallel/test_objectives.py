"""Objectives of one's own: with a module beside the model, and on its logits, the same in every layout."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from many import on_processes, open_trainer
from tiny_models import Kind, Layout, Runs, slow
from torch import nn

from zili.config import RunConfig
from zili.config.model import ModelConfig
from zili.data.loader import Batch
from zili.errors import TrainingError
from zili.models.layers import Linear
from zili.models.outputs import Outputs
from zili.objectives import Objective, Peers, Terms
from zili.ops import IGNORE_INDEX
from zili.training.restoring import load_model


class OddTokens(Objective):
    """The next token, a z-loss, and from the hidden states whether the next token's number is odd."""

    figures = ("z", "odd")

    def modules(self, model: ModelConfig) -> dict[str, nn.Module]:
        return {"odd": Linear(model.hidden_size, 1)}

    def terms(self, outputs: Outputs, batch: Batch, peers: Peers) -> Terms:
        counted = batch.labels != IGNORE_INDEX
        z = (outputs.logsumexp(outputs.logits()).square() * counted).sum()
        labels = outputs.take(batch.labels)
        said = outputs.decoder.get_submodule("odd")(outputs.hidden).squeeze(-1).float()
        wrong = F.binary_cross_entropy_with_logits(said, (labels % 2).float(), reduction="none")
        odd = outputs.total((wrong * (labels != IGNORE_INDEX)).sum())
        loss = outputs.cross_entropy(batch.labels) + 0.01 * z + 0.1 * odd
        return Terms(loss, {"z": z.detach(), "odd": odd.detach()}, counted.sum())


def _curve(config: RunConfig) -> list[dict[str, float]]:
    trainer = open_trainer(config, objective=OddTokens())
    found = []
    rows = trainer.world.rows(config.training.global_batch)
    for _ in range(3):
        loss, norm = trainer.train_step(trainer.loader.batch(trainer.step, rows))
        further = {name: float(value) for name, value in trainer._further.items()}
        found.append({"loss": float(loss), "norm": float(norm), **further})
    trainer.save()
    trainer.saver.wait()
    return found


@pytest.mark.parametrize(
    "layout",
    [
        Layout("tensor=2"),
        slow(Layout("shards=2")),
        slow(Layout("tensor=2 context=2")),
        slow(Layout("pipeline=2 tensor=2")),
        slow(Layout("pipeline=2 schedule=zbv")),
    ],
)
def test_a_layout_has_the_curve_of_one_process(layout: Layout, runs: Runs) -> None:
    config = runs.recipe("dense")
    (one,) = on_processes(1, _curve, config)
    other = on_processes(layout.world, _curve, runs.recipe("dense", *layout.overrides))[0]
    for alone, together in zip(one, other, strict=True):
        assert together == pytest.approx(alone, rel=2e-4)
    _has_the_module(config.folder)


def _has_the_module(folder: Path) -> None:
    """The checkpoint has what was learned beside the model, and the model is read without it."""
    from safetensors import safe_open

    files = sorted(folder.glob("checkpoints/step-*/*.safetensors"))
    names: set[Any] = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    assert "model.odd.weight" in names
    with torch.no_grad():
        assert load_model(folder)(torch.zeros(1, 3, dtype=torch.long)).isfinite().all()


def test_figures_that_are_not_named_are_refused(runs: Runs) -> None:
    """Processes without the last layer know the figures by `figures` alone, so a difference is refused."""

    ((kind, said),) = on_processes(1, _step_of_wrong, runs.recipe("dense"), Wrong())
    assert kind == "TypeError" and "['odd', 'z'], and `figures` names ['missing', 'z']" in said


class Wrong(OddTokens):
    figures = ("z", "missing")


def _step_of_wrong(config: RunConfig, objective: Objective) -> tuple[str, str]:
    trainer = open_trainer(config, objective=objective)
    try:
        trainer.train_step(trainer.loader.batch(0))
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


class Partial(Objective):
    """The next token and a z-loss, which forgets that there is more vocabulary elsewhere."""

    figures = ("z",)

    def terms(self, outputs: Outputs, batch: Batch, peers: Peers) -> Terms:
        counted = batch.labels != IGNORE_INDEX
        z = (outputs.logits().logsumexp(-1).square() * counted).sum()
        return Terms(outputs.cross_entropy(batch.labels) + 1e-4 * z, {"z": z.detach()}, counted.sum())


@pytest.mark.parametrize(
    ("objective", "layout"),
    [
        (Partial(), Layout("tensor=2")),
        (OddTokens(), Layout("tensor=2")),
        slow(Partial(), Layout("tensor=2 pipeline=2")),
        slow(OddTokens(), Layout("tensor=2 context=2")),
    ],
)
def test_taking_a_part_of_the_vocabulary_for_the_whole_is_refused(
    objective: Objective, layout: Layout, runs: Runs
) -> None:
    overrides = (*layout.overrides, "training.steps=1")
    said = on_processes(layout.world, _fit, runs.recipe("dense", *overrides), objective)
    wrong = "Partial.terms gives another loss or figure on each process of parallel.tensor: outputs.logits() has a part"
    assert all(word.startswith(wrong) if isinstance(objective, Partial) else word == "" for word in said), said


def _fit(config: RunConfig, objective: Objective) -> str:
    try:
        open_trainer(config, objective=objective).fit()
    except TrainingError as error:
        return str(error)
    return ""


OWN = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "own_model.py"), run_name="own_model")


def _own_curve(config: RunConfig) -> list[list[float]]:
    trainer = open_trainer(config, decoder=OWN["OwnDecoder"])
    rows = trainer.world.rows(config.training.global_batch)
    steps = [trainer.train_step(trainer.loader.batch(trainer.step, rows)) for _ in range(3)]
    return [[float(value) for value in step] for step in steps]


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        (Layout("tensor=2 pipeline=2"), "dense"),
        slow(Layout("shards=2"), "dense"),
        slow(Layout("context=2"), "mixture"),
        slow(Layout("tensor=2"), "mixture"),
        slow(Layout("shards=2 expert=2"), "mixture"),
        slow(Layout("pipeline=2 schedule=zbv"), "dense"),
    ],
)
def test_a_block_of_ones_own_has_the_curve_of_one_process(layout: Layout, kind: Kind, runs: Runs) -> None:
    (one,) = on_processes(1, _own_curve, runs.recipe(kind, "training.recompute=selective"))
    other = on_processes(layout.world, _own_curve, runs.recipe(kind, *layout.overrides))[0]
    for alone, together in zip(one, other, strict=True):
        assert together == pytest.approx(alone, rel=2e-4)
