"""A plan as an HTML page: where the time goes, memory by part, a pipeline's timeline, failures, other chips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zili.pages import render
from zili.pages.charts import Bar, Scale, Tick, bar, ticks
from zili.planning.exact.memory import PARTS
from zili.planning.exact.schedule import Span, makespan
from zili.planning.fitted.machine import Machine
from zili.planning.fitted.rates import Rates
from zili.planning.search.goodput import Goodput
from zili.planning.search.layouts import Candidate
from zili.planning.search.plan import MFU, Plan
from zili.planning.search.timeline import timeline

_ROW = 16
"""Height of a process in the timeline, in pixels; its width is 1000."""


def page(plans: Sequence[Plan], title: str) -> str:
    """An HTML page: the first plan in full, the others beside it."""
    first = plans[0]
    room = first.machine.room / 2**30 if first.machine.capacity else None
    return render(
        "planning/search/page.html.jinja",
        title=title,
        mfu=MFU,
        plan=first,
        seconds=_seconds(first, first.best),
        layouts=[_layout(first, candidate) for candidate in first.found.best],
        drawbacks=[(one.choice, one.why) for one in first.found.drawbacks],
        others=[_other(plan) for plan in plans] if len(plans) > 1 else [],
        time=bar(vars(first.best.time), "s"),
        memory=bar({part: first.best.memory.get(part, 0.0) / 2**30 for part in PARTS}, "GiB", room),
        room=room,
        pipeline=_pipeline(first.best, first.machine, first.rates) if first.best.run.pipeline > 1 else None,
        failures=_failures(first.goodput),
    )


def _seconds(plan: Plan, candidate: Candidate) -> tuple[str, str]:
    """Of a step, and where nine of ten runs were."""
    seconds, low, high = plan.seconds(candidate)
    return f"{seconds:.3g}", f"{low:.3g} to {high:.3g}"


def _layout(plan: Plan, candidate: Candidate) -> list[str]:
    share, size = plan.mfu(candidate), candidate.bytes / 2**30
    return [candidate.text, *_seconds(plan, candidate), f"{100 * share:.1f} %", f"{size:.1f}"]


def _other(plan: Plan) -> list[str]:
    seconds, band = _seconds(plan, plan.best)
    speed, share = plan.tokens_per_s(plan.best) / plan.chips, plan.mfu(plan.best)
    figures = [f"{speed:,.0f}", f"{100 * share:.1f} %", f"{plan.days:,.1f}", f"{plan.chip_hours:,.0f}"]
    return [plan.chip.name, f"{plan.chips:,}", f"{seconds} ({band})", *figures, plan.best.text]


@dataclass(frozen=True)
class Timeline:
    """The timeline of a pipeline's processes, for its first micro-batches. `busy`: share of the time."""

    micro_batches: int
    seconds: float
    busy: float
    height: int
    spans: list[tuple[str, str, str, int]]
    """Class, x, width and y of each."""
    processes: list[Tick]
    ticks: list[Tick]


def _pipeline(candidate: Candidate, machine: Machine, rates: Rates) -> Timeline:
    run = candidate.run
    # As many micro-batches as show every phase; the rest only lengthens the middle.
    count = int(min(run.micro_batches, 3 * run.pipeline))
    queues = timeline(candidate.job, machine, rates, count)
    end, rows = makespan(queues), len(queues)
    labelled = range(0, rows, -(-rows // 16))
    return Timeline(
        micro_batches=count,
        seconds=end,
        busy=sum(span.end - span.start for queue in queues for span in queue) / end / run.pipeline,
        height=_ROW * rows,
        spans=[_drawn(span, row, end, rows) for row, queue in enumerate(queues) for span in queue],
        processes=[Tick(1 - (row + 0.5) / rows, str(row)) for row in labelled],
        ticks=ticks(Scale(0.0, end)),
    )


def _drawn(span: Span, row: int, end: float, processes: int) -> tuple[str, str, str, int]:
    later = " later" if span.action.stage >= processes else ""
    width = max(0.2, 1000 * (span.end - span.start) / end - 0.4)
    return f"{span.action.kind}{later}", f"{1000 * span.start / end:.2f}", f"{width:.2f}", _ROW * row + 1


def _failures(goodput: Goodput) -> list[Bar]:
    """All of the time to scale, and the lost part of it alone in the same colours."""
    lost = {name: 100 * share for name, share in goodput.lost.items() if share > 1e-4}
    whole = bar({"training": 100 * goodput.share, **lost}, "%", 100.0)
    return [whole, bar({"training": 0.0, **lost}, "%")] if lost else [whole]
