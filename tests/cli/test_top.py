"""`zili top`: one picture of runs of all kinds, and the live one on a terminal."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from outcome import Zili
from rich.cells import cell_len

RECORDED = Path(__file__).parents[1] / "supervision" / "two_kills.jsonl"


def record(run: Path, *lines: dict[str, object]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def step(number: int, **more: object) -> dict[str, object]:
    figures = {"loss": 5.0 - number / 100, "gradient_norm": 0.5, "learning_rate": 3e-4, "tokens": 1000 * number}
    speed = {"step_seconds": 0.5, "data_seconds": 0.125, "tokens_per_second": 2000.0, "matmul_share": 0.25}
    return {"kind": "train", "time": time.time() - 100 + number, "step": number, **figures, **speed, **more}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A run of `zili train`, at step 40 of 50."""
    run = tmp_path / "plain"
    record(run, {"kind": "start", "time": 1.0, "step": 0, "steps": 50}, *map(step, range(1, 41)))
    record(run, {"kind": "eval", "time": 2.0, "step": 40, "loss": 4.5, "bits_per_byte": 1.234})
    record(run, {"kind": "saved", "time": time.time() - 65, "step": 30, "path": "x", "bytes": 1, "seconds": 2.5})
    record(run, {"kind": "note", "time": time.time(), "text": "a note \x1b[31m with \n controls"})
    return run


@pytest.fixture
def supervised(plain: Path) -> Path:
    """The same under `zili launch`, as the events of a recorded run tell it; it ended with 0."""
    (plain / "supervision").mkdir()
    events = RECORDED.read_text(encoding="utf-8").splitlines()
    last = json.loads(events[-1])
    slow = {"rank": 3, "machine": "b", "step_seconds": 0.9, "data_seconds": 0.3}
    at = {"seconds": {}, "phase": "step", "step": 1, "step_seconds": 0.5, "slowest": [slow]}
    events.append(json.dumps({**last, "event": "progress", "at": at}))
    (plain / "supervision" / "events.jsonl").write_text("\n".join([*events, ""]), encoding="utf-8")
    state = {"machines": ["b", "a"], "left_out": {"c": "failed three times"}}
    (plain / "supervision" / "state.json").write_text(json.dumps(state), encoding="utf-8")
    return plain


