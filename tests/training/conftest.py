"""Fixtures of the trainer's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from zili import ops


@pytest.fixture(autouse=True)
def operations_as_before() -> Iterator[None]:
    """The versions of operations are the process's, not the test's."""
    before = ops.chosen()
    ops.choose("cpu", "fp32", dict.fromkeys(before, "reference"))
    yield
    ops.choose("cpu", "fp32", before)
