"""Rehearsals of a recipe: as one process of many, or as one process of each stage of the pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from typing import TYPE_CHECKING

from zili import chips
from zili.chips.catalog import Chip, find_chip
from zili.config import RunConfig
from zili.errors import ConfigError, LayoutError, ZiliError
from zili.parallel.layout import lay_out

if TYPE_CHECKING:
    from zili.rehearsal import Rehearsal

Say = Callable[[str], None]


def rehearse_ranks(
    config: RunConfig, count: int, rank: int | None, chip: str | None, micro_batches: int | None, say: Say
) -> list[Rehearsal]:
    """Process `rank` of `count`; None: the first of each place in the pipeline, each in a process of its own.

    Raises:
        ZiliError: as `zili.rehearsal.rehearse`, naming the process.
    """
    if count < 1:
        raise LayoutError(f"a rehearsal is of 1 process or more, not of {count}")
    pipeline = lay_out(config, count).pipeline
    name = chip or config.chip.model
    as_one = partial(_as_one, config, count, find_chip(name) if name else None, micro_batches)
    # What the others of a place do is the same.
    ranks = [rank] if rank is not None else [place * (count // pipeline) for place in range(pipeline)]
    say(f"rehearsing process {', '.join(map(str, ranks))}")
    if len(ranks) == 1:
        return [as_one(ranks[0], say)]
    # There is one process group to a process, and there are cores.
    workers = min(len(ranks), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, _forks(), initializer=_one_thread, max_tasks_per_child=1) as pool:
        found = []
        for one in pool.map(as_one, ranks):
            found.append(one)
            say(f"{len(found)} of {len(ranks)} processes rehearsed")
        return found


def _forks() -> BaseContext:
    """What begins processes as forks of one that has imported torch, where there are forks: it takes seconds."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["zili.rehearsal"])
    return context


def _one_thread() -> None:
    """Each has a core; threads of several would wait for each other."""
    import torch

    torch.set_num_threads(1)


def _as_one(
    config: RunConfig, count: int, model: Chip | None, micro_batches: int | None, rank: int, say: Say = lambda _: None
) -> Rehearsal:
    chips.activate(chips.find_backend("cpu"))
    from zili.rehearsal import rehearse

    try:
        backend = _backend(config, model)
        return rehearse(config, count, rank, backend=backend, chip=model, micro_batches=micro_batches, progress=say)
    except ZiliError as error:
        raise type(error)(f"process {rank} of {count}: {error}") from error


def _backend(config: RunConfig, model: Chip | None) -> chips.Backend:
    if model is not None:
        if model.backend is None:
            raise ConfigError(f"{model.name} is in the catalog for planning only: no backend drives it")
        return chips.find_backend(model.backend)
    return (
        chips.choose(config.chip.name).backend if config.chip.name == "auto" else chips.find_backend(config.chip.name)
    )
