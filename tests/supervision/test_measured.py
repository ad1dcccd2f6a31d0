"""A run's own phases in the planner's model of failures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zili.errors import DataError
from zili.planning.search.goodput import LLAMA3_RATE, Failures
from zili.supervision.account import account_of
from zili.supervision.measured import ENOUGH, measured

RECORDED = Path(__file__).parent / "two_kills.jsonl"


def folder(path: Path, text: str) -> Path:
    (path / "supervision").mkdir()
    (path / "supervision" / "events.jsonl").write_text(text, encoding="utf-8")
    return path


def test_a_run_gives_its_own_figures(tmp_path: Path) -> None:
    run = folder(tmp_path, RECORDED.read_text(encoding="utf-8"))
    found, usual = measured(run, Failures()), Failures()
    _, second, third = account_of(run).lives
    assert set(found.figures) == {"detection", "replacement", "reload", "warm_up", "checkpoint"}
    assert found.failures.reload == pytest.approx((second.seconds["reload"] + third.seconds["reload"]) / 2)
    assert found.failures.restart < 10 < usual.restart
    assert found.failures.drain == usual.drain and found.failures.per_chip_day == LLAMA3_RATE
    told = "\n".join(found.notes)
    assert "4 processes, 3 lives" in told and "drain 60.00 s" in told and "2 failures in 0.00303 chip-days" in told


def test_enough_failures_give_a_rate_unless_one_was_given(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()]
    second = next(at for at, event in enumerate(lines) if event["event"] == "preparing" and event["life"] == 2)
    stopped = next(at for at, event in enumerate(lines) if event["event"] == "stopped" and event["life"] == 2)
    first, life, rest = lines[:second], lines[second : stopped + 1], lines[stopped + 1 :]
    length, events = life[-1]["monotonic"] - first[-1]["monotonic"], list(first)
    for number in range(ENOUGH - 1):
        events += [{**event, "monotonic": event["monotonic"] + number * length} for event in life]
    events += [{**event, "monotonic": event["monotonic"] + (ENOUGH - 2) * length} for event in rest]
    run = folder(tmp_path, "\n".join(map(json.dumps, events)))
    found = measured(run, Failures())
    days = 4 * account_of(run).wall / 86_400
    assert found.failures.per_chip_day == pytest.approx(ENOUGH / days)
    given = measured(run, Failures(per_chip_day=1e-3))
    assert given.failures.per_chip_day == 1e-3 and "as given" in "".join(given.notes)


def test_a_run_without_a_failure_measures_what_it_has(tmp_path: Path) -> None:
    lines = RECORDED.read_text(encoding="utf-8").splitlines()
    cut = next(at for at, line in enumerate(lines) if '"stopping"' in line)
    end = next(json.loads(line) for line in lines if '"event":"end"' in line)
    end["monotonic"] = json.loads(lines[cut])["monotonic"]
    found = measured(folder(tmp_path, "\n".join([*lines[:cut], json.dumps(end)])), Failures())
    assert set(found.figures) == {"warm_up", "checkpoint"}
    assert "assumed, as it was not measured: detection 180.00 s, replacement 300.00 s, reload" in "\n".join(found.notes)


def test_too_short_is_one_clear_line(tmp_path: Path) -> None:
    lines = RECORDED.read_text(encoding="utf-8").splitlines()
    with pytest.raises(DataError, match=r"too short to measure by: 1 life in 10 s, and none did two steps"):
        measured(folder(tmp_path, "\n".join(lines[:5])), Failures())
