"""`zili doctor` on the CPU, as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Zili, zili
from torch.utils._python_dispatch import TorchDispatchMode
from waiting import until

from zili import chips
from zili.chips.device import Device
from zili.diagnosis import capabilities, collectives, speed
from zili.diagnosis.findings import Finding
from zili.ops.yardstick import distance


def doctor(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return zili("doctor", "--chip", "cpu", *words, environment=variables)


@pytest.mark.parametrize(
    "areas", [("numbers", "disk", "repeatability"), pytest.param((), marks=pytest.mark.slow, id="whole")]
)
def test_this_machine(areas: tuple[str, ...], tmp_path: Path) -> None:
    only = [word for area in areas for word in ("--only", area)]
    finished = doctor("--json", "--folder", str(tmp_path), *only)
    report = json.loads(finished.stdout)
    assert finished.returncode == 0, [
        found for found in report["findings"] if found["severity"] in ("broken", "degraded")
    ]
    assert report["severity"] == "fallback" and report["versions"]["torch"] == torch.__version__
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_not_there_is_said(tmp_path: Path) -> None:
    finished = doctor("--folder", str(tmp_path / "nowhere"), "--only", "disk")
    assert finished.returncode == 10
    assert "cannot be written" in finished.stdout and "verdict: broken" in finished.stdout


def test_a_chip_that_is_not_here() -> None:
    if torch.cuda.is_available():
        pytest.skip("the chip is here")
    finished = doctor("--chip", "nvidia")
    assert finished.returncode == 10 and "built without cuda" in finished.stdout and "Traceback" not in finished.stderr


def test_it_is_not_for_torchrun() -> None:
    finished = doctor(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    assert finished.returncode == 7 and "run it by itself, without torchrun" in finished.stderr


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads processes from Linux's /proc")
def test_its_processes_end_when_it_is_killed(tmp_path: Path) -> None:
    words = ("--processes", "2", "--only", "collectives", "--patience", "600", "--folder", tmp_path)
    started = Zili("doctor", "--chip", "cpu", *words)
    children = Path(f"/proc/{started.process.pid}/task/{started.process.pid}/children")

    def workers() -> list[int]:
        found = list(map(int, children.read_text().split()))
        # Between fork and exec one has all that its parent has open: the pipe at whose end the first one ends, too.
        begun = all(b"collectives" in Path(f"/proc/{child}/cmdline").read_bytes() for child in found)
        return found if len(found) == 2 and begun else []

    first, second = until(workers)
    os.kill(second, signal.SIGSTOP)  # the first will wait for it, and would for ever
    try:
        until(lambda: waits(first))
        started.kill()
        until(lambda: ended(first))
    finally:
        os.kill(second, signal.SIGCONT)
    until(lambda: ended(second))


class Gone:
    """A process that has ended well."""

    def poll(self) -> int:
        return 0


class Running:
    def poll(self) -> None:
        return None


def watched(monkeypatch: pytest.MonkeyPatch, handle: Any, patience: float, *meanwhile: dict[str, Any]) -> list[Finding]:
    """What is found about a process that says one of `meanwhile` whenever whoever watches sleeps; {} is nothing."""
    worker, left = collectives._Process(0, handle), list(meanwhile)

    def sleep(_: float) -> None:
        if left and (line := left.pop(0)):
            worker.lines.append(line)

    monkeypatch.setattr(collectives.time, "sleep", sleep)
    return collectives._watch([worker], patience)


def test_silence_is_counted_from_the_first_word(monkeypatch: pytest.MonkeyPatch) -> None:
    done = {"done": True}
    assert watched(monkeypatch, Running(), 0.0, {}, {}, {}, done) == []
    (silent,) = watched(monkeypatch, Running(), 0.0, {}, {"begin": "a product"}, {}, {}, done)
    assert "a product" in silent.seen


def test_processes_that_share_a_core_have_longer_to_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 50))
    monkeypatch.setattr(collectives.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(collectives.time, "sleep", lambda _: None)
    monkeypatch.setattr(collectives.os, "cpu_count", lambda: 2)
    workers = [collectives._Process(rank, Running()) for rank in range(4)]
    (silent,) = collectives._watch(workers, 10.0)
    assert "did not end in 120 s" in silent.seen


def test_a_last_word_that_is_read_late_is_no_death(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched(monkeypatch, Gone(), 60.0, {"done": True}) == []
    (dead,) = watched(monkeypatch, Gone(), 60.0, {"begin": "a product"})
    assert "ended with code 0 at a product" in dead.seen


SECONDS = 0.02


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize(
    ("name", "gives", "sent"),
    [
        # What comes out beside what a process brings, and what it has to send of what it brings.
        ("all_gather", lambda n: n, lambda n: n - 1),
        ("reduce_scatter", lambda n: 1 / n, lambda n: (n - 1) / n),
        ("all_reduce", lambda n: 1, lambda n: 2 * (n - 1) / n),
        ("all_to_all", lambda n: 1, lambda n: (n - 1) / n),
        ("broadcast", lambda n: 1, lambda n: 1),
        ("send and receive", lambda n: 1, lambda n: 1),
    ],
)
def test_the_rate_of_a_collective_is_that_of_a_link(
    name: str, gives: Any, sent: Any, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(collectives, "_say", lambda **what: said.append(what))

    def takes_its_time(mine: torch.Tensor, *_: Any) -> collectives.Begun:
        time.sleep(SECONDS)
        out = torch.zeros(round(gives(size) * len(mine)))
        return collectives.Begun([], out, lambda: out)

    collectives._one(f"{name} among {size}", takes_its_time, None, 0, size, torch.device("cpu"))  # type: ignore[arg-type]
    rate = said[-1]["rate"] * said[-1]["seconds"]
    assert rate == pytest.approx(sent(size) * (4 << 20), rel=1e-4)
    assert SECONDS <= said[-1]["seconds"] < 10 * SECONDS


def test_blocks_in_another_order_are_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(collectives, "_say", lambda **what: said.append(what))

    def turned(mine: torch.Tensor, unit: torch.Tensor, *_: Any) -> collectives.Begun:
        return collectives.Begun([], mine.flip(0), lambda: unit)

    collectives._one("broadcast among 2", turned, None, 0, 2, torch.device("cpu"))  # type: ignore[arg-type]
    assert said[-1]["right"] is False


class Spread(TorchDispatchMode):
    """Notes how the numbers of large inputs are spread; of what is written to nothing is said."""

    def __init__(self) -> None:
        super().__init__()
        self.least: dict[str, float] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        name = str(function)
        for one in arguments[1:] if "copy_" in name else arguments:
            if isinstance(one, torch.Tensor) and one.numel() >= 256 * 256:
                self.least[name] = min(self.least.get(name, 10.0), float(one.float().std()))
        return function(*arguments, **(named or {}))


def test_speeds_are_taken_on_numbers_as_training_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on ones, of which a chip makes products faster than of any training's."""
    device = Device(chips.activate(chips.find_backend("cpu")))
    spread = Spread()

    def watched(work: Callable[[], object], _: Device) -> float:
        with spread:
            work()
        return 1.0

    for module, timer in ((speed, "fastest_call"), (collectives, "fastest_call"), (capabilities, "_seconds")):
        monkeypatch.setattr(module, timer, watched)
    monkeypatch.setattr(speed, "_SIZES", (256,))
    monkeypatch.setattr(speed, "_COPY", 1 << 20)
    for measured in (
        lambda: list(speed.examine_speed(device)),
        lambda: list(speed._copies(device)),
        lambda: capabilities._bf16(device),
        lambda: collectives._product(device),
    ):
        spread.least.clear()
        measured()
        assert spread.least and min(spread.least.values()) > 0.9, spread.least


