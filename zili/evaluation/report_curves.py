"""Chooses the curves of a report from the records of a run."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import median

from zili.evaluation.run_record import Record, RunRecord, number, values
from zili.pages.charts import Chart, Drawing, Level, Line, Point, draw, rising_ceiling, smoothed
from zili.pages.figures import byte_size, compact
from zili.plurals import counted


def charts(run: RunRecord) -> list[Drawing]:
    """What was recorded, drawn."""
    planned = (_loss(run), _bits(run), _rewards(run), _learning_rate(run), _gradient(run), _speed(run), _memory(run))
    last = run.last_step if run.last_step > 1 else None
    return [drawing for chart in planned if (drawing := draw(replace(chart, last_step=last)))]


def lead(run: RunRecord) -> str:
    """How long the run is, in a sentence."""
    tokens = number(run.train[-1], "tokens") if run.train else None
    read = f", {compact(tokens)} tokens" if tokens else ""
    return f"{counted(run.last_step, 'step')}{read}. Point at a chart for the values of a step."


def series(records: list[Record], key: str) -> list[Point]:
    """`(step, value)` of every record that has `key`; a value that is no finite number is NaN, a gap."""
    found = [(float(r["step"]), number(r, key)) for r in records if key in r]
    return [(step, math.nan if value is None else value) for step, value in found]


def compressor_levels(run: RunRecord) -> list[Level]:
    """The reference compressors of the summary, in its order."""
    listed = run.summary.get("compressors")
    entries = [c for c in listed if isinstance(c, dict)] if isinstance(listed, list) else []
    values = [(str(c.get("name", "compressor")), number(c, "bits_per_byte")) for c in entries]
    return [Level(name, value) for name, value in values if value is not None]


_CROSS_ENTROPY = ("Cross entropy in nats a token", "nats a token")
"""What the loss is of next tokens, and its unit."""

_MOST_MARKS = 100


def _loss(run: RunRecord) -> Chart:
    raw = series(run.train, "loss")
    window = max(3, len(raw) // 25)
    lines = [Line("each step", raw, "raw")]
    if len(raw) >= 8:
        lines.append(Line(f"mean of {window} records", smoothed(raw, window), "main"))
    lines += _evaluated(run, "loss", "held out")
    ceiling = rising_ceiling(raw)
    above = max((y for _, y in raw if math.isfinite(y)), default=0.0)
    preferences = bool(series(run.train, "reward_chosen"))
    measure, unit = ("Of preferences, the mean over pairs", "a pair") if preferences else _CROSS_ENTROPY
    caption = f"{measure}; lower is better."
    if ceiling is not None:
        caption += f" It began at {compact(above)}, above the chart."
    loss = Chart("Loss", caption, lines, unit=unit, ceiling=ceiling, wide=True, identity="loss")
    return replace(loss, marks=_went_on(run), marked="went on from a checkpoint")


def _went_on(run: RunRecord) -> list[float]:
    """Steps after which the run was begun again; of many the last ones."""
    return sorted({step for step in values(run.starts, "step") if step > 0})[-_MOST_MARKS:]


def _bits(run: RunRecord) -> Chart:
    levels = compressor_levels(run)
    beside = ", next to what compressors need for it" if levels else ""
    lines = _evaluated(run, "bits_per_byte", "model")
    caption = f"On held-out text{beside}; lower is better."
    return Chart("Bits per byte", caption, lines, levels, unit="bits a byte", identity="bits")


def _rewards(run: RunRecord) -> Chart:
    lines = [
        Line(name, series(run.train, f"reward_{name}"), style)
        for name, style in (("chosen", "main"), ("rejected", "other"))
    ]
    caption = "How much likelier each answer is than to the reference, times beta: apart is what is learned."
    return Chart("Rewards", caption, lines, unit="nats, times beta", identity="rewards")


def _evaluated(run: RunRecord, key: str, name: str) -> list[Line]:
    """A line for each amount of text scored: figures on different text are not one curve."""
    sizes = list(dict.fromkeys(number(r, "bytes") for r in run.evals))
    lines: list[Line] = []
    for size in sizes:
        points = series([r for r in run.evals if number(r, "bytes") == size], key)
        label = f"{name}, {byte_size(size)}" if len(sizes) > 1 and size else name
        if points:
            lines.append(Line(label, points, "again" if lines else "evaluated"))
    return lines


def _learning_rate(run: RunRecord) -> Chart:
    lines = [Line("learning rate", series(run.train, "learning_rate"))]
    return Chart("Learning rate", "As the schedule sets it.", lines, from_zero=True, identity="rate")


def _gradient(run: RunRecord) -> Chart:
    lines = [Line("gradient norm", series(run.train, "gradient_norm"))]
    caption = "Global norm before clipping. Lasting growth or tall spikes warn of divergence."
    return Chart("Gradient norm", caption, lines, unit="L2 norm", logarithmic=True, identity="gradient")


def _speed(run: RunRecord) -> Chart:
    points = series(run.train, "tokens_per_second")
    finite = [y for _, y in points if math.isfinite(y)]
    caption = f"Tokens a second; the median is {compact(median(finite))}." if finite else ""
    return Chart("Throughput", caption, [Line("throughput", points)], unit="tokens/s", from_zero=True, identity="speed")


def _memory(run: RunRecord) -> Chart:
    points = [(step, size / 1e9) for step, size in series(run.train, "memory_bytes")]
    caption = "Most that the first process has had so far, in GB: of its device, on a CPU of the machine's."
    return Chart("Memory", caption, [Line("memory", points)], unit="GB", from_zero=True, identity="memory")
