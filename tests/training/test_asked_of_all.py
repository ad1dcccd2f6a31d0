"""What one process asks for travels in a step's sum, and is done after the step that follows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zili.training.requests import Request, Requests


def of_world(size: int) -> Requests:
    world: Any = SimpleNamespace(size=size, device=SimpleNamespace(type="cpu", torch=torch.device("cpu")))
    return Requests(world)


def step(*processes: Requests) -> None:
    """Each makes a step: what they ask for is added up, and each takes the sum."""
    total = sum((one.terms() for one in processes), torch.zeros(5))
    for one in processes:
        one.take(total.clone())


@pytest.mark.parametrize("name", ["interrupt", "give_up", "over", "save", "stop"])
def test_what_one_asks_for_all_do_after_the_same_step(name: Request) -> None:
    processes = [of_world(3) for _ in range(3)]
    step(*processes)
    processes[1].own[name] = True
    for done_after in (set(), set(), {name}):
        assert [one.due() for one in processes] == [done_after] * 3
        step(*processes)
        processes[1].own[name] = False


def test_one_process_alone_does_at_once_what_it_asks_for() -> None:
    alone = of_world(1)
    assert alone.due() == set()
    alone.own["stop"] = alone.own["save"] = True
    assert alone.due() == {"stop", "save"} and alone.delay == 0


def test_each_sum_is_read_once() -> None:
    one, other = of_world(2), of_world(2)
    one.own["save"] = True
    step(one, other)
    one.own["save"] = False
    due = []
    for _ in range(4):
        step(one, other)
        due.append(other.due())
    assert due == [{"save"}, set(), set(), set()], "asked for in one step, done once"


def test_nothing_is_copied_to_the_device_where_nothing_is_asked_for() -> None:
    one = of_world(2)
    assert one.terms() is one.terms()
    one.own["over"] = True
    assert one.terms().tolist() == [0, 0, 1, 0, 0]
