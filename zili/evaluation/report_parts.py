"""What the parts of a report say, each empty when the run has nothing for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from statistics import fmean, median
from typing import Any, NamedTuple

from zili.evaluation.report_curves import compressor_levels
from zili.evaluation.run_record import Record, RunRecord, number, section, values
from zili.pages.figures import byte_size, compact, duration, percent
from zili.serving.generate.text_stream import visible


def state(run: RunRecord) -> str:
    """How far the run is."""
    if not run.train:
        return "no step yet"
    if run.planned_steps is None:
        return f"step {run.last_step:,}"
    return "finished" if run.last_step >= run.planned_steps else f"step {run.last_step:,} of {run.planned_steps:,}"


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """What one asks first: figure (or "") and words."""
    start = run.starts[-1] if run.starts else {}
    size = number(section(run.summary, "model"), "parameters") or number(start, "parameters")
    tokens = number(run.train[-1], "tokens") if run.train else None
    place = section(run.summary, "machine").get("name") or start.get("device")
    began = _moment(run.starts[0].get("time")) if run.starts else None
    seconds = wall_seconds(run)
    found = [
        size and (compact(size), "parameters"),
        tokens and (compact(tokens), "tokens read"),
        seconds and (duration(seconds), ""),
        place and ("", str(place)),
        began and ("", f"begun {began:%Y-%m-%d %H:%M}"),
    ]
    return [fact for fact in found if isinstance(fact, tuple)]


def wall_seconds(run: RunRecord) -> float | None:
    """Seconds of the run: the summary's, or the sum of its steps'."""
    told = number(section(run.summary, "timing"), "seconds")
    steps = [number(r, "step_seconds") for r in run.train]
    return told or sum(s for s in steps if s) or None


def _moment(value: Any) -> datetime | None:
    """A record's time: seconds since 1970, or ISO 8601 text."""
    try:
        if isinstance(value, str):
            return datetime.fromisoformat(value).astimezone()
        return datetime.fromtimestamp(float(value)).astimezone()
    except (TypeError, ValueError, OverflowError, OSError):
        return None


class Headline(NamedTuple):
    """Final bits per byte beside the compressors': each with a name, what it has seen, and its figure."""

    ours: float
    verdict: str
    bars: list[tuple[str, str, float]]


def headline(run: RunRecord) -> Headline | None:
    """Figures of the last evaluation."""
    last = next((r for r in reversed(run.evals) if number(r, "bits_per_byte") is not None), None)
    if last is None:
        return None
    ours = number(last, "bits_per_byte") or 0.0
    levels = [(level.name, level.value) for level in compressor_levels(run)]
    bars = [("this model", "has read the training text", ours)]
    bars += [(name, _seen(run, name), value) for name, value in levels]
    return Headline(ours, _verdict(ours, levels, last), bars if levels else [])


def _seen(run: RunRecord, name: str) -> str:
    """What a compressor knew beforehand."""
    entries = [c for c in run.summary["compressors"] if isinstance(c, dict) and c.get("name") == name]
    seen = entries[0].get("seen") if entries else None
    return f"has seen {seen}" if seen else ""


def _verdict(ours: float, levels: Sequence[tuple[str, float]], last: Record) -> str:
    """The comparison in words, to either side."""
    documents, size = number(last, "documents"), number(last, "bytes")
    scope = f"On {documents:,.0f} documents" if documents else "On text"
    scope += f" ({byte_size(size)})" if size else ""
    scope += " kept out of training"
    compared = [
        f"{percent(abs(1 - ours / value))} {'fewer' if ours < value else 'more'}{{}} than {name}"
        for name, value in levels
        if value
    ]
    if not compared:
        return f"{scope}."
    first, *others = [c.format(" bits" if i == 0 else "") for i, c in enumerate(compared)]
    listed = ", ".join([first, *others[:-1]]) + (f" and {others[-1]}" if others else "")
    return f"{scope} it needs {listed}."


Tile = tuple[str, str, str]
"""Name, value, remark."""


def tiles(run: RunRecord) -> Iterator[Tile]:
    """A few figures in boxes."""
    yield from _loss_tiles(run)
    yield from _speed_tiles(run)