def ended(process: int) -> bool:
    """Whether it is gone, or a zombie nobody has asked about."""
    try:
        return of_process(process)[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def waits(process: int) -> bool:
    """Whether it has started, and computes nothing for a second."""
    before = of_process(process)[11]
    time.sleep(1)
    return int(before) > 100 and of_process(process)[11] == before


def of_process(number: int) -> list[str]:
    """Its state, ..., and as the twelfth, user time in hundredths of a second (proc(5))."""
    return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2.0**bits).trunc() / 2.0**bits, exponent).float()


def test_distances_are_in_units_of_the_precision() -> None:
    exact = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).double()
    same = exact.float()
    assert distance(same, same, exact).ulps <= 1 and distance(same, same, exact).fits
    off = same.clone()
    off[3, 4] += 100 * torch.finfo(torch.float32).eps * same.abs().max()
    assert distance(off, same, exact).ulps == pytest.approx(100, rel=0.02) and not distance(off, same, exact).fits
    cut = distance(rounded(exact, 23), same, exact)
    assert cut.ulps < cut.expected and not cut.fits, "too small to stand out, but all to one side"
    assert 0.3 < cut.bias < 0.7
    nan = same.clone()
    nan[0, 0] = torch.nan
    assert not distance(nan, same, exact).fits
    assert not distance(torch.tensor([1, 2]), torch.tensor([1, 3]), None).fits
    inf = torch.tensor([torch.inf, 1.0])
    assert distance(inf, inf, None).fits and not distance(-inf * -1, torch.tensor([-torch.inf, 1.0]), None).fits
    assert not distance(torch.tensor([torch.nan, 1.0]), torch.tensor([-torch.inf, 1.0]), None).fits
