"""Charts, bars and timelines laid out: Python says where things lie, `parts.html.jinja` draws them as SVG and HTML.

There is no library here. The smallest well-kept one (uPlot) adds 50 kB to a page and shows nothing where scripts do not
run. It would replace some forty lines, since ticks, thinning, words for screen readers and bars would stay.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from zili.pages.figures import compact, linear_ticks, log_ticks, tick_labels

WIDTH, HEIGHT = 1000, 400
MOST_POINTS = 600
"""Points kept of a line: about one for each pixel column of a wide chart."""

Point = tuple[float, float]
LegendItem = tuple[str, str, str]
"""Kind of the key, name, figure."""


@dataclass(frozen=True)
class Line:
    """A curve. `kind` is its look: "raw" (faint), "main", "other" (beside it), "evaluated" and "again" (dots joined by
    a line), "run-0" to "run-5", "part-0" to "part-10"."""

    name: str
    points: Sequence[Point]
    kind: str = "main"


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with, such as a compressor's figure."""

    name: str
    value: float
    unit: str = ""


@dataclass(frozen=True)
class Chart:
    """One figure: `along` says what x counts, `unit` is y's, `ceiling` cuts off what is above it."""

    title: str
    caption: str
    lines: Sequence[Line]
    levels: Sequence[Level] = ()
    unit: str = ""
    along: str = "step"
    logarithmic: bool = False
    from_zero: bool = False
    stacked: bool = False
    """Each line on the one before it, as areas; all have a point at every x."""
    ceiling: float | None = None
    last_step: float | None = None
    """Where the axis ends if the points end earlier, so that the charts of a run stand under one another."""
    marks: Sequence[float] = ()
    """Where something happened, along the axis; `marked` says what."""
    marked: str = ""
    wide: bool = False
    identity: str = field(default="chart")


@dataclass(frozen=True)
class Scale:
    """Where a value lies on an axis, from 0 to 1."""

    low: float
    high: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        if self.logarithmic:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Tick:
    """A label `at` a share of an axis."""

    at: float
    text: str

    @property
    def down(self) -> str:
        """Where it is in an SVG, from the top."""
        return f"{HEIGHT * (1 - self.at):.1f}"


@dataclass(frozen=True)
class Curve:
    """Paths of one line: its area where lines are stacked, a stroke for each stretch without gaps, dots where there is
    nothing to join."""

    kind: str
    area: str = ""
    stroke: str = ""
    dots: str = ""


@dataclass(frozen=True)
class Drawing:
    """A chart laid out. `described`: it in a sentence, for those who do not see it; `data`: JSON for the tooltip."""

    chart: Chart
    curves: list[Curve]
    levels: list[Tick]
    marks: list[str]
    """Where they are in an SVG, from the left."""
    ticks_x: list[Tick]
    ticks_y: list[Tick]
    legend: list[LegendItem]
    described: str
    data: str


def draw(chart: Chart) -> Drawing | None:
    """`chart` laid out; None when there is not one finite point."""
    lines = [(line, _kept(line, chart)) for line in chart.lines]
    lines = [(line, points) for line, points in lines if any(map(_finite, points))]
    if not lines:
        return None
    tops = _stacked([points for _, points in lines]) if chart.stacked else [points for _, points in lines]
    everything = [p for points in tops for p in points]
    x, y = _x_scale(everything, chart.last_step), _y_scale(chart, [p for p in everything if _finite(p)])
    below = [[(a, y.low) for a, _ in tops[0]], *tops]
    curves = [
        _area(line.kind, low, high, x, y) if chart.stacked else _curve(line.kind, high, x, y)
        for (line, _), low, high in zip(lines, below, tops, strict=False)
    ]
    legend = [(line.kind, line.name, "") for line, _ in lines] + [
        (f"level level-{i}", level.name, f"{compact(level.value, 4)} {level.unit}".strip())
        for i, level in enumerate(chart.levels)
    ]
    levels = [Tick(y.at(level.value), level.name) for level in chart.levels]
    marks = [f"{WIDTH * x.at(mark):.1f}" for mark in chart.marks if x.low <= mark <= x.high]
    legend += [("mark", chart.marked, "")] if marks else []
    described, data = _described(chart, lines), _for_script(lines, chart, x)
    return Drawing(chart, curves, levels, marks, _whole_ticks(x), ticks(y), legend, described, data)


