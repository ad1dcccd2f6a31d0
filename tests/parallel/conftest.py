"""Runs of the two tiny models, shared by the tests of every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import Runs


@pytest.fixture(scope="session")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The session's runs; the curve of one process is computed once for each recipe."""
    return Runs(tiny_data, tmp_path_factory.mktemp("runs"))
