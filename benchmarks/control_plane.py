"""What it costs N processes to start, agree, save, verify and resume: time, messages, CPU, open files of the busiest.

    python benchmarks/control_plane.py [--processes 8 32 128 256] [--agents]

Real processes, forked from one that has everything imported, eight to a machine as far as they know, over loopback.
There is no model to speak of: fifty small tensors cut over all of them. The processes meet at a store in a process of
its own, as torchrun has it, and the first of each machine has its node; with `--agents` the nodes are in processes of
their own, which are not counted, and hold the store too. CPU is user and system time of a process (getrusage), the
thread of its machine's node with it. A message is one that a process or its node sends or receives.
Start makes the groups over Gloo that a run on CPUs has. What follows has groups that do nothing, since it needs none:
the idle threads of Gloo, thirty a process, wake by the clock, and those of 256 processes take both cores.
On two cores it is CPU that is measured, and the wall time of many processes is that of their work one after another.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

EACH = 8
"""Processes of a machine."""
TENSORS, ROWS, COLUMNS = 50, 64, 8
"""Tensors, the rows of one that a process has, and columns."""
AGREEMENTS = 100
SECRET = b"of a benchmark"
PHASES = ("start", "agree", "save", "verify", "resume")


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--processes", type=int, nargs="+", default=[8, 32, 128, 256])
    given.add_argument("--seconds", type=float, default=240, help="after which a count of processes is given up")
    given.add_argument("--agents", action="store_true", help="a process on each machine that has its node")
    asked = given.parse_args()
    _import_all()
    print("| processes | work | wall, ms | messages | CPU, ms | mean CPU, ms | open files | hashed, kB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for count in asked.processes:
        with tempfile.TemporaryDirectory(prefix="control-") as folder:
            begun = _on_processes(_start, count, Path(folder), asked.seconds, agents=asked.agents)
        with tempfile.TemporaryDirectory(prefix="control-") as folder:
            found = _on_processes(_go_on, count, Path(folder), asked.seconds, agents=asked.agents)
        for phase in PHASES:
            every = [one[phase] for one in (begun if phase == "start" else found)]
            print(f"| {count} | {_row(phase, every)} |", flush=True)


def _row(phase: str, every: list[dict[str, float]]) -> str:
    """The busiest of all processes, in each column."""
    most = {key: max(one[key] for one in every) for key in every[0]}
    mean = {key: statistics.mean(one[key] for one in every) for key in every[0]}
    hashed = f"{most['hashed'] / 1e3:.1f} (mean {mean['hashed'] / 1e3:.1f})" if phase == "verify" else ""
    cells = (f"{1e3 * most['wall']:.1f}", f"{most['messages']:.0f}", f"{1e3 * most['cpu']:.1f}")
    return " | ".join((phase, *cells, f"{1e3 * mean['cpu']:.1f}", f"{most['files']:.0f}", hashed))


def _import_all() -> None:
    from zili.chips import find_backend

    for one in find_backend("cpu").environment:
        if one.value is not None:
            os.environ.setdefault(one.name, one.value)
    import torch
    import torch._dynamo  # else each process imports it at its first DTensor
    import torch.distributed.checkpoint
    import torch.distributed.tensor

    import zili.training.restoring
    import zili.training.saving

    assert zili.training.restoring and zili.training.saving
    torch.set_num_threads(1)


def _on_processes(
    work: Callable[..., Any], count: int, folder: Path, seconds: float, *, agents: bool
) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    machines = -(-count // EACH)
    if agents:
        around = [_forked(_be_agent, machine, count, folder) for machine in range(machines)]
        while len(list(folder.glob("agent-*"))) < machines:
            time.sleep(0.01)
    else:
        around = [_forked(_be_store, port)]
    children = [_forked(_be_process, work, rank, count, port, folder, agents) for rank in range(count)]
    end, left = time.monotonic() + seconds, set(children)
    while left and time.monotonic() < end:
        left -= {child for child in left if os.waitpid(child, os.WNOHANG)[0]}
        time.sleep(0.05)
    for child in (*left, *around):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    files = [folder / f"{rank}.json" for rank in range(count)]
    missing = [file.stem for file in files if not file.is_file()]
    if missing:
        sys.exit(f"{len(missing)} of {count} processes did not end within {seconds:.0f} s; the first is {missing[0]}")
    return [json.loads(file.read_text()) for file in files]


def _forked(work: Callable[..., None], *arguments: Any) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _be_process(work: Callable[..., Any], rank: int, count: int, port: int, folder: Path, agents: bool) -> None:
    machine, local = divmod(rank, EACH)
    places = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": min(EACH, count)}
    places |= {"GROUP_RANK": machine, "GROUP_WORLD_SIZE": -(-count // EACH), "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    if agents:
        os.environ["ZILI_AGENT"] = (folder / f"agent-{machine}").read_text()
        os.environ["ZILI_AGENT_SECRET"] = SECRET.hex()
    aside = folder / f"{rank}.part"
    aside.write_text(json.dumps(work(count, folder)))
    aside.rename(folder / f"{rank}.json")


def _be_store(port: int) -> None:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    while store:
        time.sleep(60)


def _be_agent(machine: int, count: int, folder: Path) -> None:
    from zili.parallel.control.member import Hosted
    from zili.parallel.control.node import Node, above, below

    ranks = range(EACH * machine, min(count, EACH * machine + EACH))
    hosted = Hosted(Node(machine, ranks, below(machine, -(-count // EACH)), SECRET))
    port = hosted.listen("127.0.0.1")
    aside = folder / f"aside-{machine}"
    aside.write_text(f"127.0.0.1:{port}")
    parent = above(machine)
    aside.rename(folder / f"agent-{machine}")
    if parent is not None:
        while not (folder / f"agent-{parent}").exists():
            time.sleep(0.01)
        hosted.join((folder / f"agent-{parent}").read_text())
    while True:
        time.sleep(60)


class _Meter:
    """Counts what this process sends, receives and hashes, and measures phases of its work."""

    def __init__(self) -> None:
        from zili import checksums
        from zili.parallel.control import links

        self.messages, self.hashed = 0, 0
        self.found: dict[str, dict[str, float]] = {}
        for kind in (links.Link, links.PlainLink):
            kind.send = self._counting(kind.send)  # type: ignore[method-assign]
        links.PlainLink.receive = self._counting(links.PlainLink.receive)  # type: ignore[method-assign]
        links.Link.receive = self._counting(links.Link.receive)  # type: ignore[method-assign]
        real = checksums.sha256

        lock = threading.Lock()

        def hashing(path: Path) -> str:
            with lock:  # files are hashed on several threads
                self.hashed += path.stat().st_size
            return real(path)

        checksums.sha256 = hashing

    def _counting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.messages += 1
            return real(*arguments)

        return counted

    @contextmanager
    def phase(self, name: str, times: int = 1) -> Iterator[None]:
        """Measure what is done `times` in it, as done once."""
        messages, hashed, cpu, begun = self.messages, self.hashed, _cpu(), time.perf_counter()
        yield
        found = {"wall": time.perf_counter() - begun, "cpu": _cpu() - cpu, "messages": self.messages - messages}
        self.found[name] = {key: value / times for key, value in found.items()}
        self.found[name] |= {"hashed": self.hashed - hashed, "files": len(list(Path("/proc/self/fd").iterdir()))}


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _start(count: int, folder: Path) -> dict[str, dict[str, float]]:
    """As a run begins on CPUs: control messages, and groups over Gloo for all dimensions."""
    from zili.parallel.world import leave

    meter = _Meter()
    device = _device()
    with meter.phase("start"):
        world = _join(device, count)
    _agree(world, 1)
    leave()
    return meter.found


def _go_on(count: int, folder: Path) -> dict[str, dict[str, float]]:
    """What follows, with groups that do nothing: nothing here needs them, and Gloo's take both cores when they idle."""
    import torch.testing._internal.distributed.fake_pg  # noqa: F401 - knows the backend "fake"

    from zili.parallel.world import leave
    from zili.training.checkpoints import RunState, newest_sound
    from zili.training.index import TensorIndex
    from zili.training.restoring import _read, files_to_read
    from zili.training.saving import Saver

    meter, device = _Meter(), _device()
    device.backend = replace(device.backend, collectives="fake")
    world = _join(device, count)
    tensors, room = _tensors(world), _tensors(world)
    _agree(world, 3)
    with meter.phase("agree", AGREEMENTS):
        times = _agree(world, AGREEMENTS)
    meter.found["agree"]["wall"] = statistics.median(times)
    saver = Saver(folder / "checkpoints", world, keep=2, asynchronous=False)
    with meter.phase("save"):
        saver.save(RunState(1, 1, {}, ""), tensors)
        saver.wait()
    _agree(world, 1)
    with meter.phase("verify"):

        def reads(index: TensorIndex) -> set[str]:
            return files_to_read(index, room, [], world.rank)

        found = newest_sound(folder / "checkpoints", print, world, reads)
    _agree(world, 1)
    with meter.phase("resume"):
        assert found is not None
        _read(found, room)
    _agree(world, 1)
    for name, tensor in tensors.items():
        assert (tensor.to_local() == room[name].to_local()).all()
    leave()
    return meter.found


def _device() -> Any:
    from zili.chips import find_backend
    from zili.chips.activation import activate
    from zili.chips.device import Device

    return Device(activate(find_backend("cpu"), index=0))


def _join(device: Any, count: int) -> Any:
    from zili.parallel.layout import Layout
    from zili.parallel.world import World, join

    join(device)
    return World(Layout(shards=count), device)


def _agree(world: Any, times: int) -> list[float]:
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        world.agree(lambda: None)
        found.append(time.perf_counter() - begun)
    return found


def _tensors(world: Any) -> dict[str, Any]:
    import torch
    from torch.distributed.tensor import DTensor, Shard

    mesh = world.mesh("weights")
    local = torch.rand(TENSORS, ROWS, COLUMNS)
    whole, stride = torch.Size((ROWS * world.size, COLUMNS)), (COLUMNS, 1)
    placed = (DTensor.from_local(one, mesh, [Shard(0)], run_check=False, shape=whole, stride=stride) for one in local)
    return {f"model.layers.{number}.weight": tensor for number, tensor in enumerate(placed)}


if __name__ == "__main__":
    main()
