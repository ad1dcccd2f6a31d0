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
    assert [row[5] for row in found.rows] == [*["process 3 on a: killed by signal 9, in step"] * 2, ""]
    shares = [float(row[2].removesuffix(" %")) for row in found.phases]
    assert abs(sum(shares) - 100) < 0.05 * len(shares)
    assert {row[0] for row in found.phases} <= {*WORDS.values()}
    assert abs(sum(part.share for part in found.bar.parts) - 1) < 1e-9
    assert found.lead.startswith("3 lives in 1") and "43.5 % trained; join 21.9 %" in found.lead


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


def test_nothing_known_is_no_section(tmp_path: Path) -> None:
    assert lives(tmp_path) is None
    (supervised(tmp_path) / "supervision" / "events.jsonl").write_text("garbage\n", encoding="utf-8")
    assert lives(tmp_path) is None
