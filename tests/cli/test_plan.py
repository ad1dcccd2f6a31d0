"""`zili plan` as a user runs it."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from outcome import Zili

from zili.chips.catalog import find_chip
from zili.config import load_recipe
from zili.config.presets import load_preset
from zili.parallel.layout import lay_out
from zili.planning.exact.job import Job
from zili.planning.exact.memory import Peaks
from zili.planning.fitted.machine import machine
from zili.planning.fitted.rates import rates_of
from zili.planning.search.goodput import Failures
from zili.planning.search.layouts import TIE, _options, _Room
from zili.planning.search.plan import Setting, make_plan, setting_config, usual_batch

SMALL = ("telechat2-3b", "--chip", "ascend-910b2", "--chips", "16", "--tokens", "1e11", "--global-batch", "256")


def test_it_finds_layouts_that_fit_and_says_all_that_was_asked(zili: Zili, tmp_path: Path) -> None:
    page, recipe = tmp_path / "p.html", tmp_path / "p.toml"
    wanted = ("--price", "2", "--page", page, "--write", recipe, "--compare", "a800,h20:8,mlu590")
    found, told = zili("plan", *SMALL, *wanted), zili("plan", *SMALL, *wanted, "--json")
    assert found.code == told.code == 0, found.err + told.err
    for text in ("tokens/s", "MFU: 6 N", "memory: ", "time: products", "chip-hours", "estimate", "a checkpoint"):
        assert text in found.out
    assert "the peak of mlu590 is not published" in found.out
    plan = json.loads(told.out)
    assert "the peak of mlu590 is not published" in told.err, "JSON stands alone"
    best = plan["layouts"][0]
    low, high = best["step_seconds_band"]
    assert low < best["step_seconds"] < high
    assert best["step_seconds"] == pytest.approx(sum(best["seconds_by_part"].values()))
    assert best["memory_bytes"] == pytest.approx(sum(best["memory_bytes_by_part"].values()))
    assert best["memory_bytes"] < 64e9
    assert plan["cost"] == pytest.approx(2 * plan["chip_hours"])
    days = 1e11 / best["tokens_per_s"] / plan["goodput"]["share"] / 86_400
    assert plan["days"] == pytest.approx(days)
    assert plan["spare_chips"] == 1 and plan["chip_hours"] == pytest.approx(24 * days * 17)
    assert [one["chip"] for one in plan["compared"]] == ["ascend-910b2", "a800", "h20"]
    assert plan["compared"][2]["chips"] == 8
    text = page.read_text(encoding="utf-8")
    assert "Where the time of a step goes" in text and 'class="strip"' in text and "Why not another" in text
    # What is written can be run: it divides, and is what was said.
    config = load_recipe(recipe)
    layout, written = lay_out(config, 16), plan["chosen"]
    assert (layout.tensor, layout.pipeline) == (written["layout"]["tensor"], written["layout"]["pipeline"])
    assert best["step_seconds"] <= written["step_seconds"] <= (1 + TIE) * best["step_seconds"]
    places = [sum(Peaks(Job(config, layout)).at(place).values()) for place in range(layout.pipeline)]
    assert max(places) == pytest.approx(written["memory_bytes"])
    assert config.training.steps * 256 * 4096 == pytest.approx(1e11, rel=0.01)


@pytest.mark.parametrize("preset", ["telechat2-115b", pytest.param("zili-1t-a32b", marks=pytest.mark.slow)])
def test_ten_thousand_chips_are_searched_in_seconds(zili: Zili, preset: str) -> None:
    """Five seconds on two quiet cores were asked for; the machine that tests may be slower."""
    started = time.process_time()
    found = zili("plan", preset, "--chip", "ascend-910b2", "--chips", "10240")
    assert found.code == 0, found.err
    assert time.process_time() - started < 20


@pytest.mark.parametrize("chips", [384, 1000])
def test_what_is_found_can_be_run_and_fits_everywhere(chips: int) -> None:
    """Each place of each pipeline, and the trainer's own rules."""
    config = setting_config(load_preset("telechat3-36b"), 4096, usual_batch(chips, 4096), 1e12, "x")
    plan = make_plan(Setting(config, 1e12, Failures()), find_chip("ascend-910b2"), chips)
    for candidate in plan.found.best:
        assert lay_out(candidate.config, chips) == candidate.layout
        for place in range(candidate.layout.pipeline):
            taken = sum(Peaks(Job(candidate.config, candidate.layout)).at(place).values())
            assert taken <= min(candidate.bytes * (1 + 1e-9), 0.94 * 64e9)


