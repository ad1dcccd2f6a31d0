"""What a run really allocates, by the profiler's account of the CPU's allocator."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from many import open_trainer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from zili.config import RunConfig
from zili.data.loader import Batch
from zili.models.mixture import Router, Routes

_SECOND = "the second step"


def largest_bytes(config: RunConfig) -> int:
    """Of this process, during the second step, of all it has allocated since the trainer was built."""
    with (
        mock.patch.object(Router, "forward", _to_every_expert_alike(Router.forward)),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        trainer = open_trainer(config)
        trainer.parallel.train()
        rows = trainer.world.rows(config.training.global_batch)
        trainer.train_step(_copied(trainer.loader.batch(0, rows)))
        batch = _copied(trainer.loader.batch(1, rows))
        with record_function(_SECOND):
            trainer.train_step(batch)
    return _peak(profiler.profiler.kineto_results.events())  # type: ignore[union-attr]


def _copied(batch: Batch) -> Batch:
    """Of the allocator's memory, not numpy's."""
    return Batch(*(part.clone() for part in batch))


def _to_every_expert_alike(forward: Any) -> Any:
    """A router as rehearsals think of it: every expert is taken as often as every other."""

    def routed(router: Router, x: Tensor) -> Any:
        routes, loss, counts = forward(router, x)
        experts = torch.arange(routes.experts.numel(), device=x.device).view_as(routes.experts) % router.mixture.experts
        return Routes(experts, routes.weights), loss, torch.full_like(counts, experts.numel() / len(counts))

    return routed


def _peak(events: list[Any]) -> int:
    begin, end = next((e.start_ns(), e.end_ns()) for e in events if e.name() == _SECOND)
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        if begin <= event.start_ns() <= end:
            peak = max(peak, live)
    return peak
