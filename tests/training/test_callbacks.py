"""The run's record, TensorBoard's and the progress display."""

from __future__ import annotations

import io
import json
import re
import resource
import socket
import time
import urllib.request
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tiny_run import PEAK, At, Recipe, Recorder, die_after_step, interrupt, run_apart, train

from zili.errors import ConfigError
from zili.models.arithmetic import parameter_shapes
from zili.training.callbacks import Callback, MetricsLog, ProgressDisplay, StepRecord
from zili.training.callbacks.named import named_callbacks
from zili.training.callbacks.tensorboard import TensorBoardLog
from zili.training.saving import Saved


def lines(folder: Path) -> list[dict[str, Any]]:
    """The record, every line of it valid JSON by the standard (no NaN)."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_the_record_holds_every_step_as_it_was(recipe: Recipe) -> None:
    recorder, config = Recorder(), recipe()
    train(config, MetricsLog(config.folder), recorder)
    first, *others = lines(config.folder)
    rest = [line for line in others if line["kind"] == "train"]
    parameters = sum(
        rows * (columns[0] if columns else 1) for rows, *columns in parameter_shapes(config.model).values()
    )
    assert first["kind"] == "start" and first["step"] == 0 and first["steps"] == 6
    assert (first["parameters"], first["matmul_peak"]) == (parameters, PEAK)
    assert [{k: v for k, v in line.items() if k not in ("kind", "time")} for line in rest] == [
        record.figures() for record in recorder.records
    ]
    saved = [line for line in others if line["kind"] == "saved"]
    assert [line["step"] for line in saved] == [2, 4, 6]
    assert saved and all(line["bytes"] > 0 and line["seconds"] > 0 for line in saved)
    times = [line["time"] for line in (first, *others)]
    assert times == sorted(times)


def test_after_a_kill_the_steps_that_happen_again_are_recorded_once(recipe: Recipe) -> None:
    config = recipe("checkpoint.every=2", "training.steps=8")
    whole = recipe("training.steps=8", f"folder={recipe().folder}-whole")
    for each in (config, whole):
        train(each, MetricsLog(each.folder), *([At(5, interrupt)] if each is config else []))
    # Steps 6 and 7 were recorded, then the machine went down; the newest checkpoint is of step 5.
    log = MetricsLog(config.folder)
    for step in (6, 7):
        log.write("train", step=step, loss=99.0)
    log.write("eval", step=6, bits_per_byte=99.0)
    log.write("note", text="a note has no step, so it stays")
    with log.path.open("a") as file:
        file.write('{"kind": "train", "st')
    train(config, MetricsLog(config.folder))
    found = lines(config.folder)
    assert [line["step"] for line in found if line["kind"] == "train"] == list(range(1, 9))
    expected = [line["loss"] for line in lines(whole.folder) if line["kind"] == "train"]
    assert [line["loss"] for line in found if line["kind"] == "train"] == expected
    assert not any(line["kind"] == "eval" for line in found)
    assert [line["step"] for line in found if line["kind"] == "start"] == [0, 5]
    notes = [line["text"] for line in found if line["kind"] == "note"]
    assert notes[0].startswith("a note") and "resumed from" in notes[1], "the cut line takes no other with it"


def test_notes_in_any_script_survive(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "new" / "folder")
    log.on_note("自立 \u2028 line separators too")
    assert [line["text"] for line in lines(tmp_path / "new" / "folder")] == ["自立 \u2028 line separators too"]


def board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of the event files, as TensorBoard itself reads them."""
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    found = defaultdict(list)
    for tag in accumulator.Tags()["scalars"]:
        found[tag] = [(event.step, event.value) for event in accumulator.Scalars(tag)]
    return found


