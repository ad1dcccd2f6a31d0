"""Checks that processes of this machine reach one another: every collective, in groups of several sizes, with a guard.

Each also multiplies on its own device, and takes part in what a chip's record promises of many processes.

Each process is started anew and says, a line at a time, what it is about to do and what came of it. One that falls
silent, or ends, is named with the last thing it said, and all of them are ended.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import combinations
from threading import Thread
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from zili import chips
from zili.chips.device import Device
from zili.diagnosis import capabilities
from zili.diagnosis.findings import Finding, Severity
from zili.diagnosis.speed import numbers
from zili.ops import reference
from zili.ops.examples import example
from zili.ops.yardstick import compared
from zili.parallel.world import await_the_others, join, leave
from zili.planning.fitted.machine import share_sent
from zili.training.throughput import fastest_call

AREA = "collectives"
PATIENCE = 60.0
"""Seconds without a word from any process after which they are ended. Before all have said one there are never
fewer, and as many times more as there are processes for a core."""
_BYTES, _FEW_BYTES = 4 << 20, 4 << 10
"""What a process brings: so much that bandwidth decides, and so little that latency does."""
_ROUNDS = 5
_PRODUCT = "a product of matrices"
_SIDE = 1024
_SLOW = 3.0
"""Times the fastest pair, from which on the best pair of a process is slow; and a floor in seconds."""
_SLOW_FLOOR = 0.02


@dataclass
class _Process:
    """One worker and what it said."""

    rank: int
    handle: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def last(self) -> str:
        """What it was last heard to begin."""
        return next((line["begin"] for line in reversed(self.lines) if "begin" in line), "starting")

    @property
    def done(self) -> bool:
        return any("done" in line for line in self.lines)


def examine(chip: str, count: int, patience: float = PATIENCE) -> list[Finding]:
    """Findings of `count` processes on devices of backend `chip`; ends `patience` seconds after the last word."""
    if count < 2:
        return [Finding(AREA, "all", Severity.FALLBACK, "one device: nothing to reach", "give --processes")]
    workers: list[_Process] = []
    try:
        _start(chip, count, workers)
        trouble = _watch(workers, patience)
    finally:
        for worker in workers:
            if worker.handle.poll() is None:
                worker.handle.kill()
        for worker in workers:
            with suppress(subprocess.TimeoutExpired):  # a driver may keep a process that was killed
                worker.handle.wait(5)
    return [*_findings(workers), *trouble]


def _start(chip: str, count: int, workers: list[_Process]) -> None:
    """Start `count` processes, each into `workers` as it starts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What a launcher above told this process about its own group is not for them.
    own = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC_")}
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        environment = {**own, **{key: str(value) for key, value in place.items()}, "MASTER_ADDR": "127.0.0.1"}
        environment.setdefault("OMP_NUM_THREADS", "1")
        handle = subprocess.Popen(
            [sys.executable, "-m", "zili.diagnosis.collectives", chip],
            env=environment,
            stdin=subprocess.PIPE,  # closed when this process ends, however that is
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        worker = _Process(rank, handle)
        Thread(target=_read_lines, args=(worker,), daemon=True).start()
        Thread(target=_read_errors, args=(worker,), daemon=True).start()
        workers.append(worker)


def _read_lines(worker: _Process) -> None:
    assert worker.handle.stdout is not None
    for line in worker.handle.stdout:
        if line.startswith("{"):
            worker.lines.append(json.loads(line))


def _read_errors(worker: _Process) -> None:
    assert worker.handle.stderr is not None
    worker.errors.extend(worker.handle.stderr)


def _watch(workers: list[_Process], patience: float) -> list[Finding]:
    """Wait for all to be done; findings about those that ended early or fell silent, or none."""
    said, since = -1, time.monotonic()
    while not all(worker.done for worker in workers):
        ended = [worker for worker in workers if worker.handle.poll() is not None and not worker.done]
        if ended:
            time.sleep(0.5)  # the others may be ending because of the first: whoever failed by itself says why
            ended = [worker for worker in ended if not worker.done]  # or its last word was not read yet
        if ended:
            return [_of_the_dead(ended)]
        now = sum(len(worker.lines) for worker in workers)
        # Until its first word a process imports, which takes long from a slow disk, and where many share a core: all
        # import at once, so none says a word before the last is nearly done.
        starting = max(patience, PATIENCE) * max(1, len(workers) / (os.cpu_count() or 1))
        bound = patience if all(worker.lines for worker in workers) else starting
        if now != said:
            said, since = now, time.monotonic()
        elif time.monotonic() - since > bound:
            return [_of_the_silent(workers, bound)]
        time.sleep(0.05)
    return []


def _of_the_dead(ended: list[_Process]) -> Finding:
    # Those that lost their peer say so; the one that was lost is the one that says nothing, or something else.
    lost = [worker for worker in ended if not any("by peer" in line.lower() for line in worker.errors)]
    worker = (lost or ended)[0]
    code = worker.handle.poll()
    assert code is not None
    how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
    why = next((line.strip() for line in reversed(worker.errors) if line.strip()), "without a word")
    return Finding(
        *(AREA, worker.last, Severity.BROKEN, f"process {worker.rank} {how} at {worker.last}: {why[:200]}"),
        f"look at device {worker.rank}, its driver's log and the machine's memory",
    )


def _of_the_silent(workers: list[_Process], patience: float) -> Finding:
    waiting = [worker for worker in workers if not worker.done]
    # Who has handed its part over waits for the others. Of those that have not, the ones furthest behind hold up the
    # rest: others may have gone on to make their next group, which they too are waited for in.
    behind = [worker for worker in waiting if not worker.lines or "begin" in worker.lines[-1]]
    furthest = min((sum("begin" in line for line in worker.lines) for worker in behind), default=0)
    guilty = [worker for worker in behind if sum("begin" in line for line in worker.lines) == furthest]
    if guilty and len(guilty) < len(workers):
        who = " and ".join(f"process {worker.rank}" for worker in guilty)
        seen = f"{who} did not take part in {guilty[0].last} for {patience:.0f} s; the others waited"
        fix = f"look at device {guilty[0].rank} and at what else runs on it"
    else:
        seen = f"all took part in {waiting[0].last}, and it did not end in {patience:.0f} s"
        fix = "look at the links between the devices and at the collectives' library and its log"
    return Finding(AREA, waiting[0].last, Severity.BROKEN, seen, fix)


def _findings(workers: list[_Process]) -> Iterator[Finding]:
    """What the processes found: wrong results, rates, and one that all others wait for."""
    results: dict[str, list[dict[str, Any]]] = {}
    verdicts: dict[str, list[Finding]] = {}
    for worker in workers:
        for line in worker.lines:
            if "result" in line:
                results.setdefault(line["result"], []).append({**line, "rank": worker.rank})
            if "verdict" in line:
                finding = Finding(**{**line["verdict"], "severity": Severity(line["verdict"]["severity"])})
                verdicts.setdefault(finding.name, []).append(finding)
    yield from (max(found, key=lambda finding: finding.severity) for found in verdicts.values())
    yield from _of_devices(results.pop(_PRODUCT, []))
    for name, found in results.items():
        if name.startswith("pair"):
            continue
        wrong = [line["rank"] for line in found if not line["right"]]
        if wrong:
            where = ", ".join(map(str, wrong))
            yield Finding(
                *(AREA, name, Severity.BROKEN, f"wrong numbers on process {where}"),
                "do not train on it; update the collectives' library",
            )
            continue
        rate, latency = min(line["rate"] for line in found), max(line["latency"] for line in found)
        seen = f"{rate / 1e9:.3g} GB/s, {1e6 * latency:.3g} us for 4 KB"
        yield Finding(AREA, name, Severity.GOOD, seen, figures={"bytes/s": rate, "seconds of 4 KB": latency})
    yield from _slow(results, len(workers))


def _of_devices(found: list[dict[str, Any]]) -> Iterator[Finding]:
    """Findings about the product that each process computes on its own device: wrong ones, and slow ones."""
    fastest = max((line["rate"] for line in found), default=0.0)
    for line in found:
        where, fix = f"process {line['rank']}", f"look at device {line['rank']}: its clock, its temperature, its memory"
        if not line["right"]:
            yield Finding(AREA, where, Severity.BROKEN, "a product of matrices is wrong on it", f"{fix}; do not use it")
        elif line["rate"] * _SLOW < fastest:
            seen = f"slow: a product at {line['rate'] / 1e12:.3g} TFLOP/s, {fastest / 1e12:.3g} on the fastest"
            yield Finding(AREA, where, Severity.DEGRADED, seen, fix)
    if found:
        rates = {f"process {line['rank']} FLOP/s": line["rate"] for line in found}
        seen = f"{min(rates.values()) / 1e12:.3g} to {fastest / 1e12:.3g} TFLOP/s in fp32, all at once"
        yield Finding(AREA, "each device", Severity.GOOD, seen, figures=rates)


def _slow(results: dict[str, list[dict[str, Any]]], count: int) -> Iterator[Finding]:
    """A process is slow when every pair with it is."""
    seconds = {
        tuple(map(int, name.split()[1].split("-"))): max(line["seconds"] for line in found)
        for name, found in results.items()
        if name.startswith("pair")
    }
    fastest = min(seconds.values(), default=0.0)
    for rank in range(count):
        with_it = [taken for pair, taken in seconds.items() if rank in pair]
        without = [taken for pair, taken in seconds.items() if rank not in pair]
        if without and min(with_it) > max(_SLOW * fastest, _SLOW_FLOOR):
            own, others = 1e3 * min(with_it), 1e3 * fastest
            yield Finding(
                *(AREA, f"process {rank}", Severity.DEGRADED),
                f"slow: {own:.3g} ms with each other process, {others:.3g} ms in the fastest pair",
                f"look at device {rank}: its clock, its temperature, what else runs on it, its link",
            )


# ---- in each process


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def _end_with_the_first() -> None:
    """End this process when the one that started it is gone: nobody would end it where it hangs."""
    sys.stdin.read()
    os._exit(1)


def _work(chip: str) -> None:
    """What one process does: every kind in every group, then every pair."""
    Thread(target=_end_with_the_first, daemon=True).start()
    _say(begin="opening the device")
    opened = Device(chips.activate(chips.find_backend(chip), index=_device_index(chip)))
    device = opened.torch
    _say(begin=_PRODUCT)
    _say(result=_PRODUCT, **_product(opened))
    _say(begin="joining the others")
    join(opened)
    rank, world = dist.get_rank(), dist.get_world_size()
    for size in sorted({2, world}):
        _say(begin=f"making groups of {size}")
        groups = [dist.new_group(list(range(start, start + size))) for start in range(0, world - size + 1, size)]
        if rank // size < len(groups):
            for name, kind in _KINDS.items():
                _one(f"{name} among {size}", kind, groups[rank // size], rank % size, size, device)
    for pair in combinations(range(world), 2) if world > 2 else []:
        _say(begin=f"making pair {pair[0]}-{pair[1]}")
        group = dist.new_group(list(pair))
        if rank in pair:
            _one(f"pair {pair[0]}-{pair[1]}", _all_reduce, group, pair.index(rank), 2, device, few=True)
    for name, try_it in capabilities.examine_together(opened, world):
        _say(begin=name)
        _say(verdict=asdict(try_it()))
    _say(begin="parting")
    await_the_others()  # the first one holds what new groups meet by, so it must not leave before
    _say(done=True)
    leave()


def _device_index(chip: str) -> int:
    return 0 if chip == "cpu" else int(os.environ["LOCAL_RANK"])


def _one(
    name: str,
    kind: Callable[[Tensor, Tensor, dist.ProcessGroup, int, int], Begun],
    group: dist.ProcessGroup,
    own: int,
    size: int,
    device: torch.device,
    few: bool = False,
) -> None:
    """One collective a few times, with little and unless `few` with much: its numbers, and the fastest times."""
    right, best, sent = True, {}, 0.0
    for bytes_each in (_FEW_BYTES,) if few else (_FEW_BYTES, _BYTES):
        best[bytes_each] = float("inf")
        # Small whole numbers, of which sums are exact.
        unit = torch.randint(1, 256, (bytes_each // 4 // size * size,), generator=torch.Generator().manual_seed(0))
        unit = unit.to(device, torch.float32)
        for _ in range(_ROUNDS):
            _say(begin=name)
            mine = unit * (own + 1)
            _finish(device)
            started = time.perf_counter()
            begun = kind(mine, unit, group, own, size)
            _say(**{"handed over": name})
            for work in begun.works:
                work.wait()
            _finish(device)
            best[bytes_each] = min(best[bytes_each], time.perf_counter() - started)
            right = right and torch.equal(begun.out, begun.wanted())
            sent = share_sent(name.partition(" among ")[0], size) * max(mine.nbytes, begun.out.nbytes)
    most = max(best)
    _say(result=name, right=right, seconds=best[most], rate=sent / best[most], latency=best[_FEW_BYTES])


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _product(device: Device) -> dict[str, Any]:
    """Whether this process's device multiplies rightly, and FLOP/s of a product, all devices being at work."""
    found = compared(reference.linear, reference.linear, *example("linear", "cpu", torch.float32), device.torch)
    a = numbers(device, _SIDE, _SIDE)
    seconds = fastest_call(lambda: a @ a, device)
    return {"right": all(measured.fits for measured in found.values()), "rate": 2 * _SIDE**3 / seconds}


class Begun(NamedTuple):
    """A collective on its way."""

    works: list[dist.Work]
    out: Tensor
    wanted: Callable[[], Tensor]


# Each takes `mine`, which is `unit` times this process's place from 1, its group, its place in it and the group's size.


def _all_reduce(mine: Tensor, unit: Tensor, group: dist.ProcessGroup, own: int, size: int) -> Begun:
    works = [dist.all_reduce(mine, group=group, async_op=True)]
    return Begun(works, mine, lambda: unit * (size * (size + 1) // 2))


def _all_gather(mine: Tensor, unit: Tensor, group: dist.ProcessGroup, own: int, size: int) -> Begun:
    out = mine.new_zeros(size * len(mine))
    works = [capabilities.all_gather(out, mine, group=group, async_op=True)]
    return Begun(works, out, lambda: torch.cat([unit * (rank + 1) for rank in range(size)]))


def _reduce_scatter(mine: Tensor, unit: Tensor, group: dist.ProcessGroup, own: int, size: int) -> Begun:
    out = mine.new_zeros(len(mine) // size)
    works = [capabilities.reduce_scatter(out, mine, group=group, async_op=True)]
    return Begun(works, out, lambda: unit.chunk(size)[own] * (size * (size + 1) // 2))


def _all_to_all(mine: Tensor, unit: Tensor, group: dist.ProcessGroup, own: int, size: int) -> Begun:
    out = torch.zeros_like(mine)
    works = [dist.all_to_all_single(out, mine, group=group, async_op=True)]
    return Begun(works, out, lambda: torch.cat([unit.chunk(size)[own] * (rank + 1) for rank in range(size)]))


def _broadcast(mine: Tensor, unit: Tensor, group: dist.ProcessGroup, own: int, size: int) -> Begun:
    first = dist.get_global_rank(group, 0)
    return Begun([dist.broadcast(mine, first, group=group, async_op=True)], mine, lambda: unit)


def _send(mine: Tensor, unit: Tensor, group: dist.ProcessGroup, own: int, size: int) -> Begun:
    """Each to the next, in a ring."""
    out = torch.zeros_like(mine)
    to, source = (dist.get_global_rank(group, (own + step) % size) for step in (1, -1))
    messages = [dist.P2POp(dist.isend, mine, to, group), dist.P2POp(dist.irecv, out, source, group)]
    return Begun(dist.batch_isend_irecv(messages), out, lambda: unit * ((own - 1) % size + 1))


_KINDS = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "send and receive": _send,
}

if __name__ == "__main__":
    _work(sys.argv[1])
