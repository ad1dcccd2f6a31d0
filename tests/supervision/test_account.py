"""The account of a run: every second has a phase, as far as anything is known of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from zili.errors import DataError
from zili.parallel.control.crumbs import Crumbs
from zili.supervision.account import Account, account, account_of, read_events
from zili.supervision.ledger import EVENTS, Ledger, mean_of, seen, told, waited

RECORDED = Path(__file__).parent / "two_kills.jsonl"
"""A run under `zili launch`: two machines of two processes each, 120 steps, a checkpoint every 10. A process was killed
after step 26 and another after step 51."""


class Story:
    """Events as a root would write them, by its clock."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.term, self.clock, self.skew = 1, "a", 0.0

    def at(self, now: float, event: str, **facts: Any) -> Story:
        # What a clock of another machine counts has nothing to do with ours.
        monotonic = now + (1000.0 if self.clock == "a" else 7.0)
        times = {"time": 5000.0 + now + self.skew, "monotonic": monotonic, "clock": self.clock}
        self.events.append({"event": event, "term": self.term, **times, **facts})
        return self

    def begin(self, now: float, life: int = 1) -> Story:
        self.at(now, "preparing", life=life, generation=life, machines=["a", "b"], processes=4)
        return self.at(now + 1, "started", life=life)

    @property
    def account(self) -> Account:
        return account(self.events)


def at(done: int, begun_after: int, stood: float = 0.0, phase: str = "step", **seconds: float) -> dict[str, Any]:
    found = {"step": done, "begun_after": begun_after, "stood": stood, "phase": phase, "saves": 1.0, "went_on": 0.0}
    return {**found, "seconds": seconds}


def killed() -> Story:
    """Two seconds until the first life; its 11 steps of 2 s, save one to warm up; half a step; then a second life."""
    story = Story().at(0, "root", running=False).begin(2)
    story.at(40, "stopping", cause="process 1 on b: killed by signal 9, in step", hang=False)
    story.at(42, "stopped", at=at(11, 0, 1.0, init=5, warm_up=11, step=20), failed=True)
    story.begin(45, 2)
    return story.at(66, "end", code=0, at=at(15, 6, 1.0, "end", load=1, warm_up=2, step=16))


def test_phases_sum_to_the_wall_time() -> None:
    found = killed().account
    assert found.wall == sum(found.seconds.values()) == 66
    # 5 of 11 steps were done again; of the step at hand a second was done.
    assert found.lives[0].seconds == {
        **{"waiting": 3, "init": 5, "warm_up": 11, "step": 10, "lost": 10 + 1, "stopping": 2}
    }
    assert found.lives[1].seconds == {"replacement": 4, "reload": 1, "warm_up": 2, "step": 16, "end": 1}
    assert found.share == 26 / 66 and found.balances and found.code == 0
    assert found.lives[0].cause.startswith("process 1") and found.lives[0].failed and not found.lives[1].failed


def test_what_processes_and_root_measure_otherwise_is_unaccounted() -> None:
    """The check is not true by construction: processes measure their phases, the root the whole."""
    story = killed()
    story.events[4]["at"]["seconds"]["init"] = 3.0
    found = story.account
    assert found.seconds["unaccounted"] == 2 and found.wall == 66 and not found.balances
    story.events[4]["at"]["seconds"]["init"] = 9.0  # more than there was
    found = story.account
    assert found.seconds["unaccounted"] == -4 and found.unknown == 4 / 66 and not found.balances


def test_a_hang_is_detection_from_the_last_change() -> None:
    story = Story().at(0, "root", running=False).begin(0)
    story.at(100, "stopping", cause="", hang=True).at(101, "stopped", at=at(11, 0, 69.0, init=10, step=20))
    assert story.account.seconds == {"step": 20, "init": 10, "detection": 69, "stopping": 1, "waiting": 1}


def test_a_slow_end_after_an_error_is_detection_beyond_a_step() -> None:
    story = Story().at(0, "root", running=False).begin(0)
    story.at(100, "stopping", cause="process 1").at(101, "stopped", at=at(11, 0, 69.0, init=10, step=20))
    assert story.account.seconds["lost"] == 2 and story.account.seconds["detection"] == 67


