"""Settings of a run hold on many processes as on one."""

from __future__ import annotations

import math

import pytest
import torch
from many import largest_difference, on_processes, open_trainer
from tiny_models import BOUND, Kind, Layout, Row, Runs, slow

from zili.config import RunConfig

BF16 = 2e-3
"""Sums of terms that were rounded to 8 bits."""
BOTH = "shards=2 tensor=2"

# What both have, what only the run on many processes has, then bounds of losses and norms.
SAME = [
    slow("muon", "dense", Layout("shards=2"), ["optimizer.name=muon"], [], BOUND, BOUND),
    slow("muon", "dense", Layout(BOTH), ["optimizer.name=muon"], [], BOUND, BOUND),
    slow("muon", "dense", Layout("pipeline=2"), ["optimizer.name=muon"], [], BOUND, BOUND),
    slow("muon", "mixture", Layout("shards=2 expert=2"), ["optimizer.name=muon"], [], BOUND, BOUND),
    slow("muon", "mixture", Layout("tensor=2 expert=2"), ["optimizer.name=muon"], [], BOUND, BOUND),
    *(
        slow(f"recompute {way}", kind, Layout(layout), [], [f"training.recompute={way}"], BOUND, BOUND)
        for way in ("selective", "full")
        for kind, layout in (("dense", BOTH), ("mixture", "shards=2 tensor=2 expert=2"), ("dense", "pipeline=2"))
    ),
    slow("tied", "dense", Layout("pipeline=2"), ["model.tied_embeddings=true"], [], BOUND, BOUND),
    slow("tied", "dense", Layout(BOTH), ["model.tied_embeddings=true"], [], BOUND, BOUND),
    slow("micro-batches of 1", "dense", Layout(BOTH), [], ["training.micro_batch=1"], BOUND, BOUND),
    slow("micro-batches of 1", "mixture", Layout(BOTH), [], ["training.micro_batch=1"], BOUND, BOUND),
    slow("micro-batches of 4", "dense", Layout("shards=2"), [], ["training.micro_batch=4"], BOUND, BOUND),
    *(
        slow("sums each", kind, Layout(f"{layout} reduce=micro_batch"), [], ["training.micro_batch=1"], BOUND, BOUND)
        for kind, layout in (
            *(("dense", "shards=2"), ("dense", "shards=2 replicas=2 tensor=2"), ("mixture", "shards=2 expert=2")),
            *(("dense", "pipeline=2 shards=2"), ("dense", "pipeline=2 replicas=2 schedule=interleaved")),
            ("mixture", "pipeline=2 shards=2 expert=2"),
        )
    ),
    *(
        slow("compiled", kind, Layout(layout), [], ["chip.compile=true"], BOUND, BOUND)
        for kind, layout in (("dense", "shards=2"), ("mixture", "shards=2 expert=2"), ("mixture", "tensor=2 expert=2"))
    ),
    slow("bf16", "dense", Layout("shards=2"), ["chip.precision=bf16"], [], BF16, 10 * BF16),
    slow("bf16", "dense", Layout(BOTH), ["chip.precision=bf16"], [], BF16, 10 * BF16),
]


@pytest.mark.parametrize(("name", "kind", "layout", "both", "many", "losses", "norms"), SAME)
def test_a_setting_does_what_it_does_on_one_process(
    name: str,
    kind: Kind,
    layout: Layout,
    both: list[str],
    many: list[str],
    losses: float,
    norms: float,
    runs: Runs,
    request: pytest.FixtureRequest,
) -> None:
    one, other = runs.alone(kind, *both), runs.on(layout, kind, *both, *many)
    Row.of(f"{layout}, {name}", layout.world, kind, one, other, losses, norms).check(request)


def evaluate(config: RunConfig) -> float:
    """Sum of the losses of made-up rows by a model that was not trained, as evaluation computes it."""
    trainer = open_trainer(config)
    trainer.parallel.eval()
    numbers = torch.Generator().manual_seed(0)
    rows = torch.randint(0, config.model.vocab_size, (32, 65), generator=numbers)
    documents = torch.randint(0, 2, (32, 64), generator=numbers).cumsum(1)
    return float(trainer.parallel.loss_sum(rows[:, :-1], rows[:, 1:], document_ids=documents))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_evaluation_gives_on_every_process_what_one_gives(kind: Kind, runs: Runs) -> None:
    (alone,) = on_processes(1, evaluate, runs.recipe(kind))
    # zbv has the first and the last stage in one process, which cannot hold two embeddings (multi-token prediction).
    schedules = ("interleaved", "zero_bubble", "zbv") if kind == "dense" else ("interleaved", "zero_bubble")
    pipelines = [f"pipeline=2 schedule={name}" for name in schedules]
    for text in ("shards=2", "tensor=2", "context=2", *pipelines, BOTH):
        layout = Layout(text)
        found = on_processes(layout.world, evaluate, runs.recipe(kind, *layout.overrides))
        assert len(set(found)) == 1, "all of them the same"
        assert found[0] == pytest.approx(alone, rel=1e-5), text


@pytest.mark.slow
def test_dropout_drops(runs: Runs) -> None:
    dropout = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1")
    for text in (BOTH, "context=2", "pipeline=2"):
        without, dropped = runs.alone("dense"), runs.on(Layout(text), "dense", *dropout)
        # Other elements on each process, so no curve to compare with; it learns all the same.
        assert all(map(math.isfinite, dropped.losses + dropped.norms))
        assert 1e-4 < largest_difference(without.losses, dropped.losses) < 0.5
        assert dropped.losses[-1] < 0.9 * dropped.losses[0]