@pytest.mark.parametrize("width", [80, 200])
def test_a_run_without_launch(zili: Zili, plain: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    shown = zili("top", plain, "--once")
    assert shown.code == 0 and not shown.err
    lines = shown.out.splitlines()
    assert max(map(cell_len, lines)) <= width and not any(line.endswith(" ") for line in lines)
    text = " ".join(shown.out.split())
    for what in (
        *("plain · step 40 of 50 (80 % )", "10 s left", "loss 4.6000", "held out 1.234 bits/byte (step 40)"),
        *("2,000 tokens/s · 25% of matmul peak", "25 % of it waiting for data", "40k tokens read"),
        *("step 30, 1 min 5 s ago · took 2.5 s", "of the last 40 records", "step 75 %", "data wait 25 %"),
        "a note ␛[31m with controls",
    ):
        assert what.replace("% )", "%)").replace(" ", "") in text.replace("\u202f", "").replace(" ", ""), what
    assert "\x1b" not in shown.out


def test_a_supervised_run_that_has_ended(zili: Zili, supervised: Path) -> None:
    slow = {"process": 3, "place": "process 3 on b (cpu)", "phase": "step", "over": False, "seconds": 2, "median": 1.5}
    record(supervised, {"kind": "straggler", "time": 1.0, "step": 40, **slow})
    shown = zili("top", supervised)  # without --once: it ends since the run has
    assert shown.code == 0
    text = shown.out.replace("\u202f", " ")
    assert "finished" in text and "2 restarts" in text and "43.5% of 1 min" in text
    assert "0.5 s a step is usual · longest 0.9 s: process 3 on b, 0.3 s of it waiting for data" in text
    assert "process 3 on b (cpu) in step: 2 s a step, where the median is 1.5 s" in text
    assert "machine c failed three times" in text and "the run is over, exit code 0" in text
    for part in ("step 43", "join 22 %", "rest"):
        assert part in text


def test_a_damaged_run_is_shown_with_a_line_about_it(zili: Zili, supervised: Path) -> None:
    with (supervised / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "train", "st\n\xff\xfe\n[]\n')
        file.write(json.dumps(step(41, loss="x", step_seconds=None, data_seconds=[], tokens="many")).encode() + b"\n")
        file.write(b'{"kind": "train", "time": 1, "step": 42, "lo')
    with (supervised / "supervision" / "events.jsonl").open("a") as file:
        file.write('{"event"\n')
    (supervised / "recipe.toml").write_text("= broken", encoding="utf-8")
    shown = zili("top", supervised, "--once")
    assert shown.code == 0 and "step 41 of 50" in shown.out and shown.out.count("no whole record") == 1
    assert "4 lines of its files are no whole record and are left out" in shown.out


@pytest.mark.parametrize("what", ["nothing", "empty", "file"])
def test_what_is_no_run_is_one_line(zili: Zili, tmp_path: Path, what: str) -> None:
    place = tmp_path / what
    if what == "empty":
        place.mkdir()
    elif what == "file":
        place.write_text("x", encoding="utf-8")
    shown = zili("top", place, "--once")
    assert shown.code == 4 and not shown.out and shown.err.count("\n") == 1 and "is not a run" in shown.err


def test_a_run_that_has_done_nothing_yet(zili: Zili, tmp_path: Path) -> None:
    (tmp_path / "run" / "supervision").mkdir(parents=True)
    for content in (None, b"", b"\n"):
        if content is not None:
            (tmp_path / "run" / "metrics.jsonl").write_bytes(content)
            (tmp_path / "run" / "supervision" / "events.jsonl").write_bytes(content)
        shown = zili("top", tmp_path / "run", "--once")
        assert shown.code == 0 and shown.out.split() == ["run", "run", "·", "step", "0", "·", "no", "step", "yet"]


def test_figures_that_are_no_numbers_and_clocks_that_go_back(zili: Zili, tmp_path: Path) -> None:
    run = tmp_path / "run"
    record(run, step(1, time=time.time() + 1e6), step(2, time=-5.0, loss=float("nan")), step(2), step(3, step=1e300))
    shown = zili("top", run, "--once")
    assert shown.code == 0 and "nan" not in shown.out


def test_live_it_follows_the_run_and_ctrl_c_ends_it(plain: Path) -> None:
    screen, end = pty.openpty()
    words = [sys.executable, "-m", "zili", "top", str(plain), "--every", "0.1"]
    environment = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm"}
    process = subprocess.Popen(words, stdin=end, stdout=end, stderr=end, env=environment)
    os.close(end)
    try:
        seen = until(screen, b"step 40 of 50")
        record(plain, step(41))
        seen += until(screen, b"step 41 of 50")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        seen += rest(screen)
    finally:
        process.kill()
        process.wait()
        os.close(screen)
    assert b"Traceback" not in seen and seen.rstrip().endswith(b"\x1b[?25h"), "the cursor is back"


def until(screen: int, text: bytes) -> bytes:
    seen, end = b"", time.monotonic() + 60
    while text not in seen:
        assert time.monotonic() < end, seen
        seen += os.read(screen, 65536)
    return seen


def rest(screen: int) -> bytes:
    seen = b""
    try:
        while piece := os.read(screen, 65536):
            seen += piece
    except OSError:  # nobody has the other end any more
        pass
    return seen


@pytest.mark.parametrize("place", ["x", "127.0.0.1:", "70000"])
def test_figures_are_served_nowhere_else_than_at_a_place(
    zili: Zili, recipe_file: Path, tmp_path: Path, place: str
) -> None:
    refused = zili("launch", recipe_file, "--metrics", place)
    assert refused.code == 3 and f"{place!r} is no place for figures: give PORT or HOST:PORT" in refused.err
    assert not (tmp_path / "run").exists(), "nothing is begun"
