"""The reference model of preferences: what the model that the run starts from gives each answer, computed once.

Kept in the run's folder, since by the time a run goes on its weights are others. Rafailov et al. (2023) run the
reference beside the model; its numbers never change, so a second model in memory and a second pass a step buy nothing.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from zili.data.packing import DialogueLoader
from zili.durable import sync
from zili.errors import CheckpointError
from zili.objectives.preference import log_probabilities
from zili.plurals import counted
from zili.training.trainer import Trainer

REFERENCE_FILE = "reference.safetensors"
Table = dict[str, NDArray[np.float32]]
"""Log-probability of every document `[N]`, by the identity of its store."""
_SUM = "sha256"


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
        started = time.perf_counter()
        table = reference_of(trainer, loaders)
        pairs = sum(len(known) for known in table.values()) // 2
        trainer.note(f"reference: {counted(pairs, 'pair')} in {time.perf_counter() - started:.1f} s")
        trainer.world.from_first(lambda: _write(path, table))
    for loader in loaders:
        loader.reference = table


def reference_of(trainer: Trainer, loaders: Iterable[DialogueLoader]) -> Table:
    """What the model gives every document of `loaders` now, by the identity of their stores."""
    parallel = trainer.parallel
    # As many rows as a step's micro-batches have, on every process.
    rows = max(parallel.rows_together, parallel.micro_batch * trainer.world.layout.data)
    table: Table = {}
    parallel.eval()
    with trainer.uncompiled():
        for loader in loaders:
            for number, (store, _) in enumerate(loader.sources):
                known = table.setdefault(store.identity(), np.zeros(len(store), np.float32))
                for batch, documents in loader.every_row(number, rows):
                    assert batch.reference is not None
                    width = batch.reference.shape[1]
                    values = parallel.row_values(batch, log_probabilities, width).cpu().numpy()
                    for row, here in zip(values, documents, strict=False):
                        known[here] = row[: len(here)]
    parallel.train()
    return table


def _read(path: Path, wanted: dict[str, int]) -> Table:
    try:
        with safe_open(path, "numpy") as file:
            table = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
            written = (file.metadata() or {}).get(_SUM)
        if written != _sum(table):
            raise ValueError("its content changed since it was written")
    except (OSError, ValueError, SafetensorError) as error:
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


def _write(path: Path, table: Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    named = {_key(identity): values for identity, values in table.items()}
    save_file(named, aside, {_SUM: _sum(named)})
    sync(aside)
    aside.replace(path)


def _sum(table: Table) -> str:
    """sha256 of names and values."""
    digest = hashlib.sha256()
    for name in sorted(table):
        digest.update(name.encode() + table[name].tobytes())
    return digest.hexdigest()


def _key(identity: str) -> str:
    return identity.replace(":", "-")
