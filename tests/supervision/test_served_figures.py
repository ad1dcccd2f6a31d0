"""What an agent's endpoint says of its processes and of the run, and what `zili top` reads."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from zili.exposition import METRICS, ServedFigure
from zili.parallel.control.crumbs import Crumbs
from zili.supervision.account import account_of
from zili.supervision.figures import MachineFigures
from zili.supervision.ledger import mean_of
from zili.supervision.pace import Pace
from zili.supervision.standing import Growing, Standing
from zili.supervision.state import State

RECORDED = Path(__file__).parent / "two_kills.jsonl"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`clock.at` is what `time.monotonic` says."""

    class Clock:
        at = 100.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.at)
    return Clock


def step(crumbs: Crumbs, number: int, clock: Any, data: float, work: float) -> None:
    crumbs.enter("data")
    clock.at += data
    crumbs.enter("step")
    clock.at += work
    crumbs.done(number)


def test_the_slow_process_is_the_one_whose_steps_take_longest(clock: Any) -> None:
    pace, own = Pace("a"), [100.0] * 10
    crumbs = {rank: Crumbs() for rank in range(10)}
    for number in range(1, 6):
        for rank, one in crumbs.items():
            clock.at = own[rank]
            step(one, number, clock, data=0.25, work=2.0 if rank == 7 else 1.0)
            own[rank] = clock.at
        at = pace.look(crumbs)
    assert at is not None and at["slowest"][0] == {
        **{"rank": 7, "machine": "a"},
        **{"step_seconds": 2.25, "data_seconds": 0.25},
    }
    assert at["step_seconds"] == 1.25 and len(at["slowest"]) == 2, "of ten thousand not all are told"
    assert pace.processes[7]["step_seconds"] == 2.25 and pace.processes[7]["step"] == 5
    others = {**at, "slowest": [{"rank": 12, "machine": "b", "step_seconds": 9.0, "data_seconds": 0.0}]}
    both = mean_of([at, others])
    assert both is not None and [one["rank"] for one in both["slowest"][:2]] == [12, 7]
    many = mean_of([at] * 9)
    assert many is not None and len(many["slowest"]) == 8


def test_a_pace_is_of_the_present_life(clock: Any) -> None:
    pace, old = Pace("a"), Crumbs()
    for number in range(1, 9):
        step(old, number, clock, 0.0, 5.0)
        pace.look({0: old})
    assert pace.processes[0]["step_seconds"] == 5.0
    new = Crumbs()
    new.resumed(4)
    assert "step_seconds" not in (pace.look({0: new}) or {}), "nothing is known of it"
    for number in range(5, 9):
        step(new, number, clock, 0.0, 1.0)
        pace.look({0: new})
    assert pace.processes[0]["step_seconds"] == 1.0
    assert pace.look({}) is None and pace.processes == {}


