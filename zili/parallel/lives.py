"""The lives of a job: torchrun starts its processes anew when one dies, and keeps their store with all that is in it.

Who finds an address of the last life there knocks at the door of the dead: on torch 2.13 every life but the first ended
with "Gloo connectFullMesh failed ... refused". So each life has keys of its own. No variable of the environment names
a life: the count of restarts is an agent's own, and agents of several machines differ in it. The processes find their
life themselves, by what they write into the store.
"""

from __future__ import annotations

import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist

from zili.errors import LayoutError

_PAUSES = (0.01, 0.5)
"""Seconds between two looks, at first and in the end: ten thousand processes ask one store."""


def own_life(store: dist.Store, rank: int, size: int, patience: timedelta) -> dist.Store:
    """`store` under keys that are this life's alone. Every process of the life calls it; all of them have come then.

    The first process names the life, as nobody did before. The others present themselves, each by a name of its own, to
    the life that was named last, and are in it when the first has called them by that name. So a process never takes
    what an earlier life left for its own: it left no call for it.

    Raises:
        LayoutError: not all processes have come before `patience` was over.
    """
    store = dist.PrefixStore(f"zili/{size}", store)
    own = uuid4().hex
    life = _call_all(store, own, size, patience) if rank == 0 else _await_call(store, own, rank, patience)
    return dist.PrefixStore(f"life/{life}", store)


def _call_all(store: dist.Store, life: str, size: int, patience: timedelta) -> str:
    store.set("newest", life)
    places = [_place(life, rank) for rank in range(1, size)]
    try:
        store.wait(places, patience)
    except dist.DistStoreError as error:
        late = [rank for rank, place in enumerate(places, 1) if not store.check([place])]
        raise LayoutError(
            f"{len(late)} of {size} processes did not come within {patience} (process {late[0]} is the first of them); "
            "see what their machines say"
        ) from error
    names = store.multi_get(places)
    calls = [_call(name.decode()) for name in names]
    store.multi_set(calls, [life] * len(calls))  # type: ignore[attr-defined]  # the stub has multi_get alone
    return life


def _await_call(store: dist.Store, own: str, rank: int, patience: timedelta) -> str:
    end, pause = time.monotonic() + patience.total_seconds(), _PAUSES[0]
    while time.monotonic() < end:
        # `wait` with a short patience would do, and print a warning each time.
        if store.check(["newest"]):
            store.set(_place(store.get("newest").decode(), rank), own)
        if store.check([_call(own)]):
            return store.get(_call(own)).decode()
        time.sleep(pause)
        pause = min(2 * pause, _PAUSES[1])
    raise LayoutError(f"the first process did not call process {rank} within {patience}; see what its machine says")


def _place(life: str, rank: int) -> str:
    return f"came/{life}/{rank}"


def _call(name: str) -> str:
    return f"call/{name}"
