"""Predictions for a table of published runs: `zili plan --runs`."""

from __future__ import annotations

import csv
import io

from zili.chips.catalog import Chip
from zili.planning.fitted.published import Row, Unpredictable, read_row
from zili.planning.fitted.published_memory import memory_gib
from zili.planning.fitted.rates import band_of, families, rates_of
from zili.planning.fitted.step_time import step_time

COLUMNS = (
    *("pred_step_time_s", "pred_tokens_per_s_per_chip", "pred_memory_GB", "pred_mfu_uniform_pct"),
    *("pred_low", "pred_high", "status"),
)
"""Behind the table's own: seconds of a step; what nine of ten published runs were within; and what was assumed, or why
there is no prediction. Memory is in the row's own unit, GiB where it says nothing."""


def predict_table(text: str, chip: Chip | None = None) -> tuple[str, str]:
    """The table with `COLUMNS` behind its own, and a line that says how many rows were predicted. No row fails."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    reader = csv.DictReader(io.StringIO(text.replace("\0", "")), restkey="more", restval="")
    names = [name for name in reader.fieldnames or () if name not in COLUMNS]
    out = io.StringIO()
    writer = csv.DictWriter(out, [*names, *COLUMNS], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    count = done = 0
    for cells in reader:
        predicted = _predicted({key: value for key, value in cells.items() if isinstance(value, str)}, chip)
        writer.writerow({**cells, **predicted})
        count, done = count + 1, done + bool(predicted["pred_step_time_s"])
    return out.getvalue(), f"{done} of {count} rows predicted"


def _predicted(cells: dict[str, str], chip: Chip | None) -> dict[str, str]:
    blank = dict.fromkeys(COLUMNS, "")
    try:
        row = read_row(cells, chip)
        return blank | _figures(row, cells.get("memory_def") or "")
    except Unpredictable as reason:
        return blank | {"status": f"not predicted: {reason}"}
    except (ArithmeticError, ValueError) as error:
        # Figures that make no sense together, such as sizes beyond what numbers hold: said, like any other.
        return blank | {"status": f"not predicted: {type(error).__name__}: {error}"}


def _figures(row: Row, definition: str) -> dict[str, str]:
    run, family = row.run, row.chip.family
    seconds = step_time(run, row.machine, rates_of(family)).total
    band = band_of(run, family)
    memory = memory_gib(run, definition) * (2**30 / 1e9 if definition.startswith("GB ") else 1.0)
    peak = row.peak_tflops or row.machine.lowered_peak / 1e12
    utilisation = 100 * run.model_flops / run.chips / seconds / peak / 1e12
    known = [] if family in families() else [f"no published runs on {row.chip.name} or its like: a wide band"]
    numbers = (seconds, run.tokens / run.chips / seconds, memory, utilisation, seconds * band.low, seconds * band.high)
    texts = [f"{number:.5g}" for number in numbers]
    said = "; ".join([*row.assumed, *known])
    return dict(zip(COLUMNS, [*texts, f"predicted ({said})" if said else "predicted"], strict=True))