def test_tensorboard_shows_the_recorded_figures(recipe: Recipe) -> None:
    recorder, log = Recorder(), TensorBoardLog()
    train(recipe(), recorder, log, At(4, lambda: log.on_evaluation(4, {"bits_per_byte": 1.5})))
    found = board(recipe().folder)
    assert found["eval/bits_per_byte"] == [(4, 1.5)]
    for name in recorder.records[0].figures().keys() - {"step"}:
        expected = [(record.step, getattr(record, name)) for record in recorder.records]
        assert [step for step, _ in found[f"train/{name}"]] == [step for step, _ in expected]
        assert [v for _, v in found[f"train/{name}"]] == pytest.approx([v for _, v in expected], rel=1e-6), name


class RunWithBoard:
    """Picklable: a run that logs to TensorBoard and is killed."""

    def __call__(self, config: Any, step: int) -> None:
        from tiny_run import die

        train(config, TensorBoardLog(), At(step, die))


def test_tensorboard_has_no_gap_and_nothing_twice_after_a_kill(recipe: Recipe) -> None:
    config = recipe("training.steps=8", "checkpoint.every=3")
    assert run_apart(RunWithBoard(), config, 5) == -9
    time.sleep(1.1)  # event files are ordered by the second in their names
    train(config, TensorBoardLog())
    assert [step for step, _ in board(config.folder)["train/loss"]] == list(range(1, 9))