@pytest.mark.parametrize(("preset", "chips"), [("telechat2-115b", 2048), ("telechat3-105b-a4.7b", 384)])
def test_what_is_left_out_unseen_would_not_have_fitted(preset: str, chips: int) -> None:
    """The search's quick bound of memory is below what the walk through a step gives, within the walk's own error."""
    config = setting_config(load_preset(preset), 4096, 768 if chips == 384 else 1024, 1e12, "x")
    chip = find_chip("ascend-910b2")
    place, rates = machine(chip), rates_of(chip.family)
    every = [one for one in _options(config, chips, place, rates) if one.run.micro_batches <= 300]
    room = _Room(config, place, rates)
    for option in random.Random(3).sample(every, 40):
        candidate = option.candidate(config, place)
        assert room.least(option) <= 1.03 * candidate.bytes, option.alike
        assert candidate.run == option.run, "the recipe is of the very sizes that were looked at"


def test_predicting_the_token_after_the_next_costs() -> None:
    config = setting_config({**load_preset("telechat2-3b"), "mtp_layers": 1}, 4096, 256, 1e12, "x")
    plain = config.model_copy(update={"model": config.model.model_copy(update={"mtp_layers": 0})})
    steps = [
        make_plan(Setting(one, 1e12, Failures()), find_chip("ascend-910b2"), 16).best.time.total
        for one in (config, plain)
    ]
    assert steps[0] > 1.05 * steps[1]


def test_a_given_layout(zili: Zili) -> None:
    layout = "tensor=2 pipeline=2 schedule=interleaved micro_batch=1 recompute=full"
    found = zili("plan", *SMALL, "--layout", layout)
    assert found.code == 0, found.err
    assert "1: pipeline 2 x shards 4 x tensor 2, interleaved of 2 stages" in found.out


def test_a_recipe_s_own_layout(zili: Zili) -> None:
    recipes = Path(__file__).parents[2] / "recipes"
    words = ("--chip", "ascend-910b2", "--chips", "10240", "--layout", "recipe")
    found = zili("plan", recipes / "telechat2-115b-10240.toml", *words)
    assert found.code == 0, found.err
    assert "pipeline 8 x replicas 10 x shards 16 x tensor 8, interleaved of 3 stages" in found.out


def test_a_run_that_nothing_interrupts_is_json_too(zili: Zili) -> None:
    assert "failures: none; a checkpoint" in zili("plan", *SMALL, "--failures", "0").out
    plan = json.loads(zili("plan", *SMALL, "--failures", "0", "--json").out, parse_constant=_no_such_number)
    assert plan["goodput"]["mean_between"] is None and plan["goodput"]["interruptions"] == 0


def test_chips_that_fail_together_interrupt_less_often(zili: Zili) -> None:
    between = []
    for together in ("1", "8"):
        found = zili("plan", *SMALL, "--failing-together", together, "--json")
        between.append(json.loads(found.out)["goodput"]["mean_between"])
    assert between[1] == pytest.approx(8 * between[0])


def test_a_batch_that_was_chosen_is_said(zili: Zili) -> None:
    words = [word for word in SMALL if word not in ("--global-batch", "256")]
    assert "no global batch was given: 512 sequences, near the rule's 2.6 M tokens" in zili("plan", *words).out
    for given in (("--global-batch", "256"), ("--set", "training.global_batch=256")):
        assert "no global batch was given" not in zili("plan", *words, *given).out


