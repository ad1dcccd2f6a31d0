"""A rehearsal as an HTML page: memory over a step, what it is at its peak, messages, arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from zili.pages import render
from zili.pages.charts import Chart, Drawing, Level, Line, draw
from zili.pages.figures import binary_size
from zili.rehearsal.recorder import PARTS
from zili.rehearsal.result import Rehearsal, ranges_text

_TITLE, _OWN = "Memory over the step", "the chip's memory"
_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
_LOW = 0.4
"""A step that takes less of a chip's memory is drawn by itself as well: below the chip's line it is low."""


def page(rehearsals: Sequence[Rehearsal], title: str, capacity: int | None) -> str:
    """An HTML page of `rehearsals`, one a process; `capacity`: bytes of the chip, where it is known."""
    return render(
        "rehearsal/page.html.jinja",
        title=title,
        first=rehearsals[0],
        capacity=capacity,
        stages=[_stage(one) for one in rehearsals] if len(rehearsals) > 1 else [],
        imbalance=[imbalance([one.peak.bytes for one in rehearsals]), imbalance([_flops(one) for one in rehearsals])],
        sections=[_section(one, capacity) for one in rehearsals],
    )


def imbalance(values: Sequence[float]) -> float:
    """The largest over the mean."""
    return max(values) * len(values) / sum(values)


def _flops(rehearsal: Rehearsal) -> int:
    return sum(rehearsal.flops.values())


def _stage(one: Rehearsal) -> list[str]:
    where = [str(one.rank), ranges_text(one.stages), ranges_text(one.layers)]
    return [*where, binary_size(one.peak.bytes), f"{_flops(one) / 1e12:,.1f}"]


def _section(one: Rehearsal, capacity: int | None) -> dict[str, object]:
    messages = sorted(one.messages.items(), key=lambda item: -item[0].bytes * item[1])
    return {
        "rank": one.rank,
        "layers": ranges_text(one.layers),
        "peak": one.peak.bytes,
        "drawings": _drawings(one, capacity),
        "parts": [
            (f"part-{i}", name, one.peak.parts[name], what)
            for i, (name, what) in enumerate(PARTS.items())
            if one.peak.parts[name]
        ],
        "flops": ", ".join(f"{phase} {count / 1e12:,.2f}" for phase, count in one.flops.items()),
        "operations": sum(one.operations.values()),
        "largest": [[what, binary_size(size), str(count)] for size, what, count in one.peak.largest],
        "messages": [
            [m.kind, m.mesh, f"{m.processes}", binary_size(m.bytes), f"{n:,}", binary_size(m.bytes * n)]
            for m, n in messages
        ],
    }


def _drawings(one: Rehearsal, capacity: int | None) -> list[Drawing]:
    """Memory over the operations of the step, part on part: below what the chip has, and larger where that is low."""
    small = capacity is not None and one.peak.bytes < _LOW * capacity
    charts = [] if capacity is None else [replace(_chart(one, "GiB"), levels=[Level(_OWN, capacity / 2**30, "GiB")])]
    if capacity is None or small:
        fitting = next((unit for unit in _UNITS if one.peak.bytes >= _UNITS[unit]), "KiB")
        charts.append(replace(_chart(one, fitting), title="Without the chip's line" if small else _TITLE))
    drawn = [replace(chart, wide=not small, identity=f"{chart.unit}-{one.rank}-{i}") for i, chart in enumerate(charts)]
    return [drawing for chart in drawn if (drawing := draw(chart))]


def _chart(one: Rehearsal, unit: str) -> Chart:
    lines = [
        Line(part, [(time, parts[part] / _UNITS[unit]) for time, parts in one.timeline], f"part-{i}")
        for i, part in enumerate(PARTS)
    ]
    caption = f"From the first operation of the step to the last ({one.timeline[-1][0]:,})."
    return Chart(_TITLE, caption, lines, unit=unit, along="operation", stacked=True, from_zero=True)
