"""What the model that a run starts from gives each answer, computed once: the reference that preferences are beside.

Kept in the run's folder, since by the time a run goes on its weights are others. Rafailov et al. (2023) run the
reference beside the model; its numbers never change, so a second model in memory and a second pass a step buy nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from zili.data.packing import DialogueLoader
from zili.durable import sync
from zili.errors import CheckpointError
from zili.training.trainer import Trainer

REFERENCE_FILE = "reference.safetensors"
_Table = dict[str, NDArray[np.float32]]


def set_reference(trainer: Trainer, loaders: Iterable[DialogueLoader], *, resumed: bool) -> None:
    """Give `loaders` of pairs their reference: of a run that `resumed` what it began with, of a new one what its
    weights give now, which is written into its folder.

    Raises:
        CheckpointError: a run that goes on has lost its reference, or has other pairs.
    """
    path, loaders = trainer.config.folder / REFERENCE_FILE, list(loaders)
    wanted = {store.identity(): len(store) for loader in loaders for store, _ in loader.sources}
    if resumed:
        table = trainer.world.agree(lambda: _read(path, wanted))
    else:
        table = _computed(trainer, loaders)
        trainer.world.from_first(lambda: _write(path, table))
    for loader in loaders:
        loader.reference = table


def _computed(trainer: Trainer, loaders: list[DialogueLoader]) -> _Table:
    started = time.perf_counter()
    parallel = trainer.parallel
    # As many rows as a step's micro-batches have, on every process.
    rows = max(parallel.rows_together, parallel.micro_batch * trainer.world.layout.data)
    table: _Table = {}
    parallel.eval()
    with trainer.uncompiled():
        for loader in loaders:
            for number, (store, _) in enumerate(loader.sources):
                known = table.setdefault(store.identity(), np.zeros(len(store), np.float32))
                for batch, documents in loader.every_row(number, rows):
                    values = parallel.log_probabilities(batch).cpu().numpy()
                    for row, here in zip(values, documents, strict=False):
                        known[here] = row[: len(here)]
    parallel.train()
    pairs = sum(len(known) for known in table.values()) // 2
    trainer.note(f"reference: {pairs:,} pairs in {time.perf_counter() - started:.1f} s")
    return table


def _read(path: Path, wanted: dict[str, int]) -> _Table:
    try:
        table = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: the run goes on, and what it began as cannot be read ({error}); restore the file, or give the "
            "run another folder"
        ) from error
    for identity, documents in wanted.items():
        if table.get(_key(identity), np.empty(0)).shape != (documents,):
            raise CheckpointError(
                f"{path}: has no reference of a store that the recipe names; the run began with others. Name those, or "
                "give the run another folder"
            )
    return {identity: table[_key(identity)] for identity in wanted}


def _write(path: Path, table: _Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({_key(identity): values for identity, values in table.items()}, aside)
    sync(aside)
    aside.replace(path)


def _key(identity: str) -> str:
    return identity.replace(":", "-")
