"""The parts of a report as HTML, each "" when the run has nothing for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from html import escape
from statistics import fmean, median
from typing import Any

from zili.evaluation.figures import byte_size, compact, duration, percent
from zili.evaluation.report_curves import compressor_levels
from zili.evaluation.run_record import Record, RunRecord, number, section, values
from zili.serving.generate.text_stream import visible

SAMPLES_SHOWN = 6
"""Samples shown in full; the same one from earlier steps is folded under each."""


def header(run: RunRecord) -> str:
    """Name, state, and the facts one asks first."""
    facts = "".join(f"<span>{fact}</span>" for fact in _facts(run))
    return f"""<header>
<div class="seal" lang="zh" aria-hidden="true">自立</div>
<div><p class="eyebrow">Zili training run{_state(run)}</p>
<h1>{escape(run.name)}</h1>
<div class="facts">{facts}</div></div>
</header>"""


def _state(run: RunRecord) -> str:
    if not run.train:
        text = "no step yet"
    elif run.planned_steps is None:
        text = f"step {run.last_step:,}"
    elif run.last_step >= run.planned_steps:
        text = "finished"
    else:
        text = f"step {run.last_step:,} of {run.planned_steps:,}"
    return f'<span class="state">{text}</span>'


def _facts(run: RunRecord) -> list[str]:
    start = run.starts[-1] if run.starts else {}
    size = number(section(run.summary, "model"), "parameters") or number(start, "parameters")
    tokens = number(run.train[-1], "tokens") if run.train else None
    machine = section(run.summary, "machine")
    place = machine.get("name") or start.get("device")
    began = _moment(run.starts[0].get("time")) if run.starts else None
    seconds = wall_seconds(run)
    found = [
        f"<b>{compact(size)}</b> parameters" if size else "",
        f"<b>{compact(tokens)}</b> tokens read" if tokens else "",
        f"<b>{escape(duration(seconds))}</b>" if seconds else "",
        escape(str(place)) if place else "",
        f"begun {began:%Y-%m-%d %H:%M}" if began else "",
    ]
    return [fact for fact in found if fact]


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


def notes(run: RunRecord) -> str:
    """What a reader must know before reading on."""
    items = "".join(f"<li>{escape(visible(note))}</li>" for note in run.notes)
    return f'<ul class="notes" role="note">{items}</ul>' if items else ""


def headline(run: RunRecord) -> str:
    """Final bits per byte, large, beside the compressors as bars from zero."""
    last = next((r for r in reversed(run.evals) if number(r, "bits_per_byte") is not None), None)
    if last is None:
        return ""
    ours = number(last, "bits_per_byte") or 0.0
    levels = compressor_levels(run)
    widest = max([ours, *(level.value for level in levels)]) or 1.0
    bars = _bar("this model", "has read the training text", ours, widest, "ours")
    bars += "".join(_bar(c.name, _seen(run, c.name), c.value, widest, "theirs") for c in levels)
    right = f'<div><ol class="bars">{bars}</ol><p class="fine">{_FINE}</p></div>' if levels else ""
    return f"""<section class="headline{"" if levels else " lone"}">
<div><p class="big">{ours:.3f}</p><p class="unit">bits per byte of held-out text</p>
<p class="verdict">{escape(_verdict(ours, [(c.name, c.value) for c in levels], last))}</p></div>
{right}
</section>"""


_FINE = "Lower is better. Neither the size of the model nor that of the compressors is counted."


def _bar(name: str, seen: str, value: float, widest: float, kind: str) -> str:
    # 78 %: the figure stands to the right of the longest bar.
    return (
        f'<li class="{kind}"><span>{escape(name)}<small>{escape(seen)}</small></span><span class="track">'
        f'<span class="bar" style="width:{78 * value / widest:.1f}%"></span><b>{value:.3f}</b></span></li>'
    )


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


def tiles(run: RunRecord) -> str:
    """A few figures in boxes."""
    boxes = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(remark)}</small></dd></div>'
        for name, value, remark in [*_loss_tiles(run), *_speed_tiles(run)]
    )
    return f'<dl class="tiles">{boxes}</dl>' if boxes else ""


Tile = tuple[str, str, str]
"""Name, value, remark."""


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


def evaluations(run: RunRecord) -> str:
    """Every evaluation as a table, folded: the chart's values for those who want or need numbers."""
    if not run.evals:
        return ""
    columns = {name: of for name, of in _EVALUATED.items() if any(number(r, of[0]) is not None for r in run.evals)}
    rows = [[f"{r['step']:,.0f}", *(_figure(r, key, form) for key, form in columns.values())] for r in run.evals]
    return (
        f'<details class="fold"><summary>Evaluations as a table ({len(rows)})</summary>'
        f"{plain_table(['Step', *columns], rows)}</details>"
    )


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


