"""Every page: whole, with one header, without network, and no wider than a phone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import pytest
from made_run import ATTACK, make_run
from test_report import Page

import zili
from zili.chips.catalog import find_chip
from zili.config.presets import load_preset
from zili.diagnosis import align
from zili.diagnosis.shadow import Alignment, Checked, Offence
from zili.evaluation import comparison, report
from zili.ops.yardstick import Distance
from zili.planning.exact.messages import Message
from zili.planning.search import page as plan
from zili.planning.search.goodput import Failures
from zili.planning.search.plan import Plan, Setting, make_plan, setting_config
from zili.rehearsal import page as rehearsal
from zili.rehearsal.recorder import PARTS
from zili.rehearsal.result import Peak, Rehearsal

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
GIB = 2**30
LIVES = Path(__file__).parents[1] / "supervision" / "two_kills.jsonl"


def alignment() -> Alignment:
    distance = Distance(31.2, 4.0)
    offence = Offence(
        1, "forward", f"layers.0.{ATTACK}", "aten.silu.default", (4, 512, 2048), "torch.bfloat16", distance
    )
    seen = {"aten.silu.default": Checked(40, 2.9), "aten._fused_rms_norm_backward.default": Checked(7, 0.25)}
    return Alignment("mlu", [(9.25, 9.25), (8.75, 8.5)], [offence] * 3, seen, {"aten.native_dropout.default"})


def rehearsed(rank: int, gib: float) -> Rehearsal:
    """With memory that goes up to `gib` and down again."""
    heights = [*range(1, 21), *range(20, 0, -1)]
    parts = [{name: round(gib * GIB * height / 20 / len(PARTS)) for name in PARTS} for height in heights]
    timeline = [(500 * i, part) for i, part in enumerate(parts)]
    peak = Peak(sum(parts[19].values()), 9500, parts[19], [(GIB, f"weights: [4, 8] torch.float32 of {ATTACK}", 12)])
    messages = {Message("reduce_scatter", "weight_shards", 16, 552 * 2**20): 12}
    return Rehearsal(
        *(rank, 16, "pipeline 2 x shards 8", [rank], [rank, 7], 4, peak, timeline, messages),
        *({"forward": 10**12, "backward": 2 * 10**12}, {"mm": 24_245}),
    )


def planned(**failing: float) -> Plan:
    """A pipeline given, since a search takes seconds."""
    config = setting_config(load_preset("telechat2-3b"), 4096, 256, 1e11, "telechat2-3b")
    config = config.changed(chip={"precision": "bf16"}, parallel={"pipeline": 4, "schedule": "1f1b"})
    return make_plan(Setting(config, 1e11, Failures(**failing), 2.0), find_chip("ascend-910b2"), 16, given=True)


def the_report(folder: Path) -> str:
    run = make_run(folder / "first-light")
    (run / "supervision").mkdir()
    shutil.copy(LIVES, run / "supervision" / "events.jsonl")
    return report.write_report(run).read_text(encoding="utf-8")


def the_comparison(folder: Path) -> str:
    runs = [make_run(folder / name) for name in ("a-name-that-is-as-long-as-names-get-1", "two")]
    (runs[1] / "recipe.toml").write_text('seed = 7\nname = "two"\n', encoding="utf-8")
    return comparison.page(comparison.compare(runs), [run.name for run in runs])


MAKERS: dict[str, Callable[[Path], str]] = {
    "report": the_report,
    "comparison": the_comparison,
    "align": lambda _: align.page(alignment(), ATTACK),
    "rehearsal": lambda _: rehearsal.page([rehearsed(0, 10), rehearsed(8, 40)], ATTACK, 64 * 10**9),
    "plan": lambda _: plan.page([planned(), planned(per_day=3.0)], ATTACK),
}


@pytest.fixture(params=MAKERS)
def made(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sys.argv", ["/x/bin/zili", request.param, "--set", f"name={ATTACK}"])
    return MAKERS[request.param](tmp_path)


def test_it_is_whole_and_says_where_it_comes_from(made: str, request: pytest.FixtureRequest) -> None:
    page = Page(made)
    assert page.tags.count("header") == page.tags.count("h1") == page.tags.count("style") == 1
    header = Page(re.findall(r"<header>.*?</header>", made, re.DOTALL)[0]).text
    assert re.search(r"zili (report|comparison|align|rehearsal|plan) --set 'name=", header)
    assert f"Zili {zili.__version__}" in header and re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d", header)
    assert "nan" not in page.text.lower().replace("finan", "")


def test_it_takes_nothing_from_elsewhere_and_runs_nothing_of_others(made: str) -> None:
    page = Page(made)
    assert not re.search(r"""<[^>]+\s(src|href)\s*=|url\(|@import|https?://""", made.replace(escape(ATTACK), ""))
    assert "default-src 'none'" in made and escape(ATTACK, quote=False)[:9] in made
    assert page.tags.count("script") == 1 and "img" not in page.tags and "a" not in page.tags


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


WIDER = """() => [...document.querySelectorAll("body *:not(svg *)")]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5 || e.getBoundingClientRect().left < -0.5)
    .map(e => `${e.tagName}.${e.className}: ${e.textContent.slice(0, 40)}`)"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (Debian: apt install chromium)")
def test_nothing_is_wider_than_a_phone(made: str, browser: Any, tmp_path: Path) -> None:
    file, asked, errors = tmp_path / "page.html", [], []
    file.write_text(made.replace("<details", "<details open"), encoding="utf-8")
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(file.as_uri())
    assert page.evaluate(WIDER) == [] and page.evaluate("document.documentElement.scrollWidth") == 390
    for plot in page.locator(".plot[data-chart]").all():
        plot.hover()
        assert plot.locator(".tip").is_visible()
    assert asked == [file.as_uri()] and errors == []
    page.close()


def strips(made: str) -> list[list[float]]:
    """Widths of the pieces of each bar, in per cent."""
    found = re.findall(r'<div class="strip">(.*?)</div>', made)
    return [[float(width) for width in re.findall(r"width:([\d.]+)%", strip)] for strip in found]


def test_what_failures_take_is_drawn_to_scale() -> None:
    one = planned(per_day=3.0)
    time, _, whole, lost = strips(plan.page([one], "x"))
    assert [sum(time), sum(whole), sum(lost)] == pytest.approx([100, 100, 100], abs=0.1)
    assert whole[0] == pytest.approx(100 * one.goodput.share, abs=0.01) and 50 < whole[0] < 99
    assert whole[1:] == pytest.approx([share * (100 - whole[0]) / 100 for share in lost], abs=0.02)


@pytest.mark.parametrize(("gib", "charts"), [(40, 1), (10, 2)])
def test_the_chips_memory_is_a_line_above_the_step(gib: float, charts: int) -> None:
    one = rehearsed(0, gib)
    made = rehearsal.page([one], "x", 64 * GIB)
    (line,) = re.findall(r'class="level level-0" d="M0 ([\d.]+)H1000"', made)
    first = re.findall(r"<figure.*?</figure>", made, re.DOTALL)[0]
    areas = re.findall(r'class="area [^"]*" d="M(.*?)Z"', first)
    heights = [float(place.split()[1]) for area in areas for place in area.split("L")]
    assert made.count("<figure") == charts and "the chip's memory 64 GiB" in Page(made).text
    assert (400 - float(line)) / (400 - min(heights)) == pytest.approx(64 / gib, rel=0.01)
