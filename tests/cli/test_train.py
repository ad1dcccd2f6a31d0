"""`zili train` and `zili config`: what they print, leave behind and refuse."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import forks
import pytest
from waiting import until

from zili.config import load_recipe
from zili.data import Document, Tokenizer, build_store
from zili.durable import locked
from zili.training.callbacks import Callback, MetricsLog
from zili.training.checkpoints import list_checkpoints
from zili.training.trainer import Trainer

Listing = Callable[[], list[str]]


def one_error(outcome, code: int, *parts: str) -> None:
    """Exit code `code`, and one message on standard error that holds all of `parts`."""
    assert outcome.code == code, outcome
    assert outcome.err.startswith("zili: ") and outcome.err.count("zili: ") == 1
    assert "Traceback" not in outcome.err + outcome.out
    assert all(part in outcome.err for part in parts), outcome.err


def test_a_run_leaves_a_folder_that_goes_on_by_itself(zili, recipe_file: Path, tmp_path: Path) -> None:
    first = zili("train", recipe_file, "--set", "training.steps=3", "--set", "schedule.kind=constant")
    assert first.code == 0, first
    assert "Done: 3 steps, 384 tokens" in first.out and "zili sample" in first.out
    assert "chip.precision = fp32: asked for" in first.out
    own = tmp_path / "run" / "recipe.toml"
    assert load_recipe(own).training.steps == 3
    again = zili("train", own, "--set", "training.steps=5")
    assert again.code == 0 and "resumed from" in again.out and "Done: 5 steps" in again.out
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "checkpoints",
        "metrics.jsonl",
        "recipe.toml",
        "tokenizer",
    }


def first_loss(folder: Path) -> float:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return next(line["loss"] for line in lines if line["kind"] == "train")


def test_a_run_starts_from_the_weights_of_a_published_folder_or_of_another_run(
    zili, recipe_file: Path, tmp_path: Path
) -> None:
    run, published = tmp_path / "run", tmp_path / "published"
    assert zili("train", recipe_file, "--set", "training.steps=5", "--set", "schedule.kind=constant").code == 0
    assert zili("export", run, "--to", published).code == 0
    losses = []
    for source in (run, published):
        folder = tmp_path / f"from-{source.name}"
        changes = (f"training.start_from={source}", f"folder={folder}", "training.steps=1")
        outcome = zili("train", recipe_file, *(word for change in changes for word in ("--set", change)))
        assert outcome.code == 0 and f"weights from {source}" in outcome.out.replace("\n", "")
        losses.append(first_loss(folder))
    # The first batch again, by a model that has learned from it.
    assert losses[0] == losses[1] < first_loss(run) - 0.1


def test_a_run_does_not_start_from_another_shape(zili, recipe_file: Path, tmp_path: Path) -> None:
    assert zili("train", recipe_file, "--set", "training.steps=1").code == 0
    start = ("--set", f"training.start_from={tmp_path / 'run'}", "--set", f"folder={tmp_path / 'other'}")
    one_error(zili("train", recipe_file, *start, "--set", "model.layers=3"), 5, "layers")
    assert not (tmp_path / "other" / "checkpoints").exists()


def test_an_interrupted_run_says_how_to_go_on(
    zili, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Callback, trainer: Trainer) -> None:
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MetricsLog, "after_step", stop)
    outcome = zili("train", recipe_file)
    assert outcome.code == 130
    assert "Stopped at step 3; the checkpoint is written" in outcome.out
    command = outcome.out.splitlines()[-1].split()
    assert command[:2] == ["zili", "train"] and Path(command[2]) == tmp_path / "run" / "recipe.toml"


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_the_process_saves_and_the_same_command_goes_on(
    recipe_file: Path, tmp_path: Path, number: int
) -> None:
    endless = [sys.executable, "-m", "zili", "train", str(recipe_file), "--set", "training.steps=1000000"]
    endless += ["--set", "checkpoint.every=0"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: metrics.exists() and '"train"' in metrics.read_text())
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert err == "" and "Go on with:\n" in out and "zili train" in out
    (saved,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    step = int(saved.name.removeprefix("step-"))
    again = forks.zili("train", recipe_file, "--set", f"training.steps={step + 2}")
    assert again.returncode == 0, again.stderr
    assert f"at step {step}" in again.stdout and f"Done: {step + 2} steps" in again.stdout


def test_ctrl_c_outside_the_loop_ends_with_one_line(zili, recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("zili.api.open_run", interrupted)
    outcome = zili("train", recipe_file)
    assert outcome.code == 130 and outcome.err == "zili: interrupted; run the same command again to go on\n"


def test_show_prints_a_recipe_that_reads_back_and_every_reason(zili, recipe_file: Path, tmp_path: Path) -> None:
    outcome = zili("config", "show", recipe_file, "--set", "training.micro_batch=auto")
    assert outcome.code == 0
    comments = [line for line in outcome.out.splitlines() if line.startswith("# ")]
    assert any(line.startswith("# training.micro_batch = 4: about 0.0 GiB of") for line in comments)
    shown = tomllib.loads(outcome.out)
    assert shown["training"]["micro_batch"] == 4 and shown["chip"]["name"] == "cpu"
    assert not (tmp_path / "run").exists()


def test_reference_and_presets_are_printed(zili) -> None:
    assert zili("config", "reference").out.startswith("# Every key of a recipe")
    assert json.loads(zili("config", "presets", "--json").out)["telechat2-115b"]["parameters"] == 113_282_916_352
    assert "113,282,916,352" in zili("config", "presets").out  # TeleChat2-115B: its published files' bytes over 4


def bigger(store: str) -> tuple[str, ...]:
    return ("--set", f'data.sources=[{{store="{store}"}}]')


def test_wrong_usage(zili) -> None:
    assert zili("train").code == 2
    assert zili("trian").code == 2


MEMORY = ("hidden_size=16384", "layers=100", "heads=128", "kv_heads=128", "head_dim=128", "ffn_hidden_size=65536")
REFUSED = {
    "no recipe": (["nowhere.toml"], 3, ["no recipe nowhere.toml", "zili quickstart", "zili config presets"]),
    "an unknown key": (["optimizer.learnig_rate=1"], 3, ["tiny.toml", "did you mean optimizer.learning_rate?"]),
    "a malformed override": (["seed"], 3, ["'seed'", "--set table.key=value"]),
    "more than memory": ([f"model.{size}" for size in MEMORY], 3, ["this run needs about", "GiB free", "smaller"]),
    "a vocabulary too small": (["model.vocab_size=299"], 3, ["300 tokens", "model.vocab_size is 299", "raise it"]),
    "an unknown operation": (["chip.operations.conv=x"], 3, ["no operation 'conv'", "linear"]),
    "an unknown version": (["chip.operations.linear=x"], 3, ["no version 'x'", "reference"]),
    "no store": (['data.sources=[{store="nowhere"}]'], 4, ["nowhere.json", "Build the store again"]),
    "no tokenizer": (["data.tokenizer=nowhere"], 4, ["nowhere"]),
    "a text too short": (
        ["training.sequence_length=16000", "model.max_length=16000", "model.heads=1", "training.micro_batch=1"],
        4,
        ["fill no row of 16000"],
    ),
    "an unknown chip": (["chip.name=asend"], 6, ["'asend'", "did you mean ascend", "zili chips"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_is_refused_in_one_message_and_leaves_nothing(
    zili, recipe_file: Path, listing: Listing, case: str
) -> None:
    arguments, code, parts = REFUSED[case]
    before = listing()
    if arguments == ["nowhere.toml"]:
        outcome = zili("train", *arguments)
    else:
        outcome = zili("train", recipe_file, *(word for override in arguments for word in ("--set", override)))
    one_error(outcome, code, *parts)
    assert listing() == before


def test_a_store_built_with_another_tokenizer(zili, recipe_file: Path, tmp_path: Path, listing: Listing) -> None:
    other = Tokenizer.train(["quite another text, zebra zebra zebra"] * 20, vocab_size=290)
    build_store([Document("zebra " * 100, "z")], other, tmp_path / "zebra", engine="tokenizers")
    before = listing()
    outcome = zili("train", recipe_file, *bigger(str(tmp_path / "zebra")))
    one_error(outcome, 4, str(tmp_path / "zebra"), other.sha256[:12], "Use that tokenizer")
    assert listing() == before


def test_a_truncated_bin(zili, recipe_file: Path, tiny_data: Path, tmp_path: Path, listing: Listing) -> None:
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(tiny_data / f"train{suffix}", tmp_path / f"cut{suffix}")
    size = (tmp_path / "cut.bin").stat().st_size
    os.truncate(tmp_path / "cut.bin", size - 10)
    before = listing()
    outcome = zili("train", recipe_file, *bigger(str(tmp_path / "cut")))
    one_error(outcome, 4, f"{tmp_path / 'cut.bin'}", f"take {size} bytes, found {size - 10}", "Build the store again")
    assert listing() == before


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("model.layers=3", "model.layers 2 there, 3 here"),
        ("optimizer.name=muon", "another optimizer"),
        ("seed=7", "seed 0 there, 7 here"),
    ],
)
def test_a_checkpoint_of_another_run(
    zili, recipe_file: Path, tmp_path: Path, listing: Listing, override: str, part: str
) -> None:
    assert zili("train", recipe_file).code == 0
    before, kept = listing(), (tmp_path / "run" / "recipe.toml").read_text()
    one_error(zili("train", recipe_file, "--set", override), 5, "step-00000006", part, "folder")
    assert listing() == before and (tmp_path / "run" / "recipe.toml").read_text() == kept


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on(zili, recipe_file: Path, tmp_path: Path) -> None:
    assert zili("train", recipe_file).code == 0
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    (newest / "run.json").write_text("{")
    outcome = zili("train", recipe_file)
    assert outcome.code == 0
    told = " ".join(outcome.out.split())
    assert f"passing over a damaged checkpoint: {newest}/run.json" in told and "at step 4" in told
    assert "Done: 6 steps" in told


def test_all_checkpoints_damaged(zili, recipe_file: Path, tmp_path: Path) -> None:
    assert zili("train", recipe_file).code == 0
    for path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        (path / "SHA256SUMS").unlink()
    one_error(zili("train", recipe_file), 5, "all 2 checkpoints", str(tmp_path / "run"), "new folder")


def test_a_defect_of_ours_exits_with_one_and_a_traceback(recipe_file: Path) -> None:
    script = "import zili.api as l, sys\nl.open_run = lambda r: 1 / 0\n"
    script += f"sys.argv = ['zili', 'train', {str(recipe_file)!r}]\nimport zili.__main__"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "ZeroDivisionError" in result.stderr


def test_a_store_whose_content_changed_is_refused(zili, recipe_file: Path, tiny_data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for file in tiny_data.glob("train.*"):
        copy.with_suffix(file.suffix).write_bytes(file.read_bytes())
    content = copy.with_suffix(".bin").read_bytes()
    copy.with_suffix(".bin").write_bytes(content[1000:] + content[:1000])
    outcome = zili("train", recipe_file, "--set", f'data.sources=[{{store="{copy}"}}]')
    assert outcome.code == 4 and "copy.bin: content changed" in outcome.err


def test_a_disk_that_is_full_from_the_start(zili, recipe_file: Path, tmp_path: Path, monkeypatch) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("zili.durable.sync", full)
    one_error(zili("train", recipe_file), 3, f"No space left on device: '{tmp_path / 'run' / 'recipe.toml'}'")


def test_a_run_folder_has_one_trainer(zili, recipe_file: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        outcome = zili("train", recipe_file)
    assert outcome.code == 3 and "another process trains in" in outcome.err
    assert zili("train", recipe_file).code == 0
