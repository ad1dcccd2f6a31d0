"""What a rehearsal says a process takes is what a device's allocator gives it: layouts on one to eight processes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from many import on_processes, open_trainer
from plugins import CAMBRICON, Environment
from tiny_models import Kind, Layout, Runs, slow
from torch.nn.attention import SDPBackend, sdpa_kernel

from zili import chips
from zili.config import RunConfig
from zili.models.mixture import Router, Routes
from zili.models.outputs import Routing

SIZES = (
    *("model.vocab_size=2048", "model.hidden_size=256", "model.ffn_hidden_size=512"),
    *("training.sequence_length=128", "training.global_batch=8"),
)
"""Blocks large beside the 512 bytes in which an allocator counts."""
PLAIN = ("linear", "attention")
LAYOUTS: dict[int, list[tuple[Kind, str, tuple[str, ...]]]] = {
    1: [
        ("dense", "", ("training.recompute=selective", "chip.precision=bf16")),
        ("mixture", "", ()),
        ("dense", "", ()),
        ("dense", "", ("training.recompute=full",)),
        ("dense", "", ("optimizer.name=muon", "training.micro_batch=4")),
    ],
    2: [
        ("dense", "shards=2", ("chip.precision=bf16",)),
        ("dense", "replicas=2", ()),
        ("dense", "tensor=2", ()),
        ("dense", "tensor=2", ("training.recompute=selective", "chip.precision=bf16")),
        ("dense", "context=2", ()),
        ("dense", "pipeline=2", ()),
        ("dense", "pipeline=2 schedule=interleaved", ()),
        ("mixture", "shards=2 expert=2", ()),
    ],
    4: [
        ("dense", "replicas=2 shards=2", ()),
        ("dense", "shards=2 tensor=2", ()),
        ("dense", "context=2 pipeline=2", ("training.recompute=full",)),
        ("dense", "tensor=2 pipeline=2 schedule=zero_bubble", ()),
        ("mixture", "tensor=2 expert=2 shards=2", ("chip.precision=bf16",)),
        ("mixture", "shards=2 pipeline=2 expert=2", ("training.recompute=full",)),
    ],
    8: [
        ("dense", "shards=2 tensor=2 pipeline=2", ("training.global_batch=32",)),
        ("mixture", "shards=2 context=2 tensor=2 expert=4", ()),
    ],
}
WITHIN = 0.03


def largest_bytes(configs: Sequence[RunConfig]) -> list[int]:
    """Most that the device's allocator gave this process during the second step of each."""
    import emulated

    found = []
    for config in configs:
        gc.collect()  # FSDP2's modules refer to one another
        left = emulated.counts().live
        with mock.patch.object(Router, "forward", to_every_expert_alike(Router.forward)):
            trainer = open_trainer(config)
            trainer.parallel.train()
            rows = trainer.world.rows(config.training.global_batch)
            trainer.train_step(trainer.loader.batch(0, rows))
            batch = trainer.loader.batch(1, rows)
            emulated.reset()
            trainer.train_step(batch)
            found.append(emulated.counts().peak - left)
        del trainer
    return found


def to_every_expert_alike(forward: Any) -> Any:
    """A router as rehearsals think of it: every expert is taken as often as every other."""

    def routed(router: Router, x: torch.Tensor, routing: Routing) -> Any:
        routes, loss = forward(router, x, routing)
        experts = torch.arange(routes.experts.numel(), device=x.device).view_as(routes.experts)
        even = torch.full_like(routes.counts, experts.numel() // len(routes.counts))
        if routing.figures:
            routing.figures[-1] = routing.figures[-1]._replace(tokens=even.float())
        return Routes(experts % router.mixture.experts, routes.weights, even), loss

    return routed


def rehearsed(config: RunConfig, world: int, rank: int) -> int:
    from zili.rehearsal import rehearse

    # The device has torch's formula for attention, not a kernel.
    with sdpa_kernel(SDPBackend.MATH):
        return rehearse(config, world, rank, backend=chips.find_backend("cambricon"), micro_batches=64).peak.bytes


@pytest.mark.parametrize(("world", "cases"), [(1, 2), slow(1, 5), slow(2, 8), slow(4, 6), slow(8, 2)])
def test_it_is_what_the_allocator_gives(
    world: int, cases: int, runs: Runs, with_plugins: Environment, record_property: Callable[[str, object], None]
) -> None:
    plain = [f"chip.operations.{name}=reference" for name in PLAIN]
    layouts = [(kind, Layout(text), more) for kind, text, more in LAYOUTS[world][:cases]]
    configs = [
        runs.recipe(kind, *layout.overrides, *SIZES, *plain, "chip.name=cambricon", *more)
        for kind, layout, more in layouts
    ]
    given = on_processes(world, largest_bytes, configs, environment=with_plugins(CAMBRICON))
    for number, (kind, layout, more) in enumerate(layouts):
        for rank in sorted({0, world - 1}):
            (said,) = on_processes(1, rehearsed, configs[number], world, rank)
            truth = given[rank][number]
            off = said / truth - 1
            case = f"{kind}, {layout}, {' '.join(more)}: process {rank}: {said:,} bytes said, {truth:,} given"
            record_property(case, f"{off:.2%}")
            assert abs(off) <= WITHIN, case
