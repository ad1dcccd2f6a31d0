"""`zili chips`: what is here, what is known."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

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
from zili.cli.options import AsJson
from zili.cli.output import console, several_lines, table
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
    new_name: Annotated[str | None, typer.Argument(help="With `new`: the backend's name, for `chip.name`.")] = None,
    *,
    as_json: AsJson = False,
    folder: Annotated[Path | None, typer.Option(help="With `new`: folder to make; zili-NAME if not given.")] = None,
    device_type: Annotated[str | None, typer.Option(help="With `new`: torch's name for the device.")] = None,
    collectives: Annotated[str | None, typer.Option(help="With `new`: its torch.distributed backend.")] = None,
    plugin: Annotated[str | None, typer.Option(help="With `new`: module that teaches torch the device.")] = None,
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
        typer.echo(f"Next: pip install --editable {where}, then zili chips {new_name} (docs/extending/chip.md)")
        return
    if as_json:
        typer.echo(json.dumps(_as_data(name), indent=2, ensure_ascii=False))
        return
    to = console()
    if name is None:
        _show_here(to)
        _show_known(to)
        return
    subject = _find(name)
    if isinstance(subject, Chip):
        _show_chip(to, subject)
    else:
        _show_backend(to, subject)


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


def _show_here(to: Console) -> None:
    columns = ("backend", "torch device", "devices", "what it can, or what is missing and how to get it")
    rows = table(to, columns, left=columns, title="Here", boxed=True, lines=True)
    for found in detect():
        count = "?" if found.here and found.count is None else str(found.count or "none")
        rows.add_row(
            f"[bold]{escape(found.backend.name)}[/]" if found.here else escape(found.backend.name),
            found.backend.device_type,
            count,
            several_lines(to, *_abilities(found.backend))
            if found.here
            else several_lines(to, escape(found.reason), f"[dim]{escape(found.fix)}[/]"),
        )
    to.print(rows)
    for message in registry().refused.values():
        to.print(f"[yellow]{escape(message)}[/]")


def _abilities(backend: Backend) -> tuple[str, str]:
    can = [name for name in CAPABILITIES if backend.capability(name).value]
    lacks = [name for name in CAPABILITIES if name not in can]
    return f"[green]can[/] {', '.join(can)}", f"[red]lacks[/] {', '.join(lacks) or 'nothing known'}"


def _show_known(to: Console) -> None:
    title, names = "Known (dense peaks of the matrix units; bf16 where not marked)", ("chip", "backend")
    rows = table(to, (*names, *_COLUMNS.values()), left=names, title=title, boxed=True)
    for chip in catalog().values():
        cells = {column: _short(chip.figure(column)) for column in _COLUMNS}
        if chip.bf16_tflops is None and chip.fp16_tflops is not None:
            cells["bf16_tflops"] = "fp16 " + _short(chip.figure("fp16_tflops"))
        rows.add_row(chip.name, chip.backend or "[dim]none[/]", *cells.values())
    to.print(rows)
    to.print("[dim]–[/]: not published.  Confidence: " + "; ".join(f"{k} {v}" for k, v in CONFIDENCE.items()))
    to.print("`zili chips NAME` shows all figures of one chip, or one backend, with sources.")


def _short(figure: Figure | None) -> str:
    return "[dim]–[/]" if figure is None else f"{figure.value:g} [dim]{figure.confidence}[/]"


def _show_chip(to: Console, chip: Chip) -> None:
    to.print(f"[bold]{escape(chip.name)}[/]  {escape(chip.vendor)}, backend {chip.backend or 'none'}")
    columns = ("figure", "value", "confidence")
    rows = table(to, columns, left=columns, boxed=True)
    for name, figure in chip.figures().items():
        value = f"[dim]{_ABSENT}[/]" if figure is None else f"{figure.value:g}"
        rows.add_row(name, value, "" if figure is None else f"{figure.confidence}: {CONFIDENCE[figure.confidence]}")
    to.print(rows)
    for name, override in chip.capabilities.items():
        to.print(f"{name}: {_yes(override.value)}, {escape(override.reason)} ({override.evidence})")
    to.print(f"source: {escape(chip.source)}")
    if chip.note:
        to.print(f"note: {escape(chip.note)}")


def _show_backend(to: Console, backend: Backend) -> None:
    found = presence(backend)
    state = "here" if found.here else "not here"
    to.print(f"[bold]{escape(backend.name)}[/]: {state}, {escape(found.reason)}")
    if found.fix:
        to.print(f"  to get it: {escape(found.fix)}")
    for what, version in installed_versions(backend).items():
        to.print(f"  {what} {escape(version)}")
    to.print(
        f"torch device {backend.device_type}, collectives {backend.collectives}, "
        f"plugin {backend.plugin or 'none needed'}, devices limited by {backend.visible_devices or 'nothing'}"
    )
    columns = ("capability", "", "why", "evidence")
    rows = table(to, columns, left=columns, title="Capabilities", boxed=True)
    for name, meaning in CAPABILITIES.items():
        answer = backend.capability(name)
        why = answer.reason if answer.value else f"{answer.reason}; {meaning.otherwise}"
        rows.add_row(name, _yes(answer.value), escape(why), answer.evidence)
    to.print(rows)
    variables = ("variable", "default", "why")
    rows = table(to, variables, left=variables, title="Environment", boxed=True)
    for variable in backend.environment:
        when = " [dim](deterministic runs)[/]" if variable.only_deterministic else ""
        value = "[dim]left alone[/]" if variable.value is None else escape(variable.value) + when
        rows.add_row(variable.name, value, escape(variable.reason))
    to.print(rows)
    for refusal in backend.refusals:
        what = " ".join(filter(None, (refusal.operation, refusal.argument, refusal.dtype)))
        then = f"capability {refusal.capability}" if refusal.capability else "no run asks for it"
        to.print(f"refuses {what}: {escape(refusal.source)}; {then}")
    for note in backend.notes:
        to.print(f"- {escape(note)}")
    models = [chip.name for chip in catalog().values() if chip.backend == backend.name]
    if models:
        to.print(f"chips: {', '.join(models)}")


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