class Steps:
    """What the display asks of a trainer."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.step = 0


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ")


def shown(recipe: Recipe, steps: int, seconds: float, *overrides: str, until: int | None = None) -> list[str]:
    """What a run prints without a terminal, steps of `seconds` each; of each line what is behind its stamp."""
    output, clock = io.StringIO(), Clock()
    display = ProgressDisplay(Console(file=output, width=20), clock)
    trainer: Any = Steps(recipe(f"training.steps={steps}", *overrides))
    display.on_start(trainer)
    for step in range(1, (until or steps) + 1):
        clock.now += seconds
        display.on_step(
            trainer,
            StepRecord(step, step * 100, step, 2.5, 1e-3, 1.25, 0.1, 0.0, 12_345.6, 0.789, memory_bytes=3 * 10**9),
        )
    display.on_end(trainer)
    lines = output.getvalue().splitlines()
    assert all(STAMP.match(line) for line in lines), lines
    return [STAMP.sub("", line) for line in lines]


@pytest.mark.parametrize(
    ("steps", "seconds", "overrides", "told"),
    [
        (5, 31.0, [], [1, 2, 3, 4, 5]),
        (20, 10.0, [], [1, 4, 7, 10, 13, 16, 19, 20]),
        (50_000, 0.001, [], [1, 30_001, 50_000]),
        (20, 10.0, ["logging.line_seconds=60"], [1, 7, 13, 19, 20]),
        (5, 0.01, ["logging.line_seconds=0"], [1, 2, 3, 4, 5]),
    ],
)
def test_without_a_terminal_a_run_is_told_by_the_clock(
    recipe: Recipe, steps: int, seconds: float, overrides: list[str], told: list[int]
) -> None:
    begun, *found = shown(recipe, steps, seconds, *overrides)
    assert begun.startswith(f"step 0/{steps}  begins")
    expected = [f"step {step}/{steps}" for step in told]
    # Thousandths of a second add up with an error that may move a line by a step.
    assert [line.split("  ")[0] for line in found] == expected or (steps == 50_000 and len(found) == 3)


def test_a_run_that_is_stopped_tells_its_last_step(recipe: Recipe) -> None:
    assert shown(recipe, 50, 1.0, until=20)[-1].startswith("step 20/50")


def test_a_line_holds_the_figures_and_the_time_that_is_left(recipe: Recipe) -> None:
    figures = "loss 2.500  lr 1.00e-03  norm 1.25  12,346 tokens/s  79% of matmul peak  3.0 GB"
    assert shown(recipe, 1, 1.0)[1:] == [f"step 1/1  {figures}"]
    assert shown(recipe, 100, 90.0, until=3)[-1] == f"step 3/100  {figures}  2:25:30 left"


def test_a_checkpoint_is_a_line_once_it_is_whole(recipe: Recipe) -> None:
    output, config = io.StringIO(), recipe("checkpoint.every=4", "checkpoint.keep=9")
    found = []

    class Whole(Callback):
        def on_saved(self, saved: Saved) -> None:
            found.append((saved.path.name, saved.bytes == sum(f.stat().st_size for f in files(saved.path))))

    def files(folder: Path) -> list[Path]:
        return list(folder.glob("shard-*"))

    train(config, ProgressDisplay(Console(file=output)), Whole())
    assert found == [("step-00000004", True), ("step-00000006", True)]
    told = [line.split("  ", 1)[1] for line in output.getvalue().splitlines() if "  saved " in line]
    assert [line.split(": ")[0] for line in told] == [f"saved {config.folder}/checkpoints/{name}" for name, _ in found]


def test_the_record_has_the_memory_that_the_process_has_had(recipe: Recipe) -> None:
    """The kernel's own figure: what getrusage has is at least as much, since it counts the parent's too."""
    config = recipe("training.steps=2")
    train(config, MetricsLog(config.folder))
    had = [line["memory_bytes"] for line in lines(config.folder) if line["kind"] == "train"]
    most = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 50e6 < had[0] <= had[1] < 1.02 * most, "Linux counts pages in batches, a thread each"


def test_the_newest_evaluation_is_shown_from_then_on(recipe: Recipe) -> None:
    output = io.StringIO()
    display = ProgressDisplay(Console(file=output, width=200))
    display.on_evaluation(3, {"bits_per_byte": 2.3456})
    display.on_step(Steps(recipe("training.steps=4")), StepRecord(4, 1, 1, 2.5, 0, 0, 1, 0, 1, 0))  # type: ignore[arg-type]
    assert "2.346 bits/byte" in output.getvalue()


def test_the_terminal_is_left_as_it_was_when_the_run_fails(recipe: Recipe) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    display = ProgressDisplay(console)
    display.on_start(Steps(recipe()))  # type: ignore[arg-type]
    assert "\x1b[?25l" in console.file.getvalue(), "the cursor is hidden while the bar moves"  # type: ignore[attr-defined]
    display.close()
    display.close()
    assert console.file.getvalue().rstrip().endswith("\x1b[?25h")  # type: ignore[attr-defined]


def test_die_after_step_kills(recipe: Recipe) -> None:
    """The other tests lean on it."""
    assert run_apart(die_after_step, recipe(), 1) == -9
    assert not (recipe().folder / "checkpoints").exists()


def test_a_full_disk_leaves_gaps_in_the_record_and_is_said_once(recipe: Recipe) -> None:
    """/dev/full refuses what is written to it as a full disk does."""
    config, said = recipe("checkpoint.every=100"), list[str]()
    log = MetricsLog(config.folder, said.append)

    def fill() -> None:
        log.path.rename(config.folder / "before")
        log.path.symlink_to("/dev/full")

    assert train(config, log, At(2, fill), At(4, log.path.unlink)).done
    assert [line["step"] for line in lines(config.folder) if line["kind"] == "train"] == [5, 6]
    first, last = said
    assert "No space left on device" in first and str(log.path) in first and "failed 2 times" in last


class AtStep:
    """What TensorBoard's log asks of a trainer."""

    def __init__(self, step: int, config: Any = None, note: Any = None) -> None:
        self.step = step
        self.config = config
        self.note = note


