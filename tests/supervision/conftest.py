"""Runs under `zili launch` that end with the test, whatever becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launching import Launch, Launched

from zili.config import RunConfig

SETTINGS = (
    *(f"chip.operations.{name}=reference" for name in ("linear", "attention")),
    *("chip.precision=fp32", "checkpoint.every=10", "training.micro_batch=1"),
)


@pytest.fixture
def launch(recipe: Callable[..., RunConfig], tmp_path: Path) -> Iterator[Launch]:
    """`launch("training.steps=9", words=("--machines", "2"), name="run")`: a run that is ready to begin."""
    runs: list[Launched] = []

    def make(*overrides: str, words: tuple[str, ...] = (), name: str = "run") -> Launched:
        folder = tmp_path / name
        folder.mkdir()
        config = recipe(*SETTINGS, *overrides, f"folder={folder / 'run'}")
        runs.append(Launched(folder, config, "--processes", "2", *words))
        return runs[-1]

    yield make
    for run in runs:
        run.end()
        assert not run.left(), "nothing is left behind"
