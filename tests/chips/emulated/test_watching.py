"""A run on an accelerator watches itself as one on the CPU does."""

from __future__ import annotations

import pytest
from many import on_processes
from plugins import ASCEND, Environment
from test_corruption import SETTINGS, FlipInPass, train
from tiny_models import Runs


@pytest.mark.slow
@pytest.mark.parametrize("blamed", [None, 1])
def test_who_computes_other_bits_is_named_on_a_chip_too(
    blamed: int | None, runs: Runs, with_plugins: Environment
) -> None:
    looks = ("watch.corruption=1", "watch.spike=skip", "watch.fewest=2", "chip.deterministic=true")
    config = runs.recipe("dense", *SETTINGS, *looks, f"chip.name={ASCEND.backend}", "parallel.replicas=2")
    fault = None if blamed is None else FlipInPass(blamed, 2)
    found = on_processes(2, train, config, fault, environment=with_plugins(ASCEND))
    if blamed is None:
        assert [one[:3] for one in found] == [("", "", 4)] * 2
    else:
        assert [one[0] for one in found] == ["PeerError", "CorruptionError"]
        assert "process 1 on " in found[0][1]