def report_of(chip: str, **rates: float) -> dict[str, Any]:
    """As `zili doctor --json` makes it, with what a speed by name is measured as."""
    figures = {"matmul bf16": {"2048 FLOP/s": rates.get("products", 100e12), "peak FLOP/s": 354e12}}
    figures |= {"memory": {"bytes/s": rates.get("memory", 1.2e12)}}
    figures |= {"all_gather among 8": {"bytes/s": rates.get("link", 100e9), "seconds of 4 KB": 1e-5}}
    return {"device": chip, "findings": [{"name": name, "figures": each} for name, each in figures.items()]}


def test_measured_speeds_count(zili: Zili, tmp_path: Path) -> None:
    report = tmp_path / "doctor.json"
    report.write_text(json.dumps(report_of("Ascend910B2")), encoding="utf-8")
    found = zili("plan", *SMALL, "--doctor", report)
    assert found.code == 0, found.err
    for text in ("100 TFLOP/s in bf16 products", "1200 GB/s of memory", "100 GB/s between 8 chips"):
        assert f"measured: {text}" in found.out
    assert float(found.out.split("MFU")[1].split("%")[0].split()[-1]) < 100 * 100 / 354


def test_a_chip_without_a_published_peak_is_planned_for_with_a_report(zili: Zili, tmp_path: Path) -> None:
    report = tmp_path / "doctor.json"
    report.write_text(json.dumps(report_of("MLU590", products=200e12, link=50e9)), encoding="utf-8")
    found = zili("plan", "telechat2-3b", "--chip", "mlu590", *SMALL[3:], "--doctor", report)
    assert found.code == 0, found.err
    assert "the peak of mlu590 is not published: MFU is a share of its fastest product" in found.out
    assert "measured: 200 TFLOP/s in bf16 products" in found.out


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (report_of("NVIDIA H100 80GB HBM3"), "the report is of NVIDIA H100 80GB HBM3"),
        (report_of("Intel(R) Xeon(R) 8375C"), "the report is of Intel(R) Xeon(R) 8375C"),
        ({**report_of("Ascend910B2"), "model": "h100-sxm"}, "the report is of h100-sxm"),
        ({"findings": report_of("Ascend910B2")["findings"]}, "does not say on which chip"),
        ({**report_of("Ascend910B2"), "device": 910}, "does not say on which chip"),
        (report_of("Ascend910B2", products=360e12), "360 TFLOP/s in bf16 products, and ascend-910b2 is said to have"),
        (report_of("Ascend910B2", products=0.3e12), "0.3 TFLOP/s in bf16 products"),
        (report_of("Ascend910B2", memory=1.7e12), "1700 GB/s of memory"),
        (report_of("Ascend910B2", memory=1e9), "1 GB/s of memory"),
        (report_of("Ascend910B2", link=392e9), "392 GB/s between 8 chips"),
        (report_of("Ascend910B2", products=float("nan")), "is nan: no speed"),
        (report_of("Ascend910B2", memory=float("inf")), "is inf: no speed"),
        (report_of("Ascend910B2", memory=-1e12), "is -1000000000000.0: no speed"),
        (report_of("Ascend910B2", link=10**400), "no speed"),
        (report_of("Ascend910B2", link=True), "is True: no speed"),
        (report_of("Ascend910B2", link="fast"), "is fast: no speed"),  # type: ignore[arg-type]
        (
            {"device": "Ascend910B2", "findings": [{"name": "matmul bf16", "figures": {"8192 x 8192": 1e14}}]},
            "has '8192 x 8192', where zili doctor gives FLOP/s by size",
        ),
        ({"device": "Ascend910B2"}, "it has no measured speeds"),
        ({"device": "Ascend910B2", "findings": None}, "it has no measured speeds"),
        ({"device": "Ascend910B2", "findings": [3, {"figures": [1]}, {"name": "memory"}]}, "it has no measured speeds"),
        ([], "is not a report"),
    ],
)
def test_a_report_of_something_else_is_refused(zili: Zili, tmp_path: Path, report: Any, said: str) -> None:
    file = tmp_path / "doctor.json"
    file.write_text(json.dumps(report), encoding="utf-8")
    found = zili("plan", *SMALL, "--doctor", file)
    assert found.code == 3 and said in " ".join(found.err.split()), found.err


