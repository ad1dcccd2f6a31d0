"""What a collective's speed is: one definition for those who measure it and those who reckon with it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from zili.chips.catalog import find_chip
from zili.planning.fitted.machine import machine, share_sent, with_measurements
from zili.planning.fitted.rates import rates_of
from zili.planning.fitted.step_time import all_to_all, collective

LINK = 100e9


def ring(kind: str, brought: float, processes: int) -> float:
    """Bytes a process sends, step by step, of a collective in which each brings so many."""
    block = brought / processes
    steps = range(processes - 1)
    if kind == "all_gather":  # what came last is passed on
        return sum(brought for _ in steps)
    if kind == "reduce_scatter":  # sums of one block grow on their way
        return sum(block for _ in steps)
    if kind == "all_reduce":
        return ring("reduce_scatter", brought, processes) + ring("all_gather", block, processes)
    if kind == "all_to_all":  # a block for each other
        return sum(block for _ in steps)
    return brought  # to the next one in a chain, or ring


KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "send and receive")


@pytest.mark.parametrize("processes", [2, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sent(kind: str, processes: int) -> None:
    brought = 4e6
    larger = processes * brought if kind == "all_gather" else brought
    assert larger * share_sent(kind, processes) == pytest.approx(ring(kind, brought, processes))


@pytest.mark.parametrize("processes", [2, 8])
def test_what_doctor_measures_the_planner_gives_back(processes: int) -> None:
    """The links of a node carry so much, measured as doctor does: every collective takes as long in the planner."""
    chip = find_chip("ascend-910b2")
    brought = 4e6
    seconds = {kind: ring(kind, brought, processes) / LINK for kind in KINDS}
    rate = share_sent("all_gather", processes) * processes * brought / seconds["all_gather"]
    findings = [{"name": f"all_gather among {processes}", "figures": {"bytes/s": rate}}]
    measured, _ = with_measurements(machine(chip), {"device": "Ascend910B2", "findings": findings})
    assert measured.link == pytest.approx(LINK)
    here = replace(measured, domain=processes)
    rates = rates_of(chip.family).on(here)
    assert collective(processes * brought, processes, 1, here, rates) == pytest.approx(seconds["all_gather"])
    assert collective(brought, processes, 1, here, rates) == pytest.approx(seconds["reduce_scatter"])
    assert all_to_all(brought, processes, here, rates) == pytest.approx(seconds["all_to_all"])
