"""The report's section of lives and phases."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from made_run import ATTACK

from zili.evaluation.report import write_report
from zili.evaluation.report_lives import lives
from zili.supervision.account import WORDS

RECORDED = Path(__file__).parents[1] / "supervision" / "two_kills.jsonl"


def supervised(run: Path) -> Path:
    (run / "supervision").mkdir(parents=True)
    shutil.copy(RECORDED, run / "supervision" / "events.jsonl")
    return run


def test_lives_and_phases(tmp_path: Path) -> None:
    found = lives(supervised(tmp_path))
    assert found is not None
    assert [row[3] for row in found.rows] == ["0 to 26", "20 to 51", "50 to 120"]
    assert [row[5] for row in found.rows] == ["13 %", "47 %", "67 %"]
    assert [row[6] for row in found.rows] == [*["process 3 on a: killed by signal 9, in step"] * 2, ""]
    shares = [float(row[2].removesuffix(" %")) for row in found.phases]
    assert abs(sum(shares) - 100) < 0.05 * len(shares)
    assert {row[0] for row in found.phases} <= {*WORDS.values()}
    assert abs(sum(part.share for part in found.bar.parts) - 1) < 1e-9
    assert found.lead.startswith("3 lives in 1") and "43.5 % trained; join 21.9 %" in found.lead
    assert found.lead.endswith(" 2 processes on each machine.")


def test_the_page_has_them_where_there_are_events(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("", encoding="utf-8")
    assert "<h2>Lives</h2>" not in write_report(tmp_path).read_text(encoding="utf-8")
    supervised(tmp_path)
    events = tmp_path / "supervision" / "events.jsonl"
    verdict = {"event": "verdict", "term": 1, "time": 0, "monotonic": 0, "clock": "", "decision": "", "cause": ATTACK}
    *lines, last, _, _ = events.read_text(encoding="utf-8").splitlines()
    events.write_text("\n".join([*lines, json.dumps(verdict), last]), encoding="utf-8")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<h2>Lives</h2>" in page and "alert(&#34;x&#34;)" in page and not re.search(r"<script>alert", page)


def test_lives_that_the_table_leaves_out_are_named(tmp_path: Path) -> None:
    run = supervised(tmp_path)
    events = []
    for number in range(1, 61):
        at = {"term": 1, "time": 100.0 * number, "clock": "x", "life": number}
        events.append({**at, "event": "preparing", "monotonic": at["time"], "machines": ["a"], "processes": 1})
        events.append({**at, "event": "stopped", "monotonic": at["time"] + 50})
        cause = {"cause": "It was killed.", "decision": "restart where it was"}
        events.append({**at, "event": "verdict", "monotonic": at["time"] + 50, **cause})
    text = "".join(json.dumps(event) + "\n" for event in events)
    (run / "supervision" / "events.jsonl").write_text(text, encoding="utf-8")
    found = lives(run)
    assert found is not None and [row[0] for row in found.rows[24:26]] == ["25", "36"]
    assert found.rows[0][-1] == "It was killed. Zili: restart where it was"
    assert "The table leaves out lives 26 to 35." in found.notes


def test_the_loss_shows_where_the_run_went_on(tmp_path: Path) -> None:
    steps = [{"kind": "train", "step": n, "loss": 3 - n / 10, "time": 0} for n in range(1, 11)]
    starts = [{"kind": "start", "step": n, "steps": 10, "time": 0} for n in (0, 5, 5, 10)]
    record = "".join(json.dumps(line) + "\n" for line in [*steps, *starts])
    (tmp_path / "metrics.jsonl").write_text(record, encoding="utf-8")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert re.findall(r'class="mark" d="M([\d.]+) 0V400"', page) == ["500.0", "1000.0"]
    assert page.count("went on from a checkpoint") == 1
    (tmp_path / "metrics.jsonl").write_text(
        record.replace('"kind": "start", "step": 5', '"kind": "x"'), encoding="utf-8"
    )
    assert 'class="mark" d="M500' not in write_report(tmp_path).read_text(encoding="utf-8")


def test_nothing_known_is_no_section(tmp_path: Path) -> None:
    assert lives(tmp_path) is None
    (supervised(tmp_path) / "supervision" / "events.jsonl").write_text("garbage\n", encoding="utf-8")
    assert lives(tmp_path) is None
