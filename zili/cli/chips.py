"""`zili chips`: what is here, what is known."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zili.chips import (
    CAPABILITIES,
    Backend,
    Chip,
    Presence,
    catalog,
    detect,
    find_backend,
    registry,
)
from zili.chips.backend import nearest
from zili.chips.catalog import CONFIDENCE, Figure, chip_names, identify
from zili.chips.presence import installed_versions, presence
from zili.chips.skeleton import write_skeleton
from zili.errors import ChipError

_COLUMNS = {
    "bf16_tflops": "16-bit\nTFLOP/s",
    "fp32_tflops": "fp32\nTFLOP/s",
    "memory_gb": "memory\nGB",
    "memory_gb_s": "memory\nGB/s",
    "link_gb_s": "link\nGB/s",
    "internode_gbit_s": "network\nGbit/s",
}
_ABSENT = "not published"


def chips(
    name: Annotated[str | None, typer.Argument(help="One backend or chip in detail; `new`: begin a plugin.")] = None,
    new_name: Annotated[str | None, typer.Argument(help="After `new`: what `chip.name` is to take.")] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Of `new`: where; zili-NAME if not given.")] = None,
    device_type: Annotated[str | None, typer.Option(help="Of `new`: torch's name for the device.")] = None,
    collectives: Annotated[str | None, typer.Option(help="Of `new`: its torch.distributed backend.")] = None,
    plugin: Annotated[str | None, typer.Option(help="Of `new`: module that teaches torch the device.")] = None,
) -> None:
    """List the chips that are here and the chips that are known. Imports no torch, opens no device.

    `zili chips new NAME` writes a plugin package for another vendor's chip.
    """
    if (name == "new") != (new_name is not None):
        raise typer.BadParameter("`zili chips new NAME`, or `zili chips [NAME]`")
    if new_name is not None:
        where = folder or Path(f"zili-{new_name}")
        module = plugin or f"torch_{new_name}"
        for path in write_skeleton(new_name, where, device_type or new_name, collectives or f"{new_name}ccl", module):
            typer.echo(path)
        typer.echo(f"Next: pip install --editable {where}, then zili chips {new_name}; docs/new_chip.md has the way")
        return
    if as_json:
        typer.echo(json.dumps(_as_data(name), indent=2, ensure_ascii=False))
        return
    console = Console()
    if name is None:
        _show_here(console)
        _show_known(console)
        return
    subject = _find(name)
    if isinstance(subject, Chip):
        _show_chip(console, subject)
    else:
        _show_backend(console, subject)


def _find(name: str) -> Backend | Chip:
    """A backend of that name before a chip of that name."""
    known = registry()
    backends = [key for backend in known.backends for key in (backend.name, backend.device_type)]
    if name.lower() in backends or name.lower() in known.refused:
        return find_backend(name)
    chip = identify(name)
    if chip is None:
        near = nearest(name, dict.fromkeys([*backends, *chip_names()]))
        raise ChipError(f"no backend or chip is named {name!r}{near} (`zili chips` lists them)")
    return chip


def _show_here(console: Console) -> None:
    table = Table(title="Here", title_justify="left", show_lines=True)
    for column in ("backend", "torch device", "devices"):
        table.add_column(column)
    table.add_column("what it can, or what is missing and how to get it", ratio=1)
    for found in detect():
        count = "?" if found.here and found.count is None else str(found.count or "none")
        table.add_row(
            f"[bold]{escape(found.backend.name)}[/]" if found.here else escape(found.backend.name),
            found.backend.device_type,
            count,
            _abilities(found.backend) if found.here else f"{escape(found.reason)}\n[dim]{escape(found.fix)}[/]",
        )
    console.print(table)
    for message in registry().refused.values():
        console.print(f"[yellow]{escape(message)}[/]")


def _abilities(backend: Backend) -> str:
    can = [name for name in CAPABILITIES if backend.capability(name).value]
    lacks = [name for name in CAPABILITIES if name not in can]
    return f"[green]can[/] {', '.join(can)}\n[red]lacks[/] {', '.join(lacks) or 'nothing known'}"


def _show_known(console: Console) -> None:
    table = Table(title="Known (dense peaks of the matrix units; bf16 where not marked)", title_justify="left")
    table.add_column("chip", no_wrap=True)
    table.add_column("backend")
    for heading in _COLUMNS.values():
        table.add_column(heading, justify="right")
    for chip in catalog().values():
        cells = {column: _short(chip.figure(column)) for column in _COLUMNS}
        if chip.bf16_tflops is None and chip.fp16_tflops is not None:
            cells["bf16_tflops"] = "fp16 " + _short(chip.figure("fp16_tflops"))
        table.add_row(chip.name, chip.backend or "[dim]none[/]", *cells.values())
    console.print(table)
    console.print("[dim]–[/]: not published.  Confidence: " + "; ".join(f"{k} {v}" for k, v in CONFIDENCE.items()))
    console.print("`zili chips NAME` shows all figures of one chip, or one backend, with sources.")


def _short(figure: Figure | None) -> str:
    return "[dim]–[/]" if figure is None else f"{figure.value:g} [dim]{figure.confidence}[/]"


def _show_chip(console: Console, chip: Chip) -> None:
    console.print(f"[bold]{escape(chip.name)}[/]  {escape(chip.vendor)}, backend {chip.backend or 'none'}")
    table = Table("figure", "value", "confidence")
    for name, figure in chip.figures().items():
        value = f"[dim]{_ABSENT}[/]" if figure is None else f"{figure.value:g}"
        table.add_row(name, value, "" if figure is None else f"{figure.confidence}: {CONFIDENCE[figure.confidence]}")
    console.print(table)
    for name, override in chip.capabilities.items():
        console.print(f"{name}: {_yes(override.value)}, {escape(override.reason)} ({override.evidence})")
    console.print(f"source: {escape(chip.source)}")
    if chip.note:
        console.print(f"note: {escape(chip.note)}")


def _show_backend(console: Console, backend: Backend) -> None:
    found = presence(backend)
    state = "here" if found.here else "not here"
    console.print(f"[bold]{escape(backend.name)}[/]: {state}, {escape(found.reason)}")
    if found.fix:
        console.print(f"  to get it: {escape(found.fix)}")
    for what, version in installed_versions(backend).items():
        console.print(f"  {what} {escape(version)}")
    console.print(
        f"torch device {backend.device_type}, collectives {backend.collectives}, "
        f"plugin {backend.plugin or 'none needed'}, devices limited by {backend.visible_devices or 'nothing'}"
    )
    table = Table("capability", "", "why", "evidence", title="Capabilities", title_justify="left")
    for name, meaning in CAPABILITIES.items():
        answer = backend.capability(name)
        why = answer.reason if answer.value else f"{answer.reason}; {meaning.otherwise}"
        table.add_row(name, _yes(answer.value), escape(why), answer.evidence)
    console.print(table)
    table = Table("variable", "default", "why", title="Environment", title_justify="left")
    for variable in backend.environment:
        when = " [dim](deterministic runs)[/]" if variable.only_deterministic else ""
        value = "[dim]left alone[/]" if variable.value is None else escape(variable.value) + when
        table.add_row(variable.name, value, escape(variable.reason))
    console.print(table)
    for refusal in backend.refusals:
        what = " ".join(filter(None, (refusal.operation, refusal.argument, refusal.dtype)))
        then = f"capability {refusal.capability}" if refusal.capability else "no run asks for it"
        console.print(f"refuses {what}: {escape(refusal.source)}; {then}")
    for note in backend.notes:
        console.print(f"- {escape(note)}")
    models = [chip.name for chip in catalog().values() if chip.backend == backend.name]
    if models:
        console.print(f"chips: {', '.join(models)}")


def _yes(value: bool) -> str:
    return "[green]yes[/]" if value else "[red]no[/]"


def _as_data(name: str | None) -> dict[str, Any]:
    if name is None:
        return {
            "backends": [_backend_data(found) for found in detect()],
            "refused": registry().refused,
            "chips": [_chip_data(chip) for chip in catalog().values()],
        }
    subject = _find(name)
    return _chip_data(subject) if isinstance(subject, Chip) else _backend_data(presence(subject))


def _backend_data(found: Presence) -> dict[str, Any]:
    backend = found.backend
    plain = ("name", "device_type", "collectives", "vendor", "plugin", "install", "visible_devices", "notes")
    return {
        **{key: getattr(backend, key) for key in plain},
        "here": found.here,
        "count": found.count,
        "reason": found.reason,
        "fix": found.fix,
        "versions": installed_versions(backend),
        "environment": [asdict(variable) for variable in backend.environment],
        "refusals": [asdict(refusal) for refusal in backend.refusals],
        "capabilities": {key: asdict(backend.capability(key)) for key in CAPABILITIES},
    }


def _chip_data(chip: Chip) -> dict[str, Any]:
    """Figures that are not published are left out."""
    data = chip.model_dump(mode="json", exclude=set(chip.figures()) | {"figure_confidence"})
    known = {key: figure._asdict() for key, figure in chip.figures().items() if figure}
    return {**data, "figures": known}
