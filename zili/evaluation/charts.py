"""Line charts as HTML figures: the curves in an SVG that stretches, the labels in HTML that does not."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from zili.evaluation.figures import compact, linear_ticks, log_ticks, tick_labels

WIDTH, HEIGHT = 1000, 400
MOST_POINTS = 600
"""Points kept of a line: about one for each pixel column of a wide chart."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A curve. `kind` is its look: "raw" (faint), "main", "other" (beside it), "evaluated" and "again" (dots joined by
    a line)."""

    name: str
    points: Sequence[Point]
    kind: str = "main"


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with, such as a compressor's figure."""

    name: str
    value: float


@dataclass(frozen=True)
class Chart:
    """One figure. x is the training step; y has `unit`; `ceiling` cuts off what is above it."""

    title: str
    caption: str
    lines: Sequence[Line]
    levels: Sequence[Level] = ()
    logarithmic: bool = False
    from_zero: bool = False
    ceiling: float | None = None
    last_step: float | None = None
    """Where the axis ends if the points end earlier, so that the charts of a run stand under one another."""
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


def drawn(chart: Chart) -> str:
    """The figure's HTML; "" when there is not one finite point."""
    lines = [(line, _kept(line, chart)) for line in chart.lines]
    lines = [(line, points) for line, points in lines if any(map(_finite, points))]
    if not lines:
        return ""
    x = _x_scale([p for _, points in lines for p in points], chart.last_step)
    y = _y_scale(chart, [p for _, points in lines for p in points if _finite(p)])
    ticks = (log_ticks if y.logarithmic else linear_ticks)(y.low, y.high)
    return f"""<figure class="chart{" wide" if chart.wide else ""}">
<figcaption><h3>{escape(chart.title)}</h3><p>{escape(chart.caption)}</p></figcaption>
<div class="plot" data-chart="{escape(_for_script(lines, chart, x, y))}">
<div class="ticks-y" aria-hidden="true">{_labels_y(ticks, y)}</div>
{_svg(chart, lines, x, y, ticks)}
<div class="ticks-x" aria-hidden="true">{_labels_x(x)}</div>
</div>
{_legend(lines, chart)}
</figure>"""


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
    points = [(x, y if not chart.logarithmic or y > 0 else math.nan) for x, y in line.points]
    return thinned(points)


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


def _svg(chart: Chart, lines: Sequence[tuple[Line, list[Point]]], x: Scale, y: Scale, ticks: Sequence[float]) -> str:
    identity = escape(chart.identity)
    grid = "".join(f'<path class="grid" d="M0 {_y(y, t)}H{WIDTH}"/>' for t in ticks if 0 <= y.at(t) <= 1)
    levels = "".join(
        f'<path class="level level-{i}" d="M0 {_y(y, level.value)}H{WIDTH}"/>' for i, level in enumerate(chart.levels)
    )
    curves = "".join(_curve(line, points, x, y) for line, points in lines)
    return f"""<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" \
aria-labelledby="{identity}-title {identity}-text">
<title id="{identity}-title">{escape(chart.title)}</title>
<desc id="{identity}-text">{escape(_described(chart, lines))}</desc>
{grid}{levels}{curves}</svg>"""


def _curve(line: Line, points: Sequence[Point], x: Scale, y: Scale) -> str:
    """Paths of one line: a stroke for each stretch without gaps, dots where there is nothing to join."""
    stretches: list[list[str]] = [[]]
    for point in points:
        if _finite(point):
            stretches[-1].append(f"{_x(x, point[0])} {_y(y, point[1])}")
        elif stretches[-1]:
            stretches.append([])
    stroke = "".join("M" + "L".join(s) for s in stretches if len(s) > 1)
    dotted = line.kind in ("evaluated", "again")
    dots = "".join(f"M{place}h0" for s in stretches for place in s if dotted or len(s) == 1)
    paths = f'<path class="line {line.kind}" d="{stroke}"/>' if stroke else ""
    # A stroke of no length with round ends is a dot that stays round however the picture is stretched.
    return paths + (f'<path class="dots {line.kind}" d="{dots}"/>' if dots else "")


def _x(scale: Scale, value: float) -> str:
    return f"{WIDTH * scale.at(value):.1f}"


def _y(scale: Scale, value: float) -> str:
    return f"{HEIGHT * (1 - scale.at(value)):.1f}"


def _described(chart: Chart, lines: Sequence[tuple[Line, list[Point]]]) -> str:
    """The chart in a sentence, for those who do not see it."""
    parts = []
    for line, points in lines:
        finite = [p for p in points if _finite(p)]
        (x0, y0), (x1, y1) = finite[0], finite[-1]
        parts.append(f"{line.name}: from {compact(y0)} at step {x0:,.0f} to {compact(y1)} at step {x1:,.0f}")
    parts += [f"{level.name}: {compact(level.value, 4)}" for level in chart.levels]
    return "; ".join(parts) + "."


def _labels_y(ticks: Sequence[float], y: Scale) -> str:
    return "".join(
        f'<span style="bottom:{100 * y.at(t):.2f}%">{text}</span>'
        for t, text in zip(ticks, tick_labels(ticks), strict=True)
    )


def _labels_x(x: Scale) -> str:
    # A step is whole, and 5,000 reads better than 5k.
    ticks = [t for t in linear_ticks(x.low, x.high) if t == round(t) and 0 <= x.at(t) <= 1]
    labels = [f"{t:,.0f}" if t < 1e6 else compact(t) for t in ticks]
    spans = [f'<span style="left:{100 * x.at(t):.2f}%">{text}</span>' for t, text in zip(ticks, labels, strict=True)]
    return "".join(spans) + '<span class="axis">step</span>'


def _legend(lines: Sequence[tuple[Line, list[Point]]], chart: Chart) -> str:
    items = [f'<li><i class="key {line.kind}"></i>{escape(line.name)}</li>' for line, _ in lines]
    items += [
        f'<li><i class="key level level-{i}"></i>{escape(level.name)} <b>{compact(level.value, 4)}</b></li>'
        for i, level in enumerate(chart.levels)
    ]
    return f'<ul class="legend">{"".join(items)}</ul>' if len(items) > 1 else ""


def _for_script(lines: Sequence[tuple[Line, list[Point]]], chart: Chart, x: Scale, y: Scale) -> str:
    """What the tooltip needs, as JSON."""
    curves = [
        {
            "name": line.name,
            "kind": line.kind,
            "at": [[a, float(f"{b:.5g}")] for a, b in points if _finite((a, b))],
        }
        for line, points in lines
    ]
    box = {"x": [x.low, x.high], "y": [y.low, y.high], "log": y.logarithmic}
    return json.dumps({**box, "lines": curves}, separators=(",", ":"))


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
