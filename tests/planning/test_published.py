"""The model of time on published runs: what it was fitted to, and rows that make no sense."""

from __future__ import annotations

import csv
import io
from math import exp, log
from pathlib import Path
from statistics import mean, median

import pytest

from zili.planning.fitted.published import Unpredictable, read_row
from zili.planning.fitted.published_memory import memory_gib
from zili.planning.fitted.rates import band_of, families, rates_of
from zili.planning.fitted.runs import COLUMNS, predict_table
from zili.planning.fitted.step_time import step_time

RUNS = Path(__file__).parents[2] / "benchmarks" / "planner" / "published_runs.csv"
"""Published training runs, each row with its source."""
ROW = {
    "id": "one", "model": "Llama2-7B", "layers": "32", "hidden": "4096", "ffn_hidden": "11008", "heads": "32",
    "kv_heads": "32", "vocab": "32000", "seq_len": "4096", "chip": "A100-80G-SXM", "chips": "8", "TP": "1", "PP": "1",
    "global_batch_seqs": "64", "micro_batch": "1", "precision": "bf16",
}  # fmt: skip


def table(*rows: dict[str, str]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(ROW) + sorted({key for row in rows for key in row} - set(ROW)))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def predicted(**cells: str) -> dict[str, str]:
    text, _ = predict_table(table({**ROW, **cells}))
    return next(csv.DictReader(io.StringIO(text)))


def test_it_explains_what_it_was_fitted_to() -> None:
    """A fit's own rows: cross-validated errors are the fit's to say (benchmarks/planner/fit.py)."""
    errors, inside, memory = [], [], []
    for cells in csv.DictReader(RUNS.open(encoding="utf-8")):
        try:
            row = read_row(cells)
        except Unpredictable:
            continue
        if row.seconds is not None and row.chip.family in families():
            error = log(step_time(row.run, row.machine, rates_of(row.chip.family)).total / row.seconds)
            band = band_of(row.run, row.chip.family)
            errors.append(abs(exp(error) - 1))
            inside.append(band.low <= exp(-error) <= band.high)
        if cells["memory_GB_per_chip"].replace(".", "").isdigit():
            said = memory_gib(row.run, cells["memory_def"])
            memory.append(abs(said / float(cells["memory_GB_per_chip"]) - 1))
    assert len(errors) > 230
    assert median(errors) < 0.07
    assert mean(errors) < 0.11
    assert sum(inside) >= 0.9 * len(inside)
    assert len(memory) > 35
    assert median(memory) < 0.08


def test_a_row_is_predicted() -> None:
    found = predicted()
    assert found["status"] == "predicted"
    # 65 to 45 % of the peak: any sane training of this model on this chip.
    assert 45 < float(found["pred_mfu_uniform_pct"]) < 65
    assert float(found["pred_low"]) < float(found["pred_step_time_s"]) < float(found["pred_high"])
    tokens = float(found["pred_tokens_per_s_per_chip"]) * float(found["pred_step_time_s"]) * 8
    assert tokens == pytest.approx(64 * 4096, rel=1e-3)


@pytest.mark.parametrize(
    ("cells", "why"),
    [
        ({"layers": "-3"}, "layers is '-3'"),
        ({"layers": ""}, "layers is missing"),
        ({"layers": "1e30"}, "more than makes sense"),
        ({"hidden": "nan"}, "hidden is 'nan'"),
        ({"seq_len": "2048.5"}, "not a whole number"),
        ({"chip": "FooChip"}, "not in the catalog"),
        ({"chip": ""}, "chip is missing"),
        ({"chip": "mlu590"}, "peak of mlu590 is not published"),
        ({"kv_heads": "7"}, "not a multiple of kv_heads"),
        ({"TP": "3"}, "does not divide 8 chips"),
        ({"chips": "0"}, "chips is '0'"),
    ],
)
def test_what_cannot_be_predicted_says_why(cells: dict[str, str], why: str) -> None:
    found = predicted(**cells)
    assert found["status"].startswith("not predicted: ")
    assert why in found["status"]
    assert not found["pred_step_time_s"]


def test_a_peak_that_is_given_is_taken_and_an_unknown_chip_is_less_certain() -> None:
    given = predicted(chip="mlu590", peak_tflops_assumed="300")
    known = predicted()
    assert given["status"].startswith("predicted (")
    assert "wide band" in given["status"]
    width = [float(row["pred_high"]) / float(row["pred_low"]) for row in (given, known)]
    assert width[0] > 1.5 * width[1]


def test_no_table_makes_it_fail() -> None:
    for text in ("", "\n", "a,b\n1\n1,2,3,4\n", 'chip,layers\n"x', "chip\n\0\0\n", ",,,\n,,,\n"):
        out, _ = predict_table(text)
        assert out.splitlines()[0].endswith(",".join(COLUMNS))


def test_which_way_things_go() -> None:
    """More of what costs costs more."""
    base = float(predicted()["pred_step_time_s"])
    assert float(predicted(recompute="full")["pred_step_time_s"]) > 1.2 * base
    assert float(predicted(chip="H100-SXM")["pred_step_time_s"]) < 0.6 * base
    assert float(predicted(chips="16")["pred_step_time_s"]) < base
    assert float(predicted(seq_len="8192")["pred_step_time_s"]) > 2 * base
    assert float(predicted(notes="4x100Gb RoCE", chips="64")["pred_step_time_s"]) > float(
        predicted(chips="64")["pred_step_time_s"]
    )
