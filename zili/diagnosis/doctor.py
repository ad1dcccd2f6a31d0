"""A machine and its chip, examined: what is here, what works, how fast, together, repeatably."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zili import chips
from zili.chips.activation import Activation
from zili.diagnosis.findings import AREAS, Finding, Severity, worst
from zili.errors import ChipError

if TYPE_CHECKING:
    from zili.chips.device import Device

_MOST_PROCESSES = 8


def examine(
    chip: str,
    processes: int | None,
    folder: Path,
    show: Callable[[Finding], None],
    patience: float,
    areas: Collection[str] = AREAS,
    most: int = _MOST_PROCESSES,
) -> dict[str, Any]:
    """Examine backend `chip` ("auto": the one a run would take); `show` hears each finding as it is made.

    Args:
        processes: for collectives and workers; None: as many as there are devices, up to `most`; two on the CPU.
        folder: where checkpoints would go.
        patience: seconds after which processes that fell silent are ended.
        areas: what to examine.
    Returns:
        What `zili doctor --json` prints; `findings` and `severity` among it.
    """
    findings: list[Finding] = []

    def note(found: Iterator[Finding] | list[Finding]) -> None:
        for finding in found:
            findings.append(finding)
            show(finding)

    note(_here())
    report: dict[str, Any] = {"chip": chip}
    try:
        selection = chips.choose(chip)
        activation = chips.activate(selection.backend)
    except ChipError as error:
        note([Finding("here", chip, Severity.BROKEN, str(error))])
    else:
        from zili.chips.device import Device

        device = Device(activation)
        report |= _identity(activation, device)
        note(_opened(activation, device, selection.reason))
        note(_on_one_device(device, folder, areas))
        count = processes or (2 if device.type == "cpu" else min(activation.count, most))
        if "collectives" in areas:
            from zili.diagnosis import collectives

            note(collectives.examine(selection.backend.name, count, patience))
        if "workers" in areas:
            from zili.diagnosis import forked_workers

            note([forked_workers.examine(selection.backend.name, count)])
        report["capabilities"] = _capabilities(device, findings)
    report["severity"] = worst(findings).name.lower()
    report["findings"] = [{**asdict(finding), "severity": finding.severity.name.lower()} for finding in findings]
    return report


def _here() -> Iterator[Finding]:
    """Drivers, plugins and versions, found without opening anything."""
    for found in chips.detect():
        severity = Severity.GOOD if found.here else Severity.FALLBACK
        yield Finding("here", found.backend.name, severity, found.reason, found.fix)


def identity(chip: str) -> dict[str, Any]:
    """What a report says of the device that a run on backend `chip` would take."""
    from zili.chips.device import Device

    activation = chips.activate(chips.choose(chip).backend)
    return {"chip": chip, **_identity(activation, Device(activation))}


def _identity(activation: Activation, device: Device) -> dict[str, Any]:
    return {
        "backend": activation.backend.name,
        "device": device.name(),
        "model": device.chip.name if device.chip else None,
        "devices": activation.count,
        "versions": dict(activation.versions),
        "environment": {setting.name: setting.value for setting in (*activation.applied, *activation.kept)},
        "memory": device.memory(),
    }


def _opened(activation: Activation, device: Device, reason: str) -> Iterator[Finding]:
    versions = ", ".join(f"{name} {version}" for name, version in activation.versions.items())
    model = f"{device.name()}, {activation.count} in sight, {versions} ({reason})"
    yield Finding("here", f"{activation.backend.name} opens", Severity.GOOD, model)
    if device.chip is None and device.type != "cpu":
        known = "its peak is unknown, so no share of it can be given"
        yield Finding("here", "model", Severity.FALLBACK, f"{device.name()} is not in the catalog: {known}")
    for warning in activation.warnings:
        yield Finding("here", "environment", Severity.DEGRADED, warning, "start zili in a fresh process")


def _capabilities(device: Device, findings: list[Finding]) -> dict[str, Any]:
    """What the record says of every capability, and whether it was seen to work; None where it was not tried."""
    tried = {finding.name: finding for finding in findings if finding.area == "capabilities"}
    answers = {name: device.capability(name) for name in chips.CAPABILITIES}
    return {
        name: {"record": answer.value, "works": bool(tried[name].figures["works"]) if name in tried else None}
        for name, answer in answers.items()
    }


def _on_one_device(device: Device, folder: Path, areas: Collection[str]) -> Iterator[Finding]:
    from zili.diagnosis import operations, speed
    from zili.ops.yardstick import first_line

    examinations: dict[str, Callable[[], Iterable[Finding]]] = {
        "numbers": lambda: operations.examine(device),
        "capabilities": lambda: _capabilities_tried(device),
        "speed": lambda: speed.examine_speed(device),
        "repeatability": lambda: [speed.examine_repeatability(device)],
        "disk": lambda: [speed.examine_disk(folder)],
    }
    for area, examination in examinations.items():
        if area not in areas:
            continue
        try:
            yield from examination()
        except Exception as error:  # one missing kernel must not cost the rest of the report
            yield Finding(area, "all", Severity.BROKEN, f"stopped: {first_line(error)}", "update the plugin or driver")


def _capabilities_tried(device: Device) -> Iterator[Finding]:
    # It trains a small model, so it needs more packages than the other areas: they do without.
    from zili.diagnosis import capabilities

    return capabilities.examine(device)
