"""Measurements that are kept for a machine's next runs."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from zili.ops.timings import Timings

KEY = {"cpu": "Xeon", "threads": "2", "torch": "2.13.0"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZILI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "timings"


def never() -> float:
    pytest.fail("measured again")


def test_a_figure_is_measured_once_and_is_the_users_own(folder: Path) -> None:
    assert Timings(KEY).measured("linear", lambda: 1.25) == 1.25
    again = Timings(KEY)
    assert again.known("linear") and again.measured("linear", never) == 1.25 and again.problem is None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.suffix for path in folder.iterdir()] == [".json"], "nothing half-written is left"


@pytest.mark.parametrize("changed", KEY)
def test_another_machine_or_software_measures_for_itself(changed: str) -> None:
    Timings(KEY).measured("linear", lambda: 1.25)
    assert Timings(KEY | {changed: "another"}).measured("linear", lambda: 0.75) == 0.75
    assert Timings(KEY).measured("linear", never) == 1.25


def test_of_two_runs_at_once_both_go_on_with_the_first_figure() -> None:
    one, other = Timings(KEY), Timings(KEY)
    one.measured("linear", lambda: 1.25)
    assert other.measured("linear", lambda: 0.75) == 1.25
    other.measured("attention", lambda: 3.0)
    assert one.measured("attention", lambda: 4.0) == 3.0


def cut(path: Path) -> None:
    path.write_text(path.read_text()[:-20])


def no_number(path: Path) -> None:
    path.write_text(path.read_text().replace("1.25", '"fast"'))


def nan(path: Path) -> None:
    path.write_text(path.read_text().replace("1.25", "NaN"))


def of_another(path: Path) -> None:
    path.write_text(path.read_text().replace("Xeon", "EPYC"))


def a_list(path: Path) -> None:
    path.write_text(json.dumps([1, 2]))


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize("damage", [cut, no_number, nan, of_another, a_list, no_text])
def test_a_damaged_file_is_named_and_written_anew(damage: Callable[[Path], None]) -> None:
    first = Timings(KEY)
    first.measured("linear", lambda: 1.25)
    assert first.path is not None
    damage(first.path)
    second = Timings(KEY)
    assert second.problem is not None and str(first.path) in second.problem and "measured anew" in second.problem
    assert second.measured("linear", lambda: 0.75) == 0.75
    third = Timings(KEY)
    assert third.problem is None and third.measured("linear", never) == 0.75


def test_a_folder_that_cannot_be_written_costs_a_line_and_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ZILI_CACHE", str(tmp_path / "file"))
    timings = Timings(KEY)
    assert timings.measured("linear", lambda: 1.25) == 1.25
    assert timings.problem is not None and "ZILI_CACHE" in timings.problem
    assert timings.measured("linear", never) == 1.25


def test_a_folder_that_others_could_write_to_is_made_private(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    Timings(KEY).measured("linear", lambda: 1.25)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_later_life_need_not_compare_again_what_an_earlier_one_did_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    Timings(KEY).agrees("linear fast")
    assert not Timings(KEY).agreed("linear fast"), "a run that a person begins looks again"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Timings(KEY).agreed("linear fast")
    assert not Timings(KEY).agreed("linear other")
    assert not Timings(KEY | {"device": "another"}).agreed("linear fast")