def _loss_tiles(run: RunRecord) -> Iterator[Tile]:
    losses, held = values(run.train, "loss"), values(run.evals, "loss")
    if losses:
        last = losses[-max(1, len(losses) // 40) :]
        remark = f"mean of the last {len(last)} records" if len(last) > 1 else "last record"
        yield "Training loss", f"{fmean(last):.3f}", remark
    if held:
        right = number(run.evals[-1], "reward_accuracy")
        perplexity = f"perplexity {compact(math.exp(min(held[-1], 50)))} a token"
        remark = perplexity if right is None else f"{right:.1%} of pairs preferred as chosen"
        yield "Held-out loss", f"{held[-1]:.3f}", remark


def _speed_tiles(run: RunRecord) -> Iterator[Tile]:
    speeds, shares = values(run.train, "tokens_per_second"), values(run.train, "matmul_share")
    waited, total = values(run.train, "data_seconds"), values(run.train, "step_seconds")
    if speeds:
        yield "Throughput", compact(median(speeds)), "tokens a second, median"
    if shares:
        yield "Share of matmul peak", percent(median(shares)), "of the rate measured on this machine"
    if waited and sum(total):
        yield "Waiting for data", percent(sum(waited) / sum(total)), "of the steps' time"
    if had := values(run.train, "memory_bytes"):
        yield "Memory", byte_size(max(had)), "at most, of the first process"


def evaluations(run: RunRecord) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for every evaluation: the chart's values for those who want or need numbers."""
    columns = {name: of for name, of in _EVALUATED.items() if any(number(r, of[0]) is not None for r in run.evals)}
    rows = [[f"{r['step']:,.0f}", *(_figure(r, key, form) for key, form in columns.values())] for r in run.evals]
    return ["Step", *columns], rows


_EVALUATED = {
    "Tokens read": ("tokens", ",.0f"),
    "Bits per byte": ("bits_per_byte", ".4f"),
    "Loss": ("loss", ".4f"),
    "Preferred as chosen": ("reward_accuracy", ".1%"),
    "Documents": ("documents", ",.0f"),
    "Bytes": ("bytes", ",.0f"),
}


def _figure(record: Record, key: str, form: str) -> str:
    value = number(record, key)
    return "–" if value is None else format(value, form)


class DrawnText(NamedTuple):
    """A text the model wrote, how it was drawn, and the prompt before it."""

    how: str
    prompt: str
    text: str


def samples(run: RunRecord) -> list[list[DrawnText]]:
    """What the model wrote, of each prompt and seed the newest first."""
    prompts: dict[tuple[str, Any], list[Record]] = {}
    for sample in run.samples:
        if isinstance(sample.get("text"), str):
            prompts.setdefault((str(sample.get("prompt") or ""), number(sample, "seed")), []).append(sample)
    return [_newest_first(drawn) for drawn in prompts.values()]


def _newest_first(drawn: list[Record]) -> list[DrawnText]:
    oldest_first = sorted(drawn, key=lambda s: number(s, "step") or 0)
    return [
        DrawnText(_drawn_how(s), visible(str(s.get("prompt") or "")), visible(s["text"]))
        for s in reversed(oldest_first)
    ]


def _drawn_how(sample: Record) -> str:
    step, temperature, seed = (number(sample, key) for key in ("step", "temperature", "seed"))
    found = [
        f"step {step:,.0f}" if step is not None else "",
        f"temperature {temperature:g}" if temperature is not None else "",
        f"seed {seed:.0f}" if seed is not None else "",
    ]
    return " · ".join(part for part in found if part) or "sample"


def choices(run: RunRecord) -> list[list[str]]:
    """What was chosen for the user, and why: setting, value, reason."""
    listed = run.summary.get("choices")
    entries = [c for c in listed if isinstance(c, dict)] if isinstance(listed, list) else []
    return [[str(c.get("name", "")), _plain("", c.get("value", "")), str(c.get("reason", ""))] for c in entries]


def details(run: RunRecord) -> dict[str, list[tuple[str, str]]]:
    """The summary's tables as they are: name, and rows of key and value."""
    tables = {name.capitalize(): section(run.summary, name) for name in ("model", "data", "timing", "machine")}
    rows = {
        name: [(_label(str(key)), _plain(str(key), value)) for key, value in table.items() if value is not None]
        for name, table in tables.items()
    }
    return {name: listed for name, listed in rows.items() if listed}


def _label(key: str) -> str:
    """A key as words; the unit it ends in stands with the value."""
    return key.removesuffix("_seconds").removesuffix("_bytes").replace("_", " ")


def _plain(key: str, value: Any) -> str:
    """A value of a summary as people read it."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(str(k), v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(key, v) for v in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and math.isfinite(value):
        return _measured(key, value)
    return visible(str(value))


def _measured(key: str, value: float) -> str:
    """A number with the unit its key ends in."""
    for unit, form in (("seconds", duration), ("bytes", byte_size), ("share", percent)):
        if key.endswith(unit):
            return form(value)
    return f"{value:,}" if isinstance(value, int) else compact(value, 4)
