"""Runs of the real trainer on several processes of this machine, over Gloo on loopback."""

from __future__ import annotations

import multiprocessing
import os
import queue
import random
import signal
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import forks
import torch

from zili.chips import find_backend
from zili.chips.device import Device
from zili.config import RunConfig
from zili.models.decoder import Decoder
from zili.objectives import Objective
from zili.parallel.layout import Layout
from zili.parallel.world import World, join
from zili.training.callbacks import Callback, StepRecord
from zili.training.trainer import Trainer

_SECONDS = 900
PEAK = 1e11


@dataclass
class Curve(Callback):
    """What a run went through."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        self.losses.append(record.loss)
        self.norms.append(record.gradient_norm)


def on_processes(
    count: int, work: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
) -> list[Any]:
    """`work(*arguments)` on `count` processes that torchrun might have started; the results by rank.

    They are forks of one that has torch imported, but no plugin: those in their `environment` are theirs alone.
    Raises `AssertionError` with the traceback of the first that failed.
    """
    context = forks.context()
    port = free_port()
    results: multiprocessing.Queue[Any] = context.Queue()
    all_in = context.Event()
    processes = [
        context.Process(
            target=_on_one, args=(rank, count, port, dict(environment or {}), results, all_in, work, arguments)
        )
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    end = time.monotonic() + _SECONDS
    try:
        while len(found) < count and time.monotonic() < end:
            try:
                rank, result = results.get(timeout=0.5)
                found[rank] = result
            except queue.Empty:
                if any(process.exitcode not in (0, None) for process in processes):
                    break
            if any(isinstance(result, Failed) for result in found.values()):
                break  # the others wait for one that has given up
        all_in.set()
        for process in processes[: None if len(found) == count else 0]:
            process.join(10)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    failed = [result for result in found.values() if isinstance(result, Failed)]
    assert not failed, failed[0].trace
    assert sorted(found) == list(range(count)), f"processes ended without a word: {[p.exitcode for p in processes]}"
    return [found[rank] for rank in range(count)]


def free_port() -> int:
    """A port of this machine that nobody listened at a moment ago.

    Not one the system hands out by itself: the pairs of another test's processes might take it before it is used.
    """
    while True:
        port = random.randint(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass
class Failed:
    trace: str


def place(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells process `rank` of `count` on this machine."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return {**{name: str(value) for name, value in place.items()}, "MASTER_ADDR": "127.0.0.1"}


def _on_one(
    rank: int,
    count: int,
    port: int,
    environment: Mapping[str, str],
    results: Any,
    all_in: Any,
    work: Callable[..., Any],
    arguments: Any,
) -> None:
    forks.take_environment({**environment, **place(rank, count, port)})
    torch.set_num_threads(1)
    try:
        results.put((rank, work(*arguments)))
    except BaseException:
        results.put((rank, Failed(traceback.format_exc())))
    finally:
        all_in.wait(_SECONDS)  # who leaves while another reads its last message may take that along
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class Stop(Callback):
    """Ends a run after one step, by a signal to its last process alone: the others must hear of it.

    They do after two steps more. A run that is to end before that is told so on each process."""

    def __init__(self, step: int) -> None:
        self.step = step
        self._at_once = False

    def on_start(self, trainer: Trainer) -> None:
        self._at_once = self.step <= trainer.step + trainer._requests.delay

    def after_step(self, trainer: Trainer) -> None:
        requests = trainer._requests
        if self._at_once:
            if trainer.step == self.step:
                requests.due = lambda: {"interrupt"}  # type: ignore[method-assign]
        elif trainer.step == self.step - requests.delay and trainer.world.rank == trainer.world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def world_here(size: int) -> World:
    """The world of this process, one of `size` without a model."""
    from zili.chips.activation import activate

    device = Device(activate(find_backend("cpu"), index=0))
    join(device)
    return World(Layout(shards=size), device)


def open_trainer(
    config: RunConfig,
    callbacks: Sequence[Callback] = (),
    objective: Objective | None = None,
    decoder: type[Decoder] = Decoder,
) -> Trainer:
    """The trainer of `config` on a process of its world."""
    from zili.runs.opening import open_run

    with mock.patch("zili.training.setup.chips.activate", _activate):
        opened = open_run(config)
    resolved = opened.setup.config
    assert resolved.chip.precision != "auto"
    given = (resolved, opened.loader, opened.setup.device, callbacks, opened.setup.world)
    trainer = Trainer(*given, objective=objective, decoder=decoder)
    trainer.matmul_peak = PEAK  # 0.3 s to measure
    return trainer


def train(config: RunConfig, stop: int | None = None) -> Curve:
    """Train `config` as a process of its world does, from its newest checkpoint to its end or to step `stop`."""
    from zili.runs.running import begin

    curve = Curve()
    trainer = open_trainer(config, [curve] if stop is None else [curve, Stop(stop)])
    begin(trainer)
    trainer.fit()
    return curve


def curve_of(config: RunConfig, world: int, stop: int | None = None) -> Curve:
    """Losses and gradient norms of `config` on `world` processes; all of them report the same."""
    curves = on_processes(world, train, config, stop)
    for other in curves[1:]:
        assert other.losses == curves[0].losses and other.norms == curves[0].norms
    return curves[0]


def largest_difference(one: list[float], other: list[float]) -> float:
    """The largest relative difference of two curves of equal length."""
    assert len(one) == len(other) > 0
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _activate(backend: Any, *, index: int = 0, deterministic: bool = False) -> Any:
    # On the CPU every process has device 0.
    from zili.chips.activation import activate

    return activate(backend, index=0, deterministic=deterministic)