def test_tensorboard_has_the_settings_of_a_run(recipe: Recipe) -> None:
    """As its own table of hyperparameters reads them."""
    config = recipe("optimizer.learning_rate=0.00125", "schedule.kind=wsd")
    log: Any = TensorBoardLog()
    log.on_start(AtStep(0, config))
    log.on_end(AtStep(0, config))
    accumulator = EventAccumulator(str(config.folder / "tensorboard"))
    accumulator.Reload()
    content = accumulator.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["optimizer.learning_rate"].number_value == 0.00125
    assert settings["schedule.kind"].string_value == "wsd"
    assert settings["model.layers"].number_value == config.model.layers
    assert settings["chip.compile"].bool_value is False
    assert [path.name for path in (config.folder / "tensorboard").iterdir() if path.is_dir()] == []


def test_tensorboard_goes_on_after_a_full_disk(
    recipe: Recipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = list[str]()
    log: Any = TensorBoardLog()
    log.on_start(AtStep(0, recipe(), said.append))
    log.on_evaluation(1, {"loss": 1.0})
    log.on_checkpoint(AtStep(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        for step in (2, 3, 4):
            log.on_evaluation(step, {"loss": 1.0})
            log.on_checkpoint(AtStep(step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    time.sleep(1.1)  # event files are ordered by the second in their names
    log.on_checkpoint(AtStep(4))
    log.on_evaluation(5, {"loss": 2.0})
    log.on_end(AtStep(5))
    found = board(recipe().folder)["eval/loss"]
    assert found[0] == (1, 1.0) and found[-1] == (5, 2.0)
    assert len(said) == 2 and "cannot be written" in said[0] and "has gaps" in said[1]
    assert "Traceback" not in capfd.readouterr().err


def test_a_log_on_a_full_disk_ends_no_run() -> None:
    with suppress(OSError), Path("/dev/full").open("w") as full:
        display = ProgressDisplay(Console(file=full))
        display.on_note("a note")
        display.on_evaluation(3, {"loss": 1.0})
        with pytest.raises(OSError, match="No space"):
            full.flush()


def test_the_trainer_serves_its_figures_while_it_trains(recipe: Recipe) -> None:
    recorder = Recorder()
    found: dict[tuple[str, str | None], Any] = {}

    def scrape() -> None:
        url = next(note for note in recorder.notes if "Prometheus" in note).split()[-1]
        with urllib.request.urlopen(url, timeout=20) as answer:
            for family in text_string_to_metric_families(answer.read().decode()):
                found.update({(one.name, one.labels.get("phase")): one for one in family.samples})

    endpoint = named_callbacks(recipe("callbacks.prometheus.port=0"))[0]
    config = recipe("checkpoint.every=2", "checkpoint.asynchronous=false")
    train(config, recorder, endpoint, At(5, scrape))
    value = {name: one.value for (name, _), one in found.items()}
    fifth = recorder.records[4]
    assert value["zili_loss"] == fifth.loss and value["zili_grad_norm"] == fifth.gradient_norm
    assert value["zili_step"] == 5 and value["zili_planned_steps"] == 6 and value["zili_mfu"] == fifth.matmul_share
    assert value["zili_data_position_samples"] == 5 * config.training.global_batch
    assert value["zili_checkpoint_step"] == 4 and 0 <= value["zili_checkpoint_age_seconds"] < 600
    assert value["zili_restarts_total"] == 0 and 0 < value["zili_goodput_ratio"] <= 1
    assert found["zili_process_in_phase", "step"].labels == {"run": config.folder.name, "rank": "0", "phase": "step"}
    url = next(note for note in recorder.notes if "Prometheus" in note).split()[-1]
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=20)


def test_a_port_that_is_taken_is_a_note_and_the_run_goes_on(recipe: Recipe) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        recorder = Recorder()
        train(recipe(), recorder, *named_callbacks(recipe(f"callbacks.prometheus.port={port}")))
    assert len(recorder.records) == 6
    assert any(f"no figures for Prometheus at 127.0.0.1:{port}" in note for note in recorder.notes)
    with pytest.raises(ConfigError, match="port 65536 is not between 0 and 65535"):
        named_callbacks(recipe("callbacks.prometheus.port=65536"))
