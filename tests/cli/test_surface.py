"""The command line's surface: version, help, what is refused before torch is loaded, and what pipes get."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from rich.console import Console

import zili as package
from zili.cli import output
from zili.cli.app import _GROUPS, app, command
from zili.cli.options import finite, model_at
from zili.cli.plan import _days
from zili.errors import CheckpointError

WITHOUT_TORCH = """
import json, os, sys
from zili.cli import main

sys.modules["torch"] = None  # an import of it raises
for words in json.loads(sys.argv[1]):
    if os.fork() == 0:
        sys.argv = ["zili", *words]
        main()
        os._exit(99)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_version_says_what_is_there(zili) -> None:
    outcome = zili("--version")
    assert outcome.code == 0 and outcome.out.startswith(f"zili {package.__version__}, Python 3.")
    assert "torch 2." in outcome.out


def test_help_names_a_first_step_and_every_command_in_its_group(zili) -> None:
    outcome = zili("--help")
    assert outcome.code == 0 and "First: `zili quickstart`" in " ".join(outcome.out.split())
    for group, commands in _GROUPS.items():
        assert group in outcome.out and all(f"│ {name} " in outcome.out for name in commands)


REFUSED = {
    "sample nowhere": (5, "nowhere does not exist"),
    "eval here --text nowhere.txt": (4, "nowhere.txt: no such file or folder"),
    "export empty --to x": (5, "empty holds no model"),
    "export nowhere --to x": (5, "nowhere does not exist"),
    "import gpt2 --to x": (5, "hf:OWNER/NAME"),
    "dialogues tiny.toml --model nowhere --to x": (5, "nowhere does not exist"),
    "drill empty": (3, "empty is no run that `zili launch` has begun"),
    "drill tiny.toml --kinds kil": (3, "there is no fault 'kil'"),
    "drill tiny.toml --seed -3": (3, "--seed -3: give a whole number"),
    "sample tiny.toml": (5, "tiny.toml is a recipe, not a model: train it first"),
    "--version": (0, ""),
}


def test_a_wrong_path_is_answered_before_torch_is_loaded(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").touch()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps([line.split() for line in REFUSED])],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    codes = [int(line) for line in done.stdout.splitlines() if line.lstrip("-").isdecimal()]
    assert codes == [code for code, _ in REFUSED.values()], done.stdout + done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("zili: ") == len(REFUSED) - 1
    assert all(said in done.stderr for _, said in REFUSED.values()), done.stderr


def test_files_that_cannot_be_written_are_said_before_anything_is_computed(zili, tmp_path: Path) -> None:
    """`/proc` refuses even the superuser; a name of 300 letters is no file's."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    for words in (
        ("plan", "telechat2-7b", "--chip", "h100", "--chips", 8, "--write", "/proc/x.toml"),
        ("plan", "telechat2-7b", "--chip", "h100", "--chips", 8, "--page", tmp_path / ("x" * 300)),
        ("align", "nowhere.toml", "--page", "/proc/x.html"),
        ("report", tmp_path, "--page", "/proc/x.html"),
        ("rehearse", "nowhere.toml", "--chips", 2, "--page", "/proc/x.html"),
        ("eval", tmp_path / "model", "--answers", tmp_path, "--out", "/proc/x.json"),
    ):
        outcome = zili(*words)
        assert outcome.code == 3 and "cannot be written" in outcome.err and not outcome.out, outcome
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    outcome = zili("sample", "Once upon a time, " * 20)
    assert outcome.code == 3 and "File name too long" in outcome.err


def test_no_option_takes_what_is_no_number(zili) -> None:
    """Bounds alone let infinity pass, and where there are none NaN."""
    group: Any = typer.main.get_command(app)
    options = [
        (name, option)
        for name in group.commands
        for option in command(name).params
        if float in (annotation := option.type_descriptor.annotation, *get_args(annotation))
    ]
    assert {"quickstart", "plan", "sample", "chat", "serve", "export", "doctor"} <= {name for name, _ in options}
    # How many tokens to train on is read by a parser of its own.
    unchecked = {option.name for _, option in options if getattr(option.callback, "__name__", None) != finite.__name__}
    assert unchecked == {"tokens"}
    for value in ("nan", "inf"):
        outcome = zili("quickstart", "--minutes", value)
        assert outcome.code == 2 and "--minutes" in outcome.err


def test_plans_of_seconds_are_told_in_seconds() -> None:
    assert [_days(days) for days in (3, 1, 0.01, 1e-5, 1e-9)] == [
        *("3.0 days", "24.0 hours", "14.4 minutes", "0.864 seconds", "8.64e-05 seconds")
    ]


def test_a_recipe_that_was_trained_leads_to_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text('folder = "runs/mine"')
    (tmp_path / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="give the run that it made, runs/mine"):
        model_at(Path("mine.toml"))
    with pytest.raises(CheckpointError, match="runs here: runs/mine"):
        model_at(Path("runs/mini"))
    assert model_at(Path("runs/mine")) == Path("runs/mine")


def test_in_a_pipe_nothing_is_wrapped_and_on_a_terminal_nothing_is_cut() -> None:
    cell = " ".join(f"word{number}" for number in range(60))
    for terminal in (False, True):
        to = Console(file=io.StringIO(), width=80 if terminal else output._WHOLE, force_terminal=terminal)
        rows = output.table(to, ("name", "what\nit is"), left=("name", "what\nit is"), title="Here", boxed=True)
        rows.add_row("a", cell)
        to.print(rows)
        lines = to.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert any(cell in line for line in lines) is not terminal
        assert all(f"word{number}" in "".join(lines) for number in range(60))
        if not terminal:
            assert lines[1].split() == ["name", "what", "it", "is"] and len(lines) == 3


def test_what_a_command_is_at_is_a_line_now_and_then_in_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(output, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now)}))
    with output.working("scoring") as say:
        for second in range(70):
            now = float(second)
            say(f"scoring: {second}")
    said = capsys.readouterr()
    assert said.out == "" and said.err.splitlines() == ["scoring", "scoring: 30", "scoring: 60"]


def test_help_is_there_at_once() -> None:
    """Seconds of this process's CPU, whatever else the machine does: it was 0.4 when this was written."""
    code = "import sys, time; sys.argv = ['zili', '--help']\nfrom zili.cli import main\n"
    code += "try: main()\nfinally: sys.stderr.write(f'{time.process_time()}')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert float(done.stderr) < 2


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """Zili's logger, as it was afterwards."""
    log = logging.getLogger("zili")
    before = log.handlers, log.propagate, log.level
    yield log
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])


def test_the_log_has_the_modules_names_and_is_as_loud_as_asked(
    log: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    saving = log.getChild("training.saving")
    for level in ("warning", "debug"):
        with pytest.raises(SystemExit):
            app(["--log-level", level, "config", "presets"])
        saving.debug("a detail")
        saving.warning("a matter")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "a matter"
    assert [line.split(maxsplit=2)[2] for line in said[1:]] == [
        "DEBUG zili.training.saving: a detail",
        "WARNING zili.training.saving: a matter",
    ]
