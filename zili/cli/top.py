"""`zili top`: a run in the terminal, while it goes or when it has ended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from zili.cli.options import finite
from zili.errors import DataError
from zili.evaluation.run_record import number, values
from zili.pages.figures import compact, duration, percent
from zili.plurals import counted
from zili.serving.generate.text_stream import visible
from zili.supervision.account import WORDS
from zili.supervision.standing import Standing, age

_MARKS = (("█", "#", "green"), ("▓", "=", "cyan"), ("▒", "+", "yellow"), ("░", "-", "magenta"), ("·", ".", "white"))
"""Parts of the bar: as letters, as plain letters, and the colour where there are colours."""
_HAPPENED = 8
_NAMES, _GAP = 11, 2
"""Columns of the names, and between them and what follows."""
_SILENT = 60.0
"""Seconds without news that are never worth a word; ten steps without any are."""


def top(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder, such as runs/quickstart.")],
    once: Annotated[bool, typer.Option("--once", help="Print one picture and end.")] = False,
    every: Annotated[float, typer.Option(min=0.1, callback=finite, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Show where a run stands: step, loss, speed, where the time went, who is slow and what happened last. Everything
    comes from the files of its folder, so that any machine which sees them can look. Ctrl-C ends the looking."""
    standing, to = Standing(run), Console()
    if not standing.is_a_run:
        raise DataError(f"{run} is not a run: give the folder that `zili train` or `zili launch` made")
    try:
        if once or not to.is_terminal:
            _print(standing, to, None if once else every)
        else:
            _follow(standing, to, every)
    except KeyboardInterrupt:
        pass


def _print(standing: Standing, to: Console, every: float | None) -> None:
    """One picture, or one each time that `every` seconds have passed, until the run is over."""
    while True:
        standing.look()
        with to.capture() as drawn:
            to.print(picture(standing, to, whole=True))
        to.out("\n".join(line.rstrip() for line in drawn.get().splitlines()), highlight=False)
        if every is None or is_over(standing):
            return
        to.print()
        time.sleep(every)


def _follow(standing: Standing, to: Console, every: float) -> None:
    with Live(console=to, auto_refresh=False) as live:
        while True:
            standing.look()
            live.update(picture(standing, to, whole=is_over(standing)), refresh=True)
            if is_over(standing):
                return
            time.sleep(every)


def is_over(standing: Standing) -> bool:
    """Whether no more will come: supervised runs say so, others have done their steps."""
    if standing.account is not None and standing.account.lives:
        return standing.account.code is not None
    return standing.planned is not None and standing.last.get("step", 0) >= standing.planned


def picture(standing: Standing, to: Console, *, whole: bool) -> RenderableType:
    """The run as it stands. `whole`: no line is cut."""
    rows = {
        "run": Text(_run(standing), style="bold"),
        "loss": Text(_loss(standing)),
        "speed": Text(_speed(standing)),
        "checkpoint": Text(_checkpoint(standing)),
        "processes": Text(_processes(standing)),
        "slow": Text(_slow(standing), style="yellow"),
        "time": _time(standing, to),
        "left out": Text("; ".join(f"machine {name} {why}" for name, why in standing.state.left_out.items())),
        "unread": Text(_unread(standing), style="red"),
    }
    table = Table.grid(padding=(0, _GAP))
    table.add_column(style="dim", width=_NAMES, no_wrap=True)
    table.add_column()
    for name, text in rows.items():
        if text:
            if isinstance(text, Text):
                text.plain = visible(text.plain)
            table.add_row(name, text)
    room = _HAPPENED if whole else max(1, min(_HAPPENED, to.height - len(rows) - 4))
    for place, (when, said) in enumerate(standing.happened[-room:]):
        line = Text(f"{_clock(when)}  {' '.join(visible(said).split())}")
        line.no_wrap, line.overflow = not whole, "fold" if whole else "ellipsis"
        table.add_row("happened" if place == 0 else "", line)
    return Group(table)


def _run(standing: Standing) -> str:
    last, planned = int(number(standing.last or standing.start, "step") or 0), standing.planned
    share = f" of {planned:,} ({percent(last / planned)})" if planned else ""
    found = [standing.run.resolve().name, f"step {last:,}{share}", _state(standing), _left(standing)]
    return " · ".join(filter(None, found))


def _state(standing: Standing) -> str:
    found, steps = standing.account, standing.steps
    if found is not None and found.code is not None:
        return "finished" if found.code == 0 else f"ended with exit code {found.code}"
    if is_over(standing):
        return "finished"
    life = f"life {found.lives[-1].number}" if found is not None and found.lives else ""
    if not steps:
        return f"{life}, no step yet".removeprefix(", ")
    silent = age(steps[-1]["time"])
    if silent > max(_SILENT, 10 * (number(steps[-1], "step_seconds") or 0.0)):
        return f"{life}, no step for {duration(silent)}".removeprefix(", ")
    return life


def _left(standing: Standing) -> str:
    """Time that is left, by the pace between records."""
    if standing.planned is None or is_over(standing):
        return ""
    paces = [
        (after["time"] - before["time"]) / (after["step"] - before["step"])
        for before, after in pairwise(standing.steps)
        if after["step"] > before["step"]
    ]
    pace = median(paces) if paces else 0.0
    # A clock that went back gives none.
    return f"{duration((standing.planned - standing.last['step']) * pace)} left" if pace > 0 else ""