def run_folder(folder: Path) -> Path:
    (folder / "supervision").mkdir(parents=True)
    (folder / "supervision" / "events.jsonl").write_bytes(RECORDED.read_bytes())
    (folder / "recipe.toml").write_text("[training]\nsteps = 120\nglobal_batch = 8\n", encoding="utf-8")
    lines = [
        {"kind": "start", "time": 1.0, "step": 0, "steps": 120},
        *(
            {"kind": "train", "time": 10.0 + n, "step": n, "loss": 5.0 - n / 100, "tokens": 256 * n}
            for n in range(1, 4)
        ),
        {"kind": "eval", "time": 14.0, "step": 3, "loss": 4.5, "bits_per_byte": 1.25},
        {"kind": "saved", "time": 15.0, "step": 3, "path": "x", "bytes": 7, "seconds": 0.5},
        {"kind": "note", "time": 16.0, "text": "resumed"},
        *({"kind": "straggler", "time": 17.0, "process": rank, "phase": "data", "over": False} for rank in (2, 3)),
        {"kind": "straggler", "time": 18.0, "process": 2, "phase": "data", "over": True},
        {"kind": "straggler", "time": 18.0, "process": "x", "phase": "data", "over": False},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def by_name(samples: Iterable[ServedFigure]) -> dict[str, list[ServedFigure]]:
    found: dict[str, list[ServedFigure]] = {}
    for sample in samples:
        assert sample.name in METRICS
        found.setdefault(sample.name, []).append(sample)
    return found


def test_the_first_machine_tells_of_the_run_and_each_of_its_processes(tmp_path: Path, clock: Any) -> None:
    run = run_folder(tmp_path / "mine")
    pace, crumbs = Pace("b"), Crumbs()
    for number in range(1, 4):
        step(crumbs, number, clock, 0.5, 1.0)
        pace.look({3: crumbs})
    clock.at += 7.0
    pace.look({3: crumbs})
    state = State(machines=["a", "b"], left_out={"c": "why"})
    figures = MachineFigures(run, "cpu", pace, lambda: state)
    found = by_name(figures())
    assert not found.keys() & {"zili_loss", "zili_lives"}, "another machine tells of the run"
    labels = {"run": "mine", "node": "b", "chip": "cpu", "rank": "3"}
    assert found["zili_process_step"] == [ServedFigure("zili_process_step", 3, labels)]
    assert found["zili_process_step_seconds"] == [ServedFigure("zili_process_step_seconds", 1.5, labels)]
    assert found["zili_process_quiet_seconds"][0].value == 7.0
    seconds = {one.labels["phase"]: one.value for one in found["zili_process_phase_seconds_total"]}
    assert seconds == {"data": 1.5, "step": 3.0 + 7.0}
    assert found["zili_node_working"][0].value == 1
    state.machines = ["b", "a"]
    found = by_name(figures())
    value = {name: one[0].value for name, one in found.items() if len(one) == 1}
    told = account_of(run)
    assert value["zili_loss"] == 4.97 and value["zili_tokens_total"] == 768 and value["zili_planned_steps"] == 120
    assert value["zili_data_position_samples"] == 24 and value["zili_eval_bits_per_byte"] == 1.25
    assert value["zili_checkpoint_step"] == 3 and value["zili_checkpoint_save_seconds"] == 0.5
    assert value["zili_checkpoint_age_seconds"] == pytest.approx(time.time() - 15.0, abs=60)
    assert value["zili_lives"] == 3 and value["zili_restarts_total"] == 2 and value["zili_machines"] == 2
    assert value["zili_goodput_ratio"] == pytest.approx(told.share)
    assert {one.labels["phase"]: one.value for one in found["zili_phase_seconds"]} == pytest.approx(told.seconds)
    slow = {"run": "mine", "rank": "3", "phase": "data"}
    assert found["zili_straggler"] == [ServedFigure("zili_straggler", 1, slow)]
    assert found["zili_machine_left_out"] == [ServedFigure("zili_machine_left_out", 1, {"run": "mine", "node": "c"})]


def test_the_account_of_a_life_at_hand_reaches_up_to_now(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    events = RECORDED.read_text(encoding="utf-8").splitlines()
    began = next(n for n, line in enumerate(events) if '"started"' in line)
    (run / "supervision" / "events.jsonl").write_text("\n".join([*events[: began + 1], ""]), encoding="utf-8")
    standing = Standing(run)
    standing.look()
    assert standing.account is not None and standing.account.share == 0, "no event tells of a step"
    at = {"seconds": {"step": 6.0, "init": 1.0}, "phase": "step", "step": 9, "begun_after": 0, "saves": 0.0}
    standing.look({**at, "stood": 2.0, "went_on": 0.0})
    assert standing.account.seconds["step"] == 8.0, "who is in a step has lost nothing yet"
    assert "lost" not in standing.account.seconds
    standing.look()
    assert standing.account.share == 0, "a guess of now is not kept"


def test_a_growing_file_is_read_on_and_a_new_one_from_its_start(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    growing = Growing(file)
    assert list(growing.news()) == []
    file.write_bytes(b"one\ntw")
    assert list(growing.news()) == [None, b"one\n"]
    assert list(growing.news()) == []
    with file.open("ab") as more:
        more.write(b"o\n\nthree\n")
    assert list(growing.news()) == [b"two\n", b"three\n"]
    aside = tmp_path / "aside"
    aside.write_bytes(b"one\nanother\nand more than before\n")
    aside.replace(file)
    assert list(growing.news()) == [None, b"one\n", b"another\n", b"and more than before\n"]
    file.write_bytes(b"cut\n")
    assert list(growing.news()) == [None, b"cut\n"]
    assert list(Growing(file, end=2).news()) == [None], "a line that begins before is left out"


def test_a_thousand_machines_that_join_are_one_line(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    first = '{"event": "root", "term": 1, "time": 5, "monotonic": 5, "clock": "x"}'
    joined = '{"event": "joined", "machine": "m", "term": 1, "time": 6, "monotonic": 6, "clock": "x"}'
    (run / "supervision" / "events.jsonl").write_text("\n".join([first, *[joined] * 1000, ""]), encoding="utf-8")
    standing = Standing(run)
    standing.look()
    assert [one.text for one in standing.happened] == ["1,000 machines joined", "resumed"]


def test_what_is_broken_is_counted_and_nothing_more(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    broken = [
        *("{", "[]", "7", '"x"', "[" * 100_000, '{"kind": 3, "time": 1}', '{"kind": "train", "time": 1}', "\xff\x00"),
        '{"kind": "train", "time": "now", "step": 3}',
    ]
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n".join([*broken, ""]))
    timed = '"term": 9, "time": 1, "monotonic": 1, "clock": ""'
    wrong = [
        *(
            "{",
            f'{{{timed}, "event": "progress", "at": 3}}',
            f'{{{timed}, "event": "progress", "at": {{"seconds": 3}}}}',
            f'{{{timed}, "event": "progress", "at": {{"slowest": [{{"rank": 3}}]}}}}',
        ),
        *(f'{{{timed}, "event": "preparing", "machines": 3}}', f'{{{timed}, "event": "preparing", "life": "x"}}'),
        *(f'{{{timed}, "event": 3}}', f'{{{timed}, "event": "gone"}}', "[" * 100_000),
    ]
    with (run / "supervision" / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n".join([*wrong, ""]))
    (run / "supervision" / "state.json").write_text("{", encoding="utf-8")
    (run / "recipe.toml").write_text("[", encoding="utf-8")
    standing = Standing(run)
    standing.look()
    assert standing.broken == len(broken) + len(wrong)
    assert standing.last["step"] == 3 and standing.planned == 120 and standing.batch is None
    assert standing.account is not None and len(standing.account.lives) >= 3
    assert list(MachineFigures(run, "cpu", Pace("a"), State)())
