"""A plan as an HTML page: where the time goes, memory by part, a pipeline's timeline, failures, other chips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from zili.planning.exact.memory import PARTS
from zili.planning.exact.schedule import Span, makespan
from zili.planning.fitted.machine import Machine
from zili.planning.fitted.rates import Rates
from zili.planning.search.layouts import Candidate, usable
from zili.planning.search.plan import MFU, Plan
from zili.planning.search.timeline import timeline

_COLOURS = (
    "#38506e",
    "#b3552e",
    "#c99a2e",
    "#4f8a7c",
    "#7d97b5",
    "#7b4b73",
    "#8a7f6d",
    "#d8a48f",
    "#c4c8cc",
    "#5a6472",
)
_KINDS = {"forward": "#7d97b5", "backward": "#38506e", "inputs": "#38506e", "weights": "#c99a2e"}
_WIDTH, _ROW = 1000, 16
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #1d2430; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
svg { width: 100%; background: #f7f8fa; display: block; }
table { border-collapse: collapse; margin: .6rem 0; }
td, th { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #e3e7ec; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
i.key { display: inline-block; width: .8em; height: .8em; margin-right: .4em; } span.key { margin-right: 1.2em; }
.scroll { overflow-x: auto; } .fine { color: #5a6472; font-size: 13px; }
"""


def page(plans: Sequence[Plan], title: str) -> str:
    """An HTML page: the first plan in full, the others beside it."""
    first = plans[0]
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>zili plan: {escape(title)}</title><style>{_STYLE}</style>
<h1>{escape(title)}</h1>
<p>{_summary(first)}</p>
{_layouts(first)}
<h2>Where the time of a step goes</h2>
{_bar(vars(first.best.time), "s", 1.0)}
<h2>Memory of the fullest chip</h2>
{_memory(first)}
{_timeline(first.best, first.machine, first.rates)}
{_drawbacks(first)}
{_failures(first)}
{_comparison(plans)}
<p class=fine>{"; ".join(map(escape, first.notes))}</p>
</html>
"""


def _summary(plan: Plan) -> str:
    seconds, low, high = plan.seconds(plan.best)
    run = plan.best.run
    energy = plan.megawatt_hours
    parts = [
        f"{plan.chips:,} {escape(plan.chip.name)}, {run.global_batch:,} sequences of {run.sequence:,} a step",
        f"{seconds:.3g} s a step ({low:.3g} to {high:.3g}), {plan.tokens_per_s(plan.best):,.0f} tokens/s",
        f"MFU {100 * plan.mfu(plan.best):.1f} %",
        f"{plan.days:,.1f} days for {plan.setting.tokens / 1e12:.3g} T tokens, {plan.chip_hours:,.0f} chip-hours",
    ]
    parts += [f"about {energy:,.0f} MWh (an estimate)"] if energy else []
    parts += [f"{plan.cost:,.0f} at {plan.setting.price:g} a chip-hour"] if plan.cost is not None else []
    return "; ".join(parts) + f".<br><span class=fine>MFU: {escape(MFU)}.</span>"


def _layouts(plan: Plan) -> str:
    rows = ""
    for candidate in plan.found.best:
        seconds, low, high = plan.seconds(candidate)
        rows += (
            f"<tr><td>{escape(candidate.text)}<td class=n>{seconds:.3g}<td class=n>{low:.3g} to {high:.3g}"
            f"<td class=n>{100 * plan.mfu(candidate):.1f} %<td class=n>{candidate.bytes / 2**30:.1f}</tr>"
        )
    return f"""<h2>The fastest of {plan.found.searched:,} layouts</h2><div class=scroll><table>