def test_steps_after_an_order_to_stop_count() -> None:
    story = Story().at(0, "root", running=False).begin(0).at(31, "stopping", wanted=True, cause="interrupted")
    story.at(36, "end", code=130, at={**at(11, 0, 0.0, "end", init=10, step=22, save=2), "went_on": 4.0})
    found = story.account
    assert found.seconds == {"step": 22, "save": 2, "init": 10, "stopping": 1, "waiting": 1}
    assert found.lives[0].cause == "interrupted" and not found.lives[0].failed


def test_a_root_on_another_machine_goes_on_with_the_life() -> None:
    """Its clocks count from elsewhere; the wall clock joins them."""
    story, other = killed(), Story().at(0, "root", running=False).begin(2)
    other.term, other.clock = 2, "b"
    other.at(20, "root", running=True).at(21, "joined", machine="b", generation=1, ago=500.0)
    other.events += story.events[3:]
    for event in other.events[5:]:
        event.update(term=2, clock="b", monotonic=event["monotonic"] - 1000 + 7)
    stale = dict(story.events[3], term=1, cause="said by the root that was stopped and woke")
    other.events.insert(6, stale)
    assert other.account.seconds == killed().account.seconds and other.account.balances


def test_a_clock_that_jumps_back_is_said() -> None:
    story = Story().at(0, "root", running=False).begin(2)
    story.term, story.clock, story.skew = 2, "b", -60.0
    story.at(20, "root", running=True)
    story.at(40, "stopping", cause="process 1").at(42, "stopped", at=at(11, 0, 1.0, init=5, warm_up=11, step=20))
    found = story.account
    assert any("went back by 43 s" in note for note in found.notes)
    assert found.seconds["unaccounted"] == -17 and not found.balances
    assert found.wall == pytest.approx(sum(found.seconds.values())) == 25


def test_a_wall_clock_that_is_set_within_one_root_changes_nothing() -> None:
    story = killed()
    for event in story.events[3:]:
        event["time"] += 86_400.0
    assert story.account.seconds == killed().account.seconds


def test_a_tail_that_was_not_written_is_unaccounted() -> None:
    """All supervisors were killed at once; the next launch came 100 s later."""
    story = Story().at(0, "root", running=False).begin(0)
    story.at(31, "progress", life=1, at=at(11, 0, init=10, step=20))
    alone = story.account
    assert alone.seconds == {"step": 20, "init": 10, "waiting": 1} and alone.code is None
    assert not alone.lives[0].over and not alone.lives[0].failed
    story.term = 2
    story.at(131, "root", running=True).at(132, "joined", machine="a", generation=0, ago=1.0).begin(132, 2)
    story.at(143, "end", code=0, at=at(13, 10, 0.0, "end", load=8, step=2))
    found = story.account
    assert found.seconds["unaccounted"] == 101 and found.wall == 143 and not found.balances
    assert found.lives[0].cause == "the supervisors were gone" and found.seconds["lost"] == 2


def test_time_between_launches_is_idle_and_imports_are_not() -> None:
    story = Story().at(0, "root", running=False).at(1, "joined", machine="a", generation=0, ago=5.0).begin(1)
    story.at(32, "end", code=130, at=at(11, 0, 0.0, "end", init=10, step=20))
    story.term = 2
    story.at(132, "root", running=False).at(133, "joined", machine="a", generation=0, ago=8.0).begin(133, 2)
    story.at(144, "end", code=0, at=at(16, 11, 0.0, "end", load=2, step=8))
    found = story.account
    assert found.seconds["idle"] == 100 - 7 and found.lives[0].seconds["waiting"] == 4 + 2
    assert found.lives[1].seconds["replacement"] == 7 + 2
    assert found.wall == 148 and found.share == 28 / (148 - 93)


