"""Weights & Biases and SwanLab: their own clients offline where they are installed, and clients that refuse."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_run import At, Recorder, train

from zili.errors import ConfigError
from zili.training.callbacks.trackers import SwanLabLog, WandbLog

CLIENT = """
calls = []
broken = None
class Settings:
    def __init__(self, **_): pass
class Run:
    def define_metric(self, *_, **__): pass
    def log(self, figures, step=None):
        if broken == "log": raise OSError(28, "No space left on device")
        calls.append((step if step is not None else figures["step"], set(figures)))
    def finish(self, **how): calls.append(how)
def init(**given):
    if broken == "init": raise RuntimeError("no such key\\nmore")
    calls.append(given)
    return Run()
"""


@pytest.fixture(params=["wandb", "swanlab"])
def client(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module in the client's place that keeps what it is told."""
    (tmp_path / f"{request.param}.py").write_text(CLIENT, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, request.param, raising=False)
    importlib.invalidate_caches()
    yield importlib.import_module(request.param)
    sys.modules.pop(request.param)  # the next test may want the real one


def log_of(client: Any) -> Any:
    return {"wandb": WandbLog, "swanlab": SwanLabLog}[client.__name__](project="p", mode="offline")


def test_every_figure_goes_to_the_same_remote_run_when_a_run_goes_on(recipe: Any, client: Any) -> None:
    log = log_of(client)
    train(recipe("training.steps=2"), log, At(2, lambda: log.on_evaluation(2, {"bits_per_byte": 1.5})))
    train(recipe("training.steps=3"), log_of(client))
    first, one, evaluated, two, end, second, three, _ = client.calls
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["name"] == "run"
    assert first["config"]["training"]["steps"] == 2
    assert {step for step, _ in (one, two, three)} == {1, 2, 3} or (one[0], three[0]) == (1, 3)
    assert "train/loss" in one[1] and "eval/bits_per_byte" in {*evaluated[1], *two[1]}
    assert end in ({"exit_code": 0}, {"state": "success"})


@pytest.mark.parametrize("broken", ["init", "log"])
def test_a_client_that_refuses_is_a_note_and_the_run_goes_on(recipe: Any, client: Any, broken: str) -> None:
    client.broken, heard = broken, Recorder()
    trainer = train(recipe("training.steps=3"), log_of(client), heard)
    (said,) = [note for note in heard.notes if client.__name__ in note]
    assert trainer.step == 3 and "gets no more of this run" in said and "\n" not in said


def test_a_run_that_fails_is_told_as_failed(recipe: Any, client: Any) -> None:
    log = log_of(client)
    log.on_error(None, RuntimeError())  # before it began
    train(recipe("training.steps=1"), log)
    log._run = client.Run()
    log.on_error(None, RuntimeError())
    assert client.calls[-1] in ({"exit_code": 1}, {"state": "crashed"})


def test_without_the_client_the_way_to_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zili.training.callbacks.trackers.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'zili\[wandb\]'"):
        WandbLog()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "log"), [("wandb", WandbLog), ("swanlab", SwanLabLog)])
def test_the_real_client_offline(recipe: Any, name: str, log: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(name, reason=f"the extra {name} is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    heard, config = Recorder(), recipe("training.steps=2")
    train(config, log(mode="offline"), heard)
    train(recipe("training.steps=4"), log(mode="offline"), heard)
    assert not [note for note in heard.notes if name in note], heard.notes
    runs = [path for path in (config.folder / name).iterdir() if "run-" in path.name]
    assert len(runs) == 2, "one of each start, of one identity"
    identity = (config.folder / name / "id").read_text(encoding="utf-8")
    assert all(identity in path.name for path in runs)
    for path in runs:
        assert any(b"train/loss" in file.read_bytes() for file in path.rglob("*") if file.is_file()), path
