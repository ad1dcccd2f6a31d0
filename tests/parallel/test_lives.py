"""torchrun keeps the store of a job over all its lives: each life must find its own processes, and no dead ones."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from many import on_processes

from zili.errors import LayoutError
from zili.parallel.lives import own_life

PATIENCE = timedelta(seconds=60)


@pytest.fixture
def store() -> Iterator[dist.TCPStore]:
    """The store of an agent, which outlives its workers."""
    yield dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def client(store: dist.TCPStore) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)


def begin(store: dist.TCPStore, ranks: range, size: int) -> dict[int, dist.Store]:
    """The processes `ranks` of a life of `size`, each of which has found its store."""
    found: dict[int, dist.Store] = {}
    clients = {rank: client(store) for rank in ranks}
    threads = [
        threading.Thread(target=lambda rank=rank: found.update({rank: own_life(clients[rank], rank, size, PATIENCE)}))
        for rank in ranks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_the_processes_of_a_life_meet_and_see_nothing_of_others(store: dist.TCPStore) -> None:
    lives = [begin(store, range(3), 3), begin(store, range(3), 3), begin(store, range(2), 2)]
    for number, life in enumerate(lives):
        for rank, own in life.items():
            assert not own.check([str(rank)]), "an earlier life's"
            own.set(str(rank), str(number))
    for number, life in enumerate(lives):
        for own in life.values():
            assert [own.get(str(rank)) for rank in life] == [str(number).encode()] * len(life)


def test_who_was_killed_before_its_life_was_whole_is_not_waited_for(store: dist.TCPStore) -> None:
    def dead(rank: int) -> None:
        with pytest.raises(LayoutError):  # here its patience ends where its process would have been killed
            own_life(client(store), rank, 3, timedelta(seconds=0.2))

    dead(0)
    dead(1)
    lives = begin(store, range(3), 3)
    lives[1].set("here", "1")
    assert lives[0].get("here") == lives[2].get("here") == b"1"


def test_who_does_not_come_is_named(store: dist.TCPStore) -> None:
    with pytest.raises(LayoutError, match=r"2 of 3 processes did not come within .* \(process 1 is the first"):
        own_life(client(store), 0, 3, timedelta(seconds=0.2))
    with pytest.raises(LayoutError, match="the first process did not call process 2 within"):
        own_life(client(store), 2, 4, timedelta(seconds=0.2))


def live(port: int, dies: bool) -> list[float]:
    """One life of a process: it joins, sums over all and over a group made later, and is killed or ends."""
    from test_world import world_here

    os.environ["MASTER_PORT"] = str(port)
    world = world_here(2)
    group = dist.new_group(backend="gloo")
    sums = [world.sum(torch.ones(1)), torch.ones(1), torch.ones(1)]
    dist.all_reduce(sums[1], group=group)
    dist.all_reduce(sums[2], group=world.mesh("weights").get_group())
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(value) for value in sums]


def test_a_life_follows_one_that_was_killed(store: dist.TCPStore) -> None:
    def one_life(dies: bool) -> list[Any]:
        return on_processes(2, live, store.port, dies, environment={"TORCHELASTIC_USE_AGENT_STORE": "True"})

    with pytest.raises(AssertionError, match="without a word"):
        one_life(dies=True)
    assert one_life(dies=False) == [[2.0] * 3] * 2