def test_a_rollback_beyond_a_life_takes_its_steps_and_earlier_ones() -> None:
    story = Story().at(0, "root", running=False).begin(0)
    story.at(11, "stopping", cause="x").at(11, "stopped", at=at(11, 0, step=10)).begin(11, 2)
    story.at(22, "stopping", cause="x").at(22, "stopped", at=at(21, 10, step=10)).begin(22, 3)
    story.at(33, "end", code=0, at=at(15, 5, 0.0, "end", step=10))
    found = story.account
    assert [life.seconds.get("lost", 0.0) for life in found.lives] == [6.0, 10.0, 0.0]
    assert found.seconds["step"] == 4 + 10


def test_a_recorded_run(tmp_path: Path) -> None:
    folder = tmp_path / "supervision"
    folder.mkdir()
    text = RECORDED.read_text(encoding="utf-8")
    (folder / EVENTS).write_text(text + '{"event": "cut', encoding="utf-8")
    found = account_of(tmp_path)
    assert [(life.resumed, life.step) for life in found.lives] == [(0, 26), (20, 51), (50, 120)]
    assert found.balances and found.code == 0 and "1 line " in found.notes[0]
    assert found.wall == pytest.approx(sum(found.seconds.values()), rel=0.01)
    first, second, _ = found.lives
    assert first.step_seconds and second.step_seconds
    # Steps 21 to 26 and 51, and of each life the step at hand.
    assert 6 * first.step_seconds < first.seconds["lost"] <= 7 * first.step_seconds
    assert second.step_seconds < second.seconds["lost"] <= 2 * second.step_seconds
    assert found.lives[0].cause.endswith("killed by signal 9, in step")
    for cut in range(1, 1 + len(text.splitlines())):  # wherever its supervisors were killed
        some = account([json.loads(line) for line in text.splitlines()[:cut]])
        assert some.wall == pytest.approx(sum(some.seconds.values()))


def test_no_events_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="zili launch"):
        read_events(tmp_path)
    (tmp_path / "supervision").mkdir()
    (tmp_path / "supervision" / EVENTS).write_text('nothing\n[1]\n{"event": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match="no event"):
        read_events(tmp_path)


def test_what_processes_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    one, other = Crumbs(), Crumbs()
    one.enter("step")
    other.enter("step")
    now += 2.0
    other.done(1)
    now += 3.0
    here, there = told(one, 104.0), told(other, 101.0)
    assert here["seconds"]["step"] == 0 and here["stood"] == 5 and here["stopping"] == 1
    assert there["seconds"]["step"] == 2 and there["stood"] == 3 and there["stopping"] == 4
    both = mean_of([here, there])
    assert both is not None
    assert (both["seconds"]["step"], both["stood"], both["went_on"]) == (1.0, 2.0, 0.5)
    assert (both["step"], both["begun_after"], both["phase"]) == (1, 0, "step")
    here["heard"] = 90.0
    waited([here, there])
    now += 1.0
    waited([here, there])
    assert (mean_of([here, there]) or {})["stood"] == 2.0 + (105 - 90) / 2, "until the stop, not after"
    assert mean_of([]) is None


def test_the_ledger_tells_progress_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path, 3, lambda work: work())
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    ledger.life("started", life=1)
    table = mean_of([told(Crumbs())])
    for _ in range(10):
        now += 10
        ledger.hear("a", 1, table)
        ledger.hear("b", 1, table)
    written = [json.loads(line) for line in (tmp_path / EVENTS).read_text(encoding="utf-8").splitlines()]
    assert [event["event"] for event in written] == ["started", *["progress"] * 4]
    assert [event["monotonic"] - written[0]["monotonic"] for event in written[1:]] == pytest.approx([10, 40, 70, 100])
    assert (tmp_path / EVENTS).stat().st_mode & 0o077 == 0, "for this user alone"


def test_what_was_seen_is_short_however_many_end() -> None:
    endings = [{"rank": n, "machine": "a", "code": -9, "phase": "save", "stopped": False} for n in range(1000)]
    assert seen(endings).startswith("process 0 on a: killed by signal 9, in save; ")
    assert seen(endings).endswith("; 992 more") and seen([{**endings[0], "stopped": True}]) == ""
    assert seen(endings, ["b"]) == "machine b is gone"
