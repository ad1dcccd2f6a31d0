"""A rehearsal as an HTML page: memory over a step, what it is at its peak, messages, arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from zili.rehearsal.recorder import PARTS
from zili.rehearsal.result import Rehearsal, ranges_text, size_text

_WIDTH, _HEIGHT = 1000, 260
_COLOURS = (
    *("#38506e", "#b3552e", "#8a7f6d", "#7d97b5", "#c99a2e"),
    *("#7b4b73", "#d8a48f", "#4f8a7c", "#c4c8cc", "#5e6b3b"),
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #1d2430; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
svg { width: 100%; height: 260px; background: #f7f8fa; }
table { border-collapse: collapse; margin: .6rem 0; }
td, th { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #e3e7ec; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
i.key { display: inline-block; width: .8em; height: .8em; margin-right: .5em; }
.scroll { overflow-x: auto; } small, .fine { color: #5a6472; }
"""


def page(rehearsals: Sequence[Rehearsal], title: str, capacity: int | None) -> str:
    """An HTML page of `rehearsals`, one a process; `capacity`: bytes of the chip, where it is known."""
    first = rehearsals[0]
    sections = "".join(_section(rehearsal, capacity) for rehearsal in rehearsals)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>zili rehearse: {escape(title)}</title><style>{_STYLE}</style>
<h1>{escape(title)}</h1>
<p>{escape(first.layout)}: {first.world:,} processes, {first.micro_batches} micro-batches in the step shown.
Bytes are those tensors ask for; a chip's runtime, its collectives' buffers and gaps between blocks come on top.</p>
{_overview(rehearsals, capacity)}
{sections}
</html>
"""


def _overview(rehearsals: Sequence[Rehearsal], capacity: int | None) -> str:
    if len(rehearsals) == 1:
        return ""
    rows = "".join(
        f"<tr><td class=n>{r.rank}<td>{ranges_text(r.stages)}<td>{ranges_text(r.layers)}"
        f"<td class=n>{size_text(r.peak.bytes)}<td class=n>{sum(r.flops.values()) / 1e12:,.1f}</tr>"
        for r in rehearsals
    )
    room = f"; the chip has {size_text(capacity)}" if capacity else ""
    return f"""<h2>The stages</h2><div class=scroll><table>
<tr><th class=n>process<th>stages<th>layers<th class=n>peak<th class=n>TFLOP</tr>{rows}</table></div>
<p class=fine>Most over mean: memory {imbalance([r.peak.bytes for r in rehearsals]):.3f},
arithmetic {imbalance([sum(r.flops.values()) for r in rehearsals]):.3f}{room}.</p>"""


def imbalance(values: Sequence[float]) -> float:
    """The largest over the mean."""
    return max(values) * len(values) / sum(values)


def _section(rehearsal: Rehearsal, capacity: int | None) -> str:
    peak = rehearsal.peak
    parts = "".join(
        f'<tr><td><i class=key style="background:{colour}"></i>{part}<td class=n>{size_text(peak.parts[part])}'
        f"<td><small>{escape(what)}</small></tr>"
        for (part, what), colour in zip(PARTS.items(), _COLOURS, strict=True)
        if peak.parts[part]
    )
    largest = "".join(
        f"<tr><td class=n>{size_text(size)}<td>{escape(what)}<td class=n>{count}</tr>"
        for size, what, count in peak.largest
    )
    messages = "".join(
        f"<tr><td>{m.kind}<td>{escape(m.mesh)}<td class=n>{m.processes}<td class=n>{size_text(m.bytes)}"
        f"<td class=n>{n:,}<td class=n>{size_text(m.bytes * n)}</tr>"
        for m, n in sorted(rehearsal.messages.items(), key=lambda item: -item[0].bytes * item[1])
    )
    flops = ", ".join(f"{phase} {count / 1e12:,.2f}" for phase, count in rehearsal.flops.items())
    return f"""<h2>Process {rehearsal.rank}: layers {ranges_text(rehearsal.layers)}, peak {size_text(peak.bytes)}</h2>
{_drawing(rehearsal, capacity)}
<table><tr><th>at the peak<th class=n>bytes<th></tr>{parts}</table>
<p>TFLOP of matrix products and attention: {flops}. {sum(rehearsal.operations.values()):,} operations.</p>
<details><summary>The largest blocks at the peak</summary><div class=scroll><table>
<tr><th class=n>each<th>what<th class=n>how many</tr>{largest}</table></div></details>
<details open><summary>Messages</summary><div class=scroll><table>
<tr><th>kind<th>among those that share<th class=n>processes<th class=n>each<th class=n>times<th class=n>in all</tr>
{messages}</table></div></details>"""


def _drawing(rehearsal: Rehearsal, capacity: int | None) -> str:
    """Memory over the operations of the step, part on part."""
    peak, last = rehearsal.peak.bytes, max(time for time, _ in rehearsal.timeline) or 1
    top = 1.05 * (capacity if capacity and capacity < 1.6 * peak else peak)

    def place(time: float, value: float) -> str:
        return f"{_WIDTH * time / last:.1f} {_HEIGHT * (1 - value / top):.1f}"

    below = [0.0] * len(rehearsal.timeline)
    areas = []
    for part, colour in zip(PARTS, _COLOURS, strict=True):
        above = [low + parts[part] for low, (_, parts) in zip(below, rehearsal.timeline, strict=True)]
        if above != below:
            times = [time for time, _ in rehearsal.timeline]
            upper = [place(time, value) for time, value in zip(times, above, strict=True)]
            lower = [place(time, value) for time, value in zip(times, below, strict=True)]
            path = "M" + "L".join(upper + lower[::-1]) + "Z"
            areas.append(f'<path d="{path}" fill="{colour}"><title>{part}</title></path>')
        below = above
    line = ""
    if capacity and capacity <= top:
        line = f'<path d="M{place(0, capacity)}L{place(last, capacity)}" stroke="#b00020" stroke-width="2"/>'
    return f"""<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img"
 aria-label="memory over the step">{"".join(areas)}{line}</svg>
<p class=fine>Memory from the first operation of the step to the last ({last:,}); the height is {size_text(int(top))}\
{", the line what the chip has" if line else ""}.</p>"""
