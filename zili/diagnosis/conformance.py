"""Checks that a backend must pass before Zili trains on it; a plugin's own tests run them."""

from __future__ import annotations

from collections.abc import Iterator

from zili import chips, ops
from zili.chips import CAPABILITIES
from zili.chips.backend import Backend
from zili.chips.device import Device
from zili.diagnosis import capabilities, collectives, operations, small_model, speed
from zili.diagnosis.findings import Finding, Severity

_CLOSE = 1e-4
_STEPS = 5


def check_record(name: str) -> Iterator[Finding]:
    """Whether the record of backend `name` is found, and says what it must. Opens nothing."""
    backend = chips.find_backend(name)
    for capability in CAPABILITIES.keys() - backend.capabilities:
        yield _wrong("record", capability, "is not stated", "state it, with what it rests on")
    for capability in backend.capabilities.keys() - CAPABILITIES:
        yield _wrong("record", capability, "is no capability", f"there are {', '.join(CAPABILITIES)}")
    for variable in backend.environment:
        if not variable.reason:
            yield _wrong("record", variable.name, "has no reason", "say why it is set")
    yield Finding("record", name, Severity.GOOD, f"{backend.device_type}, {backend.collectives}, {backend.plugin}")


def check_device(name: str) -> Iterator[Finding]:
    """Whether the device of backend `name` opens, computes rightly and trains as the CPU does. Takes a minute."""
    backend = chips.find_backend(name)
    device = Device(chips.activate(backend))
    yield from operations.examine(device)
    yield from capabilities.examine(device)
    yield speed.examine_repeatability(device)
    yield _trains(backend, device)


def check_processes(name: str, count: int = 2, patience: float = collectives.PATIENCE) -> list[Finding]:
    """Whether `count` processes on devices of backend `name` reach one another."""
    return collectives.examine(name, count, patience)


def _trains(backend: Backend, device: Device) -> Finding:
    """A few steps of a small model, from the same weights on the same tokens, against the CPU's."""
    ops.choose("cpu", "fp32", dict.fromkeys(ops.chosen(), "reference"))
    cpus, chips_own = small_model.losses("cpu", _STEPS), small_model.losses(device.torch, _STEPS)
    apart = small_model.largest_difference(chips_own, cpus)
    seen = f"losses of {_STEPS} steps within {apart:.1e} of the CPU's"
    if apart > _CLOSE:
        return _wrong("training", backend.name, seen, "zili align RECIPE names the first operation that is wrong")
    return Finding("training", backend.name, Severity.GOOD, seen, figures={"relative difference": apart})


def _wrong(area: str, name: str, seen: str, fix: str) -> Finding:
    return Finding(area, name, Severity.BROKEN, seen, fix)