def _loss(standing: Standing) -> str:
    last, held_out = standing.last, standing.evaluation
    found = [_figure(last, "loss", "{:.4f}"), _figure(last, "gradient_norm", "gradient norm {:.3g}")]
    found.append(_figure(last, "learning_rate", "learning rate {:.2e}"))
    bits = _figure(held_out, "bits_per_byte", "{:.3f} bits/byte") or _figure(held_out, "loss", "{:.4f}")
    if bits:
        found.append(f"held out {bits} (step {held_out['step']:,})")
    return " · ".join(filter(None, found))


def _speed(standing: Standing) -> str:
    last = standing.last
    found = [_figure(last, "tokens_per_second", "{:,.0f} tokens/s")]
    found.append(_figure(last, "matmul_share", "{:.0%} of matmul peak"))
    found.append(_figure(last, "step_seconds", "{:.3g} s a step"))
    step, waited, tokens = (number(last, key) for key in ("step_seconds", "data_seconds", "tokens"))
    if step and waited and waited > step / 100:
        found.append(f"{percent(waited / step)} of it waiting for data")
    return " · ".join(filter(None, [*found, f"{compact(tokens)} tokens read" if tokens else ""]))


def _checkpoint(standing: Standing) -> str:
    newest = standing.checkpoint()
    if newest is None:
        return "none yet" if standing.steps else ""
    took = _figure(standing.saved, "seconds", " · took {:.2g} s")
    return f"step {newest[0]:,}, {duration(age(newest[1]))} ago{took}"


def _processes(standing: Standing) -> str:
    """Who is slow."""
    slowest, usual = standing.progress.get("slowest"), standing.progress.get("step_seconds")
    if not slowest or not usual:
        return ""
    one = slowest[0]
    who = f"process {one['rank']} on {one['machine']}"
    waits = f", {one['data_seconds']:.2g} s of it waiting for data" if one["data_seconds"] > usual / 10 else ""
    return f"{usual:.3g} s a step is usual · longest {one['step_seconds']:.3g} s: {who}{waits}"


def _slow(standing: Standing) -> str:
    """Whom the run itself has found slow."""
    found = [
        f"{one.get('place', f'process {rank}')} in {phase}"
        + _figure(one, "seconds", ": {:.3g} s a step")
        + _figure(one, "median", ", where the median is {:.3g} s")
        for (rank, phase), one in standing.stragglers.found.items()
    ]
    return "; ".join(found[:_HAPPENED])


def _time(standing: Standing, to: Console) -> RenderableType:
    """Where the time went: a share, a bar and what its parts are."""
    found = standing.account
    if found is not None and found.lives:
        restarts = counted(sum(life.failed for life in found.lives), "restart")
        seconds = {WORDS[name]: abs(size) for name, size in found.seconds.items() if name != "idle"}
        said = f"{found.share:.1%} of {duration(found.wall - found.idle)} trained · {restarts}"
    else:
        seconds = _of_steps(standing)
        said = f"of the last {counted(len(standing.steps), 'record')}"
    whole = sum(seconds.values())
    if not whole:
        return Text()
    ranked = sorted(seconds.items(), key=lambda one: -one[1])
    parts = [*ranked[: len(_MARKS) - 1], ("rest", sum(size for _, size in ranked[len(_MARKS) - 1 :]))]
    return Group(Text(said), *_bar([(name, size / whole) for name, size in parts if size], to))


def _of_steps(standing: Standing) -> dict[str, float]:
    steps = list(standing.steps)
    waited = sum(values(steps, "data_seconds"))
    return {"step": max(0.0, sum(values(steps, "step_seconds")) - waited), "data wait": waited}


def _bar(parts: list[tuple[str, float]], to: Console) -> Iterator[Text]:
    """The bar, as wide as there is room, and its legend."""
    room = max(10, to.width - _NAMES - 2 * _GAP)
    bar, legend, drawn, passed = Text(no_wrap=True, overflow="crop"), Text(), 0, 0.0
    entries = []
    for (name, share), (mark, letter, colour) in zip(parts, _MARKS, strict=False):
        passed += share
        sign, until = letter if to.options.ascii_only else mark, round(room * min(passed, 1.0))
        bar.append(sign * (until - drawn), style=colour)
        drawn = until
        entries.append(Text.assemble((sign, colour), f" {name} {percent(share)}"))
    yield bar
    for entry in entries:  # an entry is never cut in two
        if legend and legend.cell_len + 2 + entry.cell_len > room:
            yield legend
            legend = Text()
        legend = Text.assemble(legend, "  " if legend else "", entry)
    yield legend


def _unread(standing: Standing) -> str:
    broken = f"{counted(standing.broken, 'line')} of its files are no whole record and are left out"
    return "; ".join([*([broken] if standing.broken else []), *filter(None, [standing.unread])])


def _figure(record: Mapping[str, Any], key: str, form: str) -> str:
    value = number(dict(record), key)
    return "" if value is None else form.format(value)


def _clock(when: float) -> str:
    """The hour today; the day too where it was another one."""
    then = time.localtime(when)
    same = then[:3] == time.localtime()[:3]
    return time.strftime("%H:%M:%S" if same else "%m-%d %H:%M:%S", then)