def plain_table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of figures; its text is escaped."""
    top = "".join(f'<th scope="col" class="figure">{escape(name)}</th>' for name in head)
    body = "".join(
        "<tr>" + "".join(f'<td class="figure">{escape(cell)}</td>' for cell in row) + "</tr>" for row in rows
    )
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def samples(run: RunRecord) -> str:
    """What the model wrote: the newest of each prompt and seed, earlier ones folded under it."""
    prompts: dict[tuple[str, Any], list[Record]] = {}
    for sample in run.samples:
        if isinstance(sample.get("text"), str):
            prompts.setdefault((str(sample.get("prompt") or ""), number(sample, "seed")), []).append(sample)
    if not prompts:
        return ""
    blocks = [_sample(drawn) for drawn in list(prompts.values())[:SAMPLES_SHOWN]]
    more = len(prompts) - len(blocks)
    rest = f'<p class="fine">{more} more samples are in samples.jsonl.</p>' if more > 0 else ""
    lead = "What the model writes on its own. The prompt it was given is marked; the rest is the model's."
    return f'<section><h2>Samples</h2><p class="lead">{lead}</p>{"".join(blocks)}{rest}</section>'


def _sample(drawn: list[Record]) -> str:
    drawn = sorted(drawn, key=lambda s: number(s, "step") or 0)
    earlier = "".join(
        f"<details><summary>{escape(_drawn_how(s))}</summary>{_text(s)}</details>" for s in reversed(drawn[:-1])
    )
    return f'<article class="sample"><p>{escape(_drawn_how(drawn[-1]))}</p>{_text(drawn[-1])}{earlier}</article>'


def _drawn_how(sample: Record) -> str:
    step, temperature, seed = (number(sample, key) for key in ("step", "temperature", "seed"))
    found = [
        f"step {step:,.0f}" if step is not None else "",
        f"temperature {temperature:g}" if temperature is not None else "",
        f"seed {seed:.0f}" if seed is not None else "",
    ]
    return " · ".join(part for part in found if part) or "sample"


def _text(sample: Record) -> str:
    prompt, text = str(sample.get("prompt") or ""), str(sample["text"])
    shown = f'<span class="prompt">{escape(visible(prompt))}</span>' if prompt else ""
    body = escape(visible(text)) if text else '<span class="empty">(nothing: the model ended the text)</span>'
    return f'<pre tabindex="0">{shown}{body}</pre>'


def choices(run: RunRecord) -> str:
    """What was chosen for the user, and why."""
    listed = run.summary.get("choices")
    entries = [c for c in listed if isinstance(c, dict)] if isinstance(listed, list) else []
    rows = "".join(
        f'<tr><th scope="row">{escape(str(c.get("name", "")))}</th>'
        f'<td class="value">{escape(_plain("", c.get("value", "")))}</td>'
        f"<td>{escape(str(c.get('reason', '')))}</td></tr>"
        for c in entries
    )
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Setting", "Value", "Why"))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    lead = "Settings the recipe left open. Each can be set with <code>--set</code>."
    return (
        f'<section><h2>Chosen automatically</h2><p class="lead">{lead}</p>'
        f'<div class="scroll stack" tabindex="0">{table}</div></section>'
    )


def details(run: RunRecord) -> str:
    """The summary's tables as they are, and the recipe."""
    groups = "".join(_group(name, section(run.summary, name)) for name in ("model", "data", "timing", "machine"))
    recipe = (
        '<details class="fold"><summary>The resolved recipe (recipe.toml)</summary>'
        f'<pre tabindex="0">{escape(visible(run.recipe))}</pre></details>'
        if run.recipe
        else ""
    )
    if not groups and not recipe:
        return ""
    return f'<section><h2>Details</h2><div class="groups">{groups}</div>{recipe}</section>'


def _group(name: str, table: Record) -> str:
    rows = "".join(
        f"<dt>{escape(_label(str(key)))}</dt><dd>{escape(_plain(str(key), value))}</dd>"
        for key, value in table.items()
        if value is not None
    )
    return f'<div class="group"><h3>{escape(name.capitalize())}</h3><dl>{rows}</dl></div>' if rows else ""


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


def commands(listed: Iterable[tuple[str, str]]) -> str:
    """What to do next, as command lines."""
    items = "".join(f"<li><span>{escape(purpose)}</span><code>{escape(line)}</code></li>" for line, purpose in listed)
    return f'<section><h2>Next</h2><ul class="commands">{items}</ul></section>'
