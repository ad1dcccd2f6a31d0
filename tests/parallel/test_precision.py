"""In bf16 every layout takes each weight in the precision in which one process takes it."""

from __future__ import annotations

import pytest
import torch
from many import largest_difference, on_processes, open_trainer
from tiny_models import Kind, Layout, Runs, slow

from zili.config import RunConfig

BF16 = "chip.precision=bf16"
TIED = "model.tied_embeddings=true"
FEW = "training.global_batch=8"
SAME_FORWARD = 1e-6
"""Of the first loss: rows are computed as in one process, and only their sum has another order."""


@pytest.mark.parametrize(
    ("layout", "kind", "settings", "bound"),
    [
        (Layout("shards=2"), "mixture", (), SAME_FORWARD),
        slow(Layout("shards=2"), "dense", (), SAME_FORWARD),
        slow(Layout("shards=2"), "dense", (TIED,), SAME_FORWARD),
        slow(Layout("shards=2"), "mixture", ("chip.capabilities.fsdp2=false",), SAME_FORWARD),
        slow(Layout("replicas=2 shards=2"), "mixture", (), SAME_FORWARD),
        slow(Layout("shards=2 expert=2"), "mixture", (), SAME_FORWARD),
        slow(Layout("pipeline=2"), "mixture", (), SAME_FORWARD),
        slow(Layout("pipeline=2"), "dense", (TIED,), SAME_FORWARD),
        slow(Layout("shards=2 pipeline=2 schedule=zero_bubble"), "dense", (), SAME_FORWARD),
        slow(Layout("context=2"), "mixture", (), SAME_FORWARD),
        # Its products are cut, and their terms rounded to 8 bits before they are summed.
        slow(Layout("tensor=2"), "mixture", (), 3e-5),
        slow(Layout("shards=2 tensor=2"), "dense", (), 3e-5),
    ],
)
def test_the_first_loss_is_that_of_one_process(
    layout: Layout, kind: Kind, settings: tuple[str, ...], bound: float, runs: Runs
) -> None:
    one, many = runs.alone(kind, BF16, *settings, steps=1), runs.on(layout, kind, BF16, *settings, steps=1)
    assert largest_difference(one.losses, many.losses) <= bound


def whole_weights(config: RunConfig) -> dict[str, bytes]:
    """After two steps, the weights that this process has uncut."""
    trainer = open_trainer(config)
    trainer.parallel.train()
    rows = trainer.world.rows(config.training.global_batch)
    for step in range(2):
        trainer.train_step(trainer.loader.batch(step, rows))
    held = ((name, p.detach()) for name, p in trainer.parallel.named_parameters())
    return {name: tensor.numpy().tobytes() for name, tensor in held if type(tensor) is torch.Tensor}


@pytest.mark.parametrize("layout", [Layout("shards=2"), slow(Layout("replicas=2 shards=2"))])
def test_what_every_process_has_whole_stays_the_same_on_all(layout: Layout, runs: Runs) -> None:
    first, *others = on_processes(layout.world, whole_weights, runs.recipe("mixture", BF16, FEW, *layout.overrides))
    assert {name.rpartition(".")[0].rpartition(".")[2].rpartition("_")[2] for name in first} == {"norm", "router"}
    assert all(other == first for other in others)