NUMBERS = {
    "--chips": 1_000_000,
    "--tokens": 1e18,
    "--sequence": 2**24,
    "--global-batch": 2**22,
    "--peak-tflops": 1e6,
    "--price": 1e9,
    "--failures": 1,
    "--failures-per-day": 1000,
    "--failing-together": 4096,
    "--restart-minutes": 10_000,
    "--checkpoint-seconds": 86_400,
    "--spares": 1,
}
"""Every option that takes one, with the most that it takes."""
AFTERWARDS = ("--price", "--failures", "--failures-per-day", "--failing-together", "--restart-minutes", "--spares")
"""These change no layout, so that none has to be searched."""


def test_every_number_is_among_these() -> None:
    from zili.cli.plan import plan

    hints = get_type_hints(plan)
    kinds = {name: set(get_args(hint)) or {hint} for name, hint in hints.items()}
    assert {f"--{name.replace('_', '-')}" for name, kind in kinds.items() if kind & {int, float}} == set(NUMBERS)


@pytest.mark.parametrize("option", NUMBERS)
def test_any_number_has_an_answer_or_is_refused(
    zili: Zili, tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clear line, or figures that are figures; and soon."""
    monkeypatch.setattr("zili.planning.search.plan._PATIENCE", 0)
    most = NUMBERS[option]
    words = list(SMALL)
    if option not in words:
        words += [option, ""]
    if option in AFTERWARDS:
        words += ["--layout", "pipeline=2"]  # so that nothing is searched
    for text in ("0", "-1", "nan", "inf", "1e-300", "1e300", "3", "999983", str(most), str(2 * most)):
        words[words.index(option) + 1] = text
        started = time.process_time()
        found = zili("plan", *words, "--json")
        assert time.process_time() - started < 5, text
        assert found.code in (0, 2, 3, 7), (text, found.err)
        assert (found.code == 0) == bool(found.out), text
        if found.code == 0:
            plan = json.loads(found.out, parse_constant=_no_such_number)
            assert 0 < plan["layouts"][0]["mfu"] < 1 and 0 < plan["goodput"]["share"] <= 1 and plan["days"] > 0, text
        elif found.code != 2:
            assert found.err.startswith("zili: ") and found.err.count("\n") <= 2, (text, found.err)


def _no_such_number(name: str) -> None:
    raise AssertionError(name)


@pytest.mark.parametrize("peak", ["0.001", "0.1", "0.4"])
def test_a_peak_however_small(zili: Zili, peak: str) -> None:
    """What nobody published is concluded from the peak, and must not be rounded to nothing."""
    found = zili("plan", "telechat2-3b", "--chip", "mlu590", *SMALL[3:], "--peak-tflops", peak)
    assert found.code == 0, found.err


def test_far_from_what_divides_the_nearest_is_still_named(zili: Zili) -> None:
    """The number of chips is a prime, and the next that divide are tens of thousands away."""
    started = time.process_time()
    found = zili("plan", "telechat2-3b", "--chip", "ascend-910b2", "--chips", "999983", "--global-batch", "65536")
    assert time.process_time() - started < 5
    # 65,536 sequences among as many, tensor 8 (of 24 heads), context 1 to 8: 2^22 is above twice the number.
    assert found.code == 7 and "the nearest that work are 983040 or 1048576 chips" in found.err, found.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("telechat2-3b", "--chip", "a800", "--chips", "0"), 2, "greater than or equal to 1"),
        (("telechat2-3b", "--chip", "a800"), 2, "missing: --chips: how many"),
        (("telechat2-3", "--chip", "a800", "--chips", "8"), 3, "did you mean 'telechat2-3b'"),
        (("telechat2-3b", "--chip", "a80", "--chips", "8"), 6, "no chip is named 'a80'"),
        (("telechat2-3b", "--chip", "mlu590", "--chips", "8"), 6, "the peak of mlu590 is not published"),
        (
            ("telechat2-3b", "--chip", "a800", "--chips", "97", "--global-batch", "64"),
            7,
            "nearest that work are 96 or 104",
        ),
        (("telechat2-115b", "--chip", "a800", "--chips", "8"), 7, "chips have room for it"),
        ((*SMALL, "--layout", "tensor=3"), 7, "cannot be divided by"),
        ((*SMALL, "--layout", "tensor"), 3, "write it as tensor=8"),
        ((*SMALL, "--layout", "tensors=8"), 3, "unknown key parallel.tensors"),
        ((*SMALL, "--compare", "h20:none"), 3, "write it as h20:2048"),
        ((*SMALL, "--compare", "h20:²"), 3, "write it as h20:2048"),
        ((*SMALL, "--page", "/no/such/folder/p.html"), 3, "there is no folder"),
        ((*SMALL, "--set", "model.heads=7"), 3, "heads (7) is not a multiple"),
        (("--runs", "/no/such/file.csv", "--out", "x.csv"), 3, "cannot read the table"),
        ((*SMALL, "--failures", "1", "--failures-per-day", "1000"), 3, "hardly train at all"),
        ((*SMALL, "--tokens", "inf"), 2, "--tokens"),
        ((*SMALL, "--write", "."), 3, "it is a folder"),
        ((*SMALL, "--set", "chip.precision=fp32"), 3, "bf16"),
        ((*SMALL, "--layout", "pipeline=4 schedule=interleaved", "--global-batch", "168"), 7, "rounds"),
        (("telechat2-3b", "--chip", "a800", "--chips", "100000000"), 2, "--chips"),
    ],
)
def test_bad_input_is_one_clear_line(
    zili: Zili, words: tuple[str, ...], code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zili.planning.search.plan._PATIENCE", 1000)
    found = zili("plan", *words)
    assert found.code == code, found.err
    assert said in " ".join((found.out + found.err).replace("│", " ").split())


def test_a_table_of_runs(zili: Zili, tmp_path: Path) -> None:
    table, out = tmp_path / "in.csv", tmp_path / "out.csv"
    table.write_bytes(b"id,chip,layers\nA,H100-SXM,32\nB,\xff\xfe,x\n")
    found = zili("plan", "--runs", table, "--out", out)
    assert found.code == 0, found.err
    assert "0 of 2 rows predicted" in found.out
    assert out.read_text(encoding="utf-8").count("not predicted: ") == 2


def test_a_runs_own_failures(zili, tmp_path: Path) -> None:
    recorded = Path(__file__).parents[1] / "supervision" / "two_kills.jsonl"
    (tmp_path / "supervision").mkdir()
    (tmp_path / "supervision" / "events.jsonl").write_text(recorded.read_text(encoding="utf-8"), encoding="utf-8")
    usual, own = (json.loads(zili("plan", *SMALL, *more, "--json").out) for more in ([], ["--measured", tmp_path]))
    assert own["goodput"]["share"] > usual["goodput"]["share"]
    assert any("measured in" in note and "a step 218 ms" in note for note in own["notes"])
    given = json.loads(zili("plan", *SMALL, "--measured", tmp_path, "--checkpoint-seconds", 30, "--json").out)
    assert any("a checkpoint 30 s, as given" in note for note in given["notes"])
    both = zili("plan", *SMALL, "--measured", tmp_path, "--restart-minutes", 3)
    assert both.code == 3 and "give one of them" in both.err and "Traceback" not in both.err
    none = zili("plan", *SMALL, "--measured", tmp_path / "none")
    assert none.code not in (0, 1) and "zili launch" in none.err and none.err.count("\n") == 1
