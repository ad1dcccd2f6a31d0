"""The report: whole, self-contained, safe, and made of whatever a run left behind."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from made_run import ATTACK, make_run, write_lines

from zili.errors import DataError
from zili.evaluation.report import next_commands, write_report
from zili.pages.charts import smoothed, thinned

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag closed out of order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.pieces: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_a_finished_run_shows_everything(run_folder: Path) -> None:
    text = page_of(run_folder).text
    for expected in (
        "first-light", "finished", "7.35M parameters", "1.64M tokens", "4\u202fmin 47\u202fs", "AMD EPYC",
        "1.378", "bits per byte of held-out text", "xz -9e", "1.697", "zstd -19 + training text", "1.549",
        "19\u202f% fewer bits than xz -9e", "71 documents", "Learning rate", "Gradient norm", "Throughput",
        "Share of matmul peak", "71\u202f%", "def read", "春眠不觉晓，", "处处闻啼鸟", "chip.precision",
        "bf16 runs at a quarter", "sequence_length = 512", "zili chat", "step 200",
    ):  # fmt: skip
        assert expected in text, expected


def test_nothing_is_fetched(run_folder: Path) -> None:
    raw = write_report(run_folder).read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://", re.sub(re.escape("src=x onerror"), "", raw))
    assert "default-src 'none'" in raw


def test_a_hostile_sample_stays_text(run_folder: Path) -> None:
    page = page_of(run_folder)
    assert ATTACK in page.text
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "\x1b" not in page.text and "␛[31m red" in page.text


def test_hostile_names_notes_and_choices_stay_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "<script>alert(1)<")
    (folder / "recipe.toml").write_text(ATTACK)
    summary = {
        "compressors": [{"name": ATTACK, "bits_per_byte": 1.0, "seen": ATTACK}],
        "choices": [{"name": ATTACK, "value": {ATTACK: ATTACK}, "reason": ATTACK}],
        "machine": {"name": ATTACK, ATTACK: ATTACK},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"kind": "note", "text": ATTACK}) + "\n")
    page = page_of(folder)
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert page.text.count(ATTACK) >= 8


def test_charts_are_wellformed_described_and_finite(run_folder: Path) -> None:
    raw = write_report(run_folder).read_text(encoding="utf-8")
    pictures = re.findall(r"<svg.*?</svg>", raw, re.DOTALL)
    assert len(pictures) == 5
    identities = []
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        named = {child.tag: child for child in root}
        assert root.attrib["role"] == "img" and named["title"].text and named["desc"].text
        naming = [named["title"].attrib["id"], named["desc"].attrib["id"]]
        assert root.attrib["aria-labelledby"].split() == naming
        identities += naming
        for path in root.iter("path"):
            assert re.fullmatch(r"(M-?[\d.]+ -?[\d.]+(L-?[\d.]+ -?[\d.]+|H1000|h0)+)+", path.attrib["d"])
    assert len(set(identities)) == 10
    for data in re.findall(r'data-chart="(.*?)"', raw):
        chart = json.loads(html.unescape(data))
        assert all(math.isfinite(v) for line in chart["lines"] for point in line["at"] for v in point)


def test_an_interrupted_run_says_so(new_run: Callable[..., Path]) -> None:
    folder = new_run(steps=120, planned=400)
    (folder / "summary.json").unlink()
    text = page_of(folder).text
    assert "Step 120 of 400: the run was stopped early" in text and "step 120 of 400" in text
    assert "xz" not in text


def test_a_run_without_evaluation(new_run: Callable[..., Path]) -> None:
    text = page_of(new_run(evaluated=False)).text
    assert "no evaluation yet" in text and "bits per byte of held-out text" not in text


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_of_hardly_any_steps(new_run: Callable[..., Path], steps: int) -> None:
    page = page_of(new_run(steps=steps, evaluated=False))
    assert page.tags.count("svg") == (4 if steps else 0)
    assert ("no step yet" in page.text) == (steps == 0)


def test_a_line_cut_by_a_crash(run_folder: Path) -> None:
    path = run_folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "train", "step": 401, "lo\xff')
    text = page_of(run_folder).text
    assert "metrics.jsonl line 410 is not a whole JSON object" in text
    assert "probably being written when the run stopped" in text and "finished" in text


def test_a_diverged_run(run_folder: Path) -> None:
    path = run_folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for record in lines:
        if record["kind"] == "train" and record["step"] > 300:
            record["loss"] = math.nan
            record["gradient_norm"] = math.inf
        if record["kind"] == "eval" and record["step"] > 300:
            record["bits_per_byte"] = record["loss"] = None
    write_lines(path, lines)
    page = page_of(run_folder)
    assert "The loss is not a number in 100 steps, first at step 301" in page.text
    assert "nan" not in write_report(run_folder).read_text().lower().split("<body>")[1]
    assert page.tags.count("svg") == 5


def test_every_loss_not_a_number(new_run: Callable[..., Path]) -> None:
    folder = new_run(steps=0, evaluated=False)
    write_lines(folder / "metrics.jsonl", [{"kind": "train", "step": 1, "loss": math.nan, "learning_rate": 0.0}])
    page = page_of(folder)
    assert "not a number in 1 step," in page.text and page.tags.count("svg") == 1


def test_a_resumed_run_shows_each_step_once(run_folder: Path) -> None:
    path = run_folder / "metrics.jsonl"
    again = [{"kind": "start", "time": "2025-10-09T09:00:00"}, {"kind": "train", "step": 400, "loss": 2.0}]
    with path.open("a") as metrics:
        metrics.writelines(json.dumps(record) + "\n" for record in again)
    raw = write_report(run_folder).read_text()
    assert "The run was started 2 times" in raw
    assert raw.count("[400.0,2.0]") == 1


def test_a_model_worse_than_a_compressor_is_not_flattered(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    summary["compressors"] = [{"name": "xz -9e", "bits_per_byte": 1.1}]
    (run_folder / "summary.json").write_text(json.dumps(summary))
    assert "it needs 25\u202f% more bits than xz -9e." in page_of(run_folder).text


@pytest.mark.parametrize("summary", ["", "[1]", "{", '{"model": 3, "choices": "x", "compressors": {"a": 1}}'])
def test_a_damaged_summary(run_folder: Path, summary: str) -> None:
    (run_folder / "summary.json").write_text(summary)
    assert "1.378" in page_of(run_folder).text


def test_odd_records_do_not_break_it(new_run: Callable[..., Path]) -> None:
    folder = new_run(steps=0, evaluated=False)
    records = [
        {"kind": "train", "step": True, "loss": 1}, {"kind": "train", "step": "3"}, {"kind": "train"},
        {"kind": "eval", "step": 5, "bits_per_byte": "low"}, {"kind": "start", "time": "yesterday"},
        {"kind": "start", "time": 1e300}, {"kind": ["train"]},
        {"kind": "train", "step": 1, "loss": 0.0, "gradient_norm": 0.0, "tokens_per_second": -5},
    ]  # fmt: skip
    write_lines(folder / "metrics.jsonl", records)
    write_lines(folder / "samples.jsonl", [{}, {"text": 5}, {"text": "", "prompt": None, "seed": [1]}])
    assert "the model ended the text" in page_of(folder).text


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a run"):
        write_report(tmp_path)


def test_a_run_that_stopped_before_its_first_step(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("[training]\nsteps = 5\n")
    assert "stopped before its first step" in page_of(tmp_path).text
    assert not list(tmp_path.glob(".report*"))


def test_commands_are_as_one_would_type_them(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_folder.parent)
    run_folder.rename("my run")
    lines = [line for line, _ in next_commands(Path("my run"))]
    assert "zili chat 'my run'" in lines
    assert "zili train 'my run/recipe.toml' --set training.steps=800" in lines  # it had 400 and took them


def test_thinning_keeps_spikes_and_gaps() -> None:
    points = [(float(i), 1.0) for i in range(10_000)]
    points[1234], points[5000] = (1234.0, 50.0), (5000.0, math.nan)
    kept = thinned(points, 600)
    assert len(kept) <= 603
    assert (1234.0, 50.0) in kept and any(math.isnan(y) for _, y in kept)
    assert kept == sorted(kept, key=lambda p: p[0])


def test_smoothing_keeps_a_line_straight_until_its_end() -> None:
    points = [(float(i), 2.0 * i) for i in range(50)]
    out = smoothed(points, 8)
    assert [y for _, y in out[:46]] == pytest.approx([y for _, y in points[:46]])
    assert math.isnan(smoothed([(0.0, 1.0), (1.0, math.nan), (2.0, 3.0)], 2)[1][1])


def test_evaluations_on_more_text_are_a_line_of_their_own(run_folder: Path) -> None:
    last = {"kind": "eval", "step": 400, "bits_per_byte": 1.2, "loss": 2.2, "documents": 300, "bytes": 2_000_000}
    with (run_folder / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps(last) + "\n")
    text = page_of(run_folder).text
    assert "model, 600\u202fkB" in text and "model, 2\u202fMB" in text and "On 300 documents (2\u202fMB)" in text
    assert "1.200" in text