<tr><th>layout<th class=n>s a step<th class=n>nine of ten<th class=n>MFU<th class=n>GiB</tr>{rows}</table></div>"""


def _bar(parts: Mapping[str, float], unit: str, scale: float, whole: float | None = None) -> str:
    """One bar, piece by piece, with a key; `whole` is its full width."""
    shown = [(name, size) for name, size in parts.items() if size > 0]
    total = whole or sum(size for _, size in shown)
    x, rectangles, keys = 0.0, "", ""
    for index, (name, size) in enumerate(shown):
        width, colour = _WIDTH * size / total, _COLOURS[index % len(_COLOURS)]
        rectangles += f'<rect x="{x:.1f}" y="0" width="{width:.1f}" height="36" fill="{colour}"/>'
        keys += f'<span class=key><i class=key style="background:{colour}"></i>{escape(name)} '
        keys += f"{size / scale:.3g} {unit}</span>"
        x += width
    return f'<svg viewBox="0 0 {_WIDTH} 36" preserveAspectRatio="none" height="36">{rectangles}</svg><p>{keys}</p>'


def _memory(plan: Plan) -> str:
    memory = {part: plan.best.memory.get(part, 0.0) for part in PARTS}
    room = usable(plan.machine) if plan.machine.capacity else None
    text = "" if room is None else f"<p class=fine>The bar is the {room / 2**30:.1f} GiB beside the chip's runtime.</p>"
    return _bar(memory, "GiB", 2**30, room) + text


def _timeline(candidate: Candidate, machine: Machine, rates: Rates) -> str:
    run = candidate.run
    if run.pipeline == 1:
        return ""
    # As many micro-batches as show every phase; the rest only lengthens the middle.
    count = int(min(run.micro_batches, 3 * run.pipeline))
    spans = timeline(candidate.job, machine, rates, count)
    end = makespan(spans)
    busy = sum(span.end - span.start for queue in spans for span in queue) / end / run.pipeline
    rows = "".join(_row(queue, index, end, run.pipeline) for index, queue in enumerate(spans))
    height = _ROW * len(spans)
    keys = "".join(
        f'<span class=key><i class=key style="background:{_KINDS[kind]}"></i>{text}</span>'
        for kind, text in (("forward", "forward"), ("backward", "backward"), ("weights", "gradients of weights alone"))
    )
    return f"""<h2>The pipeline, with {count} micro-batches</h2>
<svg viewBox="0 0 {_WIDTH} {height}" preserveAspectRatio="none" height="{height}">{rows}</svg>
<p>{keys}</p><p class=fine>A row a process, {end:.2f} s across; stages after a process's first are paler. Busy
{100 * busy:.0f} % of the time; the step's {run.micro_batches:.0f} micro-batches leave less idle.</p>"""


def _row(queue: Sequence[Span], index: int, end: float, processes: int) -> str:
    return "".join(
        f'<rect x="{_WIDTH * span.start / end:.2f}" y="{_ROW * index + 1}" height="{_ROW - 2}" '
        f'width="{max(0.2, _WIDTH * (span.end - span.start) / end - 0.4):.2f}" fill="{_KINDS[span.action.kind]}" '
        f'opacity="{1.0 if span.action.stage < processes else 0.6}"/>'
        for span in queue
    )


def _drawbacks(plan: Plan) -> str:
    if not plan.found.drawbacks:
        return ""
    rows = "".join(f"<tr><td>{escape(one.choice)}<td>{escape(one.why)}</tr>" for one in plan.found.drawbacks)
    return f"<h2>Why not another</h2><table><tr><th>with<th>the fastest such layout</tr>{rows}</table>"


def _failures(plan: Plan) -> str:
    good = plan.goodput
    return f"""<h2>Failures</h2>
<p>One interruption in {good.mean_between / 3600:.1f} h, {plan.interruptions:,.0f} in all. With a checkpoint
({plan.checkpoint_bytes / 1e12:.2f} TB) every {good.interval / 60:.1f} minutes {100 * good.share:.1f} % of the time
trains. Most is lost to {escape(good.first_to_improve)}.</p>
{_bar({name: 100 * share for name, share in good.lost.items() if share > 1e-4}, "% of the time", 1.0)}"""


def _comparison(plans: Sequence[Plan]) -> str:
    if len(plans) == 1:
        return ""
    rows = ""
    for plan in plans:
        seconds, low, high = plan.seconds(plan.best)
        rows += (
            f"<tr><td>{escape(plan.chip.name)}<td class=n>{plan.chips:,}"
            f"<td class=n>{seconds:.3g} ({low:.3g} to {high:.3g})"
            f"<td class=n>{plan.tokens_per_s(plan.best) / plan.chips:,.0f}<td class=n>{100 * plan.mfu(plan.best):.1f} %"
            f"<td class=n>{plan.days:,.1f}<td class=n>{plan.chip_hours:,.0f}<td>{escape(plan.best.text)}</tr>"
        )
    return f"""<h2>On other chips</h2><div class=scroll><table><tr><th>chip<th class=n>chips<th class=n>s a step
<th class=n>tokens/s a chip<th class=n>MFU<th class=n>days<th class=n>chip-hours<th>layout</tr>{rows}</table></div>"""