class BarPart(NamedTuple):
    """A part of a bar: its `share` of the bar's full width."""

    kind: str
    name: str
    text: str
    share: float


@dataclass(frozen=True)
class Bar:
    """A bar of parts on an axis from 0."""

    parts: list[BarPart]
    ticks: list[Tick]
    unit: str


def bar(parts: Mapping[str, float], unit: str, whole: float | None = None) -> Bar:
    """`parts` that are not 0, one after the other; `whole` is the full width, by default their sum. A part's colour
    depends on its place among all."""
    scale = Scale(0.0, whole or sum(parts.values()))
    drawn = [
        BarPart(f"part-{i}", name, f"{size:.3g} {unit}", scale.at(size))
        for i, (name, size) in enumerate(parts.items())
        if size > 0
    ]
    return Bar(drawn, ticks(scale), unit)


def ticks(scale: Scale) -> list[Tick]:
    """Round values on an axis, labelled."""
    values = (log_ticks if scale.logarithmic else linear_ticks)(scale.low, scale.high)
    return [Tick(scale.at(value), text) for value, text in zip(values, tick_labels(values), strict=True)]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """About `most` points at most: the lowest and the highest of each stretch, so that spikes stay."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept: list[Point] = []
    for at in range(0, len(points), size):
        stretch = points[at : at + size]
        broken = next((p for p in stretch if not _finite(p)), None)
        if broken is not None:
            kept.append(broken)
        finite = [p for p in stretch if _finite(p)]
        if finite:
            kept += {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
    return sorted(kept, key=lambda p: p[0])


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """Each value's mean with up to `window // 2` neighbours on either side; not-a-number breaks the line.

    Centred, because a trailing mean lags behind a falling loss. At the beginning, where loss falls fastest,
    the window shrinks on both sides; at the end, where it is flat, only on the side where there is nothing.
    """
    sums, counts = [0.0], [0]
    for point in points:
        sums.append(sums[-1] + (point[1] if _finite(point) else 0.0))
        counts.append(counts[-1] + _finite(point))
    out: list[Point] = []
    for i, point in enumerate(points):
        half = min(window // 2, i)
        first, last = i - half, min(i + half + 1, len(points))
        mean = (sums[last] - sums[first]) / max(counts[last] - counts[first], 1)
        out.append((point[0], mean if _finite(point) else math.nan))
    return out


def _finite(point: Point) -> bool:
    return math.isfinite(point[1])


def _kept(line: Line, chart: Chart) -> list[Point]:
    """The points drawn: thinned, and without what a logarithm cannot show."""
    if chart.stacked:
        return list(line.points) if any(y for _, y in line.points) else []
    points = [(x, y if not chart.logarithmic or y > 0 else math.nan) for x, y in line.points]
    return thinned(points)


def _stacked(lines: Sequence[Sequence[Point]]) -> list[list[Point]]:
    """The top of each line, on those before it."""
    columns = [list(accumulate(y for _, y in column)) for column in zip(*lines, strict=True)]
    return [[(x, column[i]) for (x, _), column in zip(line, columns, strict=True)] for i, line in enumerate(lines)]


def _x_scale(points: Sequence[Point], last_step: float | None) -> Scale:
    last = max(last_step or 0, *(x for x, _ in points))
    first = min(x for x, _ in points)
    # A run's steps start near 0; a lone step gets room around it.
    low = 0.0 if first <= last / 2 or last_step else first
    return Scale(low, last) if last > low else Scale(low - 1, last + 1)


def _y_scale(chart: Chart, points: Sequence[Point]) -> Scale:
    values = [y for _, y in points] + [level.value for level in chart.levels]
    low, high = min(values), max(values)
    if chart.ceiling is not None:
        high = min(high, chart.ceiling)
    if chart.logarithmic and high >= 10 * low:
        return Scale(low / 1.15, high * 1.15, logarithmic=True)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    if chart.from_zero and low >= 0:
        return Scale(0.0, high + margin)
    bottom = low - margin
    return Scale(max(bottom, 0.0) if low >= 0 else bottom, high + margin)


def _area(kind: str, low: Sequence[Point], high: Sequence[Point], x: Scale, y: Scale) -> Curve:
    edge = [f"{_x(x, a)} {_y(y, b)}" for a, b in [*high, *reversed(low)]]
    return Curve(kind, area="M" + "L".join(edge) + "Z")


def _curve(kind: str, points: Sequence[Point], x: Scale, y: Scale) -> Curve:
    stretches: list[list[str]] = [[]]
    for point in points:
        if _finite(point):
            stretches[-1].append(f"{_x(x, point[0])} {_y(y, point[1])}")
        elif stretches[-1]:
            stretches.append([])
    dotted = kind in ("evaluated", "again")
    # A stroke of no length with round ends is a dot that stays round however the picture is stretched.
    dots = "".join(f"M{place}h0" for s in stretches for place in s if dotted or len(s) == 1)
    return Curve(kind, stroke="".join("M" + "L".join(s) for s in stretches if len(s) > 1), dots=dots)


def _x(scale: Scale, value: float) -> str:
    return f"{WIDTH * scale.at(value):.1f}"


def _y(scale: Scale, value: float) -> str:
    return f"{HEIGHT * (1 - scale.at(value)):.1f}"


def _described(chart: Chart, lines: Sequence[tuple[Line, list[Point]]]) -> str:
    parts = []
    for line, points in lines:
        finite = [p for p in points if _finite(p)]
        (x0, y0), (x1, y1) = finite[0], finite[-1]
        first, last = f"{chart.along} {x0:,.0f}", f"{chart.along} {x1:,.0f}"
        parts.append(f"{line.name}: from {compact(y0)} at {first} to {compact(y1)} at {last}")
    parts += [f"{level.name}: {compact(level.value, 4)}" for level in chart.levels]
    return "; ".join(parts) + "."


def _whole_ticks(x: Scale) -> list[Tick]:
    # A step is whole, and 5,000 reads better than 5k.
    values = [t for t in linear_ticks(x.low, x.high) if t == round(t) and 0 <= x.at(t) <= 1]
    return [Tick(x.at(t), f"{t:,.0f}" if t < 1e6 else compact(t)) for t in values]


def _for_script(lines: Sequence[tuple[Line, list[Point]]], chart: Chart, x: Scale) -> str:
    curves = [
        {
            "name": line.name,
            "kind": line.kind,
            "at": [[a, float(f"{b:.5g}")] for a, b in points if _finite((a, b))],
        }
        for line, points in lines
    ]
    told = {"x": [x.low, x.high], "along": chart.along, "unit": chart.unit, "lines": curves}
    return json.dumps(told, separators=(",", ":"))


def rising_ceiling(points: Sequence[Point]) -> float | None:
    """A top for the loss axis that shows the part where learning happens, or None to show everything.

    Loss falls steeply in the first steps, and an axis that holds them flattens the rest. The top is the
    highest value after the first twentieth, and applies only if that more than halves the axis.
    """
    finite = [p for p in points if _finite(p)]
    later = [y for _, y in finite[len(finite) // 20 :]]
    if len(finite) < 40 or not later:
        return None
    everything = max(y for _, y in finite) - min(y for _, y in finite)
    kept = max(later) - min(later)
    return max(later) if kept < everything / 2 else None
