"""Made-up runs for the report's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from made_run import make_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run of 400 steps."""
    return make_run(tmp_path / "first-light")


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Path]:
    """`make_run` into a fresh folder."""
    return lambda name="some-run", **how: make_run(tmp_path / name, **how)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from threads, and on a busy machine lose a hundredfold waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
