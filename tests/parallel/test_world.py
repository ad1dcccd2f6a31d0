"""Processes agree: what one fails with, all fail with, and none is left waiting."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from many import on_processes, world_here

from zili import chips
from zili.chips.device import Device
from zili.errors import CheckpointError, DataError, ZiliError
from zili.parallel.layout import Layout
from zili.parallel.world import World


class Heard(NamedTuple):
    """What a process was told."""

    kind: str
    text: str
    agreed: bool
    seconds: float


def agreements() -> dict[str, Any]:
    """Several agreements in a row: after one that failed the next still works."""
    world = world_here(2)
    return {
        "all well": world.agree(lambda: world.rank * 10),
        "the first fails": failed(lambda: agreeing(world, {0: DataError("no store")})),
        "the last fails": failed(lambda: agreeing(world, {1: CheckpointError("a shard is missing")})),
        "all fail alike": failed(lambda: agreeing(world, dict.fromkeys((0, 1), DataError("no store")))),
        "each fails": failed(lambda: agreeing(world, {0: DataError("no store"), 1: CheckpointError("none")})),
        "a disk is full": failed(lambda: agreeing(world, {1: OSError(errno.ENOSPC, "no space", "a file")})),
        "the last meets a defect": failed(lambda: agreeing(world, {1: KeyError("a name")})),
        "well again": world.agree(lambda: world.rank * 10),
        "from the first": world.from_first(lambda: {"rank": world.rank, "none": None}),
        "the first makes nothing": failed(lambda: world.from_first(lambda: fails(world, {0: DataError("no")}))),
        "the others make nothing": world.from_first(lambda: fails(world, {1: DataError("never called")})),
        "a sum": world.sum(torch.tensor([1.0, world.rank])).tolist(),
    }


def fails(world: World, errors: dict[int, Exception]) -> str:
    time.sleep(0.2 * world.rank)
    if world.rank in errors:
        raise errors[world.rank]
    return "well"


def agreeing(world: World, errors: dict[int, Exception]) -> str:
    return world.agree(lambda: fails(world, errors))


def failed(work: Callable[[], object]) -> Heard:
    started = time.monotonic()
    try:
        work()
    except Exception as error:
        agreed = isinstance(error, ZiliError) and error.agreed
        return Heard(type(error).__name__, str(error), agreed, time.monotonic() - started)
    raise AssertionError("nothing was raised")


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    return on_processes(2, agreements)


@pytest.mark.parametrize(
    ("case", "kind", "text"),
    [
        ("the first fails", "DataError", "no store"),
        ("the last fails", "CheckpointError", "a shard is missing"),
        ("all fail alike", "DataError", "no store"),
        ("each fails", "DataError", "no store"),
        ("the first makes nothing", "DataError", "no"),
        (
            "a disk is full",
            "ConfigError",
            f"the disk refuses: [Errno {errno.ENOSPC}] no space: 'a file'; free some space, or name another place",
        ),
    ],
)
def test_an_error_of_one_process_is_raised_on_all(told: list[dict[str, Any]], case: str, kind: str, text: str) -> None:
    for own in told:
        found = own[case]
        assert (found.kind, found.text, found.agreed) == (kind, text, True)
        assert found.seconds < 10


def test_a_defect_is_raised_where_it_is_and_the_others_are_told(told: list[dict[str, Any]]) -> None:
    first, last = (own["the last meets a defect"] for own in told)
    assert (first.kind, first.text, first.agreed) == ("ZiliError", "process 1 failed: KeyError: 'a name'", True)
    assert (last.kind, last.text, last.agreed) == ("KeyError", "'a name'", False)


def test_where_nothing_fails_each_process_has_its_own_result(told: list[dict[str, Any]]) -> None:
    for case in ("all well", "well again"):
        assert [own[case] for own in told] == [0, 10]


def test_what_the_first_makes_all_have(told: list[dict[str, Any]]) -> None:
    assert [own["from the first"] for own in told] == [{"rank": 0, "none": None}] * 2
    assert [own["the others make nothing"] for own in told] == ["well"] * 2


def test_a_sum_is_over_all(told: list[dict[str, Any]]) -> None:
    assert [own["a sum"] for own in told] == [[2.0, 1.0]] * 2


def test_one_process_agrees_with_itself_and_says_so_itself() -> None:
    world = World(Layout(), Device(chips.activate(chips.find_backend("cpu"))))
    assert world.from_first(lambda: 3) == world.agree(lambda: 3) == 3
    with pytest.raises(DataError) as raised:
        world.agree(lambda: fails(world, {0: DataError("no store")}))
    assert not raised.value.agreed
