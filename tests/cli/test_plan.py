"""`zili plan` as a user runs it."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from conftest import Zili

from zili.chips.catalog import find_chip
from zili.config import load_recipe
from zili.config.presets import load_preset
from zili.parallel.layout import lay_out
from zili.planning.goodput import Failures
from zili.planning.job import Job
from zili.planning.machine import machine
from zili.planning.memory import peak_bytes
from zili.planning.plan import Setting, make_plan, setting_config, usual_batch
from zili.planning.rates import rates_of
from zili.planning.search import _options, _Room

SMALL = ("telechat2-3b", "--chip", "ascend-910b2", "--chips", "16", "--tokens", "1e11", "--global-batch", "256")


def test_it_finds_layouts_that_fit_and_says_all_that_was_asked(zili: Zili, tmp_path: Path) -> None:
    out, page, recipe = tmp_path / "p.json", tmp_path / "p.html", tmp_path / "p.toml"
    wanted = ("--price", "2", "--json", out, "--page", page, "--write", recipe)
    found = zili("plan", *SMALL, *wanted, "--compare", "a800,h20:8,mlu590")
    assert found.code == 0, found.err
    for text in ("tokens/s", "MFU: 6 N", "memory: ", "seconds: products", "chip-hours", "estimate", "a checkpoint"):
        assert text in found.out
    assert "the peak of mlu590 is not published" in found.out
    plan = json.loads(out.read_text(encoding="utf-8"))
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
    assert "Where the time of a step goes" in text and "<svg" in text and "Why not another" in text
    # What is written can be run: it divides, and is what was said.
    config = load_recipe(recipe)
    layout = lay_out(config, 16)
    assert (layout.tensor, layout.pipeline) == (best["layout"]["tensor"], best["layout"]["pipeline"])
    places = [sum(peak_bytes(Job(config, layout, place)).values()) for place in range(layout.pipeline)]
    assert max(places) == pytest.approx(best["memory_bytes"])
    assert config.training.steps * 256 * 4096 == pytest.approx(1e11, rel=0.01)


@pytest.mark.parametrize("preset", ["telechat2-115b", "zili-1t-a32b"])
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
            taken = sum(peak_bytes(Job(candidate.config, candidate.layout, place)).values())
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
        assert room.least(option) <= 1.03 * option.candidate(config).bytes, option.alike


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


def test_a_run_that_nothing_interrupts_is_json_too(zili: Zili, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    assert zili("plan", *SMALL, "--failures", "0", "--json", out).code == 0

    def no_such(name: str) -> None:
        raise AssertionError(name)

    plan = json.loads(out.read_text(encoding="utf-8"), parse_constant=no_such)
    assert plan["goodput"]["mean_between"] is None and plan["goodput"]["interruptions"] == 0


def test_chips_that_fail_together_interrupt_less_often(zili: Zili, tmp_path: Path) -> None:
    out, between = tmp_path / "p.json", []
    for together in ("1", "8"):
        assert zili("plan", *SMALL, "--failing-together", together, "--json", out).code == 0
        between.append(json.loads(out.read_text(encoding="utf-8"))["goodput"]["mean_between"])
    assert between[1] == pytest.approx(8 * between[0])


def test_a_batch_that_was_chosen_is_said(zili: Zili) -> None:
    words = [word for word in SMALL if word not in ("--global-batch", "256")]
    assert "no global batch was given: 4,096 sequences" in zili("plan", *words).out
    for given in (("--global-batch", "256"), ("--set", "training.global_batch=256")):
        assert "no global batch was given" not in zili("plan", *words, *given).out


def test_measured_speeds_count(zili: Zili, tmp_path: Path) -> None:
    report = tmp_path / "doctor.json"
    findings = [{"name": "matmul bf16", "figures": {"2048 FLOP/s": 100e12, "peak FLOP/s": 354e12}}]
    findings += [{"name": "memory", "figures": {"bytes/s": 1.2e12}}]
    report.write_text(json.dumps({"findings": findings}), encoding="utf-8")
    found = zili("plan", *SMALL, "--doctor", report)
    assert "measured: 100 TFLOP/s in bf16 products" in found.out
    assert float(found.out.split("MFU")[1].split("%")[0].split()[-1]) < 100 * 100 / 354
    nothing = ({}, {"findings": None}, {"findings": [{"name": "memory", "figures": {"bytes/s": float("nan")}}]})
    for junk in (*nothing, {"findings": [{"name": "memory", "figures": {"bytes/s": -1e12}}, 3, {"figures": [1]}]}):
        report.write_text(json.dumps(junk), encoding="utf-8")
        assert zili("plan", *SMALL, "--doctor", report).code == 3


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("telechat2-3b", "--chip", "a800", "--chips", "0"), 2, "greater than or equal to 1"),
        (("telechat2-3b", "--chip", "a800"), 2, "give a model, --chip (or a recipe with chip.model) and --chips"),
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
        ((*SMALL, "--json", "/no/such/folder/p.json"), 3, "there is no folder"),
        ((*SMALL, "--set", "model.heads=7"), 3, "heads (7) is not a multiple"),
        (("--runs", "/no/such/file.csv", "--out", "x.csv"), 3, "cannot read the table"),
        ((*SMALL, "--failures", "1", "--failures-per-day", "1000"), 3, "hardly train at all"),
        ((*SMALL, "--tokens", "inf"), 2, "--tokens"),
        ((*SMALL, "--json", "."), 3, "it is a folder"),
        ((*SMALL, "--set", "chip.precision=fp32"), 3, "bf16"),
        ((*SMALL, "--layout", "pipeline=4 schedule=interleaved", "--global-batch", "168"), 7, "rounds"),
        (("telechat2-3b", "--chip", "a800", "--chips", "100000000"), 2, "--chips"),
    ],
)
def test_bad_input_is_one_clear_line(
    zili: Zili, words: tuple[str, ...], code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zili.planning.plan._PATIENCE", 1000)
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
